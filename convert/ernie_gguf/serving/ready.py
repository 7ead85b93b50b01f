"""From a name to a file that runs: download, conversion into the user's cache, in the type that fits this machine."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs
import typer

from ..errors import ErnieGgufError

if TYPE_CHECKING:
    from ..convert import Job
    from ..gguf_file.outtype import Outtype
    from ..hub.names import HubName
    from ..hub.source import Place
    from .memory import Question
    from .types import Weighed

ASK_ABOVE = 5_000_000_000  # bytes of a download
# Weights per second and core that become ccq2, on a busy Xeon with AVX-512: only to say whether it is minutes or hours.
CCQ2_SPEED = 0.5e6


class ReadyError(ErnieGgufError):
    """A name cannot be made a running model here; says why and what to do."""


@dataclass(frozen=True)
class Ready:
    """A file, and how many layers keep their experts in the CPU's memory."""

    file: Path
    n_cpu_moe: int


def models_folder(name: HubName) -> Path:
    """Where the files made from a repository lie."""
    cache = platformdirs.user_cache_path("ernie-gguf", appauthor=False)
    return cache / "models" / str(name).replace("/", "--").replace(":", "--")


def made_before(name: HubName, outtype: Outtype | None) -> Path | None:
    """The newest file that an earlier call has made, in this type if one was asked for."""
    ending = f"-{outtype.value.upper()}.gguf" if outtype else ".gguf"
    found = [path for path in models_folder(name).glob("*.gguf") if path.name.endswith(ending)]
    return max(found, key=lambda path: path.stat().st_mtime) if found else None


def ready(source: Path, ctx: int, outtype: Outtype | None, yes: bool) -> Ready:
    """The file for `source`: a GGUF file itself, or one made from a name on the Hub.

    Raises:
        ReadyError: nothing fits, or the user does not want the download.
        HubError: the repository cannot be read.
    """
    from ..hub.names import as_name, suggestion

    if source.is_file():
        return Ready(source, _experts_beside(source, ctx))
    if source.is_dir():
        raise ReadyError(f"{source}: a folder: make a file of it first: ernie-gguf convert {source} --outfile FILE")
    if (name := as_name(source)) is None:
        raise ReadyError(f"{source}: no such file, and not a name on the Hub{suggestion(str(source))}")
    if (file := made_before(name, outtype)) is not None:
        _say(f"{name}: {file} was made before (remove it to make it anew)")
        return Ready(file, _experts_beside(file, ctx))
    return _make(source, name, ctx, outtype, yes)


def _question(ctx: int) -> Question:
    """What to plan for: this machine, with the KV cache that `chat` and `serve` have."""
    from ernie_llama import device_memory

    from .memory import Question

    return Question(ctx, "q8_0", tuple(device.total for device in device_memory() if device.name != "CPU"))


def _experts_beside(file: Path, ctx: int) -> int:
    """Layers whose experts do not fit on the cards."""
    from ..gguf_file.reader import read_gguf
    from .cards import OWN_CARDS, EstimateError
    from .memory import Model, fit

    try:
        return fit(Model(read_gguf(file)), _question(ctx), OWN_CARDS)[-1].n_cpu_moe
    except EstimateError:
        return 0  # another architecture: llama.cpp's own placement


def _make(source: Path, name: HubName, ctx: int, outtype: Outtype | None, yes: bool) -> Ready:
    from ..hub.source import opened
    from ..units import human

    question = _question(ctx)
    _say(f"1. {name}: reading headers, to choose a type")
    with opened(source) as place:
        chosen = _choose(place, question, outtype)
        beside = f" with experts of {chosen.plan.n_cpu_moe} layers in memory" if chosen.plan.n_cpu_moe else ""
        cards = ", ".join(human(card) for card in question.cards) or "no card"
        _say(f"   {chosen.outtype.value}, {human(chosen.nbytes)}: {chosen.verdict} ({cards}{beside})")
        file = _convert(place, name, chosen, yes)
    _say(f"3. starting {file}")
    return Ready(file, chosen.plan.n_cpu_moe)


def _choose(place: Place, question: Question, outtype: Outtype | None) -> Weighed:
    """The type asked for, else the most exact one that fits."""
    from .cards import OWN_CARDS
    from .types import best, weigh

    found = weigh(place.folder, question, OWN_CARDS, [outtype] if outtype else None, text_only=True)
    if outtype is not None and found:
        return found[0]
    if (chosen := best(found)) is None:
        smallest = f"; the smallest, {found[-1].outtype.value}, {found[-1].verdict}" if found else ""
        raise ReadyError(f"{place.name}: no type of it fits this machine with a context of {question.n_ctx}{smallest}")
    return chosen


def _convert(place: Place, name: HubName, chosen: Weighed, yes: bool) -> Path:
    """Say what it takes, ask, and write the file."""
    from ..convert import output_path, prepare, write_gguf
    from ..hub.k_order import fetch_for_k_order
    from ..hub.source import duration
    from ..hub.stream import check_disk, convert_stream, plan_stream
    from ..progress import progress_bar
    from ..units import human

    folder, threads = models_folder(name), min(4, os.cpu_count() or 1)
    folder.mkdir(parents=True, exist_ok=True)
    fetch_for_k_order(place, text_only=True)
    job = prepare(place.folder, chosen.outtype, text_only=True)
    path = output_path(job, folder)
    if place.repository is None:  # offline, and all of it is in the cache
        _say(f"2. converting {human(place.shard_bytes)} to {path}{_encoding(job)}")
        with progress_bar(job.nbytes) as progress:
            write_gguf(job, path, threads, False, progress)
        return path
    stream = plan_stream(job, place.repository, path, None, None)
    check_disk(stream)
    nbytes = place.shard_bytes
    _say(
        f"2. downloading {human(nbytes)} ({duration(nbytes)}) and converting it on the way{_encoding(job)}; "
        f"{human(chosen.nbytes)} stay in {folder}"
    )
    _ask(nbytes, yes)
    convert_stream(stream, threads, overwrite=False, restart=False, progress=progress_bar)
    return path


def _encoding(job: Job) -> str:
    """How long two-bit experts take to encode, if that is more than a minute."""
    weights = sum(
        tensor.elements
        for tensor in job.plan.tensors
        if tensor.ggml_type.name == "CCQ2" and not tensor.parts[0].source.storage.quantized
    )
    minutes = weights / CCQ2_SPEED / min(4, os.cpu_count() or 1) / 60
    return f" (to encode it: about {minutes:.0f} min)" if minutes > 1 else ""


def _ask(nbytes: int, yes: bool) -> None:
    if nbytes <= ASK_ABOVE or yes:
        return
    if not sys.stdin.isatty():
        raise ReadyError("that is more than 5 GB, and there is nobody to ask: give --yes")
    if not typer.confirm("   Go on?", err=True):
        raise ReadyError("nothing was downloaded")


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
