"""`info FILE`: the sizes it tells are those of the buffers that llama.cpp allocates, within 2 %."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import synthetic
import typer
from ernie_gguf.engine import memory
from ernie_gguf.engine.memory import CPU, GIB, OWN_CARDS, Cards, Model, Plan, Question, fit, place, stand_ins
from ernie_gguf.gguf_file.reader import read_gguf
from ernie_gguf.serving.serve import ServeError, placement
from released import SHAPES
from support.command_line import Command

# Loads a file for real and prints llama.cpp's log. Arguments: file, context, KV type, RPC servers, n_cpu_moe.
# With experts on the CPU not by mmap, whose buffer would count what lies between them in the file.
LOAD = """
import ctypes, os, sys
from ernie_llama._engine.params import KV_TYPES, model_fields
from ernie_llama._engine.rpc import add_rpc_servers
from ernie_llama._lib.library import load
from ernie_llama._lib.log import LOG
path, n_ctx, kv, servers, n_cpu_moe = sys.argv[1:]
library = load()
params = library.llama_model_default_params()
fields = model_fields(library, n_gpu_layers=-1, split_mode="layer", main_gpu=0,
    tensor_split=[1] * len(servers.split(",")) if servers else None, n_cpu_moe=int(n_cpu_moe),
    tensor_buft_overrides={}, kv_overrides=None, use_mmap=n_cpu_moe == "0", use_mlock=False)
if servers:
    add_rpc_servers(library, servers)
for name, value in {**fields, "use_extra_bufts": False}.items():
    setattr(params, name, value)
