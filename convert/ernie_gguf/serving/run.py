"""The command `run`: from a name to an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..gguf_file.outtype import Outtype
from ..options import CpuThreads, CtxSize, Seed, System, Temp, Yes


def run(  # noqa: PLR0917 - typer makes options of the parameters
    source: Annotated[Path, typer.Argument(metavar="NAME", help="A name on the Hub, or a GGUF file.")],
    prompt: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="Answer this and end.", show_default=False)
    ] = None,
    outtype: Annotated[
        Outtype | None,
        typer.Option(
            help="Type to convert to (default: the most exact one that fits this machine).", show_default=False
        ),
    ] = None,
    yes: Yes = False,
    ctx_size: CtxSize = 8192,
    system: System = "",
    temp: Temp = 0.8,
    seed: Seed = -1,
    threads: CpuThreads = 0,
) -> None:
    """Download NAME, convert it to a type that fits this machine, and chat with it.

    Nothing of the download is kept; the file lies in the user's cache, and the next call takes it from there.
    """
    from .chat import talk
    from .ready import ready

    found = ready(source, ctx_size, outtype, yes)
    talk(
        found.file,
        system=system,
        temp=temp,
        prompt=prompt,
        n_ctx=ctx_size,
        n_threads=threads or None,
        n_cpu_moe=found.n_cpu_moe,
        seed=seed,
    )
