"""What a context held, to return to."""

from __future__ import annotations

from dataclasses import dataclass

from ._pictures import PictureSize


@dataclass(frozen=True)
class LlamaState:
    """What `Llama.save_state` returns: the KV cache, and what is needed to continue from it.

    Attributes:
        input_ids: the evaluated tokens.
        llama_state: the cache, as llama.cpp writes it.
        seed: seed of the next draw.
        pictures: what the negative ids among `input_ids` stand for.
        model: tells files apart, see `Model.fingerprint`; empty in states of older versions.
    """

    input_ids: tuple[int, ...]
    llama_state: bytes
    seed: int
    pictures: tuple[PictureSize, ...] = ()
    model: str = ""

    @property
    def n_tokens(self) -> int:
        """Number of evaluated tokens."""
        return len(self.input_ids)

    @property
    def llama_state_size(self) -> int:
        """Size of the cache in bytes."""
        return len(self.llama_state)
