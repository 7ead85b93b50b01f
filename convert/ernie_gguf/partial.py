"""The folder OUT.gguf.partial: what an interrupted run needs to resume, whatever it makes.

It is locked while a run uses it. Its `state.json` is replaced once everything that it names is on the disk. The folder
is removed when the run is done, when nothing worth keeping was done, and after an error that would only happen again.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from .checkpoint.json_object import read_object
from .errors import ErnieGgufError, OutputError, WorkspaceError

STATE = "state.json"
_Folder = TypeVar("_Folder", bound="PartialFolder")


def partial_path(outfile: Path) -> Path:
    """The folder of a run that makes `outfile`."""
    return outfile.with_name(outfile.name + ".partial")


def held_bytes(path: Path) -> int:
    """Bytes of disk that an interrupted run holds."""
    return sum(file.stat().st_blocks * 512 for file in path.rglob("*") if file.is_file()) if path.is_dir() else 0


def restart_error(where: Path, problem: object) -> WorkspaceError:
    """What is wrong with an earlier run, and the way out."""
    return WorkspaceError(f"{where}: {problem}; give --restart to start over")


class PartialFolder:
    """Use as a context manager; `path` may hold an earlier run with the same `fingerprint`.

    `done` counts the finished steps; 0 if there is nothing to resume. A subclass says what the state holds besides.
    """

    VERSION: ClassVar[int] = 1
    FILES: ClassVar[tuple[str, ...]]  # suffixes of what a run leaves in its folder
    FOLDERS: ClassVar[tuple[str, ...]] = ()
    RESUMABLE: ClassVar[tuple[type[ErnieGgufError], ...]]  # errors after which a run may go on

    def __init__(self, path: Path, fingerprint: Mapping[str, Any], restart: bool) -> None:
        self.path = path
        self.done = 0
        self._fingerprint: dict[str, Any] = json.loads(json.dumps(fingerprint))
        self._restart = restart
        self._lock = -1

    def restore(self, state: Mapping[str, Any]) -> set[str]:
        """Take over the state of an earlier run; returns the names of the files that it needs.

        Raises:
            KeyError, TypeError, ValueError: the state is damaged.
            WorkspaceError: one of the files is missing, or is not as the state says.
        """
        raise NotImplementedError

    def __enter__(self: _Folder) -> _Folder:
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
            self._clear(self._resume())
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        hopeless = kind is not None and issubclass(kind, ErnieGgufError) and not issubclass(kind, self.RESUMABLE)
        if self.done == 0 or hopeless:
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)

    @property
    def begun(self) -> bool:
        """Whether there is a state: of an earlier run, or of this one."""
        return (self.path / STATE).exists()

    def _resume(self) -> set[str]:
        """The names of the files to keep."""
        if self._restart or not self.begun:
            return set()
        try:
            state = read_object(self.path / STATE, WorkspaceError)
        except WorkspaceError as error:
            raise restart_error(self.path, error) from error
        if state.get("version") != self.VERSION:
            raise restart_error(self.path, "begun by another version of ernie-gguf")
        found = state.get("fingerprint")
        self.compare(found if isinstance(found, dict) else {})
        try:
            return {STATE, *self.restore(state)}
        except (KeyError, TypeError, ValueError) as error:
            raise restart_error(self.path / STATE, f"damaged ({error!r})") from error

    def compare(self, found: Mapping[str, Any]) -> None:
        """Raise WorkspaceError unless the run before was asked for the same."""
        if changed := [key for key, value in self._fingerprint.items() if found.get(key) != value]:
            problem = f"an interrupted run with another {' and '.join(changed)}"
            raise WorkspaceError(f"{restart_error(self.path, problem)}, or another --outfile")

    def _clear(self, keep: set[str]) -> None:
        """Remove what a run leaves, but not what is to be kept, nor anything of the user's."""
        others = [path for path in self.path.iterdir() if path.name not in keep]
        for path in others:
            if path.suffix not in (self.FOLDERS if path.is_dir() else self.FILES):
                raise WorkspaceError(f"{path}: not of an interrupted run; move it, or give another --outfile")
        for path in others:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def write_state(self, state: Mapping[str, Any]) -> None:
        """Replace the state; it is on the disk when this returns."""
        temporary = self.path / "state.tmp"
        with temporary.open("w") as file:
            json.dump({"version": self.VERSION, "fingerprint": self._fingerprint, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path / STATE)
        os.fsync(self._lock)  # the folder: what the old state named may go
