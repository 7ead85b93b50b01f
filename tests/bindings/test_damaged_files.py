"""A damaged file is a ValueError, never the end of the Python process.

FUZZ_FILES sets how many damaged files are tried; each is loaded and, if it loads, completes a prompt.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
from ernie_gguf.convert import prepare, write_gguf
from ernie_gguf.gguf_file.outtype import Outtype
from ernie_gguf.plan import choose
from ernie_llama import Llama
from ernie_llama._engine import metadata
from reference.specimens import VL_TINY

pytestmark = pytest.mark.build

ARCHITECTURE = "ernie4_5-moe"


def with_values(**values: Any) -> metadata.Metadata:  # noqa: ANN401
    """Metadata of a model like the example, with other values by the last parts of their keys."""
    known = {
        "block_count": 3,
        "embedding_length": 256,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 64,
        "attention.value_length": 64,
        "expert_count": 8,
        "expert_used_count": 2,
        "interleave_moe_layer_step": 1,
    } | {key.replace("__", "."): value for key, value in values.items() if key != "tokens"}
    return metadata.Metadata(
        {f"{ARCHITECTURE}.{key}": value for key, value in known.items()}
        | {"general.architecture": ARCHITECTURE.encode(), "tokenizer.ggml.tokens": values.get("tokens", [b"a", b"b"])}
    )


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({}, None),
        ({"expert_count": 0, "expert_used_count": 0}, None),
        ({"expert_used_count": (2, 1)}, None),
        ({"tokens": [b"", b"", b"a"]}, None),
        ({"block_count": 2.5}, None),  # another type: llama.cpp refuses it by itself
        ({"block_count": 0}, "block_count is 0, expected 1 to 512"),
        ({"block_count": 513}, "block_count is 513, expected 1 to 512"),
        ({"nextn_predict_layers": 4}, "nextn_predict_layers is 4, expected at most block_count, which is 3"),
        ({"expert_count": 1025}, "expert_count is 1025, expected at most 1024"),
        ({"expert_used_count": 9}, "expert_used_count is 9, expected 1 to expert_count, which is 8"),
        ({"expert_used_count": (2, 9)}, "expert_used_count is 9, expected 1 to expert_count, which is 8"),
        ({"expert_used_count": 0}, "expert_used_count is 0, expected 1 to expert_count, which is 8"),
        ({"expert_group_count": 3}, "expert_group_count is 3, expected a divisor of expert_count"),
        ({"expert_group_count": 2}, "expert_group_used_count is 0, expected 1 to 1"),
        ({"interleave_moe_layer_step": 0}, "interleave_moe_layer_step is 0, expected 1 to block_count, which is 3"),
        ({"interleave_moe_layer_step": 4}, "interleave_moe_layer_step is 4, expected 1 to block_count, which is 3"),
        ({"attention.head_count_kv": 3}, "attention.head_count_kv is 3, expected a divisor of attention.head_count"),
        ({"attention.head_count": 1 << 29}, "attention.head_count is 536870912, expected at most 1048576"),
        ({"attention.head_count": 0}, "attention.head_count_kv is 2, expected a divisor"),
        ({"attention.value_length": 32}, r"key_length, value_length and rope.dimension_count are \[64, 32, 64\]"),
        ({"rope.dimension_count": 32}, r"key_length, value_length and rope.dimension_count are \[64, 64, 32\]"),
        ({"rope.scaling.type": b"?"}, "rope.scaling.type is '[?]', expected one of none, linear, yarn, longrope"),
        ({"attention.layer_norm_rms_epsilon": -1.0}, "attention.layer_norm_rms_epsilon is -1.0, expected at least 0"),
        ({"attention.layer_norm_rms_epsilon": float("nan")}, "layer_norm_rms_epsilon is nan, expected at least 0"),
        ({"tokens": [b"a", b"a"]}, "the vocabulary has the token 'a' twice"),
        ({"tokens": [b"a", b"a\0b"]}, "the vocabulary has the token 'a' twice"),
    ],
    ids=str,
)
def test_values_that_llama_cpp_asserts_are_checked_before(values: dict[str, Any], problem: str | None) -> None:
    found = [text for check in metadata.CHECKS if (text := check(with_values(**values)))]
    if problem is None:
        assert not found
    else:
        with pytest.raises(AssertionError, match=problem):
            raise AssertionError("; ".join(found))


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({}, None),
        ({"general.architecture": b"clap"}, "general.architecture is 'clap', expected 'clip'"),
        ({"clip.vision.attention.head_count": 0}, "vision.attention.head_count is 0, expected a divisor of"),
        ({"clip.vision.attention.head_count": 65536}, "vision.attention.head_count is 65536, expected a divisor of"),
        ({"clip.vision.attention.layer_norm_epsilon": float("nan")}, "layer_norm_epsilon is nan, expected at least 0"),
        ({"clip.vision.projector.norm_epsilon": -1.0}, "vision.projector.norm_epsilon is -1.0, expected at least 0"),
    ],
)
def test_values_of_an_mmproj_are_checked_before(values: dict[str, Any], problem: str | None) -> None:
    known = {
        "general.architecture": b"clip",
        "clip.vision.attention.head_count": 16,
        "clip.vision.embedding_length": 1280,
        "clip.vision.attention.layer_norm_epsilon": 1e-6,
        "clip.vision.projector.norm_epsilon": 1e-5,
    }
    found = metadata._vision(metadata.Metadata(known | values))
    assert found == problem if problem is None else found is not None and problem in found


@pytest.fixture(scope="module")
def mmproj(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The mmproj of the example that reads images."""
    folder = tmp_path_factory.mktemp("mmproj")
    job = prepare(VL_TINY, Outtype.BF16, choices=choose())
    write_gguf(job, folder / "model.gguf", 1, False, lambda _: None, mmproj=folder / "mmproj.gguf")
    return (folder / "mmproj.gguf").read_bytes()


