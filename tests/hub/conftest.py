"""A repository on a server of this machine, and the client of the Hub pointed at it."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from reference.specimens import TINY
from support.hub_server import FakeHub, hub_server

REPO = "baidu/ERNIE-4.5-21B-A3B-PT"

Serve = Callable[..., FakeHub]


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Serve a folder as a repository, and let `huggingface_hub` find it there, with an empty cache and no token."""
    pytest.importorskip("huggingface_hub")
    from ernie_gguf.hub import ranges
    from huggingface_hub import constants

    monkeypatch.setattr(ranges, "LONGEST_WAIT", 0.01)
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with ExitStack() as stack:

        def start(folder: Path, repo: str = REPO) -> FakeHub:
            hub = stack.enter_context(hub_server(folder, repo))
            monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
            template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
            monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
            return hub

        yield start


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the example, in a folder with the repository's name."""
    return Path(shutil.copytree(TINY, tmp_path / "source" / "ERNIE-4.5-21B-A3B-PT"))


@pytest.fixture
def hub(serve: Serve, checkpoint: Path) -> FakeHub:
    """The example as a repository."""
    return serve(checkpoint)
