"""What tests of the command share: how it is called, and what it leaves behind."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Done(NamedTuple):
    """What a call has come to."""

    code: int | str | None
    out: str
    err: str

    @property
    def rows(self) -> list[str]:
        """The lines of stdout, with one space where a table has several."""
        return [" ".join(line.split()) for line in self.out.splitlines()]


Command = Callable[..., Done]  # the fixture ernie_gguf of conftest.py


def snapshot(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
