"""Where the bytes of an `image_url` part come from."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

ImageLoader = Callable[[str], bytes]


def image_bytes(value: Any, loader: ImageLoader | None) -> bytes:  # noqa: ANN401 - whatever a program passes
    """The file that the `image_url` of a message means: bytes, a data URL, or what `loader` makes of the rest.

    Raises:
        ValueError: it is none of these.
    """
    url = value.get("url") if isinstance(value, dict) else value
    if isinstance(url, bytes):
        return url
    if not isinstance(url, str):
        raise ValueError(f"image_url is {value!r}, expected a URL, {{'url': ...}} or bytes")
    if url.startswith("data:"):
        head, _, data = url.partition(",")
        try:
            if not head.endswith(";base64"):
                raise ValueError("no base64")
            return base64.b64decode(data, validate=True)
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"image_url begins with {head[:40]!r}: expected data:TYPE;base64,DATA") from error
    if loader is None:
        raise ValueError(
            f"image_url is {url[:80]!r}: only data: URLs and bytes are read; Llama(image_loader=...) loads others, "
            "ernie_llama.load_local_image local files"
        )
    return loader(url)


def load_local_image(url: str) -> bytes:
    """An `image_loader` that reads local files, by path or file: URL, and nothing from a network.

    Raises:
        ValueError: the file cannot be read, or the URL is of another kind.
    """
    parts = urlsplit(url)
    if parts.scheme not in {"", "file"} or parts.netloc:
        raise ValueError(f"{url[:80]!r} is not a local file")
    path = Path(unquote(parts.path) if parts.scheme else url)
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
