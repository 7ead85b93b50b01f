"""The folder OUT.gguf.partial: everything that an interrupted run needs to resume. Needs no torch.

It holds the unfinished model (without GGUF's magic), the activations after the last finished layer, and `state.json`,
which is replaced after each layer, once everything that it names is on the disk. The folder is removed when the model
is renamed to OUT.gguf, and after an error that would only happen again.
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
from typing import Any

import numpy as np
from gguf import GGUFWriter

from ..arrays import F32
from ..checkpoint.json_object import read_object
from ..errors import CheckpointError, ErnieGgufError, OutputError, WorkspaceError
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
    """How many finished layers the folder keeps; 0 if there is no folder."""
    try:
        return int(read_object(path / STATE, WorkspaceError)["layers"])
    except (WorkspaceError, KeyError, TypeError, ValueError):
        return 0


def _check_size(path: Path, nbytes: int) -> None:
    if (found := path.stat().st_size) != nbytes:
        raise WorkspaceError(f"{path}: {found} bytes, expected {nbytes}; give --restart to start over")


_RESUMABLE = (CheckpointError, OutputError, WorkspaceError)  # for example a full disk, or one that does not answer


class Workspace:
    """Use as a context manager; `path` may hold an earlier run with the same `fingerprint`.

    `done` counts the finished layers, `stats` describes their matrices, `seconds` is the time they took. `data_offset`
    is where the model's data begins, once this run or the earlier one has called `begin_model`.
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
        except BlockingIOError as error:
            os.close(self._lock)
            raise WorkspaceError(f"{self.path}: another run is using it; wait for it, or stop it") from error
        except OSError as error:
            raise OutputError(f"{self.path}: {error.strerror}; nothing was written") from error
        try:
            self._resume()
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        # Keep an interrupted run if it finished a layer; but bad weights would only fail again.
        hopeless = (
            error_type is not None and issubclass(error_type, ErnieGgufError) and not issubclass(error_type, _RESUMABLE)
        )
        if self.done == 0 or hopeless:
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)

    def _resume(self) -> None:
        state_path = self.path / STATE
        if not state_path.exists() or self._restart:
            self._clear()
            return
        try:
            state = read_object(state_path, WorkspaceError)
        except WorkspaceError as error:
            raise WorkspaceError(f"{self.path}: {error}; give --restart to start over") from error
        if state.get("version") != VERSION:
            raise WorkspaceError(f"{self.path}: begun by another version of ernie-gguf; give --restart to start over")
        if state.get("fingerprint") != json.loads(json.dumps(self._fingerprint)):
            found = state.get("fingerprint")
            changed = [k for k, v in self._fingerprint.items() if not isinstance(found, dict) or found.get(k) != v]
            raise WorkspaceError(
                f"{self.path}: an interrupted run with another {' and '.join(changed)}; give --restart to start over, "
                "or another --outfile"
            )
        try:
            self.stats = [MatrixStats(**{**entry, "scales": tuple(entry["scales"])}) for entry in state["stats"]]
            self.done, self.seconds = int(state["layers"]), float(state["seconds"])
            self.data_offset, model_bytes = int(state["data_offset"]), int(state["model_bytes"])
        except (KeyError, TypeError, ValueError) as error:
            raise WorkspaceError(f"{state_path}: damaged ({error!r}); give --restart to start over") from error
        keep = {MODEL, STATE, self._name(self.done)}
        for name in sorted(keep):
            if not (self.path / name).is_file():
                raise WorkspaceError(f"{self.path / name}: missing; give --restart to start over")
        _check_size(self.model, model_bytes)
        for path in self.path.iterdir():
            if path.name not in keep:
                path.unlink()

    def _clear(self) -> None:
        for path in self.path.iterdir():
            if path.suffix not in _SUFFIXES or not path.is_file():
                raise WorkspaceError(f"{path}: not a file of an interrupted run; move it, or give another --outfile")
        for path in self.path.iterdir():
            path.unlink()

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
        os.fsync(self._lock)  # the folder: the new state is on the disk before the old activations go
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
        self.done = 0  # nothing to resume: __exit__ removes the folder
