"""What decides the output of a run besides checkpoint and text."""

from dataclasses import dataclass

from ..ccq2.code_maps import CODE_MAPS
from .encoder import PASSES
from .kernels import CompiledKernels
from .metric import DAMPING


@dataclass(frozen=True)
class Settings:
    """`device` is a torch device, cpu or cuda; `maps` is how many code maps of the pool are tried on every row."""

    device: str
    threads: int
    maps: int = len(CODE_MAPS)
    passes: int = PASSES
    damping: float = DAMPING

    @property
    def compiled(self) -> bool:
        """Whether the compiled kernels are used: on a CPU, if they have been built."""
        return self.device == "cpu" and CompiledKernels.available()
