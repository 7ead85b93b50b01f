"""Pictures in llama-server and llama-mtmd-cli: several at once, cached, and bad ones."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ernie_gguf.convert import prepare, write_gguf
from ernie_gguf.gguf_file.outtype import Outtype
from ernie_gguf.serving.serve import server_command
from ernie_llama import Llama
from reference import vl_golden
from reference.vl_golden import PICTURES
from support import png
from support.servers import accepts, free_port, running

pytestmark = pytest.mark.build

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
ENDLESS = png.encode(np.zeros((20, 20000, 3), np.uint8))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random model and its eyes in bf16."""
    folder = tmp_path_factory.mktemp("vl")
    job = prepare(vl_golden.checkpoint(folder / "checkpoint"), Outtype.BF16)
    write_gguf(job, folder / "model.gguf", 1, False, lambda _: None, mmproj=folder / "eyes.gguf")
    return folder / "model.gguf", folder / "eyes.gguf"


def part(data: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(data).decode()}}


def messages(*parts: str | bytes) -> list[Any]:
    """One user's message of texts and pictures."""
    content = [part(each) if isinstance(each, bytes) else {"type": "text", "text": each} for each in parts]
    return [{"role": "user", "content": content}]


class Server:
    """A llama-server on loopback."""

    def __init__(self, port: int) -> None:
        self.port = port

    def ask(self, *parts: str | bytes) -> dict[str, Any]:
        """The answer to a message, eight tokens at most, greedy."""
        body = {"messages": messages(*parts), "max_tokens": 8, "temperature": 0, "cache_prompt": True}
        address = f"http://127.0.0.1:{self.port}/v1/chat/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            found: dict[str, Any] = json.load(answer)
            return found

    def text(self, *parts: str | bytes) -> str:
        found: str = self.ask(*parts)["choices"][0]["message"]["content"]
        return found

    def error(self, *parts: str | bytes) -> tuple[int, str]:
        """Status and message of a refusal."""
        with pytest.raises(urllib.error.HTTPError) as caught:
            self.ask(*parts)
        return caught.value.code, json.load(caught.value)["error"]["message"]


@contextmanager
def serving(model: Path, mmproj: Path | None, log: Path) -> Iterator[Server]:
    port = free_port()
    options = ["--port", str(port), "-t", "1", "-np", "3", "-c", "1536", "-ctk", "f16", "-ctv", "f16", "--no-warmup"]
    with running(server_command(model, options, mmproj), log, lambda: accepts(port) and healthy(port)):
        yield Server(port)


def healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=60) as answer:
            return b'"ok"' in answer.read()
    except OSError:  # 503 while it loads
        return False


@pytest.fixture(scope="module")
def server(built_library: None, files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(*files, tmp_path_factory.mktemp("log") / "server.log") as found:
        yield found


def test_pictures_change_the_answer(server: Server) -> None:
    answers = {server.text(data, "What is this?") for data in PICTURES[:3]}
    assert len(answers) > 1


def test_the_cache_tells_pictures_of_a_size_apart(server: Server) -> None:
    other = png.noise(84, 112, 99)  # the size of picture 1
    first = server.text(PICTURES[1], "What is this?")
    server.text(other, "What is this?")
    assert server.text(PICTURES[1], "What is this?") == first


BAD = {
    "none": (
        b"none",
        "Failed to load image, audio or video file 1 (4 bytes): it is damaged or of an unsupported format",
    ),
    "truncated": (
        PICTURES[0][:200],
        "Failed to load image, audio or video file 1 (200 bytes): it is damaged or of an unsupported format",
    ),
    "endless": (
        ENDLESS,
        "Failed to tokenize prompt: a picture of 20000x20 pixels: one side may be at most 200 times the other",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_pictures_leave_the_server_alive(server: Server, name: str) -> None:
    data, expected = BAD[name]
    assert server.error(data, "What is this?") == (400, expected)
    assert server.text("def main():") == server.text("def main():")


def test_the_second_picture_is_bad(server: Server) -> None:
    status, message = server.error(PICTURES[0], PICTURES[1][:300], "What is this?")
    assert (status, message[:46]) == (400, "Failed to load image, audio or video file 2 (3")


def test_the_smallest_picture_is_enlarged(server: Server) -> None:
    found = server.ask(png.encode(np.zeros((1, 1, 3), np.uint8)), "What is this?")
    assert found["choices"][0]["message"]["content"]


def test_the_example_with_curl(server: Server, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    (tmp_path / "picture.png").write_bytes(PICTURES[1])
    question = 'What is "this"?\\'
    command = ["sh", EXAMPLES / "picture_server.sh", tmp_path / "picture.png", question]
    command.append(f"http://127.0.0.1:{server.port}")
    done = subprocess.run([str(each) for each in command], capture_output=True, text=True, check=True, timeout=120)
    found = json.loads(done.stdout)
    expected = server.text(PICTURES[1], question)
    assert found["choices"][0]["message"]["content"].startswith(expected)
    (tmp_path / "picture.png").write_bytes(b"none")
    done = subprocess.run([str(each) for each in command], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode
    assert "Failed to load image" in done.stdout
    (tmp_path / "picture.png").unlink()
    done = subprocess.run([str(each) for each in command], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (1, f"{tmp_path / 'picture.png'}: cannot be read\n")


def test_a_picture_without_eyes(built_library: None, files: tuple[Path, Path], tmp_path: Path) -> None:
    with serving(files[0], None, tmp_path / "log") as server:
        status, message = server.error(PICTURES[0], "What is this?")
        assert 400 <= status < 600
        assert "image input is not supported" in message
        assert server.text("def main():")


def test_python_and_the_command_line_answer_too(
    built_library: None, files: tuple[Path, Path], llama_bin: Path, tmp_path: Path
) -> None:
    (tmp_path / "picture.png").write_bytes(PICTURES[1])
    command = [llama_bin / "llama-mtmd-cli", "-m", files[0], "--mmproj", files[1], "--image", tmp_path / "picture.png"]
    command += ["-p", "What is this?", "-n", "8", "--temp", "0", "-t", "1", "--jinja", "--no-warmup"]
    done = subprocess.run([str(each) for each in command], capture_output=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()
    with Llama(files[0], mmproj_path=files[1], n_ctx=512, n_threads=1) as llm:
        answer = llm.create_chat_completion(messages(PICTURES[1], "What is this?"), temperature=0, max_tokens=8)
        again = llm.create_chat_completion(messages(PICTURES[1], "What is that?"), temperature=0, max_tokens=8)
        assert answer["usage"]["prompt_tokens"] > 12
        assert answer["choices"][0]["message"]["content"]
        assert again["choices"][0]["message"]["content"]
        with pytest.raises(ValueError, match="only data: URLs and bytes are read"):
            llm.create_chat_completion(
                [{"role": "user", "content": [{"type": "image_url", "image_url": "http://x/y"}]}]
            )
