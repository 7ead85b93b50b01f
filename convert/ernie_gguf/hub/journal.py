"""The folder OUT.gguf.partial of a conversion by --stream: the unfinished files, and how far they are.

`state.json` is replaced after each batch, once every byte that it counts is on the disk. Files get their final names
after the last one; until then no program takes them for models, for the magic is missing.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..checkpoint.json_object import read_object
from ..errors import ErnieGgufError, OutputError, WorkspaceError
from ..transform import ALL_EXACT, Inexact
from .names import HubError

STATE = "state.json"
VERSION = 1
_RESUMABLE = (HubError, OutputError, WorkspaceError)  # the network and the disk; bad weights would only fail again


def partial_path(outfile: Path) -> Path:
    """The folder of a run that makes `outfile`, as that of `quantize`."""
    return outfile.with_name(outfile.name + ".partial")


def held_bytes(path: Path) -> int:
    """Bytes of disk that an interrupted run holds."""
    return sum(file.stat().st_blocks * 512 for file in path.rglob("*") if file.is_file()) if path.is_dir() else 0


class Journal:
    """Use as a context manager; `path` may hold an earlier run with the same `fingerprint`.

    `done` counts the finished batches, `complete` says that all files are finished; `inexact` is what repacks lost, by
    tensor.
    """

    def __init__(self, path: Path, files: int, fingerprint: Mapping[str, Any], restart: bool) -> None:
        self.path = path
        self.files = [path / f"{number}.gguf" for number in range(files)]
        self.done = 0
        self.inexact: dict[str, Inexact] = {}
        self._fingerprint = json.loads(json.dumps(fingerprint))
        self._restart = restart
        self._lock = -1
        self.complete = False  # every file is, and some may have their final names
        self._finished = False

    def __enter__(self) -> "Journal":
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

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        hopeless = kind is not None and issubclass(kind, ErnieGgufError) and not issubclass(kind, _RESUMABLE)
        if self._finished or hopeless or self.done == 0:
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)

    @property
    def begun(self) -> bool:
        """Whether the files are there, with their headers and all their space."""
        return (self.path / STATE).exists()

    def _resume(self) -> None:
        state_path = self.path / STATE
        if self._restart or not state_path.exists():
            self._clear(everything=True)
            return
        try:
            state = read_object(state_path, WorkspaceError)
            if state["version"] != VERSION:
                raise WorkspaceError("begun by another version of ernie-gguf")
            found = dict(state["fingerprint"])
            self.done, self.complete = int(state["batches"]), bool(state["complete"])
            self.inexact = {name: Inexact(**lost) for name, lost in state["inexact"].items()}
        except (WorkspaceError, KeyError, TypeError, ValueError) as error:
            raise WorkspaceError(f"{self.path}: {error}; give --restart to start over") from error
        self._compare(found)
        self._clear(everything=False)
        for file in self.files:
            if not file.is_file() and not self.complete:  # else it has its final name already
                raise WorkspaceError(f"{file}: missing; give --restart to start over")

    def _compare(self, found: Mapping[str, Any]) -> None:
        """Raise WorkspaceError unless the run before had the same source and the same plan."""
        changed = [key for key, value in self._fingerprint.items() if found.get(key) != value]
        if "commit" in changed:
            old, repository, new = found.get("commit"), self._fingerprint["repository"], self._fingerprint["commit"]
            raise WorkspaceError(
                f"{self.path}: an interrupted run of commit {old}, and {repository} is at {new} now: name it with "
                f"@{old} to go on, or give --restart"
            )
        if changed:
            raise WorkspaceError(
                f"{self.path}: an interrupted run with another {' and '.join(changed)}; give --restart to start over, "
                "or another --outfile"
            )

    def _clear(self, everything: bool) -> None:
        """Remove what a run leaves besides the files and their state, or also these."""
        for path in self.path.iterdir():
            ours = path.name == STATE or path in self.files
            if not ours and path.suffix not in (".gguf", ".tmp", ".window", ".json"):
                raise WorkspaceError(f"{path}: not of an interrupted run; move it, or give another --outfile")
        for path in self.path.iterdir():
            if everything or not (path.name == STATE or path in self.files):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def window(self, number: int) -> Path:
        """A new folder for the bytes of one batch."""
        path = self.path / f"{number}.window"
        path.mkdir()
        return path

    def record(self, done: int, inexact: Mapping[str, Inexact], fds: Sequence[int]) -> None:
        """Count `done` batches as finished: first their bytes go to the disk, then the state that says so."""
        for fd in fds:
            os.fsync(fd)
        for name, lost in inexact.items():
            self.inexact[name] = self.inexact.get(name, ALL_EXACT) + lost
        self._write_state(done)
        self.done = done

    def _write_state(self, done: int) -> None:
        state = {
            "version": VERSION,
            "fingerprint": self._fingerprint,
            "batches": done,
            "complete": self.complete,
            "inexact": {name: asdict(lost) for name, lost in self.inexact.items()},
        }
        temporary = self.path / "state.tmp"
        with temporary.open("w") as file:
            json.dump(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path / STATE)
        os.fsync(self._lock)

    def publish(self, paths: Sequence[Path]) -> None:
        """Give the finished files their names: in reverse, so that the one users load appears last."""
        self.complete = True
        self._write_state(self.done)
        for file, path in reversed(list(zip(self.files, paths, strict=True))):
            if file.exists():
                file.replace(path)
        self._finished = True
