"""The folder OUT.gguf.partial: all that an interrupted run needs to go on.

It holds the growing model (its first bytes say that it is none yet), the activations behind the last finished layer and
`state.json`, which is replaced whenever a layer is finished: what it names is on the disk by then. The folder goes away
when the model takes its name, and when an error says that going on makes no sense.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGUFWriter

from ..errors import ErnieGgufError, OutputError
from ..gguf_io import begin, finish
from ..jsonfile import read_object
from .stats import MatrixStats

MODEL = "model.gguf"
STATE = "state.json"
VERSION = 1


class WorkspaceError(ErnieGgufError):
    """A partial run that cannot be taken up: of other inputs, in use, or damaged."""


class Workspace:
    """Use as a context manager; `path` may hold an earlier run with the same `fingerprint`.

    `done` counts finished layers, `stats` are their matrices', `seconds` the time they took; `data_offset` is where the
    data of the growing model begins, once `begin_model` has been called in this run or the earlier one.
    """

    def __init__(self, path: Path, fingerprint: Mapping[str, Any], restart: bool) -> None:
        self.path = path
        self.model = path / MODEL
        self.done = 0
        self.stats: list[MatrixStats] = []
        self.seconds = 0.0
        self.data_offset = 0
        self._fingerprint = dict(fingerprint)
        self._restart = restart
        self._lock = -1

    def __enter__(self) -> "Workspace":
        try:
            self.path.mkdir(exist_ok=True)
            self._lock = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            os.close(self._lock)
            raise WorkspaceError(f"{self.path}: another run is using it; wait for it, or stop it") from exc
        except OSError as exc:
            raise OutputError(f"{self.path}: {exc.strerror}; nothing was written") from exc
        try:
            self._take_up()
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        # An interrupted run is kept if a layer of it is done; bad input would only fail again.
        if self.done == 0 or (kind is not None and issubclass(kind, ErnieGgufError)):
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)

    def _take_up(self) -> None:
        state_path = self.path / STATE
        if not state_path.exists() or self._restart:
            self._clear()
            return
        state = read_object(state_path, WorkspaceError)
        if state.get("fingerprint") != json.loads(json.dumps(self._fingerprint)):
            found = state.get("fingerprint")
            changed = [k for k, v in self._fingerprint.items() if not isinstance(found, dict) or found.get(k) != v]
            raise WorkspaceError(
                f"{self.path}: was begun with another {' and '.join(changed) or 'version'}; give --restart to begin "
                "again, or another --outfile"
            )
        try:
            self.stats = [MatrixStats(**{**entry, "scales": tuple(entry["scales"])}) for entry in state["stats"]]
            self.done, self.seconds = int(state["layers"]), float(state["seconds"])
            self.data_offset = int(state["data_offset"])
        except (KeyError, TypeError, ValueError) as exc:
            raise WorkspaceError(f"{state_path}: damaged ({exc!r}); give --restart to begin again") from exc
        keep = {MODEL, STATE, self._name(self.done)}
        for name in sorted(keep):
            if not (self.path / name).is_file():
                raise WorkspaceError(f"{self.path / name}: is missing; give --restart to begin again")
        for path in self.path.iterdir():
            if path.name not in keep:
                path.unlink()

    def _clear(self) -> None:
        for path in self.path.iterdir():
            if path.suffix not in (".gguf", ".json", ".f32", ".tmp"):
                raise WorkspaceError(f"{path}: is no file of ours; remove {self.path} to begin again")
        for path in self.path.iterdir():
            path.unlink()

    @staticmethod
    def _name(layer: int) -> str:
        return f"activations-{layer}.f32"

    def activations(self, layer: int, shape: Sequence[int], new: bool = False) -> torch.Tensor:
        """What layer `layer` gets, float32 in a mapped file: pages go to the disk where memory is short."""
        return self.mapped(self._name(layer), shape, new)

    def mapped(self, name: str, shape: Sequence[int], new: bool) -> torch.Tensor:
        """A float32 tensor in a file of the folder; a new one has its space on the disk at once."""
        path = self.path / name
        if new:
            with path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, 4 * int(np.prod(shape)))
        array: npt.NDArray[np.float32] = np.memmap(path, np.float32, "r+", shape=tuple(shape))
        return torch.from_numpy(array)

    def finish_layer(self, layer: int, stats: Sequence[MatrixStats], seconds: float, model_fd: int) -> None:
        """Layer `layer` is done, the activations behind it are complete: what came before is needed no more."""
        os.fsync(model_fd)
        with (self.path / self._name(layer + 1)).open("rb") as file:
            os.fsync(file.fileno())
        self.done, self.seconds = layer + 1, self.seconds + seconds
        self.stats += stats
        state = {
            "version": VERSION,
            "fingerprint": self._fingerprint,
            "layers": self.done,
            "seconds": self.seconds,
            "data_offset": self.data_offset,
            "stats": [asdict(each) for each in self.stats],
        }
        temporary = self.path / "state.tmp"
        with temporary.open("w") as file:
            json.dump(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path / STATE)
        (self.path / self._name(layer)).unlink()

    def begin_model(self, writer: GGUFWriter, nbytes: int) -> None:
        """Write the model's header and take the space of its `nbytes` of data."""
        self.data_offset = begin(self.model, writer)
        with self.model.open("r+b") as file:
            os.posix_fallocate(file.fileno(), self.data_offset, nbytes)

    def publish(self, model_fd: int, outfile: Path) -> None:
        """Give the finished model its name."""
        finish(model_fd)
        self.model.replace(outfile)
        self.done = 0  # nothing to go on with: __exit__ clears up
