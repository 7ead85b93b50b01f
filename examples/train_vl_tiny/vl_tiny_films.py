"""The twenty clips of examples/ernie-vl-tiny/clips: drawn by Pillow, packed by ffmpeg, and read again.

python examples/train_vl_tiny/vl_tiny_films.py FOLDER      # writes them

Files differ with ffmpeg's version; what they show does not.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw
from vl_tiny_pictures import (
    COLORS,
    DIGITS,
    FIRST,
    LAST,
    LETTERS,
    MOVE,
    PAIRS,
    SIDES,
    draw,
    random_text,
)

# Width and height in pixels. A clip has at most as many pairs of frames as columns: what follows it then stands at the
# same position for transformers as for Baidu's engine.
CLIP_SIZES = ((112, 56), (140, 56), (112, 84))
FRAMES = range(4, 9)
RATES = (1, 2, 2, 4)  # frames per second
ASKED = {"number": (FIRST, LAST), "word": (FIRST, LAST), "square": (MOVE,)}
FILMED = [("number", DIGITS, 2)] * 4 + [("number", DIGITS, 3)] * 3 + [("square", "", 0)] * 6
FILMED += [("word", LETTERS, 2)] * 3 + [("word", LETTERS, 3)] * 4
CODECS = {
    "mp4": ("-c:v", "libx264", "-crf", "16", "-preset", "veryslow"),
    "webm": ("-c:v", "libvpx-vp9", "-crf", "16", "-b:v", "0", "-deadline", "best"),
}


@dataclass(frozen=True)
class Film:
    """Frames of one size in RGB, and how many there are in a second."""

    frames: list[Image.Image]
    rate: float


def film_of_texts(rng: random.Random, texts: tuple[str, str]) -> Film:
    """A text that another replaces, each in two frames or more."""
    size, count, pair = rng.choice(CLIP_SIZES), rng.choice(FRAMES), rng.choice(PAIRS)
    before, after = (draw(rng, text, size, pair).image for text in texts)
    at = rng.randint(2, count - 2)
    return Film([before] * at + [after] * (count - at), rng.choice(RATES))


def film_of_square(rng: random.Random, direction: str) -> Film:
    """A square that moves."""
    (width, height), count, side = rng.choice(CLIP_SIZES), rng.choice(FRAMES), rng.choice(SIDES)
    ink, ground = (COLORS[name] for name in rng.choice(PAIRS))
    room = width - side  # of which it crosses three quarters or more
    step = (room - rng.randint(0, room // 4)) // (count - 1)
    begin, top = rng.randint(0, room - step * (count - 1)), rng.randint(0, height - side)
    frames = []
    for number in range(count) if direction == "right" else reversed(range(count)):
        image = Image.new("RGB", (width, height), ground)
        left = begin + step * number
        ImageDraw.Draw(image).rectangle((left, top, left + side - 1, top + side - 1), fill=ink)
        frames.append(image)
    return Film(frames, rng.choice(RATES))


def films() -> dict[str, Film]:
    """Twenty clips of texts kept for tests, by names that say what happens."""
    rng = random.Random("clips")
    used, out = {""}, dict[str, Film]()
    for number, (kind, characters, length) in enumerate(FILMED):
        if kind == "square":
            direction = "left" if number % 2 else "right"
            out[f"{number:02d}-{kind}-{direction}"] = film_of_square(rng, direction)
        else:
            texts = ("", "")
            while used.intersection(texts) or texts[0] == texts[1]:
                texts = (random_text(rng, characters, length, True), random_text(rng, characters, length, True))
            used.update(texts)
            out[f"{number:02d}-{kind}-{'-'.join(texts)}"] = film_of_texts(rng, texts)
    return out


def right_answers(name: str) -> dict[str, str]:
    """What should be answered about a clip of this name, by question."""
    _, kind, *answers = name.split("-")
    return dict(zip(ASKED[kind], answers, strict=False))


def write(film: Film, path: Path) -> None:
    """A video file by ffmpeg, in the format that the path's ending says."""
    width, height = film.frames[0].size
    command = ["ffmpeg", "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"]
    command += ["-r", str(film.rate), "-i", "-", *CODECS[path.suffix[1:]], "-pix_fmt", "yuv420p"]
    command += ["-threads", "1", "-fflags", "+bitexact", "-flags", "+bitexact", str(path)]
    subprocess.run(command, input=b"".join(frame.tobytes() for frame in film.frames), check=True)


def read(path: Path) -> Film:
    """All frames of a video file."""
    asked = ["ffprobe", "-v", "error", "-of", "json", "-show_entries", "stream=width,height,r_frame_rate", str(path)]
    (found,) = json.loads(subprocess.run(asked, capture_output=True, check=True).stdout)["streams"]
    command = ["ffmpeg", "-v", "error", "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    data = subprocess.run(command, capture_output=True, check=True).stdout
    size, (frames, seconds) = (found["width"], found["height"]), map(int, found["r_frame_rate"].split("/"))
    length = 3 * size[0] * size[1]
    parts = [data[begin : begin + length] for begin in range(0, len(data), length)]
    return Film([Image.frombytes("RGB", size, part) for part in parts], frames / seconds)


def write_all(folder: Path) -> dict[str, Path]:
    """The twenty files, by name."""
    folder.mkdir(exist_ok=True)
    out = {}
    for number, (name, film) in enumerate(films().items()):
        out[name] = folder / f"{name}.{'webm' if number % 3 == 2 else 'mp4'}"
        write(film, out[name])
    return out


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    write_all(Path(sys.argv[1]))
