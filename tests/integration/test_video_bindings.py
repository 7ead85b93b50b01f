"""Videos in the bindings: files and frames, beside pictures, cached, as llama-server answers them, and bad ones."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ernie_gguf.convert import prepare, write_gguf
from ernie_gguf.gguf_file.outtype import Outtype
from ernie_llama import Llama, load_local_video
from PIL import Image
from reference.specimens import VL_TINY
from support import png
from support.servers import connect, post
from support.videos import Frames, encoded, needs_ffmpeg

from integration.test_picture_server import serving

pytestmark = [pytest.mark.build, pytest.mark.usefixtures("built_library"), needs_ffmpeg]

QUESTION = "What is written here?"
# Of a frame. Baidu's least, 299 tokens, is more than this model needs.
SMALL = {"size": {"shortest_edge": 4 * 28 * 28, "longest_edge": 1196 * 28 * 28}, "fps": 2, "temporal_patch_size": 2}
PICTURES = [np.asarray(Image.open(path).convert("RGB")) for path in sorted((VL_TINY / "pictures").glob("*.png"))]
SIZE = (112, 56)
# Name: the pictures that are seen one after the other, for how many frames each, and frames per second.
FILMS: dict[str, tuple[tuple[int, ...], tuple[int, ...], int]] = {
    "still.mkv": ((3,), (4,), 2),
    "change.mkv": ((3, 7), (2, 2), 2),
    "back.mkv": ((7, 3), (2, 2), 2),
    "in a pair.mkv": ((3, 7), (1, 3), 2),
    "odd.mkv": ((11, 14), (2, 3), 4),
    "one frame.mov": ((14,), (1,), 2),
    "slow.mov": ((16, 17, 18), (2, 2, 1), 1),
    "sampled.mov": ((0, 1, 2, 3), (40, 40, 40, 40), 16),
}


def frames_of(name: str) -> Frames:
    shown, counts, _ = FILMS[name]
    still = [np.asarray(Image.fromarray(PICTURES[each]).resize(SIZE)) for each in shown]
    return np.concatenate([np.repeat(each[None], count, 0) for each, count in zip(still, counts, strict=True)])


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files without loss."""
    folder = tmp_path_factory.mktemp("films")
    for name, (_, _, rate) in FILMS.items():
        encoded(folder / name, frames_of(name), str(rate))
    return {name: folder / name for name in FILMS}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The example as a model and its mmproj, which lets frames be small."""
    folder = tmp_path_factory.mktemp("ernie-vl-tiny")
    shutil.copytree(VL_TINY, folder / "checkpoint")
    (folder / "checkpoint" / "video_preprocessor_config.json").write_text(json.dumps(SMALL))
    job = prepare(folder / "checkpoint", Outtype.BF16)
    write_gguf(job, folder / "model.gguf", 1, False, lambda _: None, mmproj=folder / "model.mmproj")
    return folder / "model.gguf", folder / "model.mmproj"


@pytest.fixture(scope="module")
def llm(built_library: None, files: tuple[Path, Path]) -> Iterator[Llama]:
    with Llama(files[0], mmproj_path=files[1], n_ctx=512, n_threads=1) as found:
        yield found


def data_url(data: bytes, kind: str = "video/mp4") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def video(url: str | bytes) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url}}


def of_frames(frames: object, fps: float) -> dict[str, Any]:
    return {"type": "video", "video": frames, "fps": fps}


def message(*parts: str | dict[str, Any]) -> list[Any]:
    """One user's message of texts and other parts."""
    content = [{"type": "text", "text": each} if isinstance(each, str) else each for each in parts]
    return [{"role": "user", "content": content}]


def ask(llm: Llama, *parts: str | dict[str, Any]) -> str:
    answer = llm.create_chat_completion(message(*parts), temperature=0, max_tokens=8)
    return answer["choices"][0]["message"]["content"] or ""


def logprobs(llm: Llama, *parts: str | dict[str, Any]) -> list[float]:
    """Of the five likeliest first tokens of the answer."""
    answer = llm.create_chat_completion(message(*parts), temperature=0, max_tokens=1, logprobs=True, top_logprobs=5)
    found = answer["choices"][0]["logprobs"]
    assert found is not None
    assert found["content"] is not None
    return [each["logprob"] for each in found["content"][0]["top_logprobs"]]


def cells(llm: Llama) -> dict[int, int]:
    """How many cells each image or video of the last prompt has."""
    ids, counts = np.unique(llm.input_ids[llm.input_ids < 0], return_counts=True)
    return dict(zip(ids.tolist(), counts.tolist(), strict=True))


def ask_server(port: int, *parts: str | dict[str, Any]) -> str:
    body = {"messages": message(*parts), "max_tokens": 8, "temperature": 0}
    status, answer = post(connect(port), "/v1/chat/completions", body)
    assert status == 200, answer
    text: str = json.loads(answer)["choices"][0]["message"]["content"]
    return text


