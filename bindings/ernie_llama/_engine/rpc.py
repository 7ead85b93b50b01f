"""RPC servers, whose devices a process uses like its own."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence

_rpc_lock = threading.Lock()
_rpc_servers: set[str] = set()


def add_rpc_servers(library: ctypes.CDLL, servers: str | Sequence[str]) -> None:
    """Add the devices of RPC servers to those of this process, each server once, until the process ends.

    Args:
        library: the loaded library.
        servers: HOST:PORT of each, as a list or separated by commas.

    Raises:
        ValueError: the library has no RPC backend, or a server does not answer.
    """
    endpoints = servers.split(",") if isinstance(servers, str) else list(servers)
    backend = library.ggml_backend_reg_by_name(b"RPC")
    address = backend and library.ggml_backend_reg_get_proc_address(backend, b"ggml_backend_rpc_add_server")
    if not address:
        raise ValueError("this libllama has no RPC backend: build it with -DGGML_RPC=ON")
    add_server = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)(address)
    with _rpc_lock:
        for endpoint in endpoints:
            if endpoint in _rpc_servers:
                continue
            _check_reachable(endpoint)
            library.ggml_backend_register(add_server(endpoint.encode()))
            _rpc_servers.add(endpoint)


def _check_reachable(endpoint: str) -> None:
    """ValueError if nothing listens at HOST:PORT: ggml would abort the process."""
    import socket

    host, colon, port = endpoint.rpartition(":")
    if not colon or not port.isdecimal():
        raise ValueError(f"rpc_servers: found {endpoint!r}, expected HOST:PORT")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        why = error.strerror or error
        raise ValueError(
            f"no RPC server answers at {endpoint} ({why}): start `ggml-rpc-server -H HOST -p PORT` there"
        ) from error
