"""What tests do with models: convert a checkpoint, compare files, take logits and text from llama.cpp."""

import subprocess
from pathlib import Path

from ernie_gguf.checkpoint.k_order import KOrder
from ernie_gguf.convert import ConvertResult, prepare, write_gguf
from ernie_gguf.gguf_file.outtype import Outtype
from ernie_gguf.gguf_file.reader import GgufFile, read_gguf
from ernie_llama import Llama

from support.checkpoints import F32


def convert_with_result(
    source: Path,
    outfile: Path,
    outtype: str = "auto",
    *,
    text_only: bool = False,
    threads: int = 2,
    split_max_bytes: int | None = None,
    k_order: str = "natural",
) -> tuple[GgufFile, ConvertResult]:
    """Convert a checkpoint; returns what is in the new file, and what `write_gguf` says of it.

    Random weights do not tell an order of K, so it is natural unless a test says otherwise.
    """
    job = prepare(source, Outtype(outtype), text_only, k_order=KOrder(k_order))
    result = write_gguf(job, outfile, threads, False, lambda _: None, split_max_bytes=split_max_bytes)
    assert result.nbytes == sum(path.stat().st_size for path in result.paths)
    return read_gguf(result.paths[0]), result


def convert(
    source: Path,
    outfile: Path,
    outtype: str = "auto",
    *,
    text_only: bool = False,
    threads: int = 2,
    split_max_bytes: int | None = None,
    k_order: str = "natural",
) -> GgufFile:
    """Convert a checkpoint; returns what is in the new file, or in all of them."""
    file, _ = convert_with_result(
        source, outfile, outtype, text_only=text_only, threads=threads, split_max_bytes=split_max_bytes, k_order=k_order
    )
    return file


def data(file: GgufFile) -> dict[str, tuple[str, bytes]]:
    """Type and bytes of every tensor."""
    return {tensor.name: (tensor.type_name, file.rows(tensor).tobytes()) for tensor in file.tensors}


def logits_of(model: Path, prompts: list[list[int]], *, exact: bool = False) -> list[F32]:
    """Logits [n, V] at every position of each prompt of n tokens; `exact` keeps keys and values in float32.

    Flash attention, which would round them to float16, is off then.
    """
    found = []
    kv, flash = ("f32", False) if exact else (None, None)
    with Llama(model, n_ctx=256, n_threads=1, logits_all=True, type_k=kv, type_v=kv, flash_attn=flash) as llm:
        for tokens in prompts:
            llm.reset()
            llm.eval(tokens)
            found.append(llm.scores.copy())
    return found


def llama_completion(
    llama_bin: Path, model: Path, prompt: str, max_tokens: int, *options: str | Path
) -> subprocess.CompletedProcess[str]:
    """Run llama.cpp's llama-completion on a prompt; it writes its own two line feeds after the text."""
    fixed = ["-n", str(max_tokens), "-c", "512", "-t", "1", "-no-cnv", "--no-display-prompt"]
    command = [str(llama_bin / "llama-completion"), "-m", str(model), "-p", prompt, *fixed, *map(str, options)]
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", check=True, stdin=subprocess.DEVNULL, timeout=120
    )
    assert done.stdout.endswith("\n\n"), done.stdout
    return done
