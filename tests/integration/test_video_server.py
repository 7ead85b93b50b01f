"""Videos in llama-server and llama-mtmd-cli: several, beside pictures, cached, at once, and bad ones."""

from __future__ import annotations

import base64
import json
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ernie_gguf.convert import prepare, write_gguf
from ernie_gguf.gguf_file.outtype import Outtype
from ernie_gguf.serving.serve import server_command
from reference import video_golden
from reference.vl_golden import PICTURES
from support import videos
from support.servers import accepts, free_port, running
from support.videos import drawn, needs_ffmpeg

pytestmark = [pytest.mark.build, needs_ffmpeg]

Part = dict[str, Any]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random model and its eyes in bf16."""
    folder = tmp_path_factory.mktemp("video")
    job = prepare(video_golden.checkpoint(folder / "checkpoint"), Outtype.BF16)
    write_gguf(job, folder / "model.gguf", 1, False, lambda _: None, mmproj=folder / "eyes.gguf")
    return folder / "model.gguf", folder / "eyes.gguf"


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Three of a size and a longer one."""
    folder = tmp_path_factory.mktemp("clips")
    made = [videos.encoded(folder / f"{i}.mov", drawn(6, 56, 56, i)) for i in range(3)]
    return [*made, videos.encoded(folder / "long.mkv", drawn(21, 84, 56, 7), "4")]


def text(value: str) -> Part:
    return {"type": "text", "text": value}


def url(data: bytes, kind: str = "video/mp4") -> str:
    return f"data:{kind};base64," + base64.b64encode(data).decode()


def video(data: bytes) -> Part:
    return {"type": "video_url", "video_url": {"url": url(data)}}


def picture(data: bytes) -> Part:
    return {"type": "image_url", "image_url": {"url": url(data, "image/png")}}


class Server:
    """A llama-server on loopback."""

    def __init__(self, port: int) -> None:
        self.port = port

    def ask(self, *parts: Part) -> dict[str, Any]:
        """The answer to a message, eight tokens at most, greedy."""
        body = {"messages": [{"role": "user", "content": list(parts)}], "max_tokens": 8, "temperature": 0}
        address = f"http://127.0.0.1:{self.port}/v1/chat/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            found: dict[str, Any] = json.load(answer)
            return found

    def text(self, *parts: Part) -> str:
        found: str = self.ask(*parts)["choices"][0]["message"]["content"]
        return found

    def error(self, *parts: Part) -> tuple[int, str]:
        """Status and message of a refusal."""
        with pytest.raises(urllib.error.HTTPError) as caught:
            self.ask(*parts)
        return caught.value.code, json.load(caught.value)["error"]["message"]


def healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=60) as answer:
            return b'"ok"' in answer.read()
    except OSError:  # 503 while it loads
        return False


@contextmanager
def serving(model: Path, mmproj: Path | None, log: Path, *more: str) -> Iterator[Server]:
    port = free_port()
    options = ["--port", str(port), "-t", "1", "-np", "2", "-c", "1024", "--no-warmup", *more]
    with running(server_command(model, options, mmproj), log, lambda: accepts(port) and healthy(port)):
        yield Server(port)


