"""What transformers makes of prompts with videos: the file golden/video.safetensors, which needs no torch to be read.

For video number v its embeddings at every 16th of the hidden numbers: v.e float32 [tokens, 16], and v.spread the
largest of all. For prompt number i, as in vl_golden: i.values [m, 16], i.last [V], i.spread [m]. t.drawn and t.plain
float32 [tokens, hidden]: the embeddings of TIMED with and without its times drawn in Roboto Regular.

Positions follow Baidu's engine, whose text goes on behind the largest coordinate of a video. transformers counts rows
and columns only, so its text would begin before the last frames of a long video; where it does not, it gives the same.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from support.videos import drawn
from support.vl import PLACEHOLDER

from reference import vl_golden
from reference.golden import FOLDER, Floats, sampled_ids

PATH = FOLDER / "video.safetensors"
START, END = PLACEHOLDER + 1, PLACEHOLDER + 2
VIDEO_START, VIDEO_END = PLACEHOLDER + 3, PLACEHOLDER + 4
LIMITS = {"shortest_edge": 4 * 28 * 28, "longest_edge": 1196 * 28 * 28}
# frames, width and height in pixels: even, odd, one, the most, and one that is resized
SIZES = [(4, 56, 56), (3, 84, 112), (1, 140, 56), (180, 56, 56), (5, 100, 75)]
VIDEOS = [drawn(*size, seed) for seed, size in enumerate(SIZES)]
RESIZED = 4
LONG = -104  # more pairs of frames than rows or columns
TIMED = drawn(2, 224, 224, 9) // 4 + 96  # low contrast, as what is drawn shall tell
TIMES = [0.0, 3725.5]
# As in vl_golden, where -1 - p is picture p; -101 - v is video v.
PROMPTS: list[list[int]] = [
    [3, 300, 301, VIDEO_START, -101, VIDEO_END, 302, 303],
    [3, START, -1, END, 310, VIDEO_START, -102, VIDEO_END, 311, VIDEO_START, -103, VIDEO_END, 312, 313],
    [-101, 320, 321],
    [3, VIDEO_START, -104, VIDEO_END, 330, 331],
    [3, VIDEO_START, -105, VIDEO_END, 340, START, -2, END, 341],
]


@dataclass(frozen=True)
class GoldenVideos:
    """The file's content."""

    embeddings: list[Floats]
    largest: list[float]
    values: list[Floats]
    last: list[Floats]
    spread: list[Floats]
    drawn: Floats
    plain: Floats

    @classmethod
    def load(cls) -> GoldenVideos:
        """Read the file."""
        found = load_file(PATH)
        videos, prompts = range(len(VIDEOS)), range(len(PROMPTS))

        def of_prompts(name: str) -> list[Floats]:
            return [found[f"{i}.{name}"] for i in prompts]

        return cls(
            [found[f"v.{v}.e"] for v in videos],
            [float(found[f"v.{v}.largest"][0]) for v in videos],
            of_prompts("values"),
            of_prompts("last"),
            of_prompts("spread"),
            found["t.drawn"],
            found["t.plain"],
        )


def checkpoint(folder: Path) -> Path:
    """The model of vl_golden with smaller limits for frames."""
    made = vl_golden.checkpoint(folder)
    (made / "video_preprocessor_config.json").write_text(json.dumps({"size": LIMITS, "temporal_patch_size": 2}))
    return made


def main() -> None:
    """Make the file anew: PYTHONPATH=... python -m reference.video_golden Roboto-Regular.ttf (extra `reference`)."""
    import sys
    import tempfile

    from reference.vl_oracle import Model

    with tempfile.TemporaryDirectory() as folder:
        model = Model(checkpoint(Path(folder) / "vl"))
    tensors: dict[str, np.ndarray] = {}
    for v, frames in enumerate(VIDEOS):
        found = model.video_embeddings(frames)
        tensors[f"v.{v}.e"], tensors[f"v.{v}.largest"] = found[:, ::16], np.abs(found).max(keepdims=True)[0]
    for i, parts in enumerate(PROMPTS):
        logits = model.logits_of_videos(parts)
        tensors[f"{i}.values"] = logits[:, sampled_ids(logits.shape[1])]
        tensors[f"{i}.last"] = logits[-1]
        tensors[f"{i}.spread"] = logits.std(1)
    tensors["t.plain"] = model.video_embeddings(TIMED)
    tensors["t.drawn"] = model.video_embeddings(TIMED, TIMES, sys.argv[1])
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, PATH)
    print(f"{PATH} ({PATH.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
