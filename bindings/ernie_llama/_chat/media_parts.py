"""The parts of a message that show something: where their bytes come from."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from .._engine.media import ImageFile, Medium, VideoFile, VideoFrames

ImageLoader = Callable[[str], bytes]
VideoLoader = Callable[[str], bytes]


class Loaders(NamedTuple):
    """What returns the bytes of a URL that is not a data: URL; nothing is loaded without."""

    image: ImageLoader | None = None
    video: VideoLoader | None = None


# The types of parts that show something.
MEDIA = ("image_url", "video_url", "video")


def medium(part: Mapping[str, Any], loaders: Loaders) -> Medium:
    """What a part of one of `MEDIA` shows.

    Raises:
        ValueError: it cannot be had.
    """
    if part["type"] == "image_url":
        return ImageFile(_bytes("image", part.get("image_url"), loaders.image))
    if part["type"] == "video_url":
        return VideoFile(_bytes("video", part.get("video_url"), loaders.video))
    if not {"video", "fps"} <= part.keys():
        raise ValueError(f'a part has {sorted(part)}, expected {{"type": "video", "video": [...], "fps": 2}}')
    return VideoFrames.of(part["video"], part["fps"])


def _bytes(kind: str, value: Any, loader: ImageLoader | None) -> bytes:  # noqa: ANN401 - whatever a program passes
    """The file behind a URL: bytes, a data URL, or what `loader` returns for others; ValueError if there is none."""
    url = value.get("url") if isinstance(value, dict) else value
    if isinstance(url, bytes):
        return url
    if not isinstance(url, str):
        raise ValueError(f"{kind}_url is {value!r}, expected a URL, {{'url': ...}} or bytes")
    if url.startswith("data:"):
        head, _, data = url.partition(",")
        try:
            if not head.endswith(";base64"):
                raise ValueError("no base64")
            return base64.b64decode(data, validate=True)
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"{kind}_url begins with {head[:40]!r}: expected data:TYPE;base64,DATA") from error
    if loader is None:
        raise ValueError(
            f"{kind}_url is {url[:80]!r}: only data: URLs and bytes are read; Llama({kind}_loader=...) loads others, "
            f"ernie_llama.load_local_{kind} local files"
        )
    return loader(url)


def load_local_image(url: str) -> bytes:
    """An `image_loader` that reads local files, by path or file: URL, and nothing from a network.

    Raises:
        ValueError: the file cannot be read, or the URL is of another kind.
    """
    return _local_file(url)


def load_local_video(url: str) -> bytes:
    """A `video_loader` that reads local files, by path or file: URL, and nothing from a network.

    Raises:
        ValueError: the file cannot be read, or the URL is of another kind.
    """
    return _local_file(url)


def _local_file(url: str) -> bytes:
    parts = urlsplit(url)
    if parts.scheme not in {"", "file"} or parts.netloc:
        raise ValueError(f"{url[:80]!r} is not a local file")
    path = Path(unquote(parts.path) if parts.scheme else url)
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