@pytest.fixture(scope="module")
def server(built_library: None, files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(*files, tmp_path_factory.mktemp("log") / "server.log") as found:
        yield found


ASKED = text("What is this?")


def test_both_forms_of_a_request(server: Server, clips: list[bytes]) -> None:
    """OpenAI's video_url, and llama.cpp's input_video with a URL or base64."""
    expected = server.text(video(clips[0]), ASKED)
    own = [{"url": url(clips[0])}, {"data": base64.b64encode(clips[0]).decode()}]
    assert [server.text({"type": "input_video", "input_video": each}, ASKED) for each in own] == [expected] * 2


def test_tokens_are_those_of_pairs_of_frames(server: Server, clips: list[bytes]) -> None:
    """4 to a pair; the longer one has 16 frames chosen of 21, 6 tokens to a pair."""
    counts = [server.ask(each, ASKED)["usage"]["prompt_tokens"] for each in (video(clips[0]), video(clips[3]))]
    assert counts[1] - counts[0] == 8 * 6 - 3 * 4


def test_the_cache_tells_videos_of_a_size_apart(server: Server, clips: list[bytes]) -> None:
    first, second, again = (server.ask(video(clips[i]), ASKED) for i in (1, 2, 1))
    answers = [each["choices"][0]["message"]["content"] for each in (first, second, again)]
    assert answers[0] == answers[2]
    once_more = server.ask(video(clips[1]), ASKED)["usage"]
    assert once_more["prompt_tokens_details"]["cached_tokens"] >= 12  # the video is not read again


def test_several_and_pictures(server: Server, clips: list[bytes]) -> None:
    mixed = [text("First"), video(clips[0]), picture(PICTURES[0]), text("then"), video(clips[3]), ASKED]
    orders = [mixed, [mixed[0], mixed[4], mixed[2], mixed[3], mixed[1], ASKED]]
    counts = [server.ask(*parts)["usage"]["prompt_tokens"] for parts in orders]
    assert counts[0] == counts[1]


def test_two_slots_at_once(server: Server, clips: list[bytes]) -> None:
    """Each with its video; the answers are those of a server that does nothing else."""
    asked = [(video(clips[i]), ASKED) for i in range(3)] + [(text("def main():"),)]
    alone = [server.text(*parts) for parts in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        assert list(pool.map(lambda parts: server.text(*parts), asked)) == alone


def test_bad_videos_leave_the_server_alive(server: Server, tmp_path: Path) -> None:
    whole = videos.encoded(tmp_path / "a.mov", drawn(20, 56, 56), "2", "-movflags", "faststart")
    videos.ffmpeg("-f", "lavfi", "-i", "sine=duration=1", "-c:a", "aac", tmp_path / "sound.mp4")
    sound = (tmp_path / "sound.mp4").read_bytes()
    cut = whole[: len(whole) * 2 // 3]
    before = "Failed to load image, audio or video file"
    for data, reason in [
        (cut, "the video is cut off"),
        (sound, "it has no video stream"),
        (b"none", "it is damaged or of an unsupported format"),
    ]:
        assert server.error(video(data), ASKED) == (400, f"{before} 1 ({len(data)} bytes): {reason}")
    assert server.error(video(b""), ASKED)[0] == 400
    assert server.text(text("def main():")) == server.text(text("def main():"))


def test_a_video_that_does_not_fit_the_context(server: Server, tmp_path: Path) -> None:
    data = videos.encoded(tmp_path / "a.mkv", drawn(16, 336, 336))
    status, message = server.error(video(data), ASKED)
    assert status == 400
    assert "exceeds the available context size" in message


def test_without_ffmpeg(built_library: None, files: tuple[Path, Path], clips: list[bytes], tmp_path: Path) -> None:
    with serving(*files, tmp_path / "log", "--video-ffmpeg-dir", str(tmp_path)) as server:
        status, message = server.error(video(clips[0]), ASKED)
        assert status == 400
        assert f"for a video ffmpeg and ffprobe must be installed: cannot run {tmp_path}/ffprobe" in message
        assert server.text(picture(PICTURES[0]), ASKED)


def test_a_video_without_eyes(
    built_library: None, files: tuple[Path, Path], clips: list[bytes], tmp_path: Path
) -> None:
    with serving(files[0], None, tmp_path / "log") as server:
        status, message = server.error(video(clips[0]), ASKED)
        assert 400 <= status < 600
        assert "video input is not supported" in message
        assert server.text(text("def main():"))


def test_the_command_line(files: tuple[Path, Path], clips: list[bytes], llama_bin: Path, tmp_path: Path) -> None:
    def run(data: bytes) -> subprocess.CompletedProcess[bytes]:
        (tmp_path / "a.mov").write_bytes(data)
        command = [llama_bin / "llama-mtmd-cli", "-m", files[0], "--mmproj", files[1], "--video", tmp_path / "a.mov"]
        command += ["-p", "What is this?", "-n", "8", "--temp", "0", "-t", "1", "--jinja", "--no-warmup"]
        return subprocess.run([str(each) for each in command], capture_output=True, check=False, timeout=120)

    done = run(clips[0])
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()
    for data, reason in [(b"none", b"failed to decode buffer as either image/audio/video")]:
        done = run(data)
        assert done.returncode == 1
        assert reason in done.stderr
