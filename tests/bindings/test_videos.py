"""Videos of messages: frames in any form are the same video, and what is none is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ernie_llama import load_local_image, load_local_video
from ernie_llama._chat.media_parts import MEDIA, Loaders, medium
from ernie_llama._chat.messages import Abilities, normalized
from ernie_llama._engine.media import ImageFile, VideoFile, VideoFrames
from PIL import Image

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 4, 6, 3), np.uint8)
IMAGES = [Image.fromarray(frame) for frame in PIXELS]


def frames(video: object, fps: object = 2) -> VideoFrames:
    found = medium({"type": "video", "video": video, "fps": fps}, Loaders())
    assert isinstance(found, VideoFrames)
    return found


@pytest.mark.parametrize("video", [PIXELS, list(PIXELS), tuple(PIXELS), IMAGES, [*PIXELS[:1], *IMAGES[1:]]])
def test_frames_in_any_form(video: object) -> None:
    found = frames(video)
    assert (found.width, found.height, len(found.frames), found.fps) == (6, 4, 3, 2.0)
    assert found.frames == tuple(frame.tobytes() for frame in PIXELS)
    assert found.digest == frames(PIXELS).digest


def test_frames_are_made_rgb() -> None:
    assert frames([IMAGES[0].convert("L")]).frames == (IMAGES[0].convert("L").convert("RGB").tobytes(),)


def test_a_view_is_read_in_its_order() -> None:
    assert frames(PIXELS[:, ::-1]).frames[0] == np.ascontiguousarray(PIXELS[0, ::-1]).tobytes()


def test_what_differs_has_another_digest() -> None:
    """Pixels, order, rate or form: the cache must not take one for the other."""
    data = b"\0" * 10
    media: list[Any] = [frames(PIXELS), frames(PIXELS[::-1]), frames(PIXELS[:2]), frames(PIXELS, 4)]
    media += [frames(PIXELS.reshape(3, 6, 4, 3)), ImageFile(data), VideoFile(data)]
    assert len({each.digest for each in media}) == len(media)


BAD: dict[str, tuple[object, object, str]] = {
    "no frames": ([], 2, "a video has 0 frames, expected 1 to 65536"),
    "no frames in an array": (PIXELS[:0], 2, "a video has 0 frames"),
    "a path": ("clip.mp4", 2, "a video is str, expected a list of frames"),
    "nothing": (None, 2, "a video is NoneType, expected a list of frames"),
    "paths": (["clip.png"], 2, r"frame 0 of a video is str, expected an image of Pillow or an array of uint8"),
    "floats": (PIXELS / 255, 2, r"frame 0 of a video is an array of float64 \[4, 6, 3\], expected"),
    "one frame alone": (PIXELS[0], 2, r"frame 0 of a video is an array of uint8 \[6, 3\], expected"),
    "channels first": (PIXELS.transpose(0, 3, 1, 2), 2, r"is an array of uint8 \[3, 4, 6\], expected"),
    "empty frames": (PIXELS[:, :0], 2, r"is an array of uint8 \[0, 6, 3\], expected"),
    "sizes": ([IMAGES[0], IMAGES[1].resize((5, 4))], 2, "frame 1 of a video is 5x4 pixels, the first is 6x4"),
    "rate 0": (PIXELS, 0, "has the fps 0, expected how many there are in a second"),
    "rate below 0": (PIXELS, -1.5, "has the fps -1.5, expected"),
    "no rate": (PIXELS, None, "has the fps None, expected"),
    "endless rate": (PIXELS, float("inf"), "has the fps inf, expected"),
    "no number": (PIXELS, float("nan"), "has the fps nan, expected"),
    "text": (PIXELS, "2", "has the fps '2', expected"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_frames_are_refused(name: str) -> None:
    video, fps, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        frames(video, fps)


@pytest.mark.parametrize("missing", ["video", "fps"])
def test_a_part_lacks_something(missing: str) -> None:
    part = {"type": "video", "video": PIXELS, "fps": 2}
    del part[missing]
    with pytest.raises(ValueError, match=r'^a part has \[.*\], expected {"type": "video", "video"'):
        medium(part, Loaders())


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("nested", [False, True])
def test_urls(kind: str, nested: bool, tmp_path: Path) -> None:
    """Data URLs and bytes are read by themselves, others by the loader for their kind only."""

    def data(url: object) -> bytes:
        loader = load_local_image if kind == "image" else load_local_video
        part = {"type": f"{kind}_url", f"{kind}_url": {"url": url} if nested else url}
        found = medium(part, Loaders(**{kind: loader}))
        assert isinstance(found, ImageFile if kind == "image" else VideoFile)
        return found.data

    path = tmp_path / "a file"
    path.write_bytes(b"content")
    assert data("data:application/octet-stream;base64,Y29udGVudA==") == data(b"content") == b"content"
    assert data(str(path)) == data(path.as_uri()) == b"content"
    with pytest.raises(ValueError, match="is not a local file"):
        data("https://host/clip.mp4")
    with pytest.raises(ValueError, match="No such file"):
        data(str(tmp_path / "none"))
    with pytest.raises(ValueError, match=f"{kind}_url begins with 'data:x': expected data:TYPE;base64,DATA"):
        data("data:x,abc")
    with pytest.raises(ValueError, match=f"^{kind}_url is .*None.*, expected a URL"):
        data(None)


def test_a_loader_of_images_loads_no_videos(tmp_path: Path) -> None:
    part = {"type": "video_url", "video_url": str(tmp_path)}
    with pytest.raises(ValueError, match=r"Llama\(video_loader=...\) loads others, ernie_llama.load_local_video local"):
        medium(part, Loaders(image=load_local_image))


@pytest.mark.parametrize("kind", MEDIA)
def test_without_an_mmproj(kind: str) -> None:
    message: Any = {"role": "user", "content": [{"type": kind, kind: "x", "fps": 2}]}
    with pytest.raises(ValueError, match=r"reads text only, without Llama\(mmproj_path=...\)"):
        normalized([message], Abilities())