@pytest.mark.parametrize(
    "name", ["v.blk.1.ln2.bias", "v.patch_embd.weight", "mm.temporal.norm.weight", "mm.model.fc.bias"]
)
def test_a_tensor_that_an_mmproj_lacks_is_named(mmproj: bytes, name: str, tmp_path: Path) -> None:
    path = tmp_path / "mmproj.gguf"
    path.write_bytes(mmproj)
    metadata.check(path, metadata.MMPROJ_CHECKS)
    path.write_bytes(mmproj.replace(name.encode(), name.replace("m", "n").replace("v.", "w.").encode()))
    with pytest.raises(
        ValueError, match=f"mmproj.gguf cannot be loaded: it holds no tensor {re.escape(name)}; the file is"
    ):
        metadata.check(path, metadata.MMPROJ_CHECKS)


@pytest.mark.parametrize("key", ["patch_size", "embedding_length", "spatial_merge_size", "projection_dim"])
def test_sizes_of_an_mmproj_are_those_of_its_tensors(mmproj: bytes, key: str, tmp_path: Path) -> None:
    path, name = tmp_path / "mmproj.gguf", f"clip.vision.{key}".encode()
    damaged = bytearray(mmproj)
    value = damaged.index(name) + len(name) + 4  # behind the type
    damaged[value : value + 4] = (1 << 12).to_bytes(4, "little")
    path.write_bytes(damaged)
    with pytest.raises(
        ValueError, match=f"mmproj.gguf cannot be loaded: vision.{key} asks for a .* of .*, found .*; the"
    ):
        metadata.check(path, metadata.MMPROJ_CHECKS)


def test_a_damaged_value_is_named_with_the_file(bf16: str, tmp_path: Path) -> None:
    damaged = bytearray(Path(bf16).read_bytes())
    field = gguf.GGUFReader(bf16).fields[f"{ARCHITECTURE}.expert_count"]
    damaged[field.offset + 8 + len(field.name) + 4] = 1
    (tmp_path / "damaged.gguf").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"damaged.gguf cannot be loaded: expert_used_count is 2, .*; the file is dam"):
        Llama(tmp_path / "damaged.gguf")


LOAD = """
import sys
from ernie_llama import Llama
for path in sys.stdin:
    try:
        with Llama(path.strip(), n_ctx=64, n_threads=1) as llm:
            llm("def", max_tokens=2, temperature=0)
        print("loaded", flush=True)
    except (ValueError, RuntimeError) as error:
        print("refused", flush=True)
"""


def damaged_files(path: str, n: int) -> Iterator[bytes]:
    """Copies of a file with damage in the header, most of it in single metadata values."""
    whole = Path(path).read_bytes()
    reader = gguf.GGUFReader(path)
    header = min(tensor.data_offset for tensor in reader.tensors)
    values = [
        field.offset + 8 + len(field.name.encode()) + 4
        for field in reader.fields.values()
        if field.offset and len(field.types) == 1
    ]
    rng = random.Random(1)
    for _ in range(n):
        damaged = bytearray(whole)
        for _ in range(rng.choice([1, 1, 2, 4])):
            at = rng.choice(values) + rng.randrange(4) if rng.random() < 0.6 else rng.randrange(8, header)
            if rng.random() < 0.5:
                damaged[at] = rng.randrange(256)
            else:
                damaged[at : at + 4] = rng.choice([0, 1, 3, 255, 65536, 2**31, 2**32 - 1]).to_bytes(4, "little")
        yield bytes(damaged if rng.random() < 0.95 else damaged[: rng.randrange(8, len(damaged))])


class Loader:
    """A process that loads files, started again when one has ended it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def load(self, path: Path) -> str:
        """What became of a file: loaded, refused, or how the process ended."""
        process = self._process = self._process or subprocess.Popen(
            [sys.executable, "-c", LOAD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        )
        assert process.stdin is not None
        assert process.stdout is not None
        print(path, file=process.stdin, flush=True)
        if outcome := process.stdout.readline().strip():
            return outcome
        self.close()
        return f"ended with {process.returncode}"

    def close(self) -> None:
        if self._process is not None:
            self._process.communicate()
        self._process = None


def test_no_damaged_file_ends_the_process(bf16: str, tmp_path: Path) -> None:
    path, loader, outcomes = tmp_path / "damaged.gguf", Loader(), []
    for damaged in damaged_files(bf16, int(os.environ.get("FUZZ_FILES", "150"))):
        path.write_bytes(damaged)
        outcomes.append(loader.load(path))
    loader.close()
    assert [(i, each) for i, each in enumerate(outcomes) if each not in {"loaded", "refused"}] == []
    assert set(outcomes) == {"loaded", "refused"}
