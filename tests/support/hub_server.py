"""A server on loopback that speaks the Hub's HTTP API for one repository, and breaks when it is told to.

What it answers follows huggingface_hub's client: `/api/models/…/revision/…` with blobs, `/api/models/…/tree/…`,
`/NAME/resolve/COMMIT/FILE` with X-Repo-Commit, X-Linked-Etag and X-Linked-Size, and a redirect of large files to signed
links of another origin, which serves ranges and takes no token.
"""

import hashlib
import json
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LARGE = 1 << 16  # from this size on a file is stored behind the Hub, as LFS does
MAIN = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """What it serves and how it misbehaves; `log` has method, path, range and whether a token came of every request."""

    def __init__(self, folder: Path, repo: str) -> None:
        self.folder, self.repo, self.commit = folder, repo, MAIN
        self.token: str | None = None  # that a request needs
        self.error: tuple[int, str] | None = None  # status and X-Error-Code of every request to the Hub
        self.faults: deque[str] = deque()  # one is used up by each request for bytes of a large file
        self.files_error: tuple[int, str] | None = None  # of resolve alone: a gated repository shows its metadata
        self.log: list[tuple[str, str, str | None, bool]] = []
        self.sent = 0  # bytes of large files
        self.limit: int | None = None  # connections break for good once so many bytes are sent
        self.redirects = True
        self.on_bytes: Callable[[int], None] = lambda _: None
        self.lock = threading.Lock()
        self.endpoint = self.storage = ""

    def names(self) -> list[str]:
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file())

    def data(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def etag(self, name: str) -> str:
        data = self.data(name)
        if len(data) >= LARGE:
            return hashlib.sha256(data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *_: object) -> None:
        pass

    def reply(self, status: int, body: bytes = b"", /, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def fail(self, status: int, code: str) -> None:
        extra = {"X_Error_Message": "Invalid credentials in Authorization header"} if code == "BadToken" else {}
        self.reply(status, b'{"error": "no"}', X_Error_Code=code, Content_Type="application/json", **extra)

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        token = self.headers.get("Authorization")
        self.hub.log.append((self.command, path, self.headers.get("Range"), token is not None))
        try:
            if path.startswith("/storage/"):
                self.storage(path.removeprefix("/storage/"))
            else:
                self.site(path, token)
        except (BrokenPipeError, ConnectionResetError):
            pass

    do_HEAD = do_GET  # noqa: N815 - the name that http.server calls

    def site(self, path: str, token: str | None) -> None:  # noqa: PLR0911 - a table of routes
        hub = self.hub
        if hub.error:
            return self.fail(*hub.error)
        if token is not None and token != f"Bearer {hub.token or 'good'}":
            return self.fail(401, "BadToken")
        if hub.token and token is None:
            return self.fail(401, "RepoNotFound")
        if path.startswith(f"/api/models/{hub.repo}/tree/"):
            return self.api([self.entry(name) for name in hub.names()])
        if path.startswith(f"/api/models/{hub.repo}"):
            revision = path.partition("/revision/")[2] or "main"
            return self.info() if revision in ("main", "v1", hub.commit) else self.fail(404, "RevisionNotFound")
        if path.startswith(f"/{hub.repo}/resolve/"):
            if hub.files_error:
                return self.fail(*hub.files_error)
            return self.resolve(path.split("/", 5)[5])
        return self.fail(404, "RepoNotFound")

    def api(self, body: object) -> None:
        self.reply(200, json.dumps(body).encode(), Content_Type="application/json")

    def entry(self, name: str) -> dict[str, object]:
        size = len(self.hub.data(name))
        lfs = {"oid": self.hub.etag(name), "size": size, "pointerSize": 134}
        return {"type": "file", "path": name, "size": size, "oid": "0" * 40} | ({"lfs": lfs} if size >= LARGE else {})

    def info(self) -> None:
        siblings = []
        for name in self.hub.names():
            size, etag = len(self.hub.data(name)), self.hub.etag(name)
            lfs = {"lfs": {"sha256": etag, "size": size, "pointerSize": 134}} if size >= LARGE else {}
            siblings.append({"rfilename": name, "size": size, "blobId": etag if not lfs else "0" * 40, **lfs})
        self.api(
            {"id": self.hub.repo, "sha": self.hub.commit or None, "private": False, "tags": [], "siblings": siblings}
        )

    def resolve(self, name: str) -> None:
        hub = self.hub
        if not (hub.folder / name).is_file():
            return self.fail(404, "EntryNotFound")
        size, etag = len(hub.data(name)), f'"{hub.etag(name)}"'
        if size < LARGE:
            return self.reply(200, hub.data(name), X_Repo_Commit=hub.commit, ETag=etag)
        known = {"X_Repo_Commit": hub.commit, "X_Linked_Etag": etag, "X_Linked_Size": str(size)}
        if not hub.redirects:
            if self.command == "HEAD":
                self.send_response(200)
                for key, value in {"Content-Length": str(size), "ETag": etag, "X-Repo-Commit": hub.commit}.items():
                    self.send_header(key, value)
                return self.end_headers()
            return self.storage(name)
        return self.reply(302, Location=f"{hub.storage}/storage/{name}", **known)

    def storage(self, name: str) -> None:
        hub = self.hub
        data = hub.data(name)
        asked = self.headers.get("Range")
        begin, end = 0, len(data)
        if asked:
            first, last = asked.removeprefix("bytes=").split("-")
            begin, end = int(first), int(last) + 1 if last else end
        fault = hub.faults.popleft() if hub.faults else ""
        if fault.startswith("status "):
            status, wait = fault.split()[1], fault.split()[2:]
            asks: dict[str, str] = {"Retry_After": wait[0]} if wait else {}
            return self.reply(int(status), **asks)
        if fault == "ignore range":
            asked, begin, end = None, 0, len(data)
        if fault == "shift range":
            begin, end = begin + 1, end + 1
        body = data[begin:end]
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"of the storage"')
        if asked:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(data)}")
        self.end_headers()
        if self.command == "HEAD":
            return None
        return self.body(body, fault)

    def body(self, body: bytes, fault: str) -> None:
        hub = self.hub
        if fault in ("truncate", "reset"):
            body = body[: len(body) // 2]
        for at in range(0, len(body), 1 << 15):
            chunk = body[at : at + (1 << 15)]
            with hub.lock:
                if hub.limit is not None and hub.sent + len(chunk) > hub.limit:
                    self.close_connection = True
                    self.connection.close()
                    return
                hub.sent += len(chunk)
            self.wfile.write(chunk)
            hub.on_bytes(hub.sent)
        if fault in ("truncate", "reset"):
            self.wfile.flush()
            self.close_connection = True


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is no error here."""


@contextmanager
def hub_server(folder: Path, repo: str) -> Iterator[FakeHub]:
    """Serve `folder` as the repository `repo`, the large files from another host than the Hub."""
    hub = FakeHub(folder, repo)
    handler = type("Handler", (_Handler,), {"hub": hub})
    servers = [_Server(("127.0.0.1", 0), handler) for _ in range(2)]
    for server in servers:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    # Two host names: older versions of huggingface_hub tell hosts apart by them alone.
    ports = [server.server_address[1] for server in servers]
    hub.endpoint, hub.storage = f"http://127.0.0.1:{ports[0]}", f"http://localhost:{ports[1]}"
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
