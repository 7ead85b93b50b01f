"""Seeds of random draws."""

from __future__ import annotations

import random
import threading

from .._lib import structs
from . import checks


class Seeds:
    """A row of seeds: each derives from the one before."""

    def __init__(self, seed: int) -> None:
        self._lock = threading.Lock()
        self.set(seed)

    def set(self, seed: int) -> None:
        """Set the next seed; -1 or llama.cpp's default for a random one."""
        seed = checks.integer("seed", seed) & 0xFFFFFFFF
        self.following = random.getrandbits(32) if seed == structs.LLAMA_DEFAULT_SEED else seed

    def next(self, seed: int | None = None) -> int:
        """The next seed; `seed` sets it first."""
        with self._lock:
            if seed is not None:
                self.set(seed)
            seed = self.following
            self.following = random.Random(seed).getrandbits(32)
            return seed
