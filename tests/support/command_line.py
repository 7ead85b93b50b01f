"""What tests of the command share: how it is called, and what it leaves behind."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Done(NamedTuple):
    """What a call has come to."""

    code: int | str | None
    out: str
    err: str


Command = Callable[..., Done]  # the fixture ernie_gguf of conftest.py


def snapshot(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
