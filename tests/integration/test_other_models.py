"""ccq2 in models that are no ERNIE: made by transformers, converted by upstream, quantized by llama-quantize, run."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import pytest
from ernie_gguf.ccq2.rows import dequantize_rows
from ernie_gguf.gguf_file.reader import read_gguf
from ernie_llama import Llama
from reference.golden import Floats
from support.command_line import Command

pytest.importorskip("transformers", reason="needs the extra `reference`")
from reference import other_models

pytestmark = pytest.mark.build

TOKENS = [300, 17, 299, 45, 102, 411, 7, 88, 260, 300, 301, 302, 12, 13, 14, 15]


@dataclass(frozen=True)
class Files:
    """A model in BF16, with experts in ccq2 and in iq2_xxs by the same importance matrix, and ccq2 decoded to F32."""

    bf16: Path
    ccq2: Path
    iq2_xxs: Path
    decoded: Path


@pytest.fixture(scope="module", params=sorted(other_models.CONFIGS))
def files(
    request: pytest.FixtureRequest, llama_bin: Path, llama_tree: Path, tmp_path_factory: pytest.TempPathFactory
) -> Files:
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = other_models.make(request.param, folder)
    made = Files(*(folder / f"{name}.gguf" for name in ("bf16", "ccq2", "iq2_xxs", "decoded")))
    imatrix, text = folder / "imatrix.gguf", folder / "text.txt"
    other_models.convert(llama_tree, checkpoint, made.bf16)
    text.write_text(other_models.TEXT * 8)
    run(llama_bin / "llama-imatrix", "-m", made.bf16, "-f", text, "-o", imatrix, "-c", "128", "-t", "1", "--no-ppl")
    quantize = (llama_bin / "llama-quantize", "--imatrix", imatrix)
    run(*quantize, made.bf16, made.ccq2, "CCQ2", "2")
    run(*quantize, "--tensor-type", "_exps=iq2_xxs", made.bf16, made.iq2_xxs, "Q8_0", "2")
    run(quantize[0], "--allow-requantize", made.ccq2, made.decoded, "F32", "2")
    return made


def run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"


def logits(path: Path) -> Floats:
    with Llama(str(path), n_ctx=64, n_threads=1, logits_all=True, verbose=False) as llm:
        llm.eval(TOKENS)
        assert llm.scores is not None
        return llm.scores[: len(TOKENS)].copy()


def test_experts_are_ccq2_and_decode_in_python_as_in_c(files: Files) -> None:
    decoded = {tensor.name: tensor.data for tensor in gguf.GGUFReader(files.decoded).tensors}
    file = read_gguf(files.ccq2)
    experts = [tensor for tensor in file.tensors if "_exps." in tensor.name]
    assert len(experts) in (6, 9)  # two or three layers of gate, up, down
    for tensor in experts:
        assert tensor.type_name == "ccq2"
        k = tensor.ne[0]
        assert np.array_equal(dequantize_rows(file.rows(tensor), k), decoded[tensor.name].reshape(-1, k)), tensor.name
    others = {tensor.type_name for tensor in file.tensors if "_exps." not in tensor.name and len(tensor.ne) > 1}
    assert others <= {"q8_0", "f32"}


def test_inspect_shows_it(files: Files, ernie_gguf: Command) -> None:
    done = ernie_gguf("inspect", files.ccq2)
    assert done.code == 0
    assert re.search(r"ernie_gguf.ccq.layout +1\n", done.out)
    assert re.search(r"blk.2.ffn_down_exps.weight +256 x 512 x 8 +ccq2 ", done.out)


def test_logits_are_those_of_bf16_within_what_two_bits_allow(
    llama_bin: Path, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What that is, iq2_xxs shows: random routers hardly prefer their experts, and a changed choice changes much."""
    monkeypatch.setenv("ERNIE_LLAMA_LIB_PATH", str(llama_bin))
    of = {name: logits(getattr(files, name)) for name in ("bf16", "ccq2", "iq2_xxs", "decoded")}

    def error(name: str, reference: str) -> float:
        difference = np.sqrt(((of[name] - of[reference]) ** 2).mean(1)) / of[reference].std(1)
        return float(np.median(difference))

    found = {name: error(name, "bf16") for name in ("ccq2", "iq2_xxs")}
    kernels = error("ccq2", "decoded")
    print(found, kernels)
    assert 0.01 < found["ccq2"] < found["iq2_xxs"]
    assert kernels < 0.1
