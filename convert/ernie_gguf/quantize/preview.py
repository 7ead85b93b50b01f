"""What a run will do and need, and whether it can: known before it begins. Needs no torch."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..convert import Job
from ..errors import OutputError, QuantizeError
from ..expected import Role
from ..files import free_bytes
from ..partial import held_bytes, partial_path
from ..units import human
from .needs import Needs
from .settings import Settings
from .text import Calibration
from .workspace import layers_done

_FEW_TOKENS = 5000  # per expert; above some 20,000, more text gains little


def check_source(job: Job) -> None:
    """Raise QuantizeError unless the checkpoint has experts and stores all weights as floats."""
    if job.config.moe is None:
        raise QuantizeError(
            f"{job.source}: a dense model: ccq2 is for experts, and it has none; use convert --outtype q8_0"
        )
    for tensor in job.plan.tensors:
        for part in tensor.parts:
            if part.source.storage.quantized:
                raise QuantizeError(
                    f"{job.source}: is quantized already: {part.source.name} is {part.source.storage.name}; expected "
                    "a BF16, F16 or F32 checkpoint. To run it as it is, use convert"
                )


@dataclass(frozen=True)
class Preview:
    """A run that has not begun."""

    job: Job
    outfile: Path
    text: Calibration
    settings: Settings
    needs: Needs

    @property
    def tokens_per_expert(self) -> int:
        """On average."""
        moe = self.job.config.moe
        return self.text.sequences.size * moe.used // moe.experts if moe else 0

    @property
    def vision_experts(self) -> str:
        """The type of the vision experts, or nothing."""
        tensors = [tensor for tensor in self.job.plan.tensors if tensor.expected.role is Role.VISION_EXPERT]
        return ", ".join(sorted({tensor.ggml_type.name.lower() for tensor in tensors}))

    def json(self) -> dict[str, Any]:
        """For --json; sizes in bytes."""
        moe, (sequences, length) = self.job.config.moe, self.text.sequences.shape
        return {
            "file": str(self.outfile),
            "bytes": self.job.plan.nbytes,
            "layers": self.job.config.layers,
            "layers_done": layers_done(partial_path(self.outfile)),
            "experts": moe.experts if moe else 0,
            "text_tokens": self.text.tokens,
            "sequences": sequences,
            "sequence_tokens": length,
            "tokens_per_expert": self.tokens_per_expert,
            "vision_experts": self.vision_experts or None,
            "memory": self.needs.memory,
            "gpu_memory": self.needs.device,
            "disk": self.needs.disk,
            "device": self.settings.device,
            "threads": self.settings.threads,
        }

    def lines(self) -> list[str]:
        """For people."""
        facts, needs, (sequences, length) = self.json(), self.needs, self.text.sequences.shape
        gpu = f", {human(needs.device)} on the GPU" if needs.device else ""
        threads = f", threads {self.settings.threads}" if self.settings.device == "cpu" else ""
        out = [
            f"{facts['layers']} layers, {facts['experts']} experts; {sequences:,} sequences of {length:,} tokens "
            f"from a text of {self.text.tokens:,}, about {self.tokens_per_expert:,} tokens per expert",
            f"needs about {human(needs.memory)} of memory{gpu} and {human(needs.disk)} on the disk (the file: "
            f"{human(self.job.plan.nbytes)}); device {self.settings.device}{threads}",
        ]
        if self.vision_experts:
            out.append(f"the vision experts become {self.vision_experts}: a text cannot calibrate them")
        if self.tokens_per_expert < _FEW_TOKENS:
            out.append("note: this is a short text; aim for 20,000 tokens per expert")
        out += [f"note: {note}" for note in self.job.notes]
        if needs.memory > (memory := os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")):
            out.append(f"note: this computer has {human(memory)} of memory; give fewer --threads")
        return out

    def check_disk(self) -> None:
        """Raise OutputError if the disk is too small. Space that an interrupted run holds counts as free."""
        taken = held_bytes(partial_path(self.outfile))
        if self.needs.disk > (free := free_bytes(self.outfile.parent)) + taken:
            raise OutputError(
                f"{self.outfile}: needs {human(self.needs.disk)}, the disk has {human(free)} free; nothing was written"
            )
