"""What a user may write where a folder is expected: `baidu/ERNIE-4.5-21B-A3B-PT`, with `@REVISION` or `ms:`."""

import difflib
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import ErnieGgufError

# Baidu's repositories of the family, as FastDeploy's and ERNIE's documentation list them: for suggestions only.
_SIZES = {
    "0.3B": ("PT", "Paddle", "Base-PT", "Base-Paddle"),
    "21B-A3B": ("PT", "Paddle", "Base-PT", "Base-Paddle", "Thinking"),
    "300B-A47B": (
        *("PT", "Paddle", "Base-PT", "Base-Paddle", "FP8-Paddle", "W4A8C8-TP4-Paddle"),
        *("2Bits-Paddle", "2Bits-TP2-Paddle", "2Bits-TP4-Paddle"),
    ),
    "VL-28B-A3B": ("PT", "Paddle", "Base-PT", "Base-Paddle", "Thinking"),
    "VL-424B-A47B": ("PT", "Paddle", "Base-PT", "Base-Paddle"),
}
FAMILY = tuple(f"baidu/ERNIE-4.5-{size}-{form}" for size, forms in _SIZES.items() for form in forms)

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_NAME = re.compile(rf"(?:(hf|ms):)?({_PART}/{_PART})(?:@([A-Za-z0-9][A-Za-z0-9._/-]{{0,255}}))?")
_SITES = {"hf": "the Hugging Face Hub", "ms": "ModelScope"}


class HubError(ErnieGgufError):
    """A repository cannot be read: it is not there, is not open to this user, or the network fails."""


class UnreachableError(HubError):
    """The site does not answer: there may still be a copy in the cache."""


class SourceChangedError(HubError):
    """A file of the repository is no longer the one that was read before."""


@dataclass(frozen=True)
class HubName:
    """A repository on a site (`hf` or `ms`), and the branch, tag or commit that was asked for."""

    site: str
    repo: str
    revision: str | None = None

    @property
    def place(self) -> str:
        """The site, for people."""
        return _SITES[self.site]

    def __str__(self) -> str:
        site = "" if self.site == "hf" else f"{self.site}:"
        return f"{site}{self.repo}{f'@{self.revision}' if self.revision else ''}"


def parse_name(text: str) -> HubName | None:
    """The repository that `text` names; None if it has not the form of such a name."""
    match = _NAME.fullmatch(text)
    return HubName(match[1] or "hf", match[2], match[3]) if match else None


def as_name(source: Path) -> HubName | None:
    """The repository that an argument means: a file or folder of that name comes first."""
    return None if source.exists() else parse_name(str(source))


def is_checkpoint(source: Path) -> bool:
    """Whether an argument that may also be a file means a checkpoint: a folder with config.json, or a name."""
    return (source / "config.json").is_file() or (source.suffix != ".gguf" and as_name(source) is not None)


def near(text: str) -> list[str]:
    """Up to three repositories of the family whose names are like `text`, the nearest first."""
    bare = text.split("@", 1)[0].rsplit(":", 1)[-1].lower()
    wanted = bare if "/" in bare else f"baidu/{bare}"
    by_lower = {name.lower(): name for name in FAMILY}
    found = difflib.get_close_matches(wanted, by_lower, n=3, cutoff=0.8)
    if wanted in found:
        found = [wanted]
    return [by_lower[name] for name in found]


def suggestion(text: str) -> str:
    """`; did you mean …?`, or nothing."""
    found = [name for name in near(text) if name != text]
    return f"; did you mean {' or '.join(found)}?" if found else ""
