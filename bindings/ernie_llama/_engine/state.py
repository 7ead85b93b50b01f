"""What a context held, to return to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from .images import ImageSize


@dataclass(frozen=True)
class LlamaState:
    """What `Llama.save_state` returns: the KV cache, and what is needed to continue from it.

    Attributes:
        input_ids: the evaluated tokens.
        llama_state: the cache, as llama.cpp writes it.
        seed: seed of the next draw.
        pictures: the images that the negative ids among `input_ids` stand for.
        model: tells files apart, see `Model.fingerprint`; empty in states of older versions.
    """

    input_ids: tuple[int, ...]
    llama_state: bytes
    seed: int
    pictures: tuple[ImageSize, ...] = ()
    model: str = ""

    @property
    def n_tokens(self) -> int:
        """Number of evaluated tokens."""
        return len(self.input_ids)

    @property
    def llama_state_size(self) -> int:
        """Size of the cache in bytes."""
        return len(self.llama_state)


class StateCache(Protocol):
    """What an engine asks of a cache of states, see `llama_cache.BaseLlamaCache`."""

    def __contains__(self, key: Sequence[int], /) -> bool: ...

    def __getitem__(self, key: Sequence[int], /) -> LlamaState: ...

    def __setitem__(self, key: Sequence[int], value: LlamaState, /) -> None: ...
