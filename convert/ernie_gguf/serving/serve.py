"""The command `serve`: llama.cpp's own server, found beside the library and started with defaults for ERNIE."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from ..errors import ErnieGgufError, one_line
from ..hub.names import as_name
from .ready import ready

SERVER = "llama-server.exe" if sys.platform == "win32" else "llama-server"

CTX_SIZE = ("-c", "--ctx-size")
PLANNED_CTX = 8192  # tokens, if nobody says how many

# What is added unless the user gives one of the names. Context, layers on the GPU and experts in the CPU's memory are
# left unset: llama.cpp's fitting chooses them so that the model fits into the memory there is.
DEFAULTS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("--cache-type-k", "-ctk"), ("--cache-type-k", "q8_0")),  # half the memory of f16 for the same text
    (("--cache-type-v", "-ctv"), ("--cache-type-v", "q8_0")),
    (("--metrics",), ("--metrics",)),
)


# Waits until the server answers that the model is loaded, as long as the server lives. Arguments: address, process id.
_OPEN = """
import os, sys, time, urllib.request, webbrowser
while True:
    time.sleep(0.5)
    try:
        urllib.request.urlopen(sys.argv[1] + "/health", timeout=5)
        break
    except OSError:
        os.kill(int(sys.argv[2]), 0)
webbrowser.open(sys.argv[1])
"""


class ServeError(ErnieGgufError):
    """The file cannot be served, or llama-server is not there."""


def serve(  # noqa: PLR0917 - typer makes options of the parameters
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A GGUF file, of a split one the first part; or a name on the Hub.")
    ],
    mmproj: Annotated[
        Path | None,
        typer.Option(help="The mmproj of a vision-language model, for requests with images.", show_default=False),
    ] = None,
    args: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ARGS]...",
            help="Options of llama-server: --host, --port, -c (context), -ngl (GPU layers), -np (slots), ...",
            show_default=False,
        ),
    ] = None,
    gpus: Annotated[
        str | None,
        typer.Option(
            help="Memory of each card in GiB: 24,24,24,24. Places the layers as `info` plans, for a context of "
            "-c tokens (8192).",
            show_default=False,
        ),
    ] = None,
    open_page: Annotated[
        bool, typer.Option("--open", help="Open the server's page in a browser once the model is loaded.")
    ] = False,
    # Without -y: of llama-server's own short options the letters are tried one by one.
    yes: Annotated[
        bool, typer.Option("--yes", help="For a name: do not ask before a download of more than 5 GB.")
    ] = False,
) -> None:
    """Serve FILE over HTTP with the OpenAI API and a page for browsers.

    Options of llama-server follow FILE: ernie-gguf serve FILE --port 8081 -c 32768
    """
    if str(file).startswith("-"):
        raise ServeError(f"FILE comes before the options of llama-server: ernie-gguf serve FILE {file} ...")
    args = args or []
    if not file.exists() and as_name(file) is not None:
        file = ready(file, context_of(args), None, yes).file
    if gpus:
        args = [*placement(file, gpus, args), *args]
    command = server_command(file, args, mmproj)
    page = address(args)
    check_port(args)
    typer.echo(f"{shlex.join(command)}\nWhen the model is loaded, the page is at {page}", err=True)
    if open_page:
        # A process of its own: the server takes the place of this one.
        subprocess.Popen([sys.executable, "-c", _OPEN, page, str(os.getpid())], start_new_session=True)
    _execute(command)


def address(args: Sequence[str]) -> str:
    """The address of the server's page, from llama-server's options `--host` and `--port`."""
    host, port = value_of(args, ("--host",), "127.0.0.1"), value_of(args, ("--port",), "8080")
    return f"http://{'127.0.0.1' if host in {'0.0.0.0', '::'} else host}:{port}"


def check_port(args: Sequence[str]) -> None:
    """Raises ServeError if something listens where the server is to, which would say so after loading the model."""
    host, port = value_of(args, ("--host",), "127.0.0.1"), value_of(args, ("--port",), "8080")
    if not port.isdecimal() or not 0 < int(port) < 1 << 16 or host.endswith(".sock"):
        return  # llama-server judges
    try:
        places = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    except OSError:
        return
    family, kind, protocol, _, place = places[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(place)
        except OSError as error:
            raise ServeError(f"{host}:{port}: {error.strerror}; give another --port") from error


def value_of(args: Sequence[str], names: tuple[str, ...], default: str) -> str:
    """What llama-server's options say, the last one given; the default if none is."""
    found = default
    for i, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if name in names:
            found = value if equals else args[i + 1] if i + 1 < len(args) else found
    return found


