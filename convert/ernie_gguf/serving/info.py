"""The command `info`: the library in use, and what memory a file needs on it or on given cards."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..options import AsJson, CtxSize, Gpus

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from .memory import Model, Plan, Question


def info(
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="[FILE]",
            help="A GGUF file, of a split one the first; or a checkpoint, a folder or a name: which type of it fits.",
        ),
    ] = None,
    gpus: Gpus = None,
    ctx_size: CtxSize = 8192,
    cache_type: Annotated[
        str,
        typer.Option(
            "--cache-type-k", "-ctk", metavar="TYPE", help="Type of the KV cache, for K and V: f16, q8_0 or q4_0."
        ),
    ] = "q8_0",
    as_json: AsJson = False,
) -> None:
    """Show the llama.cpp in use; for FILE, what it needs and whether it fits; for a checkpoint, which type does."""
    from ..gguf_file.reader import read_gguf
    from ..hub.names import is_checkpoint
    from ..hub.source import opened
    from ..tables import show
    from .cards import OWN_CARDS, read_sizes, stand_ins
    from .memory import KV_BLOCKS, Model, Question, fit
    from .types import types_json, types_text, weigh

    if file is None:
        show(_library() if as_json else _library_text(_library()))
        return
    try:
        cards = read_sizes(gpus) if gpus else ()
    except ValueError as error:
        raise typer.BadParameter(f"{gpus!r}, expected sizes in GiB such as 24,24", param_hint="--gpus") from error
    if cache_type not in KV_BLOCKS:
        expected = f"expected one of {', '.join(KV_BLOCKS)}"
        raise typer.BadParameter(f"{cache_type!r}, {expected}", param_hint="--cache-type-k")
    question = Question(ctx_size, cache_type, cards or _own_cards())
    planning = stand_ins(len(cards)) if cards else nullcontext(OWN_CARDS)
    if is_checkpoint(file):
        with opened(file) as place, planning as planned:
            found = weigh(place.folder, question, planned)
        label = str(place.name or place.folder)
        show(types_json(label, question, found) if as_json else types_text(label, question, found))
        return
    model = Model(read_gguf(file))
    with planning as planned:
        plans = fit(model, question, planned)
    show(_plans_json(model, question, plans) if as_json else _plans_text(model, question, plans))


def _own_cards() -> tuple[int, ...]:
    """Memory of the GPUs of this machine."""
    from ernie_llama import device_memory

    return tuple(device.total for device in device_memory() if device.name != "CPU")


def _library() -> dict[str, Any]:
    """What is known of the library."""
    import ernie_llama

    from ..llama_build.install import read_manifest
    from ..llama_build.recipe import digest, patch_dir
    from ..llama_build.tools import driver_version

    found = ernie_llama.info()
    built = read_manifest(found.path)
    notes = []
    if built and built.get("patches") != digest(patch_dir()):
        notes.append("it was built from other patches than this package has: run `ernie-gguf build`")
    if not found.ccq2:
        notes.append("it does not read ccq2: it is not the patched llama.cpp; run `ernie-gguf build`")
    if not found.cuda and not found.vulkan and (driver := driver_version()):
        notes.append(
            f"there is an NVIDIA GPU (its driver supports CUDA {driver[0]}.{driver[1]}), but this library is built "
            "without CUDA: run `ernie-gguf build --cuda`"
        )
    elif found.cuda and not ernie_llama.has_nvidia_device():
        notes.append("it is built with CUDA, but the NVIDIA driver is missing or sees no GPU")
    if found.vulkan and not any(device.name.startswith("Vulkan") for device in found.devices):
        notes.append("it is built with Vulkan, but no driver offers a GPU: install one, such as mesa-vulkan-drivers")
    notes += [
        f"{device.name} does not compute ccq2: the CPU would do that"
        for device in found.devices
        if found.ccq2 and not device.ccq2
    ]
    memory = {each.name: each for each in ernie_llama.device_memory()}
    devices = [
        {**asdict(device), "free": memory[device.name].free, "total": memory[device.name].total}
        for device in found.devices
    ]
    return {**asdict(found), "path": str(found.path), "devices": devices, "built": built, "notes": notes}


def _library_text(found: dict[str, Any]) -> list[RenderableType]:
    from ..tables import right, table

    has = {True: "yes", False: "no"}
    devices = table("device", "description", right("memory"), right("free"), "ccq2")
    for device in found["devices"]:
        sizes = [_gib(device[key]) for key in ("total", "free")]
        devices.add_row(device["name"], device["description"], *sizes, has[device["ccq2"]])
    built = found["built"]
    return [
        f"{found['path']} ({found['origin']})",
        f"llama.cpp {found['version']} (build {found['build_number']}), ggml {found['ggml_version']}",
        *([f"built from {built['llama_cpp']} with {built['compiler']}", built["options"]] if built else []),
        f"ccq2: {has[found['ccq2']]}, CUDA: {has[found['cuda']]}, Vulkan: {has[found['vulkan']]}, "
        f"RPC: {has[found['rpc']]}",
        found["system_info"],
        "",
        devices,
        *(f"note: {note}" for note in found["notes"]),
    ]


def _gib(nbytes: float) -> str:
    return f"{nbytes / 2**30:.2f} GiB"


def _plans_json(model: Model, question: Question, plans: list[Plan]) -> dict[str, Any]:
    return {
        "file": str(model.path),
        "ctx": question.n_ctx,
        "kv": question.kv,
        "kv_bytes_per_1k_tokens": _kv_per_1k(model),
        "fits": plans[-1].fits,
        "plans": [
            {"options": plan.options, "fits": plan.fits, "needs": [{**asdict(n), "fits": n.fits} for n in plan.needs]}
            for plan in plans
        ],
    }


def _kv_per_1k(model: Model) -> dict[str, int]:
    return {kv: model.n_layers * model.kv_bytes(1024, kv) for kv in ("f16", "q8_0")}


def _plans_text(model: Model, question: Question, plans: list[Plan]) -> list[RenderableType]:
    weights = model.input + sum(model.experts) + sum(model.rest) - (model.input if model.tied else 0)
    kv = ", ".join(f"{size / 2**20:.1f} MiB as {name}" for name, size in _kv_per_1k(model).items())
    lines: list[RenderableType] = [
        f"{model.path}: weights {_gib(weights)}; KV cache per 1K tokens {kv}",
        f"context of {question.n_ctx} tokens, KV cache {question.kv}; sizes in GiB",
    ]
    for plan in plans:
        lines += ["", f"llama-server {plan.options}" if question.cards else "on the CPU", _table(plan), _verdict(plan)]
    if not plans[-1].fits:
        lines.append("No --n-cpu-moe makes it fit: try a smaller --ctx-size.")
    return lines


def _table(plan: Plan) -> Table:
    from ..tables import right, table

    names = ("weights", "KV cache", "compute", "sum", "has", "left")
    needs = table("device", "layers", *(right(name) for name in names))
    for need in plan.needs:
        layers = f"{need.layers[0]}-{need.layers[-1]}" if need.layers else ""
        sizes = [f"{size / 2**30:.2f}" for size in (need.weights, need.kv, need.compute, need.bytes)]
        has = ["", ""] if need.total is None else [f"{x / 2**30:.2f}" for x in (need.total, need.total - need.bytes)]
        needs.add_row(need.device, layers, *sizes, *has)
    return needs


def _verdict(plan: Plan) -> str:
    from .memory import MARGIN, main_memory

    cpu, free = plan.needs[-1].bytes, main_memory()
    short = [need.device for need in plan.needs if not need.fits]
    if short:
        return f"Does not fit: {', '.join(short)} would have less than {_gib(MARGIN)} left for the driver and kernels."
    if cpu > free:
        return f"This machine has {_gib(free)} of main memory available, and the CPU's part takes {_gib(cpu)}."
    return "Fits."
