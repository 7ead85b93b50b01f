"""The page of llama-server in a real browser: it loads, an answer streams in, a second turn sees the first."""

from __future__ import annotations

import json
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.servers import free_port, running

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'ernie-gguf[browser]'")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.build,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium"),
]
SECONDS = 120_000  # in milliseconds: how long a slow machine may take


def healthy(port: int) -> bool:
    """Whether the server on the port has loaded its model."""
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def address(llama_bin: Path, tiny_ccq2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_port()
    command: list[str | Path] = [
        llama_bin / "llama-server",
        "-m",
        tiny_ccq2_gguf,
        "--port",
        str(port),
        "-c",
        "1024",
        "-n",
        "24",
    ]
    with running(command, tmp_path_factory.mktemp("page") / "log", lambda: healthy(port)):
        try:
            # The page is stored compressed, and the server says 415 to who cannot read it so.
            request = urllib.request.Request(f"http://127.0.0.1:{port}/", headers={"Accept-Encoding": "gzip"})
            with urllib.request.urlopen(request) as page:
                assert page.headers["Content-Type"].startswith("text/html")
        except urllib.error.HTTPError as error:
            assert error.code == 404
            pytest.skip("llama-server was built without its page: install npm, then make build")
        yield f"http://127.0.0.1:{port}"


def test_two_turns(address: str) -> None:
    asked: list[dict[str, Any]] = []

    def listen(request: Any) -> None:  # noqa: ANN401 - playwright is imported only if it is there
        if request.url.endswith("/v1/chat/completions"):
            asked.append(json.loads(request.post_data))

    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(SECONDS)
        page.on("request", listen)
        page.goto(address)
        for turn in (1, 2):
            page.fill("textarea", f"def read_{turn}(path):")
            page.keyboard.press("Enter")
            answer = page.get_by_label("Assistant message with actions").nth(turn - 1)
            answer.wait_for()
            page.get_by_label("Stop generation").wait_for(state="hidden")
            assert len(answer.inner_text()) > 10
        browser.close()
    first, second = (request["messages"] for request in asked if len(request["messages"]) in {1, 3})
    assert all(request["stream"] for request in asked)
    assert [message["content"] for message in first] == ["def read_1(path):"]
    assert [message["role"] for message in second] == ["user", "assistant", "user"]
    assert second[0]["content"] == "def read_1(path):"
    assert second[1]["content"]