def context_of(args: Sequence[str]) -> int:
    """The context that llama-server's options ask for, or the one that is planned for without.

    Raises:
        ServeError: it is not a number of tokens.
    """
    asked = value_of(args, CTX_SIZE, str(PLANNED_CTX))
    if not asked.isdecimal() or not int(asked):
        raise ServeError(f"a context of {asked} tokens cannot be planned for: give -c N")
    return int(asked)


def placement(file: Path, gpus: str, args: Sequence[str]) -> list[str]:
    """llama-server's options that place `file` on cards of these sizes in GiB, as `info` plans them.

    Raises:
        ServeError: it does not fit, or the type of KV cache in `args` is not one that is planned for.
        typer.BadParameter: `gpus` are not sizes.
    """
    from ..gguf_file.reader import read_gguf
    from .cards import read_sizes, stand_ins
    from .memory import KV_BLOCKS, Model, Question, fit

    try:
        cards = read_sizes(gpus)
    except ValueError as error:
        raise typer.BadParameter(f"{gpus!r}, expected sizes in GiB such as 24,24", param_hint="--gpus") from error
    ctx, kv = context_of(args), value_of(args, ("--cache-type-k", "-ctk"), "q8_0")
    if kv not in KV_BLOCKS:
        raise ServeError(f"--gpus cannot plan for a KV cache of type {kv}, only for {', '.join(KV_BLOCKS)}")
    with stand_ins(len(cards)) as planned:
        plan = fit(Model(read_gguf(file)), Question(ctx, kv, cards), planned)[-1]
    if not plan.fits:
        raise ServeError(
            f"{file} does not fit on cards of {gpus} GiB with a context of {ctx}: try a smaller -c; "
            f"`ernie-gguf info {file} --gpus {gpus} -c {ctx}` shows what each card would hold"
        )
    return [*plan.options.split(), "-c", str(ctx), "--fit", "off"]


def server_command(file: Path, args: Sequence[str], mmproj: Path | None = None) -> list[str]:
    """The command that serves `file`: the defaults that `args` does not decide, then `args`.

    Raises:
        ServeError: `file` is not a GGUF file, or llama-server is not built.
    """
    from .model_file import check_mmproj, check_model

    check_model(file, ServeError)
    if mmproj is not None:
        check_mmproj(mmproj, ServeError)
    given = {arg.split("=", 1)[0] for arg in args}
    chosen = [part for names, parts in DEFAULTS if not given & set(names) for part in parts]
    alias = [] if given & {"--alias", "-a"} else ["--alias", file.stem]
    vision = [] if mmproj is None else ["--mmproj", str(mmproj)]
    return [str(server_program()), "--model", str(file), *vision, *alias, *chosen, *args]


def server_program() -> Path:
    """The llama-server that was built with the library of the bindings.

    Raises:
        ServeError: there is none; says where it was looked for.
    """
    from ernie_llama import LibraryNotFoundError, library_path

    try:
        library = library_path()
    except LibraryNotFoundError as error:
        raise ServeError(f"{SERVER} is not built; {one_line(error)}") from error
    # Not resolved: where the library is a link into the build, its folder is that of the build already.
    program = library.parent / SERVER
    if not program.is_file():
        raise ServeError(
            f"{program} does not exist (it was looked for beside the library): run `ernie-gguf build`, or set "
            "ERNIE_LLAMA_LIB_PATH to the bin folder of a build that has it"
        )
    return program


def _execute(command: Sequence[str]) -> NoReturn:
    sys.stderr.flush()
    os.execv(command[0], list(command))  # so that signals reach the server itself
