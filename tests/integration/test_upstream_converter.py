"""Our converter against upstream's: tensor by tensor, byte by byte, and key by key.

The example checkpoint is compared with a golden file too, for those who have no torch.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from reference import specimens, upstream
from reference.golden import checkpoint_sha256
from reference.upstream import OUTTYPES, Contents
from support.models import convert

# Where we differ, and why. A key that differs and is not here is a bug, and so is a key here that no longer differs.
NAME = "the folder's name as it is; upstream guesses words and capitals from it"
TURN_END = "<|end_of_sentence|> ends a turn: generation must stop there; upstream leaves it out"
UNKNOWN = "upstream leaves out <unk>, and llama.cpp then takes 0, which it happens to be"
CONTROL = "<|begin_of_sentence|> and <|end_of_sentence|> are control tokens; upstream types them as normal text"
SHARED_WIDTH = (
    "moe_intermediate_size * moe_num_shared_experts; upstream's intermediate_size // num_key_value_heads is luck"
)

EVERYWHERE = {
    "general.name": NAME,
    "tokenizer.ggml.eot_token_id": TURN_END,
    "tokenizer.ggml.unknown_token_id": UNKNOWN,
    "tokenizer.ggml.token_type": CONTROL,
}


def contents(checkpoint: Path, outtype: str, path: Path) -> Contents:
    return Contents.of(convert(checkpoint, path, outtype).path)


def differences(ours: dict[str, str], theirs: dict[str, str]) -> dict[str, tuple[str | None, str | None]]:
    """What differs or is only in one: ours, theirs by key."""
    return {
        key: (ours.get(key), theirs.get(key)) for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)
    }


def check(ours: Contents, theirs: Contents, *more: str) -> None:
    """Assert that all tensors are the same and that the metadata differs in what is meant to differ, no less."""
    assert differences(ours.tensors, theirs.tensors) == {}
    architecture = json.loads(ours.metadata["general.architecture"].removeprefix("STRING "))
    expected = {key.format(arch=architecture) for key in (*EVERYWHERE, *more)}
    found = differences(ours.metadata, theirs.metadata)
    assert found.keys() == expected, {key: found.get(key) for key in found.keys() ^ expected}


@pytest.mark.parametrize("outtype", OUTTYPES)
def test_the_example_is_what_upstream_made_of_it(outtype: str, tmp_path: Path) -> None:
    golden = json.loads(upstream.GOLDEN.read_text())
    assert golden["checkpoint_sha256"] == checkpoint_sha256(specimens.TINY)
    theirs = Contents(**golden["outtypes"][outtype])
    ours = contents(specimens.TINY, outtype, tmp_path / "ours.gguf")
    check(ours, theirs, "{arch}.expert_shared_feed_forward_length")
    assert ours.metadata["ernie4_5-moe.expert_shared_feed_forward_length"] == "UINT32 256"
    assert theirs.metadata["ernie4_5-moe.expert_shared_feed_forward_length"] == "UINT32 384"


# Sizes for which upstream's rule gives the right width too: 512 // 2 == 256 * 1
SHARED_RIGHT = replace(specimens.MOE_FUSED.split, name="shared-right", shared_experts=1)
# Quantized rows must be multiples of 32: these are not, and stay f16
ODD_ROWS = replace(specimens.DENSE, name="odd-rows", dense_ffn=500)
LIVE: dict[str, tuple[specimens.Random, tuple[str, ...]]] = {
    "moe-bias": (specimens.MOE_BIAS, ()),
    "moe-fused": (specimens.MOE_FUSED, ("{arch}.expert_shared_feed_forward_length",)),
    "shared-right": (SHARED_RIGHT, ()),
    "dense": (specimens.DENSE, ()),
    "dense-fused": (specimens.DENSE_FUSED, ()),
    "odd-rows": (ODD_ROWS, ()),
}
# A run of upstream's converter takes seconds, so not every combination; the example has all types.
COMBINATIONS = [*((name, "q8_0") for name in LIVE), ("moe-bias", "f32"), ("moe-bias", "bf16"), ("dense-fused", "f16")]


@pytest.fixture(scope="session")
def tree(llama_tree: Path) -> Path:
    """A llama.cpp source tree, and a Python that can run its converter."""
    for package in ("torch", "transformers"):
        pytest.importorskip(
            package, reason=f"{package} is not installed (extra `reference`); the golden file is tested"
        )
    return llama_tree


@pytest.mark.parametrize(("name", "outtype"), COMBINATIONS)
def test_upstream_makes_the_same_tensors_and_keys(name: str, outtype: str, tree: Path, tmp_path: Path) -> None:
    specimen, more = LIVE[name]
    checkpoint = specimens.make(specimen, tmp_path)
    # Upstream cannot read fused names in a MoE checkpoint ("Can not map tensor"): it gets the same numbers, split.
    readable = specimens.make(specimen.split, tmp_path) if specimen.fused and specimen.experts else checkpoint
    theirs = upstream.convert(tree, readable, outtype, tmp_path / "theirs.gguf")
    check(contents(checkpoint, outtype, tmp_path / "ours.gguf"), theirs, *more)


@pytest.mark.parametrize("outtype", OUTTYPES)
def test_the_golden_file_is_what_upstream_makes_now(outtype: str, tree: Path, tmp_path: Path) -> None:
    golden = json.loads(upstream.GOLDEN.read_text())["outtypes"][outtype]
    assert Contents(**golden) == upstream.convert(tree, specimens.TINY, outtype, tmp_path / "theirs.gguf")
