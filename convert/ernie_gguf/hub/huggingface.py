"""A repository of the Hugging Face Hub by `huggingface_hub`, which decides cache, token, endpoint and offline mode."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import huggingface_hub
from huggingface_hub import HfApi, constants, get_token, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of httpx or httpx2, whichever this version of the library uses
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import HfFileMetadata, get_hf_file_metadata
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    build_hf_headers,
    disable_progress_bars,
    get_session,
)

from .names import HubError, HubName, SourceChangedError, UnreachableError, suggestion
from .ranges import ATTEMPTS, CHUNK, TRANSIENT, Answer, Interrupted, pauses, read_range, retry_after
from .repository import RemoteFile, Sink, Sleep
from .skeleton import SMALL

TIMEOUT = 30.0  # seconds without a byte
LINK_SECONDS = 600.0  # a link to the storage behind the Hub is signed for about an hour

T = TypeVar("T")


def quiet() -> None:
    """Keep the library's warnings of retries off the terminal: what matters becomes one line of ours."""
    huggingface_hub.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if not sys.stderr.isatty():
        disable_progress_bars()


def explained(name: HubName, error: Exception) -> HubError:
    """One line for an error of the library."""
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, OSError | HTTPError):
        return explained(name, error.__cause__)
    if isinstance(error, OfflineModeIsEnabled):
        return UnreachableError(
            f"{name}: HF_HUB_OFFLINE is set, and the cache ({constants.HF_HUB_CACHE}) does not hold the whole "
            "repository; unset it to download"
        )
    if isinstance(error, HfHubHTTPError):
        return HubError(f"{name}: {_refusal(name, error)}")
    if isinstance(error, HFValidationError):
        return HubError(f"{name}: not a name of a repository: {error}")
    if isinstance(error, EntryNotFoundError):
        return HubError(f"{name}: {str(error).splitlines()[-1]}")
    return UnreachableError(
        f"{name}: cannot reach {constants.ENDPOINT}: {_first_line(error)}; with HF_HUB_OFFLINE=1 only the cache is used"
    )


def _refusal(name: HubName, error: HfHubHTTPError) -> str:
    """What an answer of the Hub means to the user."""
    has_token, status = bool(get_token()), error.response.status_code
    login = "log in with `hf auth login`, or set HF_TOKEN"
    gated = f"a gated repository: its terms are accepted at {constants.ENDPOINT}/{name.repo}; "
    private = "or it is private and not open to this token's account" if has_token else f"or private: then {login}"
    missing = f"no repository of that name on {name.place}, {private}{suggestion(name.repo)}"
    meanings: list[tuple[bool, str]] = [
        (isinstance(error, GatedRepoError), gated + ("this token's account has not" if has_token else f"then {login}")),
        (isinstance(error, RepositoryNotFoundError), missing),
        (isinstance(error, RevisionNotFoundError), f"the repository has no branch, tag or commit {name.revision!r}"),
        (isinstance(error, DisabledRepoError), "the Hub has disabled this repository"),
        (
            isinstance(error, EntryNotFoundError),
            f"{_file_of(error)} is listed, but not there; run the command again",
        ),
        (status == 401 and not has_token, missing),
        (status == 401, "the Hub does not know the token (HF_TOKEN or `hf auth login`): give a valid one"),
        (status == 403, "the Hub refuses this token: it needs the permission to read this repository"),
    ]
    other = f"{constants.ENDPOINT} answered {status}; run the command again later"
    return next((meaning for holds, meaning in meanings if holds), other)


def _file_of(error: HfHubHTTPError) -> str:
    return error.response.url.path.rsplit("/", 1)[-1]


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _asked_to_wait(error: Exception) -> float | None:
    response = getattr(error, "response", None)
    return None if response is None else retry_after(response.headers)


def _is_transient(error: BaseException | None) -> bool:
    """Whether asking again may help: the connection, or the server's trouble."""
    if isinstance(error, LocalEntryNotFoundError):
        return _is_transient(error.__cause__)
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in TRANSIENT
    return isinstance(error, HTTPError) and not isinstance(error, OfflineModeIsEnabled)


def _patiently(name: HubName, call: Callable[[], T], attempts: int = ATTEMPTS) -> T:
    """What the library returns, over several attempts where asking again may help; its errors as HubError."""
    for attempt in range(attempts):
        try:
            return call()
        except (HTTPError, OSError, HFValidationError) as error:
            cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else error
            if attempt + 1 == attempts or not _is_transient(error):
                raise explained(name, error) from error
            time.sleep(pauses(attempt, _asked_to_wait(cause) if isinstance(cause, Exception) else None))
    raise AssertionError("unreachable")