def test_files_and_frames_are_the_same_video(llm: Llama, films: dict[str, Path]) -> None:
    """Of one to 160 frames: as many tokens, and the same answer, in every form in which frames may come."""
    for name, path in films.items():
        expected = logprobs(llm, video(path.read_bytes()), QUESTION)
        (count,) = cells(llm).values()
        frames = frames_of(name)
        shown = min(len(frames), max(16, len(frames) * 2 // FILMS[name][2]))
        assert count == (shown + 1) // 2 * 8, name
        for form in (frames, list(frames), [Image.fromarray(frame) for frame in frames]):
            found = logprobs(llm, of_frames(form, FILMS[name][2]), QUESTION)
            np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=name)
            assert list(cells(llm).values()) == [count], name


def test_the_order_of_frames_counts(llm: Llama) -> None:
    """Within a pair and from pair to pair."""
    frames = frames_of("change.mkv")
    found = [
        logprobs(llm, of_frames(frames[order], 2), QUESTION) for order in ([0, 1, 2, 3], [2, 3, 0, 1], [0, 2, 1, 3])
    ]
    for other in found[1:]:
        assert not np.allclose(found[0], other, atol=1e-3)


def test_llama_server_answers_the_same(
    llm: Llama, films: dict[str, Path], files: tuple[Path, Path], tmp_path: Path
) -> None:
    """Alone and beside a picture."""
    image = {"type": "image_url", "image_url": {"url": data_url(png.encode(PICTURES[5]), "image/png")}}
    with serving(*files, tmp_path / "log") as server:
        for path in films.values():
            clip = video(data_url(path.read_bytes()))
            for before in ([], [image]):
                assert ask_server(server.port, *before, clip, QUESTION) == ask(llm, *before, clip, QUESTION), path


def test_a_file_by_its_path(llm: Llama, films: dict[str, Path], files: tuple[Path, Path]) -> None:
    """Where the program allows it."""
    path = films["change.mkv"]
    with Llama(files[0], mmproj_path=files[1], n_ctx=512, n_threads=1, video_loader=load_local_video) as allowed:
        for url in (str(path), path.as_uri()):
            assert ask(allowed, video(url), QUESTION) == ask(llm, video(path.read_bytes()), QUESTION)
    with pytest.raises(ValueError, match="only data: URLs and bytes are read"):
        ask(llm, video(str(path)), QUESTION)


def test_the_cache_knows_videos_by_their_content(llm: Llama, films: dict[str, Path]) -> None:
    """Two of a size in turn, then one beside another; a state that is loaded continues."""
    first, second = (video(films[name].read_bytes()) for name in ("change.mkv", "back.mkv"))
    answer, ids = ask(llm, first, QUESTION), llm.input_ids.tolist()
    state = llm.save_state()
    ask(llm, second, QUESTION)
    assert cells(llm).keys().isdisjoint(ids)
    assert ask(llm, first, QUESTION) == answer
    ask(llm, first, second, QUESTION)
    assert list(cells(llm).values()) == [16, 16]
    llm.load_state(state)
    assert llm.input_ids.tolist()[: len(ids)] == ids
    assert ask(llm, first, QUESTION) == answer


BAD: dict[str, tuple[bytes, str]] = {
    "no bytes": (b"", r"^video 1 \(0 bytes\) cannot be used: "),
    "a text": (b"Not a video.\n" * 20, r"^video 1 \(260 bytes\) cannot be used: "),
    "a picture": (png.noise(28, 28, 0), r"^video 1 \(\d+ bytes\) is an image or a sound, expected a video"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused(llm: Llama, name: str) -> None:
    """In one line, and the next question is answered."""
    data, expected = BAD[name]
    with pytest.raises(ValueError, match=expected) as caught:
        ask(llm, video(data_url(data)), QUESTION)
    assert "\n" not in str(caught.value)
    assert ask(llm, of_frames(frames_of("still.mkv"), 2), QUESTION)


def test_the_second_video_is_named(llm: Llama, films: dict[str, Path]) -> None:
    """Videos are counted for themselves."""
    image = {"type": "image_url", "image_url": png.noise(28, 28, 0)}
    with pytest.raises(ValueError, match=r"^video 2 \(4 bytes\) cannot be used: "):
        ask(llm, video(films["change.mkv"].read_bytes()), image, video(b"none"), QUESTION)


def test_without_ffmpeg(llm: Llama, films: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file's error says what is missing; frames need no ffmpeg."""
    data = films["change.mkv"].read_bytes()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"^video 1 \(\d+ bytes\) cannot be used: .*ffmpeg") as caught:
        ask(llm, video(data), QUESTION)
    assert "\n" not in str(caught.value)
    assert ask(llm, of_frames(frames_of("change.mkv"), 2), QUESTION)


def test_without_an_mmproj(files: tuple[Path, Path], films: dict[str, Path]) -> None:
    with Llama(files[0], n_ctx=512, n_threads=1) as llm:
        for part in (video(films["change.mkv"].read_bytes()), of_frames(frames_of("change.mkv"), 2)):
            with pytest.raises(ValueError, match=r"reads text only, without Llama\(mmproj_path=...\)"):
                ask(llm, part, QUESTION)
