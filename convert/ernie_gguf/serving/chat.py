"""The command `chat`: a small chat in the terminal."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ErnieGgufError, one_line
from ..options import CpuThreads, Seed, System, Temp

if TYPE_CHECKING:
    from ernie_llama import Llama
    from ernie_llama.llama_types import ChatCompletionRequestMessage

HELP = "/reset forgets the conversation, /exit or Ctrl-D ends, Ctrl-C stops an answer"
DIM, PLAIN = "\x1b[2m", "\x1b[0m"


class ChatError(ErnieGgufError):
    """The file does not load, or does not fit a chat."""


def chat(  # noqa: PLR0917 - typer makes options of the parameters
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A GGUF file; of a split one the first part.")],
    system: System = "",
    ctx_size: Annotated[
        int, typer.Option("--ctx-size", "-c", metavar="N", min=0, help="Context size in tokens; 0 for the model's.")
    ] = 8192,
    temp: Temp = 0.8,
    seed: Seed = -1,
    threads: CpuThreads = 0,
    n_gpu_layers: Annotated[
        int, typer.Option("--gpu-layers", "-ngl", metavar="N", help="Layers on the GPU; -1 for all.")
    ] = -1,
    n_cpu_moe: Annotated[
        int, typer.Option("--n-cpu-moe", "-ncmoe", min=0, help="Layers whose experts stay in the CPU's memory.")
    ] = 0,
) -> None:
    """Chat with FILE in the terminal."""
    talk(
        file,
        system=system,
        temp=temp,
        n_ctx=ctx_size,
        n_threads=threads or None,
        n_gpu_layers=n_gpu_layers,
        n_cpu_moe=n_cpu_moe,
        seed=seed,
    )


def talk(
    file: Path,
    *,
    system: str,
    temp: float,
    prompt: str | None = None,
    n_ctx: int,
    n_threads: int | None,
    n_gpu_layers: int = -1,
    n_cpu_moe: int,
    seed: int,
) -> None:
    """Answer `prompt`, or what is typed until it ends.

    Raises:
        ChatError: the file cannot be loaded.
    """
    from ernie_llama import Llama

    from .model_file import check_model

    metadata = check_model(file, ChatError)
    try:
        llm = Llama(
            file,
            n_ctx=context(metadata, n_ctx),
            n_threads=n_threads,
            n_gpu_layers=n_gpu_layers,
            n_cpu_moe=n_cpu_moe,
            seed=seed,
            type_k="q8_0",
            type_v="q8_0",
        )
    except (ValueError, OSError) as error:
        raise ChatError(one_line(error)) from error
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C stops an answer, not the program
    colours = sys.stdout.isatty()
    with llm:
        if prompt is None:
            typer.echo(HELP, err=True)
        lines = _lines() if prompt is None else iter([prompt])
        converse(llm, lines, _write, system=system, temperature=temp, dim=(DIM, PLAIN) if colours else ("", ""))


def context(metadata: Mapping[str, Any], wanted: int) -> int:
    """The tokens to make room for: as many as are wanted, but no more than the model was trained with."""
    trained = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    if not isinstance(trained, int) or not 0 < trained < wanted:
        return wanted
    typer.echo(f"note: room for {trained} tokens, with which the model was trained, instead of {wanted}", err=True)
    return trained


def converse(
    llm: Llama,
    lines: Iterator[str],
    write: Callable[[str], None],
    *,
    system: str,
    temperature: float,
    dim: tuple[str, str] = ("", ""),
) -> None:
    """Answer `lines` until they end or one says /exit. An answer that Ctrl-C stops stays in the conversation."""
    first: list[ChatCompletionRequestMessage] = [{"role": "system", "content": system}] if system else []
    messages = list(first)
    for line in lines:
        if line in {"/exit", "/quit"}:
            return
        if line == "/reset":
            messages = list(first)
            continue
        if not line.strip():
            continue
        if line.startswith("/"):
            typer.echo(HELP, err=True)
            continue
        question: ChatCompletionRequestMessage = {"role": "user", "content": line}
        try:
            answer = _answer(llm, [*messages, question], write, temperature, dim)
        except ValueError as error:  # the template refuses, or the conversation is too long
            write(f"{error}; {HELP}\n")
            continue
        messages += [question, {"role": "assistant", "content": answer}]


def _answer(
    llm: Llama,
    messages: list[ChatCompletionRequestMessage],
    write: Callable[[str], None],
    temperature: float,
    dim: tuple[str, str],
) -> str:
    answer, cut = "", False
    thinking = False
    chunks = llm.create_chat_completion(messages, temperature=temperature, stream=True)
    with contextlib.suppress(KeyboardInterrupt):
        for chunk in chunks:
            delta = chunk["choices"][0]["delta"]
            cut = chunk["choices"][0]["finish_reason"] == "length"
            if reasoning := delta.get("reasoning_content"):
                write(f"{dim[0]}{reasoning}{dim[1]}")
                thinking = True
            if content := delta.get("content"):
                write(f"\n\n{content}" if thinking else content)
                thinking = False
                answer += content
    write("\n")
    if cut:
        typer.echo(f"(the answer ends here because it has filled the context of {llm.n_ctx()} tokens)", err=True)
    return answer


def _lines() -> Iterator[str]:
    """Lines from the terminal, with history and editing where Python has them; Ctrl-C throws a line away."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - input() uses it when it is loaded
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            yield input(prompt)
        except EOFError:
            return
        except KeyboardInterrupt:
            _write("\n")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
