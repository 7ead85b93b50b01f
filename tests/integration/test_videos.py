"""Videos of ERNIE-4.5-VL, frames in memory and files, against transformers in float32 (golden file).

Errors are relative, as in test_pictures.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from ernie_gguf.convert import prepare, write_gguf
from ernie_gguf.gguf_file.outtype import FloatType, Outtype
from ernie_gguf.gguf_file.reader import read_gguf
from ernie_gguf.plan import choose
from ernie_llama import Llama
from ernie_llama._engine.media import ImageFile, VideoFrames
from ernie_llama._engine.vision import Image, VisionEncoder
from reference import video_golden
from reference.golden import Floats, sampled_ids
from reference.video_golden import PROMPTS, RESIZED, TIMED, TIMES, VIDEOS, GoldenVideos
from reference.vl_golden import PICTURES
from support import videos
from support.float32 import use_float32
from support.videos import drawn, needs_ffmpeg

pytestmark = pytest.mark.build

EMBEDDINGS, LOGITS = 1e-3, 3e-3  # measured: see the assertions' messages
HIDDEN = 256


@pytest.fixture(scope="module", autouse=True)
def _built_library(llama_bin: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ERNIE_LLAMA_LIB_PATH", str(llama_bin))
        yield


@dataclass(frozen=True)
class Files:
    """A model and its eyes."""

    model: Path
    eyes: Path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """The oracle's model in float32."""
    folder = tmp_path_factory.mktemp("video")
    job = prepare(video_golden.checkpoint(folder / "checkpoint"), Outtype.F32, choices=choose(projector=FloatType.F32))
    write_gguf(job, folder / "model.gguf", 1, False, lambda _: None, mmproj=folder / "eyes.gguf")
    return Files(folder / "model.gguf", folder / "eyes.gguf")


@pytest.fixture(scope="module")
def llm(files: Files) -> Iterator[Llama]:
    with loaded(files) as found:
        yield found


def loaded(files: Files, **options: object) -> Llama:
    with pytest.MonkeyPatch.context() as patch:
        use_float32(patch)
        defaults = {"n_ctx": 1024, "n_threads": 1, "logits_all": True, "cache_prompt": False}
        return Llama(files.model, mmproj_path=files.eyes, **(defaults | options))  # type: ignore[arg-type]


def eyes_of(llm: Llama) -> VisionEncoder:
    found = llm._engine.images.encoder
    assert found is not None
    return found


def relative(found: Floats, expected: Floats) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def logits(llm: Llama, parts: Sequence[int]) -> Floats:
    """At every position, [m, V]; NaN for pictures and videos."""
    eyes = eyes_of(llm)
    found: list[int | Image] = []
    for part in parts:
        if part >= 0:
            found.append(part)
        elif part > -101:
            found += [
                each
                for each in eyes.tokenize(eyes.marker, [ImageFile(PICTURES[-1 - part])], add_special=False)
                if not isinstance(each, int)
            ]
        else:
            chunk = videos.of_frames(eyes, VIDEOS[-101 - part])
            found.append(Image(f"{-part:064x}", chunk.tokens, chunk.positions, chunk.chunk))
    llm.reset()
    llm.eval(llm._engine.images.ids(found))
    return llm.scores.copy()


def test_embeddings(llm: Llama) -> None:
    """An even and an odd number of frames, one, 180, and frames that are resized."""
    golden = GoldenVideos.load()
    for v, frames in enumerate(VIDEOS):
        chunk = videos.of_frames(eyes_of(llm), frames)
        found = videos.embeddings(eyes_of(llm), chunk, HIDDEN)
        error = np.abs(found[:, ::16] - golden.embeddings[v]).max() / golden.largest[v]
        assert error < (20 if v == RESIZED else 1) * EMBEDDINGS, (v, error)


def test_logits(llm: Llama) -> None:
    """Text and videos, several, first, beside pictures; text behind a video of more pairs than rows and columns."""
    golden = GoldenVideos.load()
    for i, parts in enumerate(PROMPTS):
        found = logits(llm, parts)
        text = ~np.isnan(found[:, 0])
        sampled = found[:, sampled_ids(found.shape[1])]
        error = (np.abs(sampled - golden.values[i])[text] / golden.spread[i][text, None]).max()
        last = np.abs(found[-1] - golden.last[i]).max() / golden.spread[i][-1]
        assert max(error, last) < (20 if -101 - RESIZED in parts else 1) * LOGITS, (i, error, last)
        assert found[-1].argmax() == golden.last[i].argmax()


