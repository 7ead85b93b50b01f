"""The cards to plan for: this machine's, or stand-ins for cards that are not there.

RPC servers of llama.cpp stand in: they take no memory, and the buffers are as large as on a GPU.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from ernie_llama import DryRun, dry_run, library_path

from ..errors import ErnieGgufError

GIB = 2**30


class EstimateError(ErnieGgufError):
    """The needs of a file cannot be told; says why."""


@dataclass(frozen=True)
class Cards:
    """Cards to plan for: this machine's, or stand-ins, in a process of their own: it ends with their servers.

    `servers` are HOST:PORT, one for each card, in their order.
    """

    servers: tuple[str, ...]
    dry_run: Callable[..., DryRun]


OWN_CARDS = Cards((), dry_run)


def read_sizes(text: str) -> tuple[int, ...]:
    """`24,24,24` -> bytes of each card.

    Raises:
        ValueError: that is not a list of sizes in GiB.
    """
    sizes = tuple(float(part) for part in text.split(","))
    if not all(0 < size < 10_000 for size in sizes):
        raise ValueError(text)
    return tuple(round(size * GIB) for size in sizes)


@contextlib.contextmanager
def stand_ins(count: int) -> Iterator[Cards]:
    """So many RPC servers of llama.cpp on this machine, until the block ends.

    Raises:
        EstimateError: the program is missing, or does not start.
    """
    program = library_path().with_name("ggml-rpc-server")
    if not program.is_file():
        raise EstimateError(f"{program} does not exist, and it stands in for the cards: run `ernie-gguf build`")
    running: list[subprocess.Popen[bytes]] = []
    try:
        ports = [_free_port() for _ in range(count)]
        for port in ports:
            command = [str(program), "-H", "127.0.0.1", "-p", str(port)]
            running.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        for process, port in zip(running, ports, strict=True):
            _wait(port, process)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
            servers = tuple(f"127.0.0.1:{port}" for port in ports)
            yield Cards(servers, lambda *args, **options: executor.submit(dry_run, *args, **options).result())
    finally:
        for process in running:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _wait(port: int, process: subprocess.Popen[bytes]) -> None:
    """Until something listens at `port`."""
    end = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < end:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise EstimateError("ggml-rpc-server, which stands in for a card, did not start")
