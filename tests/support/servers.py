"""Servers on loopback that live as long as a test needs them."""

import contextlib
import http.client
import json
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

SECONDS = 60


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def accepts(port: int) -> bool:
    """Whether something listens on the port."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
        return True
    return False


@contextlib.contextmanager
def running(command: Sequence[str | Path], log: Path, ready: Callable[[], bool]) -> Iterator[subprocess.Popen[bytes]]:
    """Start a server, wait until it is `ready`, and kill it afterwards; if it ends before, its output is the error."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(each) for each in command], stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + SECONDS
        while not ready():
            assert process.poll() is None, f"{command} ended with {process.returncode}:\n{log.read_text()[-4000:]}"
            assert time.monotonic() < deadline, f"{command} is not ready after a minute:\n{log.read_text()[-4000:]}"
            time.sleep(0.02)
        yield process
    finally:
        process.kill()
        process.wait()


def connect(port: int) -> http.client.HTTPConnection:
    """A connection to a server on loopback."""
    return http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)


def post(connection: http.client.HTTPConnection, path: str, body: Any) -> tuple[int, bytes]:  # noqa: ANN401
    """Status and body of the answer to `body`, which is JSON, or text that is sent as it is."""
    text = body if isinstance(body, str) else json.dumps(body)
    connection.request("POST", path, text, {"Content-Type": "application/json"})
    response = connection.getresponse()
    return response.status, response.read()
