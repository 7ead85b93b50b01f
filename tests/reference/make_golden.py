"""Make the golden logits anew: PYTHONPATH=tests:benchmarks python -m reference.make_golden [MODEL ...]

Needs the extra `reference` (torch, transformers). The files change in their last bits with the version of torch and the
CPU; commit new ones only for a reason.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from reference import specimens
from reference.golden import Golden, GoldenPrompt, checkpoint_sha256
from reference.transformers_logits import MADE_WITH, transformers_logits


def compute(name: str, checkpoint: Path, folder: Path) -> Golden:
    """The reference logits of a model; `folder` is for the twin with split names that transformers needs."""
    specimen = specimens.RANDOM.get(name)
    readable = specimens.make(specimen.split, folder) if specimen and specimen.fused else checkpoint
    prompts = specimens.prompts(checkpoint)
    computed = transformers_logits(readable, [ids for _, ids in prompts])
    kept = [GoldenPrompt.of(text, ids, *each) for (text, ids), each in zip(prompts, computed, strict=True)]
    return Golden(name, checkpoint_sha256(checkpoint), MADE_WITH, kept)


def main() -> None:
    """Make the files of the named models, or all."""
    names = sys.argv[1:] or ["ernie-tiny", *(["ernie-mini"] if specimens.MINI else []), *specimens.RANDOM]
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            path = compute(name, specimens.checkpoint_of(name, Path(folder)), Path(folder)).save()
            print(f"{path} ({path.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
