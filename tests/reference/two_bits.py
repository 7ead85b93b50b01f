"""The golden logits of the 2Bits-Paddle fixture: transformers in float32, fed with the weights its bytes mean.

Remake the file (needs the extra `reference`): PYTHONPATH=tests:benchmarks python -m reference.two_bits
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from support.checkpoints import config, store, write_checkpoint
from support.paddle import TWO_BITS, make_two_bits, split_names

from reference import specimens
from reference.golden import Golden, GoldenPrompt, checkpoint_sha256

NAME = "two-bits"


def compute(folder: Path) -> Golden:
    """Make the fixture below `folder`, and its reference logits."""
    from reference.transformers_logits import MADE_WITH, transformers_logits

    made = make_two_bits(folder / NAME)
    split = split_names(made.weights, TWO_BITS)
    stored = {name: store(w, "F32") for name, w in split.items() if "mtp_" not in name}
    prompts = specimens.prompts(folder / NAME)
    computed = transformers_logits(
        write_checkpoint(folder / "float32", config(TWO_BITS), stored), [ids for _, ids in prompts]
    )
    kept = [GoldenPrompt.of(text, ids, *each) for (text, ids), each in zip(prompts, computed, strict=True)]
    return Golden(NAME, checkpoint_sha256(folder / NAME), MADE_WITH, kept)


def main() -> None:
    """Write golden/two-bits.safetensors."""
    with tempfile.TemporaryDirectory() as folder:
        print(compute(Path(folder)).save())


if __name__ == "__main__":
    main()
