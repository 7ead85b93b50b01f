"""What is allocated is freed, whatever becomes of a request: counted in C's functions and the process's size."""

from __future__ import annotations

import base64
import collections
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ernie_gguf.convert import prepare, write_gguf
from ernie_gguf.gguf_file.outtype import FloatType, Outtype
from ernie_gguf.plan import choose
from ernie_llama import Llama, LlamaRAMCache
from ernie_llama._lib import library, mtmd
from reference import vl_golden
from support import png

pytestmark = pytest.mark.build

# Functions that allocate, and which frees what they return.
PAIRS = {
    "llama": {
        "llama_model_load_from_file": "llama_model_free",
        "llama_init_from_model": "llama_free",
        "llama_sampler_chain_init": "llama_sampler_free",
        "llama_sampler_init_grammar": "llama_sampler_free",
    },
    "mtmd": {
        "mtmd_init_from_file": "mtmd_free",
        "mtmd_bitmap_init": "mtmd_bitmap_free",
        "mtmd_input_chunks_init": "mtmd_input_chunks_free",
        "mtmd_input_chunk_copy": "mtmd_input_chunk_free",
    },
}


class Counter(collections.Counter[str]):
    """How many objects of each kind live."""

    def alive(self) -> dict[str, int]:
        gc.collect()
        return {name: n for name, n in self.items() if n}


@pytest.fixture
def counter(llama_bin: Path, monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Counts what the bindings allocate and free from now on."""
    monkeypatch.setenv("ERNIE_LLAMA_LIB_PATH", str(llama_bin))
    count = Counter()
    for name, pairs in PAIRS.items():
        loaded = library.load() if name == "llama" else mtmd.load()
        for make, free in pairs.items():
            monkeypatch.setattr(loaded, make, _counted(getattr(loaded, make), count, free, 1))
        for free in set(pairs.values()):
            monkeypatch.setattr(loaded, free, _counted(getattr(loaded, free), count, free, -1))
    return count


def _counted(function: Callable[..., Any], count: Counter, name: str, step: int) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:  # noqa: ANN401 - as the function's
        result = function(*arguments)
        if step < 0 or result:
            count[name] += step
        return result

    return call


@pytest.fixture(scope="module")
def vl(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model and its mmproj."""
    folder = tmp_path_factory.mktemp("vl")
    job = prepare(vl_golden.checkpoint(folder / "checkpoint"), Outtype.BF16, choices=choose(projector=FloatType.BF16))
    write_gguf(job, folder / "model.gguf", 1, False, lambda _: None, mmproj=folder / "mmproj.gguf")
    return folder / "model.gguf", folder / "mmproj.gguf"


TEMPLATE = "{% for m in messages %}{{ m.content }}\n{% endfor %}"


@pytest.fixture
def llm(counter: Counter, vl: tuple[Path, Path]) -> Iterator[Llama]:
    with Llama(vl[0], mmproj_path=vl[1], n_ctx=512, n_threads=1, chat_template=TEMPLATE) as llm:
        yield llm


def chat(*texts: str | bytes) -> list[Any]:
    """A message of texts and pictures."""
    parts: list[dict[str, Any]] = [
        {"type": "text", "text": each}
        if isinstance(each, str)
        else {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(each).decode()}}
        for each in texts
    ]
    return [{"role": "user", "content": parts}]


ONE, TWO = png.noise(56, 84, 1), png.noise(84, 56, 2)


def failing(_ids: Any, _logits: Any) -> Any:  # noqa: ANN401
    raise ZeroDivisionError("division by zero")


def two_turns(llm: Llama) -> None:
    first = chat("What is this?", ONE)
    llm.create_chat_completion(first, max_tokens=2)
    again = [*first, {"role": "assistant", "content": "A picture."}, {"role": "user", "content": "Sure?"}]
    llm.create_chat_completion(again, max_tokens=2)
    llm.create_chat_completion([*again, *chat(ONE, TWO)], max_tokens=2)


def unread(llm: Llama) -> None:
    llm.create_chat_completion(chat(ONE), max_tokens=2, stream=True)


