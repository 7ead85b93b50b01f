"""The folder OUT.gguf.partial: all that an interrupted run needs to go on.

It holds the growing model (its first bytes say that it is none yet), the activations behind the last finished layer and
`state.json`, which is replaced whenever a layer is finished: what it names is on the disk by then. The folder goes away
when the model takes its name, and when an error says that going on makes no sense.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGUFWriter

from ..checkpoint.json_object import read_object
from ..errors import CheckpointError, ErnieGgufError, OutputError
from ..gguf_file.writer import begin, finish
from .stats import MatrixStats

MODEL = "model.gguf"
STATE = "state.json"
VERSION = 1


_SUFFIXES = (".gguf", ".json", ".f32", ".tmp")  # of its files


def partial_path(outfile: Path) -> Path:
    """The folder of a run that makes `outfile`."""
    return outfile.with_name(outfile.name + ".partial")


def layers_done(path: Path) -> int:
    """Finished layers that such a folder keeps, 0 if there is none."""
    try:
        return int(read_object(path / STATE, WorkspaceError)["layers"])
    except (WorkspaceError, KeyError, TypeError, ValueError):
        return 0


class WorkspaceError(ErnieGgufError):
    """A partial run that cannot be taken up: of other inputs, in use, or damaged."""


def _check_size(path: Path, nbytes: int) -> None:
    if (found := path.stat().st_size) != nbytes:
        raise WorkspaceError(f"{path}: {found} bytes, expected {nbytes}; give --restart to begin again")


_MENDABLE = (CheckpointError, OutputError, WorkspaceError)  # a disk that does not answer, one that is full


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
        # An interrupted run is kept if a layer of it is done; bad weights would only fail again.
        hopeless = kind is not None and issubclass(kind, ErnieGgufError) and not issubclass(kind, _MENDABLE)
        if self.done == 0 or hopeless:
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)

    def _take_up(self) -> None:
        state_path = self.path / STATE
        if not state_path.exists() or self._restart:
            self._clear()
            return
        try:
            state = read_object(state_path, WorkspaceError)
        except WorkspaceError as exc:
            raise WorkspaceError(f"{self.path}: {exc}; give --restart to begin again") from exc
        if state.get("version") != VERSION:
            raise WorkspaceError(
                f"{self.path}: was begun by another version of ernie-gguf; give --restart to begin again"
            )
        if state.get("fingerprint") != json.loads(json.dumps(self._fingerprint)):
            found = state.get("fingerprint")
            changed = [k for k, v in self._fingerprint.items() if not isinstance(found, dict) or found.get(k) != v]
            raise WorkspaceError(
                f"{self.path}: an interrupted run with another {' and '.join(changed)}; give --restart to begin again, "
                "or another --outfile"
            )
        try:
            self.stats = [MatrixStats(**{**entry, "scales": tuple(entry["scales"])}) for entry in state["stats"]]
            self.done, self.seconds = int(state["layers"]), float(state["seconds"])
            self.data_offset, model_bytes = int(state["data_offset"]), int(state["model_bytes"])
        except (KeyError, TypeError, ValueError) as exc:
            raise WorkspaceError(f"{state_path}: damaged ({exc!r}); give --restart to begin again") from exc
        keep = {MODEL, STATE, self._name(self.done)}
        for name in sorted(keep):
            if not (self.path / name).is_file():
                raise WorkspaceError(f"{self.path / name}: is missing; give --restart to begin again")
        _check_size(self.model, model_bytes)
        for path in self.path.iterdir():
            if path.name not in keep:
                path.unlink()

    def _clear(self) -> None:
        for path in self.path.iterdir():
            if path.suffix not in _SUFFIXES or not path.is_file():
                raise WorkspaceError(f"{path}: no file of an interrupted run; move it, or give another --outfile")
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
        path, nbytes = self.path / name, 4 * prod(shape)
        if new:
            with path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, nbytes)
        else:
            _check_size(path, nbytes)
        array: npt.NDArray[np.float32] = np.memmap(path, np.float32, "r+", shape=tuple(shape))
        return torch.from_numpy(array)

    def finish_layer(self, layer: int, stats: Sequence[MatrixStats], seconds: float, model_fd: int) -> None:
        """Layer `layer` is done, the activations behind it are complete: what came before is needed no more."""
        os.fsync(model_fd)
        with (self.path / self._name(layer + 1)).open("rb") as file:
            os.fsync(file.fileno())
        done, total, everything = layer + 1, self.seconds + seconds, [*self.stats, *stats]
        state = {
            "version": VERSION,
            "fingerprint": self._fingerprint,
            "layers": done,
            "seconds": total,
            "data_offset": self.data_offset,
            "model_bytes": os.fstat(model_fd).st_size,
            "stats": [asdict(each) for each in everything],
        }
        temporary = self.path / "state.tmp"
        with temporary.open("w") as file:
            json.dump(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path / STATE)
        os.fsync(self._lock)  # the folder: its files have their names before one that is needed until then goes away
        self.done, self.seconds, self.stats = done, total, everything
        (self.path / self._name(layer)).unlink()

    def begin_model(self, writer: GGUFWriter, nbytes: int) -> None:
        """Write the model's header and take the space of its `nbytes` of data."""
        self.data_offset = begin(self.model, writer)
        with self.model.open("r+b") as file:
            os.posix_fallocate(file.fileno(), self.data_offset, nbytes)

    @contextmanager
    def open_model(self) -> Iterator[int]:
        """A descriptor of the growing model."""
        fd = os.open(self.model, os.O_RDWR | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)

    def publish(self, model_fd: int, outfile: Path) -> None:
        """Give the finished model its name."""
        finish(model_fd)
        self.model.replace(outfile)
        self.done = 0  # nothing to go on with: __exit__ clears up
