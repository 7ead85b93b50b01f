"""A checkpoint in the layout of ERNIE-4.5-300B-A47B-2Bits-Paddle, converted and run in the patched llama.cpp.

The reference is transformers in float32 on the weights that the checkpoint's bytes mean. Errors are relative to the
spread of the reference logits at the same position.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from ernie_gguf.convert import prepare, write_gguf
from ernie_gguf.gguf_file.outtype import Outtype
from ernie_gguf.gguf_file.reader import read_gguf
from ernie_llama import Llama
from reference.golden import Comparison, Floats, Golden, checkpoint_sha256
from reference.two_bits import NAME
from support.paddle import make_two_bits

pytestmark = pytest.mark.build

# Activations in 8 bits (measured at positions with a clear choice of experts: 0.55, after an earlier one swapped an
# expert, else 0.14; and 0.07). A model of other weights is off by 1.4 on average.
LARGEST, TYPICAL, ROUTING = 1.0, 0.12, 0.05


@pytest.fixture(scope="module", autouse=True)
def _built_library(llama_bin: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ERNIE_LLAMA_LIB_PATH", str(llama_bin))
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / NAME
    make_two_bits(folder)
    return folder


def convert(source: Path, outfile: Path, outtype: str) -> Path:
    write_gguf(prepare(source, Outtype(outtype)), outfile, threads=1, overwrite=False, progress=lambda _: None)
    return outfile


def logits_of(path: Path, prompts: list[list[int]], exact: bool) -> list[Floats]:
    """Logits at every position of each prompt; `exact` keeps keys and values in float32."""
    found = []
    kv, flash = ("f32", False) if exact else (None, None)
    with Llama(path, n_ctx=256, n_threads=1, logits_all=True, type_k=kv, type_v=kv, flash_attn=flash) as llm:
        for tokens in prompts:
            llm.reset()
            llm.eval(tokens)
            found.append(llm.scores.copy())
    return found


def compare(path: Path, golden: Golden, bound: float, routing: float) -> list[Comparison]:
    logits = logits_of(path, [prompt.tokens.tolist() for prompt in golden.prompts], exact=routing == 0)
    return [prompt.compare(rows, bound, routing) for prompt, rows in zip(golden.prompts, logits, strict=True)]


def test_the_fixture_is_the_one_the_golden_file_was_made_from(source: Path) -> None:
    assert checkpoint_sha256(source) == Golden.load(NAME).checkpoint_sha256


def test_the_weights_it_means(source: Path, tmp_path: Path) -> None:
    """Dequantized to float32, nothing is rounded anywhere."""
    for found in compare(convert(source, tmp_path / "f32.gguf", "f32"), Golden.load(NAME), 2e-5, 0):
        assert found.largest < 2e-5, found
        assert found.typical < 4e-6, found
        assert found.wrong_top == [], found


def test_the_exact_repack_runs(source: Path, tmp_path: Path) -> None:
    """As users run it: the kernels of q8_0, q4_0 and ccq2 round activations to 8 bits, and the KV cache is f16."""
    path = convert(source, tmp_path / "auto.gguf", "auto")
    assert {tensor.type_name for tensor in read_gguf(path).tensors} == {"ccq2", "q4_0", "q8_0", "bf16", "f32"}
    found = compare(path, Golden.load(NAME), LARGEST, ROUTING)
    for each in found:
        assert each.largest < LARGEST, each
        assert each.typical < TYPICAL, each
        assert each.wrong_top == [], each
    assert sum(each.positions for each in found) >= 0.5 * sum(len(p.tokens) for p in Golden.load(NAME).prompts)


def test_several_files_are_one_model(source: Path, tmp_path: Path) -> None:
    whole = convert(source, tmp_path / "whole.gguf", "auto")
    job = prepare(source, Outtype.AUTO)
    parts = write_gguf(
        job, tmp_path / "m.gguf", 1, overwrite=False, progress=lambda _: None, split_max_bytes=2_000_000
    ).paths
    assert len(parts) > 3
    tokens = [Golden.load(NAME).prompts[0].tokens.tolist()]
    assert np.array_equal(logits_of(parts[0], tokens, exact=True)[0], logits_of(whole, tokens, exact=True)[0])


def test_the_golden_file_is_what_transformers_gives_now(tmp_path: Path) -> None:
    for package in ("torch", "transformers"):
        pytest.importorskip(package, reason=f"{package} is not installed (extra `reference`); golden files are tested")
    from reference.two_bits import compute

    for kept, now in zip(Golden.load(NAME).prompts, compute(tmp_path).prompts, strict=True):
        assert kept.tokens.tolist() == now.tokens.tolist()
        np.testing.assert_allclose(kept.values, now.values, atol=1e-4)
        np.testing.assert_allclose(kept.last, now.last, atol=1e-4)
