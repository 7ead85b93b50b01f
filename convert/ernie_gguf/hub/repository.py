"""A repository at one commit, as the rest of the package sees it: sizes, small files, byte ranges, a whole download."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from .names import HubName

Sink = Callable[[bytes], None]
Sleep = Callable[[float], object]


@dataclass(frozen=True)
class RemoteFile:
    """A file of a commit; `digest` changes whenever its content does (None where the site does not tell)."""

    path: str
    nbytes: int
    digest: str | None


class Repository(Protocol):
    """A repository whose revision is resolved; every method raises HubError."""

    @property
    def name(self) -> HubName:
        """As the user wrote it."""

    @property
    def commit(self) -> str:
        """What the revision stands for."""

    @property
    def files(self) -> Mapping[str, RemoteFile]:
        """By path."""

    def small(self, path: str) -> Path:
        """A file that is fetched whole, into the site's own cache."""

    def read(self, path: str, begin: int, end: int, sink: Sink, sleep: Sleep = time.sleep) -> None:
        """Give the bytes `begin` … `end` of a file to `sink`, in order, each once; `sleep` waits between attempts."""

    def download(self, paths: Iterable[str]) -> Path:
        """The folder of the site's own cache that holds these files."""

    def missing_bytes(self, paths: Iterable[str]) -> int:
        """Bytes of these files that the cache does not hold yet."""

    @property
    def cache(self) -> Path:
        """The folder of the cache."""
