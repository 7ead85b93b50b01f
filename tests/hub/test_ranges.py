"""Bytes by range requests: every way in which a server can answer wrongly, without a server."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
from ernie_gguf.hub.names import HubError, SourceChangedError
from ernie_gguf.hub.ranges import (
    ATTEMPTS,
    LONGEST_WAIT,
    MOST_PATIENCE,
    Answer,
    Interrupted,
    pauses,
    read_range,
    retry_after,
)
from ernie_gguf.hub.repository import RemoteFile

DATA = bytes(range(200))
FILE = RemoteFile("model.safetensors", len(DATA), "digest")


@dataclass
class Response:
    status_code: int = 206
    headers: dict[str, str] = field(default_factory=dict)


class Server:
    """Answers the n-th request as the n-th of `faults` says, and rightly after them."""

    def __init__(self, *faults: str) -> None:
        self.faults, self.asked = list(faults), [(0, 0)][:0]
        self.waits: list[float] = []
        self.got = bytearray()

    @contextmanager
    def request(self, begin: int, end: int) -> Iterator[Answer]:
        fault = self.faults.pop(0) if self.faults else ""
        self.asked.append((begin, end))
        body, status, total = DATA[begin:end], 206, len(DATA)
        if fault == "refused":
            raise Interrupted("refused")
        if fault.isdecimal():
            status = int(fault)
        shift, total = int(fault == "shifted"), total + (fault == "grown")
        headers = {"Content-Range": f"bytes {begin + shift}-{end - 1 + shift}/{total}", "retry-after": "3"}
        if fault == "half":
            body = body[: len(body) // 2]
        if fault == "too much":
            body += b"x"
        yield Answer(Response(status, headers), iter([body[:7], body[7:]]))

    def read(self, begin: int = 10, end: int = 150) -> bytes:
        read_range("a/b: file", FILE, (begin, end), self.request, self.got.extend, self.waits.append)
        return bytes(self.got)


def test_what_arrived_is_not_asked_for_again() -> None:
    server = Server("half", "refused", "half")
    assert server.read() == DATA[10:150]
    assert server.asked == [(10, 150), (80, 150), (80, 150), (115, 150)]


@pytest.mark.parametrize("status", ["408", "429", "500", "502", "503", "504"])
def test_a_server_may_ask_to_wait(status: str) -> None:
    server = Server(status, status)
    assert server.read() == DATA[10:150]
    assert server.waits == pytest.approx([3.1, 3.1])


def test_patience_ends() -> None:
    server = Server(*["refused"] * ATTEMPTS)
    with pytest.raises(HubError, match=rf"^a/b: file: refused, {ATTEMPTS} times in a row; run the command again later"):
        server.read()
    assert len(server.waits) == ATTEMPTS - 1


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("grown", SourceChangedError, "200 bytes before, now bytes 10-149/201"),
        ("shifted", HubError, "asked for bytes 10-149/200, the server answered 'bytes 11-150/200'"),
        ("200", HubError, "does not answer range requests"),
        ("416", HubError, "answered 416 to a request for bytes 10 to 149"),
        ("too much", HubError, "sent more than the bytes that were asked for"),
    ],
)
def test_wrong_answers_are_no_data(fault: str, error: type[Exception], message: str) -> None:
    server = Server(fault)
    with pytest.raises(error, match=message):
        server.read()
    assert len(server.asked) == 1  # asking again would not help


def test_a_whole_file_needs_no_range() -> None:
    assert Server("200").read(0, len(DATA)) == DATA


def test_retry_after() -> None:
    assert retry_after({"Retry-After": " 17 "}) == 17
    assert retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, now=1445412480 - 30) == 30
    assert retry_after({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    assert retry_after({"Retry-After": "soon"}) is None
    assert retry_after({}) is None


def test_pauses_grow_and_end() -> None:
    for attempt, middle in enumerate((1, 2, 4, 8, 16, 32, 64, 64, 64)):
        assert 0.75 * middle <= pauses(attempt, None) <= 1.25 * middle <= 1.25 * LONGEST_WAIT
    assert pauses(0, 1e9) == MOST_PATIENCE
