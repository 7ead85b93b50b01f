"""Where a checkpoint is: a folder, or a repository of which only the headers are here."""

import importlib.util
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.config import read_config
from ..convert import refuse_split
from ..errors import CheckpointError, ConfigError, ErnieGgufError, PlanError, TokenizerError
from ..files import free_bytes
from ..units import human
from . import skeleton
from .names import HubError, HubName, UnreachableError, as_name, suggestion
from .repository import Repository

_OF_THE_SOURCE = (CheckpointError, ConfigError, PlanError, TokenizerError)


@dataclass(frozen=True)
class Place:
    """A checkpoint that can be planned. Without a `repository` the folder holds the weights too."""

    folder: Path
    name: HubName | None = None
    repository: Repository | None = None

    @property
    def shard_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))

    @property
    def wanted(self) -> list[str]:
        """The files of the repository that a conversion reads."""
        if self.repository is None:
            return []
        return [*skeleton.small_files(self.repository), *(each.path for each in skeleton.shards(self.repository))]


def say(line: str) -> None:
    """One line about what happens, on stderr."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def connect(name: HubName) -> Repository:
    """The repository at the commit that its revision stands for now.

    Raises:
        HubError: the client is not installed, or the repository cannot be read.
    """
    if name.site == "ms":
        raise HubError(
            f"{name}: names on ModelScope are not read; fetch it with `modelscope download --model {name.repo} "
            "--local_dir FOLDER`, and give FOLDER"
        )
    if importlib.util.find_spec("huggingface_hub") is None:
        raise HubError(
            f"{name}: no such folder here, and taking a repository from {name.place} needs huggingface_hub: "
            "pip install 'ernie-gguf[hub]'"
        )
    from .huggingface import HuggingFace

    return HuggingFace(name)


def _cached(name: HubName) -> Path | None:
    """The whole repository in the site's cache, if it is there."""
    from .huggingface import cached

    return cached(name)


@contextmanager
def opened(source: Path) -> Iterator[Place]:
    """The checkpoint that an argument means, ready to be planned; of a repository only the headers are fetched.

    Messages about the folder of headers, which is gone afterwards, name the repository instead.
    """
    name = as_name(source)
    if name is None:
        if not source.exists() and (hint := suggestion(str(source))):
            raise HubError(f"{source}: no such folder{hint}")
        yield Place(source)
        return
    try:
        repository = connect(name)
    except UnreachableError as error:
        if (folder := _cached(name)) is None:
            raise
        say(f"note: {error}; the copy in {folder} is taken")
        yield Place(folder, name)
        return
    with tempfile.TemporaryDirectory(prefix="ernie-gguf-") as parent, _named(name, Path(parent)):
        yield Place(skeleton.make(repository, Path(parent), _readable), name, repository)


def _readable(folder: Path) -> None:
    """Refuse what no conversion can read by its name and configuration alone."""
    refuse_split(folder)
    read_config(folder, text_only=True)


@contextmanager
def _named(name: HubName, parent: Path) -> Iterator[None]:
    """Errors that name the folder of a repository's headers name the repository."""
    folder = parent / f"models--{name.repo.replace('/', '--')}" / "snapshots"
    try:
        yield
    except ErnieGgufError as error:
        text = str(error)
        for path in (*folder.glob("*"), *folder.resolve().glob("*")):
            text = text.replace(str(path), str(name))
        if isinstance(error, _OF_THE_SOURCE) and str(name) not in text:
            text = f"{name}: {text}"
        error.args = (text,)
        raise


Need = tuple[Path, int, str]  # a folder, the bytes that go there, what they are


def check_room(needs: Sequence[Need], hint: str = "") -> None:
    """Raise unless each file system has room for all that goes there.

    Raises:
        HubError: one has not; says what each part takes.
    """
    by_device: dict[int, list[Need]] = {}
    for need in needs:
        by_device.setdefault(_existing(need[0]).stat().st_dev, []).append(need)
    for parts in by_device.values():
        folder, free = parts[0][0], free_bytes(_existing(parts[0][0]))
        if sum(nbytes for _, nbytes, _ in parts) > free:
            said = " and ".join(f"{human(nbytes)} for {what}" for _, nbytes, what in parts)
            raise HubError(f"{folder}: needs {said}, the disk has {human(free)} free; nothing was written{hint}")


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists already."""
    path = folder.absolute()
    while not path.is_dir():
        path = path.parent
    return path


def download(place: Place, extra: Sequence[Need] = (), hint: str = "") -> Path:
    """The folder with the weights: the place's own, or the site's cache after a download that `extra` leaves room for.

    Raises:
        HubError: the disk is too small for both, or the repository cannot be read.
    """
    if place.repository is None:
        return place.folder
    wanted, repository = place.wanted, place.repository
    missing = repository.missing_bytes(wanted)
    if missing:
        check_room([(repository.cache, missing, "the download"), *extra], hint)
        say(
            f"{place.name}: downloading {human(missing)} of {human(sum(repository.files[p].nbytes for p in wanted))} "
            f"to {repository.cache} ({duration(missing)})"
        )
    return repository.download(wanted)


def duration(nbytes: float) -> str:
    """How long a download takes, for people: `58 min at 100 Mbit/s`."""
    seconds = nbytes / 12.5e6
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} at 100 Mbit/s"
    return f"{max(1, seconds):.0f} s at 100 Mbit/s"
