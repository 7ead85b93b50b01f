"""The page of llama-server in a real browser: answers stream in, reasoning is folded, a picture is attached."""

from __future__ import annotations

import json
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ernie_gguf.convert import prepare, write_gguf
from ernie_gguf.gguf_file.outtype import Outtype
from reference.specimens import VL_TINY
from support.servers import free_port, running

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'ernie-gguf[browser]'")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.build,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium"),
]
SECONDS = 120_000  # in milliseconds: how long a slow machine may take
# A template whose answers begin with reasoning, and a grammar with which any model reasons and then answers.
THINKS = """\
{%- for message in messages %}
{{- message.role + ': ' }}
{%- if message.reasoning_content %}{{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}{%- endif %}
{{- message.content + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'assistant: <think>\\n' }}{%- endif %}"""
REASONS = r'root ::= "first " [a-z] "\n</think>\n\nthen " [a-z]'


def healthy(port: int) -> bool:
    """Whether the server on the port has loaded its model."""
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
    except OSError:
        return False
    return True


@contextmanager
def serving(llama_bin: Path, folder: Path, model: Path, *options: str | Path) -> Iterator[str]:
    """A server with a page; gives its address."""
    port = free_port()
    command = [llama_bin / "llama-server", "-m", model, "--port", str(port), "-c", "1024", "-n", "24", *options]
    with running(command, folder / "log", lambda: healthy(port)):
        try:
            # The page is stored compressed, and the server says 415 to who cannot read it so.
            request = urllib.request.Request(f"http://127.0.0.1:{port}/", headers={"Accept-Encoding": "gzip"})
            with urllib.request.urlopen(request) as page:
                assert page.headers["Content-Type"].startswith("text/html")
        except urllib.error.HTTPError as error:
            assert error.code == 404
            pytest.skip("llama-server was built without its page: install npm, then make build")
        yield f"http://127.0.0.1:{port}"


class Browser:
    """A browser on the page, and what the page has asked the server."""

    def __init__(self, page: Any) -> None:  # noqa: ANN401 - playwright is imported only if it is there
        self.page = page
        self.requests: list[dict[str, Any]] = []
        page.set_default_timeout(SECONDS)
        page.on("request", self._listen)

    def _listen(self, request: Any) -> None:  # noqa: ANN401
        if request.url.endswith("/v1/chat/completions"):
            self.requests.append(json.loads(request.post_data))

    def say(self, text: str, turn: int = 1) -> Any:  # noqa: ANN401
        """Type a message, wait until its answer is whole; gives the answer's element."""
        self.page.fill("textarea", text)
        self.page.keyboard.press("Enter")
        answer = self.page.get_by_label("Assistant message with actions").nth(turn - 1)
        answer.wait_for()
        self.page.get_by_label("Stop generation").wait_for(state="hidden")
        return answer


@contextmanager
def browsing(address: str) -> Iterator[Browser]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        found = Browser(browser.new_page())
        found.page.goto(address)
        yield found
        browser.close()


def test_two_turns(llama_bin: Path, tiny_ccq2_gguf: Path, tmp_path: Path) -> None:
    with serving(llama_bin, tmp_path, tiny_ccq2_gguf) as address, browsing(address) as browser:
        for turn in (1, 2):
            assert len(browser.say(f"def read_{turn}(path):", turn).inner_text()) > 10
    first, second = (request["messages"] for request in browser.requests if len(request["messages"]) in {1, 3})
    assert all(request["stream"] for request in browser.requests)
    assert [message["content"] for message in first] == ["def read_1(path):"]
    assert [message["role"] for message in second] == ["user", "assistant", "user"]
    assert second[0]["content"] == "def read_1(path):"
    assert second[1]["content"]


def test_reasoning_is_folded(llama_bin: Path, tiny_ccq2_gguf: Path, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(THINKS)
    options = ("--jinja", "--chat-template-file", template, "--grammar", REASONS)
    with serving(llama_bin, tmp_path, tiny_ccq2_gguf, *options) as address, browsing(address) as browser:
        answer = browser.say("Hello")
        fold = answer.get_by_role("button", name="Reasoning")
        assert fold.get_attribute("aria-expanded") == "false"
        assert "then " in answer.inner_text()
        assert "first " not in answer.inner_text()
        fold.click()
        answer.get_by_text("first ").wait_for()


def test_a_picture_is_attached(llama_bin: Path, tmp_path: Path) -> None:
    """The example that reads numbers and words is shown one."""
    model, eyes = tmp_path / "model.gguf", tmp_path / "eyes.gguf"
    write_gguf(prepare(VL_TINY, Outtype.BF16), model, 1, False, lambda _: None, mmproj=eyes)
    options = ("--mmproj", eyes, "--jinja", "--temp", "0")
    with serving(llama_bin, tmp_path, model, *options) as address, browsing(address) as browser:
        picture = VL_TINY / "pictures" / "08-377-blue.png"
        browser.page.wait_for_selector("textarea")
        browser.page.locator("input[type=file]").first.set_input_files(picture)
        browser.page.get_by_alt_text(picture.name).wait_for()
        assert browser.say("What is written here?").inner_text().startswith("377\n")
    (parts,) = (message["content"] for request in browser.requests for message in request["messages"])
    assert {part["type"] for part in parts} == {"text", "image_url"}
