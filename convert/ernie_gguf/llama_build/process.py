"""Runs the programs of a build, with their output in a log."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import ErnieGgufError

EachLine = Callable[[str], None]


class BuildError(ErnieGgufError):
    """A step of the build failed; says which, and where its output is."""


def run(command: Sequence[str], log: Path, each_line: EachLine, folder: Path | None = None, **more: str) -> None:
    """Run a command in `folder` with its output in `log`; hand on each line. `more` goes to its environment.

    Raises:
        BuildError: it failed.
    """
    environment = {**os.environ, "NINJA_STATUS": "[%f/%t] ", **more}
    with (
        log.open("w") as file,
        subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
    ):
        assert process.stdout is not None  # noqa: S101 - it is a pipe
        try:
            for line in process.stdout:
                file.write(line)
                each_line(line)
        finally:
            if process.poll() is None and sys.exc_info()[0] is not None:
                process.terminate()
    if process.returncode != 0:
        raise BuildError(f"{Path(command[0]).name} failed: {_first_error(log)}; its output is in {log}")


def _first_error(log: Path) -> str:
    """The line of a log that most likely says what was wrong."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    marks = ("error:", "Error", "fatal", "No space left", "Killed")
    return next((line for line in lines if any(mark in line for mark in marks)), lines[-1] if lines else "no output")