LOG.verbose = True
model = library.llama_model_load_from_file(os.fsencode(path), params)
context = library.llama_context_default_params()
context.n_ctx, context.n_seq_max, context.n_ubatch = int(n_ctx), 1, 512
context.type_k = context.type_v = KV_TYPES[kv]
assert library.llama_init_from_model(model, context)
"""
BUFFER = re.compile(r"(\S+) +(model|KV|compute) buffer size = +([\d.]+) MiB")


def buffers(path: Path, question: Question, servers: tuple[str, ...], n_cpu_moe: int) -> dict[str, dict[str, float]]:
    """Bytes of llama.cpp's buffers: device -> kind -> bytes."""
    arguments = [str(path), str(question.n_ctx), question.kv, ",".join(servers), str(n_cpu_moe)]
    done = subprocess.run([sys.executable, "-c", LOAD, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, dict[str, float]] = {}
    for name, kind, mib in BUFFER.findall(done.stderr):
        device = next((f"GPU {i}" for i, server in enumerate(servers) if server in name), CPU)
        kinds = found.setdefault(device, {"model": 0.0, "KV": 0.0, "compute": 0.0})
        kinds[kind] += float(mib) * 2**20
    return found


@pytest.fixture(autouse=True)
def _built_library(llama_bin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERNIE_LLAMA_LIB_PATH", str(llama_bin))


@pytest.fixture(scope="session")
def big(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of the large models' shapes, with fewer layers and experts and a smaller vocabulary."""
    folder = tmp_path_factory.mktemp("shapes")
    few = {"21b": {"layers": 3, "experts": 32}, "300b": {"layers": 3, "dense": 1, "experts": 16}}
    return {
        name: synthetic.write_model(
            folder / f"{name}.gguf",
            replace(SHAPES[name], vocab=20000, **changes),  # type: ignore[arg-type]
            synthetic.Mix(synthetic.TYPES["ccq2"]),
            holes=True,
        )
        for name, changes in few.items()
    }


@pytest.fixture
def cards() -> Iterator[Cards]:
    with stand_ins(2) as found:
        yield found


def assert_close(plan: Plan, real: dict[str, dict[str, float]], slack: float) -> None:
    for need in plan.needs:
        told = {"model": need.weights, "KV": need.kv, "compute": need.compute}
        for kind, nbytes in told.items():
            assert nbytes == pytest.approx(real[need.device][kind], rel=0.02, abs=slack), (need.device, kind)


SLACK = 0.01 * 2**20  # the log has two places of MiB


@pytest.mark.parametrize("question", [Question(4096, "f16", ()), Question(1000, "q8_0", ())])
def test_the_example_on_the_cpu(tiny_ccq2_gguf: Path, question: Question) -> None:
    plan = place(Model(read_gguf(tiny_ccq2_gguf)), question, OWN_CARDS, 0, None)
    assert_close(plan, buffers(tiny_ccq2_gguf, question, (), 0), SLACK)


@pytest.mark.parametrize("name", ["21b", "300b"])
def test_large_shapes_on_the_cpu(big: dict[str, Path], name: str) -> None:
    question = Question(8192, "q8_0", ())
    plan = place(Model(read_gguf(big[name])), question, OWN_CARDS, 0, None)
    assert_close(plan, buffers(big[name], question, (), 0), SLACK)


@pytest.mark.parametrize(("name", "n_cpu_moe"), [("21b", 0), ("300b", 0), ("300b", 2)])
def test_large_shapes_on_two_cards(big: dict[str, Path], cards: Cards, name: str, n_cpu_moe: int) -> None:
    question = Question(8192, "f16", (GIB, GIB))
    plan = place(Model(read_gguf(big[name])), question, cards, n_cpu_moe, None)
    assert [need.device for need in plan.needs] == ["GPU 0", "GPU 1", CPU]
    assert_close(plan, buffers(big[name], question, cards.servers, n_cpu_moe), SLACK)


def test_what_does_not_fit_gets_a_plan_that_does(big: dict[str, Path], cards: Cards) -> None:
    model = Model(read_gguf(big["300b"]))
    everything = place(model, Question(8192, "f16", (GIB, GIB)), cards, 0, None)
    largest = max(need.bytes for need in everything.needs[:2])
    tight = Question(8192, "f16", (largest - 100 * 2**20 + memory.MARGIN,) * 2)
    first, best = fit(model, tight, cards)
    assert not first.fits
    assert best.fits
    assert best.tensor_split or best.n_cpu_moe


def test_serve_places_the_layers_as_planned(big: dict[str, Path]) -> None:
    assert placement(big["300b"], "8,8", 4096, []) == ["-ngl", "99", "-c", "4096", "--fit", "off"]
    with stand_ins(2) as cards:
        model = Model(read_gguf(big["300b"]))
        everything = place(model, Question(8192, "f16", (GIB, GIB)), cards, 0, None)
        largest = max(need.bytes for need in everything.needs[:2])
        each = (largest - 100 * 2**20 + memory.MARGIN) / GIB
        best = fit(model, Question(8192, "f16", memory.read_sizes(f"{each},{each}")), cards)[-1]
    options = placement(big["300b"], f"{each},{each}", 8192, ["-ctk", "f16", "-ctv", "f16"])
    assert options == [*best.options.split(), "-c", "8192", "--fit", "off"]
    assert {"-ts", "--n-cpu-moe"} & set(options)


def test_serve_says_what_does_not_fit(big: dict[str, Path]) -> None:
    with pytest.raises(ServeError, match=r"does not fit on cards of 0\.5,0\.5 GiB with a context of 4096"):
        placement(big["300b"], "0.5,0.5", 4096, [])
    with pytest.raises(ServeError, match="KV cache of type q5_1"):
        placement(big["300b"], "24", 4096, ["--cache-type-k=q5_1"])
    with pytest.raises(typer.BadParameter, match="expected sizes"):
        placement(big["300b"], "24,x", 4096, [])


def test_the_command_tells_it_in_both_forms(big: dict[str, Path], ernie_gguf: Command) -> None:
    done = ernie_gguf("info", big["300b"], "--gpus", "8,8", "--ctx", "4096", "--json")
    told = json.loads(done.out)
    assert (done.code, told["fits"], told["ctx"]) == (0, True, 4096)
    assert [need["device"] for need in told["plans"][0]["needs"]] == ["GPU 0", "GPU 1", CPU]
    text = ernie_gguf("info", big["300b"], "--gpus", "8,8").out
    assert "\nFits." in text
    assert "llama-server -ngl 99" in text
    assert "Does not fit: GPU 0" in ernie_gguf("info", big["300b"], "--gpus", "1").out


@pytest.mark.parametrize(("option", "value"), [("--gpus", "24,x"), ("--gpus", "0"), ("--kv", "f11"), ("--ctx", "0")])
def test_wrong_options_are_named(tiny_ccq2_gguf: Path, ernie_gguf: Command, option: str, value: str) -> None:
    done = ernie_gguf("info", tiny_ccq2_gguf, option, value)
    assert done.code == 2
    assert option in done.err


def test_a_file_that_is_not_gguf_is_one_line(tmp_path: Path, ernie_gguf: Command) -> None:
    (tmp_path / "x.gguf").write_bytes(b"nothing")
    done = ernie_gguf("info", tmp_path / "x.gguf")
    assert (done.code, done.out, done.err.count("\n")) == (1, "", 1)


def test_without_a_file_the_library_is_described(llama_bin: Path, ernie_gguf: Command) -> None:
    told = json.loads(ernie_gguf("info", "--json").out)
    assert (told["path"], told["ccq2"]) == (str(llama_bin / "libllama.so"), True)
    assert told["devices"][-1]["total"] > 0
    assert "ccq2: yes" in ernie_gguf("info").out