def test_positions(llm: Llama) -> None:
    """What follows a video goes on behind its largest coordinate: of time, rows or columns."""
    for frames, width, height in [(4, 56, 56), (3, 84, 112), (1, 140, 56), (180, 56, 56), (2, 28 * 9, 28)]:
        chunk = videos.of_frames(eyes_of(llm), drawn(frames, width, height))
        pairs, rows, columns = -(-frames // 2), height // 28, width // 28
        assert (chunk.tokens, chunk.positions) == (pairs * rows * columns, max(pairs, rows, columns))


def test_the_time_is_drawn_as_the_reference_draws_it(llm: Llama) -> None:
    """Embeddings with our glyphs are near those with Pillow's hinted ones, and nearer than other times'."""
    golden = GoldenVideos.load()
    plain, found = (
        videos.embeddings(eyes_of(llm), videos.of_frames(eyes_of(llm), TIMED, times), HIDDEN) for times in ((), TIMES)
    )
    assert relative(plain, golden.plain) < EMBEDDINGS
    off = np.linalg.norm(found - golden.drawn)
    assert off < 0.5 * np.linalg.norm(golden.drawn - golden.plain)  # measured: 0.42
    other = videos.embeddings(eyes_of(llm), videos.of_frames(eyes_of(llm), TIMED, [47.25, 1288.0]), HIDDEN)
    assert off < 0.9 * np.linalg.norm(other - golden.drawn)


def test_small_batches(files: Files, llm: Llama) -> None:
    """A video over several batches and ubatches: positions are cut with it."""
    expected = logits(llm, PROMPTS[1])
    with loaded(files, n_batch=8, n_ubatch=4) as small:
        found = logits(small, PROMPTS[1])
    assert np.nanmax(np.abs(found - expected)) < 1e-3 * np.nanstd(expected)


def reference_frames(total: int, fps: float, rate: float) -> list[int]:
    """transformers' sample_frames with 16 to 180 frames; rounding can give it a frame behind the last."""
    wanted = min(max(total / fps * rate, 16), 180, total)
    step = total / wanted
    numbers = [int(np.float32(i * step)) for i in range(math.ceil(total / step))]
    return [number for number in numbers if number < total]


def test_choice_of_frames(llm: Llama) -> None:
    rng = random.Random(0)
    cases = [(1, 30.0), (15, 30.0), (16, 30.0), (17, 30.0), (100, 25.0), (14400 * 25, 25.0), (251, 30000 / 1001)]
    cases += [(rng.randint(1, 20000), rng.choice([23.976, 24, 25, 29.97, 30, 60, 8.3])) for _ in range(200)]
    for total, fps in cases:
        found = videos.chosen(eyes_of(llm), total, fps)
        assert found == reference_frames(total, fps, 2.0), (total, fps)
        assert min(total, 16) <= len(found) <= 180
    assert videos.chosen(eyes_of(llm), 1000, 25, 1.0) == reference_frames(1000, 25, 1.0)
    assert videos.chosen(eyes_of(llm), 100, 25, 0) == list(range(100))  # the video's own rate
    assert videos.chosen(eyes_of(llm), 0, 25) == []


def test_choice_of_frames_live(llm: Llama) -> None:
    pytest.importorskip("torchvision")
    pytest.importorskip("transformers")
    from transformers.models.ernie4_5_vl_moe.video_processing_ernie4_5_vl_moe import Ernie4_5_VLMoeVideoProcessor
    from transformers.video_utils import VideoMetadata

    processor, rng = Ernie4_5_VLMoeVideoProcessor(font=None), random.Random(1)
    for _ in range(200):
        total, fps = rng.randint(1, 20000), rng.choice([23.976, 24, 25, 29.97, 30, 60, 8.3])
        found = processor.sample_frames(VideoMetadata(total, fps=fps), fps=2).tolist()
        expected = [number for number in found if number < total]  # rounding can give it one behind the last
        assert videos.chosen(eyes_of(llm), total, fps) == expected, (total, fps)


def test_sizes_of_frames(llm: Llama) -> None:
    """Limits are those of a frame, for a picture others."""
    rng = random.Random(0)
    low, high = video_golden.LIMITS.values()
    for _ in range(100):
        width, height = (int(10 ** rng.uniform(1, 3)) for _ in "wh")
        if max(width, height) > 200 * min(width, height):
            continue
        h, w = round(height / 28) * 28, round(width / 28) * 28
        if h * w > high:
            beta = math.sqrt(height * width / high)
            h, w = (max(28, math.floor(side / beta / 28) * 28) for side in (height, width))
        elif h * w < low:
            beta = math.sqrt(low / (height * width))
            h, w = (math.ceil(side * beta / 28) * 28 for side in (height, width))
        chunk = videos.of_frames(eyes_of(llm), np.zeros((1, height, width, 3), np.uint8))
        assert chunk.tokens == h * w // 784, (width, height)


def test_videos_are_announced_by_their_number(llm: Llama) -> None:
    eyes = eyes_of(llm)
    first, second = (VideoFrames.of(drawn(2, 56, 56, seed), 2) for seed in range(2))
    marks = f"{eyes.marker}{eyes.marker}, {eyes.marker}?"
    parts = eyes.tokenize(marks, [first, ImageFile(PICTURES[0]), second], add_special=False)
    texts: list[list[int]] = [[]]
    for part in parts:
        if isinstance(part, int):
            texts[-1].append(part)
        else:
            texts.append([])
    assert [llm.detokenize(text, special=True).decode() for text in texts] == [
        "Video 1:<|VIDEO_START|>",
        "<|VIDEO_END|>Picture 1:<|IMAGE_START|>",
        "<|IMAGE_END|>, Video 2:<|VIDEO_START|>",
        "<|VIDEO_END|>?",
    ]


@needs_ffmpeg
@pytest.mark.parametrize(
    ("name", "count", "rate"), [("a.mkv", 40, "10"), ("a.mov", 7, "2"), ("a.avi", 1, "25"), ("late.mov", 400, "2")]
)
def test_files(llm: Llama, tmp_path: Path, name: str, count: int, rate: str) -> None:
    """The frames of a file that the reference would choose, with their times."""
    frames = drawn(count, 56, 56)
    data = videos.encoded(tmp_path / name, frames, rate)
    numbers = reference_frames(count, float(rate), 2.0)
    expected = videos.of_frames(eyes_of(llm), frames[numbers], [number / float(rate) for number in numbers])
    found = videos.of_file(eyes_of(llm), data)
    assert (found.tokens, found.positions) == (expected.tokens, expected.positions)
    np.testing.assert_array_equal(
        videos.embeddings(eyes_of(llm), found, HIDDEN), videos.embeddings(eyes_of(llm), expected, HIDDEN)
    )


@needs_ffmpeg
def test_a_video_of_a_phone_is_turned_upright(llm: Llama, tmp_path: Path) -> None:
    frames = drawn(2, 112, 56)
    videos.encoded(tmp_path / "a.mov", frames)
    videos.ffmpeg("-i", tmp_path / "a.mov", "-c", "copy", "-metadata:s:v", "rotate=90", tmp_path / "turned.mov")
    found = videos.of_file(eyes_of(llm), (tmp_path / "turned.mov").read_bytes())
    upright = [np.ascontiguousarray(np.rot90(frames, turns, axes=(1, 2))) for turns in (1, 3)]
    seen = videos.embeddings(eyes_of(llm), found, HIDDEN)
    candidates = [
        videos.embeddings(eyes_of(llm), videos.of_frames(eyes_of(llm), each, [0.0, 0.5]), HIDDEN) for each in upright
    ]
    assert min(np.abs(seen - each).max() for each in candidates) == 0


@needs_ffmpeg
def test_four_hours(llm: Llama, tmp_path: Path) -> None:
    """180 frames of them, all over the file; nothing is held but these."""
    videos.ffmpeg("-f", "lavfi", "-i", "testsrc=size=56x56:rate=1:duration=14400", "-c:v", "mpeg4", tmp_path / "a.mp4")
    found = videos.of_file(eyes_of(llm), (tmp_path / "a.mp4").read_bytes())
    assert (found.tokens, found.positions) == (90 * 4, 90)


def bad_files(folder: Path) -> dict[str, tuple[bytes, str]]:
    whole = videos.encoded(folder / "a.mov", drawn(20, 56, 56), "2", "-movflags", "faststart")
    videos.ffmpeg("-f", "lavfi", "-i", "sine=duration=1", "-c:a", "aac", folder / "sound.mp4")
    videos.ffmpeg("-f", "lavfi", "-i", "testsrc=duration=1", "-t", "0", "-c:v", "mpeg4", folder / "none.mp4")
    return {
        "empty": (b"", ""),
        "nonsense": (b"none of the kinds that are known", ""),
        "header alone": (whole[:200], "it has no video stream"),
        "cut": (whole[: len(whole) * 2 // 3], "the video is cut off"),
        "sound": ((folder / "sound.mp4").read_bytes(), "it has no video stream"),
        "no frames": ((folder / "none.mp4").read_bytes(), "it has no video stream"),
    }


@needs_ffmpeg
def test_bad_files(llm: Llama, tmp_path: Path) -> None:
    for data, message in bad_files(tmp_path).values():
        with pytest.raises(ValueError, match=f"^{message}$"):
            videos.of_file(eyes_of(llm), data)


@needs_ffmpeg
def test_damaged_files(llm: Llama, tmp_path: Path) -> None:
    """ffmpeg decodes what it can, and complains at length: nothing waits for it."""
    videos.ffmpeg("-f", "lavfi", "-i", "testsrc=size=320x240:rate=10:duration=20", "-c:v", "mpeg4", tmp_path / "a.mkv")
    whole, rng = (tmp_path / "a.mkv").read_bytes(), random.Random(0)
    for _ in range(3):
        damaged = bytearray(whole)
        for _ in range(len(whole) // 50):
            damaged[rng.randrange(2000, len(whole))] = rng.randrange(256)
        try:
            assert videos.of_file(eyes_of(llm), bytes(damaged)).tokens
        except ValueError as error:
            assert "could be decoded" in str(error) or str(error).startswith("the video")


def test_without_ffmpeg(llm: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="for a video ffmpeg and ffprobe must be installed: cannot run ffprobe"):
        videos.of_file(eyes_of(llm), b"\0\0\0\x18ftypmp42" + bytes(100))
    videos.of_frames(eyes_of(llm), VIDEOS[0])  # needs none


def test_bad_frames(llm: Llama) -> None:
    with pytest.raises(ValueError, match="a video has no frames"):
        videos.of_frames(eyes_of(llm), drawn(0, 56, 56))
    with pytest.raises(ValueError, match="one side may be at most 200 times the other"):
        videos.of_frames(eyes_of(llm), np.zeros((1, 10, 2010, 3), np.uint8))
    uneven = [*drawn(1, 56, 56), *drawn(1, 84, 56)]
    with pytest.raises(ValueError, match="frame 2 of a video is 84x56 pixels, the first 56x56"):
        videos.of_frames(eyes_of(llm), uneven)


def test_an_mmproj_without_numbers_for_videos_takes_those_of_ernie(tmp_path: Path) -> None:
    """Files of earlier versions read videos too: both halves of the temporal layer have always been there."""
    checkpoint = video_golden.checkpoint(tmp_path / "checkpoint")
    (checkpoint / "video_preprocessor_config.json").unlink()
    job = prepare(checkpoint, Outtype.F32)
    write_gguf(job, tmp_path / "model.gguf", 1, False, lambda _: None, mmproj=tmp_path / "eyes.gguf")
    assert not [key for key in read_gguf(tmp_path / "eyes.gguf").metadata if "video" in key]
    with Llama(tmp_path / "model.gguf", mmproj_path=tmp_path / "eyes.gguf", n_ctx=512, n_threads=1) as llm:
        chunk = videos.of_frames(eyes_of(llm), np.zeros((2, 56, 56, 3), np.uint8))
        assert chunk.tokens == 18 * 18  # at least 299
