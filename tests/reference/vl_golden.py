"""What transformers makes of prompts with pictures: the file golden/vl.safetensors, which needs no torch to be read.

For prompt number i of n tokens and pictures, over a vocabulary of V:

    i.parts   int32   [n]      token ids in their order; -1 - p stands for picture number p of PICTURES
    i.values  float32 [m, 16]  logits of `sampled_ids(V)` at each of the m positions, a picture's among them
    i.last    float32 [V]      all logits at the last position
    i.spread  float32 [m]      standard deviation over the V logits

and for picture number p its embeddings, e.p float32 [tokens, hidden]. Routing is R3: ids from PLACEHOLDER on go through
the vision experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from support import png
from support.vl import ORACLE, ORACLE_EYES, PLACEHOLDER, Form, make_vl

from reference.golden import FOLDER, Floats, Ints, sampled_ids

PATH = FOLDER / "vl.safetensors"
START, END = PLACEHOLDER + 1, PLACEHOLDER + 2
# width and height in pixels; the last is resized
PICTURES = [png.noise(*size, seed) for seed, size in enumerate([(56, 56), (84, 112), (140, 56), (100, 75)])]
PROMPTS: list[list[int]] = [
    [3, 300, 301, 302, START, -1, END, 303, 304, 305],
    [3, 310, START, -2, END, 311, 312, START, -3, END, 313, 314, 315],
    [-2, 320, 321],
    [3, 330, 331, 332, 333, 334],
    [3, 340, 4090, 341, 4091, 4092, 342, 4095],
    [3, START, -4, END, 350, 351],
]


@dataclass(frozen=True)
class GoldenPictures:
    """The file's content."""

    embeddings: list[Floats]
    parts: list[Ints]
    values: list[Floats]
    last: list[Floats]
    spread: list[Floats]

    @classmethod
    def load(cls) -> GoldenPictures:
        """Read the file."""
        found = load_file(PATH)
        n = range(len(PROMPTS))
        return cls(
            [found[f"e.{p}"] for p in range(len(PICTURES))],
            *([found[f"{i}.{name}"] for i in n] for name in ("parts", "values", "last", "spread")),
        )


def checkpoint(folder: Path) -> Path:
    """Write the model, in the form of transformers."""
    return make_vl(folder, ORACLE, Form.TRANSFORMERS, ORACLE_EYES)


def main() -> None:
    """Make the file anew: PYTHONPATH=tests:benchmarks:convert python -m reference.vl_golden (extra `reference`)."""
    import tempfile

    from reference.vl_oracle import Model

    with tempfile.TemporaryDirectory() as folder:
        model = Model(checkpoint(Path(folder) / "vl"))
    tensors: dict[str, np.ndarray] = {f"e.{p}": model.embeddings(data) for p, data in enumerate(PICTURES)}
    for i, parts in enumerate(PROMPTS):
        logits = model.logits(parts)
        tensors[f"{i}.parts"] = np.array(parts, np.int32)
        tensors[f"{i}.values"] = logits[:, sampled_ids(logits.shape[1])]
        tensors[f"{i}.last"] = logits[-1]
        tensors[f"{i}.spread"] = logits.std(1)
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, PATH)
    print(f"{PATH} ({PATH.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
