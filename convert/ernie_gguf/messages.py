"""Messages on stderr: one line, whatever the names in a checkpoint hold."""

import io
import os
import shutil
import sys
import textwrap
from typing import NoReturn

from .errors import one_line

_LONGEST = 2000  # characters of an error message: names in a checkpoint may have any length


def fail(message: str, code: int) -> NoReturn:
    """End the program with one message."""
    # Names may come from hostile files: keep line breaks and escape sequences off the terminal.
    line = "".join(char if char.isprintable() else repr(char)[1:-1] for char in message)
    if len(line) > _LONGEST:
        line = f"{line[:_LONGEST]}… ({len(line)} characters)"
    line = f"error: {line}"
    if sys.stderr.isatty():
        line = textwrap.fill(line, shutil.get_terminal_size().columns, break_long_words=False, break_on_hyphens=False)
    sys.stderr.write(f"{line}\n")
    sys.exit(code)


def os_error(exc: OSError) -> str:
    """What it is about, and what is wrong."""
    # The path goes through the error's repr nowhere: bytes that are no text are shown by `fail`.
    place = f"{os.fsdecode(exc.filename)}: " if isinstance(exc.filename, (str, bytes)) else ""
    return f"{place}{exc.strerror or one_line(exc)}"


def print_anything() -> None:
    """Let stdout and stderr escape what their encoding cannot hold: names in checkpoints and paths may be anything."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
