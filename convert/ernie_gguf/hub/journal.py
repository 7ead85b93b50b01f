"""The folder OUT.gguf.partial of a conversion by --stream: the unfinished files, and how far they are.

The state is replaced after each batch. Files get their final names after the last one; until then no program takes them
for models, for the magic is missing.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import OutputError, WorkspaceError
from ..partial import PartialFolder, restart_error
from ..transform import ALL_EXACT, Inexact
from .names import HubError


class Journal(PartialFolder):
    """`done` counts the finished batches, `complete` says that all files are finished, and some may have their names.

    `inexact` is what repacks lost, by tensor.
    """

    FILES = (".gguf", ".tmp", ".json")
    FOLDERS = (".window",)
    RESUMABLE = (HubError, OutputError, WorkspaceError)  # the network and the disk; bad weights would only fail again

    def __init__(self, path: Path, files: int, fingerprint: Mapping[str, Any], restart: bool) -> None:
        super().__init__(path, fingerprint, restart)
        self.files = [path / f"{number}.gguf" for number in range(files)]
        self.complete = False
        self.inexact: dict[str, Inexact] = {}

    def restore(self, state: Mapping[str, Any]) -> set[str]:
        """See `PartialFolder`."""
        self.done, self.complete = int(state["batches"]), bool(state["complete"])
        self.inexact = {name: Inexact(**lost) for name, lost in state["inexact"].items()}
        for file in self.files:
            if not file.is_file() and not self.complete:  # else it has its final name already
                raise restart_error(file, "missing")
        return {file.name for file in self.files}

    def compare(self, found: Mapping[str, Any]) -> None:
        """Raise WorkspaceError unless the run before had the same source and the same plan."""
        old, new = found.get("commit"), self._fingerprint["commit"]
        if old != new:
            raise WorkspaceError(
                f"{self.path}: an interrupted run of commit {old}, and {self._fingerprint['repository']} is at {new} "
                f"now: name it with @{old} to go on, or give --restart"
            )
        super().compare(found)

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
        self._write(done)
        self.done = done

    def _write(self, done: int) -> None:
        inexact = {name: asdict(lost) for name, lost in self.inexact.items()}
        self.write_state({"batches": done, "complete": self.complete, "inexact": inexact})

    def publish(self, paths: Sequence[Path]) -> None:
        """Give the finished files their names: in reverse, so that the one users load appears last."""
        self.complete = True
        self._write(self.done)
        for file, path in reversed(list(zip(self.files, paths, strict=True))):
            if file.exists():
                file.replace(path)
        self.done = 0  # nothing to resume: the folder goes