class HuggingFace:
    """A repository at the commit that its revision stands for now."""

    def __init__(self, name: HubName) -> None:
        quiet()
        self.name = name
        # One refusal of the connection is enough to look into the cache instead.
        info = _patiently(name, lambda: HfApi().model_info(name.repo, revision=name.revision, files_metadata=True), 4)
        if info.sha is None:
            raise HubError(f"{name}: {constants.ENDPOINT} does not say which commit it has; is HF_ENDPOINT a Hub?")
        self.commit = info.sha
        self.files: Mapping[str, RemoteFile] = {
            each.rfilename: RemoteFile(each.rfilename, each.size or 0, each.lfs.sha256 if each.lfs else each.blob_id)
            for each in info.siblings or ()
        }
        self._links: dict[str, tuple[float, HfFileMetadata]] = {}

    @cached_property
    def cache(self) -> Path:
        """The folder of `huggingface_hub`'s cache."""
        return Path(constants.HF_HUB_CACHE)

    def small(self, path: str) -> Path:
        """Fetch a file into the cache of `huggingface_hub`."""
        return Path(
            _patiently(
                self.name,
                lambda: huggingface_hub.hf_hub_download(self.name.repo, path, revision=self.commit),
            )
        )

    def missing_bytes(self, paths: Iterable[str]) -> int:
        """Bytes of these files that the cache does not hold yet."""
        missing = (
            path
            for path in paths
            if not isinstance(try_to_load_from_cache(self.name.repo, path, revision=self.commit), str)
        )
        return sum(self.files[path].nbytes for path in missing)

    def download(self, paths: Iterable[str]) -> Path:
        """Fetch these files into the cache of `huggingface_hub`; what a run before has fetched stays."""
        wanted = list(paths)
        folder = Path(
            _patiently(
                self.name,
                lambda: huggingface_hub.snapshot_download(
                    self.name.repo, revision=self.commit, allow_patterns=wanted, max_workers=4
                ),
            )
        )
        # As the library does for a branch or a tag: offline it is found by this name.
        reference = folder.parents[1] / "refs" / (self.name.revision or constants.DEFAULT_REVISION)
        if self.name.revision != self.commit:
            reference.parent.mkdir(parents=True, exist_ok=True)
            reference.write_text(self.commit)
        return folder

    def read(self, path: str, begin: int, end: int, sink: Sink, sleep: Sleep = time.sleep) -> None:
        """Give bytes of a file to `sink`, over as many connections as it takes."""
        where = f"{self.name}: {path}"
        read_range(where, self.files[path], (begin, end), lambda b, e: self._request(path, b, e), sink, sleep)

    def _link(self, path: str) -> HfFileMetadata:
        """Where the bytes of a file are, and whether they are still those of this commit."""
        begun, link = self._links.get(path, (0.0, None))
        if link is not None and time.monotonic() - begun < LINK_SECONDS:
            return link
        url = hf_hub_url(self.name.repo, path, revision=self.commit)
        try:
            link = get_hf_file_metadata(url, timeout=TIMEOUT)
        except (HTTPError, OSError) as error:
            if _is_transient(error):
                raise Interrupted(_first_line(error), _asked_to_wait(error)) from error
            raise explained(self.name, error) from error
        file = self.files[path]
        if link.commit_hash not in (self.commit, None):
            raise SourceChangedError(f"{self.name}: {path}: commit {self.commit} before, now {link.commit_hash}")
        if file.digest is not None and link.etag not in (file.digest, None):
            raise SourceChangedError(
                f"{self.name}: {path}: another file than before (etag {link.etag}, was {file.digest}); "
                "nothing was written; run the command again"
            )
        if link.size not in (file.nbytes, None):
            raise SourceChangedError(f"{self.name}: {path}: {file.nbytes} bytes before, now {link.size}")
        self._links[path] = (time.monotonic(), link)
        return link

    @contextmanager
    def _request(self, path: str, begin: int, end: int) -> Iterator[Answer]:
        link = self._link(path)
        url = hf_hub_url(self.name.repo, path, revision=self.commit)
        elsewhere = link.location.split("/", 3)[:3] != url.split("/", 3)[:3]
        headers = build_hf_headers(token=False if elsewhere else None)  # a signed link needs no token, and gets none
        headers |= {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        try:
            with get_session().stream("GET", link.location, headers=headers, timeout=TIMEOUT) as response:
                if response.status_code in (401, 403, 410):  # a signed link has expired
                    self._links.pop(path, None)
                    raise Interrupted(f"the link to the storage is refused ({response.status_code})")
                yield Answer(response, response.iter_bytes(CHUNK))
        except HTTPError as error:
            self._links.pop(path, None)
            raise Interrupted(_first_line(error)) from error


def cached(name: HubName) -> Path | None:
    """The folder of the cache that holds a repository's weights, as far as `huggingface_hub` can tell."""
    quiet()
    patterns = [*SMALL, "*.safetensors"]
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name.repo, revision=name.revision, allow_patterns=patterns, local_files_only=True
            )
        )
    except (OSError, ValueError):
        return None
