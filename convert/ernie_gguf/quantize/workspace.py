"""The folder OUT.gguf.partial of `quantize`: everything that an interrupted run needs to resume. Needs no torch.

It holds the unfinished model (without GGUF's magic), the activations after the last finished layer, and the state,
which is replaced after each layer.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter

from ..arrays import F32
from ..checkpoint.json_object import read_object
from ..errors import CheckpointError, OutputError, WorkspaceError
from ..gguf_file.writer import begin, finish
from ..partial import STATE, PartialFolder, restart_error
from .stats import MatrixStats

MODEL = "model.gguf"


def layers_done(path: Path) -> int:
    """How many finished layers the folder keeps; 0 if there is no folder."""
    try:
        return int(read_object(path / STATE, WorkspaceError)["layers"])
    except (WorkspaceError, KeyError, TypeError, ValueError):
        return 0


def _check_size(path: Path, nbytes: int) -> None:
    if (found := path.stat().st_size) != nbytes:
        raise restart_error(path, f"{found} bytes, expected {nbytes}")


class Workspace(PartialFolder):
    """`done` counts the finished layers, `stats` describes their matrices, `seconds` is the time they took.

    `data_offset` is where the model's data begins, once this run or the earlier one has called `begin_model`.
    """

    FILES = (".gguf", ".json", ".f32", ".tmp")
    # For example a full disk, or one that does not answer; bad weights would only fail again.
    RESUMABLE = (CheckpointError, OutputError, WorkspaceError)

    def __init__(self, path: Path, fingerprint: Mapping[str, Any], restart: bool) -> None:
        super().__init__(path, fingerprint, restart)
        self.model = path / MODEL
        self.stats: list[MatrixStats] = []
        self.seconds = 0.0
        self.data_offset = 0

    def restore(self, state: Mapping[str, Any]) -> set[str]:
        """See `PartialFolder`."""
        self.stats = [MatrixStats(**{**entry, "scales": tuple(entry["scales"])}) for entry in state["stats"]]
        self.done, self.seconds = int(state["layers"]), float(state["seconds"])
        self.data_offset, model_bytes = int(state["data_offset"]), int(state["model_bytes"])
        keep = {MODEL, self._name(self.done)}
        for name in sorted(keep):
            if not (self.path / name).is_file():
                raise restart_error(self.path / name, "missing")
        _check_size(self.model, model_bytes)
        return keep

    @staticmethod
    def _name(layer: int) -> str:
        return f"activations-{layer}.f32"

    def activations(self, layer: int, shape: Sequence[int], new: bool = False) -> F32:
        """The input of layer `layer` in a mapped file, so that its pages go to disk when memory is short."""
        return self.mapped(self._name(layer), shape, new)

    def mapped(self, name: str, shape: Sequence[int], new: bool) -> F32:
        """A float32 array mapped from a file of the folder. A new one takes its disk space at once."""
        path, nbytes = self.path / name, 4 * prod(shape)
        if new:
            with path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, nbytes)
        else:
            _check_size(path, nbytes)
        return np.memmap(path, np.float32, "r+", shape=tuple(shape))

    def finish_layer(self, layer: int, stats: Sequence[MatrixStats], seconds: float, model_fd: int) -> None:
        """Record that layer `layer` is done and the activations after it are complete; drop those before it."""
        os.fsync(model_fd)
        with (self.path / self._name(layer + 1)).open("rb") as file:
            os.fsync(file.fileno())
        done, total, everything = layer + 1, self.seconds + seconds, [*self.stats, *stats]
        self.write_state(
            {
                "layers": done,
                "seconds": total,
                "data_offset": self.data_offset,
                "model_bytes": os.fstat(model_fd).st_size,
                "stats": [asdict(each) for each in everything],
            }
        )
        self.done, self.seconds, self.stats = done, total, everything
        (self.path / self._name(layer)).unlink()

    def begin_model(self, writer: GGUFWriter, nbytes: int) -> None:
        """Write the model's header and allocate its `nbytes` of data."""
        self.data_offset = begin(self.model, writer)
        with self.model.open("r+b") as file:
            os.posix_fallocate(file.fileno(), self.data_offset, nbytes)

    @contextmanager
    def open_model(self) -> Iterator[int]:
        """Open the unfinished model for reading and writing."""
        fd = os.open(self.model, os.O_RDWR | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)

    def publish(self, model_fd: int, outfile: Path) -> None:
        """Rename the finished model to `outfile`."""
        finish(model_fd)
        self.model.replace(outfile)
        self.done = 0  # nothing to resume: the folder goes
