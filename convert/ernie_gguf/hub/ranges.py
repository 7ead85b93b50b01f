"""Bytes of a remote file by HTTP, with retries: what arrived is kept, the rest is asked for again."""

import email.utils
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from .names import HubError, SourceChangedError
from .repository import RemoteFile, Sink, Sleep

ATTEMPTS = 8  # in a row without a new byte: with the waits below about four minutes
LONGEST_WAIT = 64.0  # seconds; a server may ask for more, up to MOST_PATIENCE
MOST_PATIENCE = 600.0
TRANSIENT = (408, 429, 500, 502, 503, 504)
CHUNK = 1 << 20


class Response(Protocol):
    """What httpx, httpx2 and requests have in common."""

    status_code: int

    @property
    def headers(self) -> Mapping[str, str]:
        """By name, in any case."""


@dataclass(frozen=True)
class Answer:
    """A response whose body has not been read."""

    response: Response
    chunks: Iterator[bytes]


class Interrupted(Exception):  # noqa: N818 - an event, not a fault of anyone
    """The connection failed, or the server asks to come back later; `wait` in seconds if it says so."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


Request = Callable[[int, int], AbstractContextManager[Answer]]  # bytes begin … end; raises Interrupted and HubError


def retry_after(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """Seconds that a server asks to wait: Retry-After as seconds or as a date (RFC 9110, 10.2.3)."""
    text = next((value for key, value in headers.items() if key.lower() == "retry-after"), "").strip()
    if text.isdecimal():
        return float(text)
    try:
        when = email.utils.parsedate_to_datetime(text).timestamp()
    except (ValueError, TypeError):
        return None
    return max(0.0, when - (time.time() if now is None else now))


def pauses(attempt: int, asked: float | None) -> float:
    """Seconds to wait before the next attempt: 1, 2, 4, … with some chance in it, or as the server asks."""
    if asked is not None:
        return min(asked + 0.1, MOST_PATIENCE)
    wait: float = min(2.0**attempt, LONGEST_WAIT) * random.uniform(0.75, 1.25)
    return wait


def check_range(where: str, answer: Answer, file: RemoteFile, begin: int, end: int) -> None:
    """Raise unless a response is exactly the bytes `begin` … `end` of a file of that size."""
    status, headers = answer.response.status_code, {key.lower(): v for key, v in answer.response.headers.items()}
    if status in TRANSIENT:
        raise Interrupted(f"the server answered {status}", retry_after(answer.response.headers))
    if status == 200 and (begin, end) == (0, file.nbytes):
        found = headers.get("content-length", str(file.nbytes))
        if found == str(file.nbytes) or "content-encoding" in headers:
            return
        raise SourceChangedError(f"{where}: {file.nbytes} bytes before, now {found}; run the command again")
    if status == 200:
        raise HubError(
            f"{where}: the server does not answer range requests (200 instead of 206); download the repository with "
            "another program, and give its folder"
        )
    if status != 206:
        raise HubError(f"{where}: the server answered {status} to a request for bytes {begin} to {end - 1}")
    content_range, expected = headers.get("content-range", ""), f"bytes {begin}-{end - 1}/{file.nbytes}"
    if content_range.rsplit("/", 1)[-1] not in (str(file.nbytes), "*"):
        raise SourceChangedError(f"{where}: {file.nbytes} bytes before, now {content_range}; run the command again")
    if content_range.rsplit("/", 1)[0] != expected.rsplit("/", 1)[0]:
        raise HubError(f"{where}: asked for {expected}, the server answered {content_range!r}")


def read_range(  # noqa: PLR0917 - what, and how
    where: str, file: RemoteFile, span: tuple[int, int], request: Request, sink: Sink, sleep: Sleep = time.sleep
) -> None:
    """Read the bytes begin … end of a file, over as many requests as it takes.

    Raises:
        SourceChangedError: the file is another one now.
        HubError: it cannot be read, or the connection stays away.
    """
    (begin, end), attempt = span, 0
    while begin < end:
        try:
            with request(begin, end) as answer:
                check_range(where, answer, file, begin, end)
                for chunk in answer.chunks:
                    if len(chunk) > end - begin:
                        raise HubError(f"{where}: the server sent more than the bytes that were asked for")
                    sink(chunk)
                    begin, attempt = begin + len(chunk), 0
            if begin < end:
                raise Interrupted(f"the connection closed {end - begin} bytes early")
        except Interrupted as stop:
            attempt += 1
            if attempt >= ATTEMPTS:
                raise HubError(f"{where}: {stop}, {attempt} times in a row; run the command again later") from stop
            sleep(pauses(attempt - 1, stop.wait))