def abandoned(llm: Llama) -> None:
    for _ in llm.create_chat_completion(chat(ONE), max_tokens=5, stream=True, grammar='root ::= "a"*'):
        break


def interrupted(llm: Llama) -> None:
    chunks = llm.create_chat_completion(chat(ONE), max_tokens=5, stream=True)
    next(chunks), next(chunks)
    llm.create_chat_completion(chat(TWO), max_tokens=2)
    list(chunks)


def late(llm: Llama) -> None:
    """A stream that is read after another request with the same picture has ended."""
    chunks = llm.create_chat_completion(chat(ONE, "x"), max_tokens=2, stream=True)
    llm.create_chat_completion(chat(ONE), max_tokens=2)
    llm.reset()
    assert len(list(chunks)) > 1


def refused(llm: Llama, match: str, *texts: str | bytes, **options: Any) -> None:  # noqa: ANN401
    with pytest.raises((ValueError, ZeroDivisionError), match=match):
        llm.create_chat_completion(chat(*texts), max_tokens=4, **options)


def cached(llm: Llama) -> None:
    llm.set_cache(LlamaRAMCache())
    llm.create_chat_completion(chat(ONE, "a"), max_tokens=2)
    llm.create_chat_completion(chat(TWO, "b"), max_tokens=2)
    llm.create_chat_completion(chat(ONE, "a"), max_tokens=2)
    llm.set_cache(None)


def sample(llm: Llama) -> None:
    llm.reset()
    llm.eval([5])
    llm.sample(grammar='root ::= "a"')


REQUESTS: dict[str, Callable[[Llama], object]] = {
    "two turns": two_turns,
    "the same picture twice": lambda llm: llm.create_chat_completion(chat(ONE, TWO, ONE), max_tokens=2),
    "an unread stream": unread,
    "an abandoned stream": abandoned,
    "an interrupted stream": interrupted,
    "a late stream": late,
    "too long": lambda llm: refused(llm, "exceed context window", ONE, "x " * 1000),
    "the second picture is damaged": lambda llm: refused(llm, "is damaged", ONE, TWO[:200]),
    "the second picture is none": lambda llm: refused(llm, "is not a", ONE, b"GIF, no"),
    "a bad option": lambda llm: refused(llm, "top_p is nan", ONE, top_p=float("nan")),
    "a bad grammar": lambda llm: refused(llm, "cannot read the grammar", ONE, grammar="root ::= root"),
    "a failing callback": lambda llm: refused(llm, "division", ONE, logits_processor=failing),
    "a cache": cached,
    "a sample": sample,
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_frees_what_it_allocates(llm: Llama, counter: Counter, name: str) -> None:
    before = counter.alive()
    assert before == {"llama_model_free": 1, "llama_free": 1, "mtmd_free": 1}
    for _ in range(2):
        REQUESTS[name](llm)
        assert counter.alive() == before


def test_a_llama_frees_everything(counter: Counter, vl: tuple[Path, Path]) -> None:
    Llama(vl[0], mmproj_path=vl[1], n_threads=1).close()
    with pytest.raises(ValueError, match="no context"):
        Llama(vl[0], n_threads=1, n_seq_max=500)
    with pytest.raises(ValueError, match="expected 'clip'"):
        Llama(vl[0], mmproj_path=vl[0], n_threads=1)
    with pytest.raises(ValueError, match="adapter"):
        Llama(vl[0], lora_path=vl[0], n_threads=1)
    assert counter.alive() == {}


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_the_process_does_not_grow(llm: Llama) -> None:
    """Each request preprocesses a picture of 3.8 MB."""
    large = [png.noise(560, 560, seed) for seed in range(2)]

    def requests() -> None:
        for data in large:
            refused(llm, "exceed context window", data, "x " * 1000)
            llm.create_chat_completion(chat(data), max_tokens=2, stream=True)

    requests()
    before = resident()
    for _ in range(5):
        requests()
    assert resident() - before < 30_000_000  # 20 pictures are 75 MB
