"""Files and disks: temporary names, free space, writes that are complete or an error."""

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import OutputError

_TEMPORARY = re.compile(r"\.ernie-gguf-(\d+)-[0-9a-f]{8}\.tmp")


def leftovers(folder: Path) -> list[Path]:
    """Temporary files of processes that have ended."""
    found = [(path, _TEMPORARY.fullmatch(path.name)) for path in sorted(folder.glob(".ernie-gguf-*.tmp"))]
    return [path for path, match in found if match and not Path(f"/proc/{match[1]}").exists()]


def check_output(path: Path, overwrite: bool) -> None:
    """Raise OutputError if no file may be written to `path`."""
    if path.exists() and not path.is_file():
        raise OutputError(f"{path}: exists and is not a regular file")
    if path.exists() and not overwrite:
        raise OutputError(f"{path}: exists already; give --overwrite to replace it")
    if not path.parent.is_dir():
        raise OutputError(f"{path.parent}: no such folder; create it first")


@contextmanager
def replacing(path: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary path beside `path`: renamed to `path` if the block succeeds, removed otherwise.

    Any OSError of the block becomes an OutputError.
    """
    check_output(path, overwrite)
    temporary = path.parent / f".ernie-gguf-{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        temporary.touch()  # a folder without permission is known before any work
        yield temporary
        temporary.replace(path)
    except OSError as exc:
        raise OutputError(f"{path}: {exc.strerror}; nothing was written") from exc
    finally:
        temporary.unlink(missing_ok=True)


def free_bytes(folder: Path) -> int:
    """Bytes that this user may still write to the file system of `folder`."""
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize


def pwrite(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data`."""
    while data:
        n = os.pwrite(fd, data, offset)
        data, offset = data[n:], offset + n
