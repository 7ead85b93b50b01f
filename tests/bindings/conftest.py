"""Models that are loaded once for all tests that need the built library.

They use one thread: llama.cpp's threads spin while they wait, which is slow on a busy machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from ernie_llama import Llama


@pytest.fixture(scope="session")
def bf16(built_library: None, tiny_bf16_gguf: Path) -> str:
    """Path of the BF16 example model."""
    return str(tiny_bf16_gguf)


@pytest.fixture(scope="session")
def shared_llm(bf16: str) -> Iterator[Llama]:
    with Llama(bf16, n_threads=1, n_ctx=512) as llm:
        yield llm


@pytest.fixture
def llm(shared_llm: Llama) -> Llama:
    """The shared model, with no evaluated tokens."""
    shared_llm.reset()
    return shared_llm
