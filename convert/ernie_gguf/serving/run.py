"""The command `run`: from a name to an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..gguf_file.outtype import Outtype


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
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before a download of more than 5 GB.")] = False,
    ctx: Annotated[int, typer.Option(min=1, help="Tokens that the conversation has room for.")] = 8192,
    system: Annotated[str, typer.Option(help="System message, before the conversation.")] = "",
    temp: Annotated[float, typer.Option(help="Temperature; 0 is greedy.")] = 0.8,
    seed: Annotated[int, typer.Option(help="Of the random draws; -1 for another one each time.")] = -1,
    threads: Annotated[int, typer.Option(min=0, help="0 for one per physical core.")] = 0,
) -> None:
    """Download NAME, convert it to a type that fits this machine, and chat with it.

    Nothing of the download is kept; the file lies in the user's cache, and the next call takes it from there.
    """
    from .chat import talk
    from .ready import ready

    found = ready(source, ctx, outtype, yes)
    talk(
        found.file,
        system=system,
        temp=temp,
        prompt=prompt,
        n_ctx=ctx,
        n_threads=threads or None,
        n_cpu_moe=found.n_cpu_moe,
        seed=seed,
    )
