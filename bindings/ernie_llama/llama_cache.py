"""Caches of evaluated prompts for `Llama.set_cache`, as in llama-cpp-python."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from typing import NoReturn

from ._engine.sequence import longest_token_prefix
from ._engine.state import LlamaState

DEFAULT_CAPACITY = 2 << 30


class BaseLlamaCache(ABC):
    """Maps evaluated tokens to the state after them.

    Looking up a prompt finds the state that shares the longest prefix with it. KeyError if none shares any.
    """

    def __init__(self, capacity_bytes: int = DEFAULT_CAPACITY) -> None:
        self.capacity_bytes = capacity_bytes

    @property
    @abstractmethod
    def cache_size(self) -> int:
        """Size of all states in bytes."""

    @abstractmethod
    def __getitem__(self, key: Sequence[int]) -> LlamaState: ...

    @abstractmethod
    def __contains__(self, key: Sequence[int]) -> bool: ...

    @abstractmethod
    def __setitem__(self, key: Sequence[int], value: LlamaState) -> None: ...


class LlamaRAMCache(BaseLlamaCache):
    """Keeps states in memory; the least recently used ones go first when they exceed `capacity_bytes`."""

    def __init__(self, capacity_bytes: int = DEFAULT_CAPACITY) -> None:
        super().__init__(capacity_bytes)
        self.cache_state: OrderedDict[tuple[int, ...], LlamaState] = OrderedDict()

    @property
    def cache_size(self) -> int:
        """Size of all states in bytes."""
        return sum(state.llama_state_size for state in self.cache_state.values())

    def _longest_prefix_key(self, tokens: Sequence[int]) -> tuple[int, ...] | None:
        best = max(self.cache_state, key=lambda key: longest_token_prefix(key, tokens), default=None)
        return best if best is not None and longest_token_prefix(best, tokens) else None

    def __getitem__(self, key: Sequence[int]) -> LlamaState:
        found = self._longest_prefix_key(key)
        if found is None:
            raise KeyError("no cached state shares a prefix with these tokens")
        self.cache_state.move_to_end(found)
        return self.cache_state[found]

    def __contains__(self, key: Sequence[int]) -> bool:
        return self._longest_prefix_key(key) is not None

    def __setitem__(self, key: Sequence[int], value: LlamaState) -> None:
        self.cache_state.pop(tuple(key), None)
        self.cache_state[tuple(key)] = value
        while self.cache_state and self.cache_size > self.capacity_bytes:
            self.cache_state.popitem(last=False)


LlamaCache = LlamaRAMCache


class LlamaDiskCache:
    """Not available: states on disk would be read and written for every call."""

    def __init__(self, cache_dir: str = "", capacity_bytes: int = DEFAULT_CAPACITY) -> NoReturn:
        raise NotImplementedError(
            "LlamaDiskCache is not available: use LlamaRAMCache, or pickle what Llama.save_state() returns"
        )
