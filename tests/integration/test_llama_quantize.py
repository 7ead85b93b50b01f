"""ccq2 as a target of llama-quantize: which tensors, the same bytes as our converter's, its options, bad input."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import gguf
import numpy as np
import pytest
from ernie_gguf.ccq2.encode import encode_rows
from ernie_gguf.ccq2.rows import dequantize_rows
from ernie_gguf.gguf_file.reader import GgufFile, read_gguf
from reference import synthetic

pytestmark = pytest.mark.build

KEY = "ernie_gguf.ccq.layout"


class Quantize:
    """llama-quantize in a folder of its own."""

    def __init__(self, program: Path, folder: Path) -> None:
        self.program = program
        self.folder = folder

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [str(self.program), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=self.folder)

    def __call__(self, source: Path, *options: str | Path, kind: str = "CCQ2", threads: int = 2) -> GgufFile:
        out = self.folder / "out.gguf"
        done = self.run(*options, source, out, kind, str(threads))
        assert done.returncode == 0, done.stdout + done.stderr
        return read_gguf(out)

    def fails(self, source: Path, *options: str | Path, kind: str = "CCQ2") -> str:
        """Its messages, having left no file."""
        done = self.run(*options, source, self.folder / "failed.gguf", kind, "2")
        assert done.returncode != 0
        assert list(self.folder.glob("failed*")) == []
        return done.stdout + done.stderr


@pytest.fixture
def quantize(llama_bin: Path, tmp_path: Path) -> Quantize:
    return Quantize(llama_bin / "llama-quantize", tmp_path)


def types(file: GgufFile) -> dict[str, str]:
    return {tensor.name: tensor.type_name for tensor in file.tensors}


def data(file: GgufFile, name: str) -> bytes:
    (tensor,) = (tensor for tensor in file.tensors if tensor.name == name)
    return file.rows(tensor).tobytes()


def floats(path: Path, name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    (tensor,) = (tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == name)
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return np.ascontiguousarray(values.reshape(-1, int(tensor.shape[0])), np.float32)


def test_experts_become_ccq2_as_our_converter_makes_them(
    quantize: Quantize, tiny_bf16_gguf: Path, tiny_ccq2_gguf: Path
) -> None:
    made, ours = quantize(tiny_bf16_gguf), read_gguf(tiny_ccq2_gguf)
    assert types(made) == types(ours)
    for name, kind in types(ours).items():
        if kind != "q8_0":  # upstream's rounding differs from gguf-py's in single steps
            assert data(made, name) == data(ours, name), name
    assert made.metadata[KEY] == 1
    assert made.metadata["general.file_type"] == 180


def test_the_importance_matrix_weighs_each_expert_by_its_own(quantize: Quantize, tiny_bf16_gguf: Path) -> None:
    name = "blk.1.ffn_down_exps.weight"
    (tensor,) = (tensor for tensor in read_gguf(tiny_bf16_gguf).tensors if tensor.name == name)
    k, n, experts = tensor.ne
    importance = np.random.default_rng(1).random((experts, k), np.float32) ** 4
    counts = np.full(experts, 8, np.float32)
    counts[2] = 0  # an expert that no token was routed to
    imatrix = synthetic.write_imatrix(quantize.folder / "imatrix.gguf", {name: (importance, counts)})
    made = quantize(tiny_bf16_gguf, "--imatrix", imatrix)
    w = floats(tiny_bf16_gguf, name).reshape(experts, n, k)
    expected = [encode_rows(w[e], importance[e] if counts[e] else None).tobytes() for e in range(experts)]
    assert data(made, name) == b"".join(expected)
    assert data(made, name) != data(quantize(tiny_bf16_gguf), name)


def test_any_number_of_threads_and_any_buffer_give_the_same(quantize: Quantize, tiny_bf16_gguf: Path) -> None:
    quantize(tiny_bf16_gguf, threads=1)
    one = (quantize.folder / "out.gguf").read_bytes()
    quantize(tiny_bf16_gguf, "--max-buffer-size", "1", threads=3)
    assert (quantize.folder / "out.gguf").read_bytes() == one


def test_single_tensors(quantize: Quantize, tiny_bf16_gguf: Path) -> None:
    made = quantize(tiny_bf16_gguf, "--tensor-type", "blk.1.ffn_up_exps=ccq2", kind="Q4_0")
    assert [name for name, kind in types(made).items() if kind == "ccq2"] == ["blk.1.ffn_up_exps.weight"]
    assert made.metadata[KEY] == 1


def test_options_for_embedding_and_head(quantize: Quantize, tiny_bf16_gguf: Path) -> None:
    made = types(quantize(tiny_bf16_gguf, "--token-embedding-type", "q4_0", "--output-tensor-type", "q6_K"))
    assert made["token_embd.weight"] == "q4_0"
    assert made.get("output.weight", "q6_k") == "q6_k"
    assert made["blk.1.ffn_up_exps.weight"] == "ccq2"


def test_dry_run_states_the_size(quantize: Quantize, tiny_bf16_gguf: Path) -> None:
    made = quantize(tiny_bf16_gguf)
    done = quantize.run("--dry-run", tiny_bf16_gguf, "CCQ2")
    assert done.returncode == 0
    (size,) = re.findall(r"quant size +=\s+([\d.]+) MiB", done.stdout + done.stderr)
    assert float(size) == pytest.approx(sum(tensor.nbytes for tensor in made.tensors) / 2**20, abs=0.01)


def test_dry_run_of_deepseek_v3(quantize: Quantize) -> None:
    """671 billion weights, of which the file holds none: the figure of docs/convert.md."""
    source = synthetic.write_deepseek_v3(quantize.folder / "deepseek-v3.gguf")
    done = quantize.run("--dry-run", source, "CCQ2")
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"quant size +=\s+([\d.]+) MiB \(([\d.]+) BPW\)", done.stdout + done.stderr)
    assert found
    assert float(found[1]) * 2**20 / 1e9 == pytest.approx(190, abs=0.5)
    assert float(found[2]) == pytest.approx(2.26, abs=0.005)


def test_splits_are_kept(quantize: Quantize, llama_bin: Path, tiny_bf16_gguf: Path) -> None:
    whole = quantize(tiny_bf16_gguf)
    parts = quantize.folder / "part"
    split: list[str | Path] = [llama_bin / "llama-gguf-split", "--split-max-tensors", "12", tiny_bf16_gguf, parts]
    subprocess.run(split, check=True, capture_output=True)
    first = min(quantize.folder.glob("part-*.gguf"))
    done = quantize.run("--keep-split", first, quantize.folder / "kept.gguf", "CCQ2", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    kept = sorted(quantize.folder.glob("kept-*.gguf"))
    assert len(kept) == len(list(quantize.folder.glob("part-*.gguf"))) > 1
    made = read_gguf(kept[0])
    assert types(made) == types(whole)
    assert all(data(made, name) == data(whole, name) for name in types(whole))


def test_requantizing(quantize: Quantize, tiny_bf16_gguf: Path, tmp_path: Path) -> None:
    """From ccq2 its values come back as our Python decodes them; to ccq2 q8_0 will do; neither without the option."""
    name = "blk.1.ffn_down_exps.weight"
    ccq2 = quantize(tiny_bf16_gguf).path.rename(tmp_path / "ccq2.gguf")
    said = quantize.fails(ccq2, "--tensor-type", "_exps=q4_0", kind="Q8_0")
    assert "requantizing from type ccq2 is disabled" in said
    decoded = quantize(ccq2, "--allow-requantize", kind="F32", threads=3)
    assert KEY not in decoded.metadata
    (tensor,) = (tensor for tensor in read_gguf(ccq2).tensors if tensor.name == name)
    expected = dequantize_rows(read_gguf(ccq2).rows(tensor), tensor.ne[0])
    assert np.array_equal(floats(decoded.path, name), expected)

    q8_0 = quantize(tiny_bf16_gguf, kind="Q8_0").path.rename(tmp_path / "q8_0.gguf")
    assert "requantizing from type q8_0 is disabled" in quantize.fails(q8_0)
    made = quantize(q8_0, "--allow-requantize")
    assert data(made, name) == encode_rows(floats(q8_0, name)).tobytes()
    copied = quantize(ccq2, kind="COPY")
    assert data(copied, name) == data(read_gguf(ccq2), name)


def test_rows_of_another_length_fall_back(quantize: Quantize) -> None:
    source = synthetic.write_model(quantize.folder / "model.gguf", hidden=256, expert_ffn=320)
    done = quantize.run(source, quantize.folder / "out.gguf", "CCQ2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"ffn_down_exps.weight.*ncols +320 not divisible by 256.*falling back to +iq4_nl", done.stderr)
    made = types(read_gguf(quantize.folder / "out.gguf"))
    assert made["blk.0.ffn_up_exps.weight"] == "ccq2"
    assert made["blk.0.ffn_down_exps.weight"] == "iq4_nl"


def test_a_model_without_experts_is_told_so(quantize: Quantize) -> None:
    source = synthetic.write_model(quantize.folder / "model.gguf", experts=0)
    done = quantize.run(source, quantize.folder / "out.gguf", "CCQ2")
    assert done.returncode == 0
    assert "no tensor becomes ccq2" in done.stdout + done.stderr
    assert KEY not in read_gguf(quantize.folder / "out.gguf").metadata


def test_rows_of_zeros(quantize: Quantize) -> None:
    source = synthetic.write_model(quantize.folder / "model.gguf", zero_rows=(0, 5))
    made = quantize(source)
    name = "blk.0.ffn_up_exps.weight"
    (tensor,) = (tensor for tensor in made.tensors if tensor.name == name)
    decoded = dequantize_rows(made.rows(tensor), tensor.ne[0])
    assert not decoded[[0, 5]].any()
    assert decoded[[1, 4]].any(1).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_weights_that_are_not_finite(quantize: Quantize, value: float, dtype: str) -> None:
    source = synthetic.write_model(quantize.folder / "model.gguf", broken=value, dtype=dtype)
    assert "tensor 'blk.0.ffn_up_exps.weight' has invalid data" in quantize.fails(source)


def test_an_imatrix_of_another_model(quantize: Quantize, tiny_bf16_gguf: Path) -> None:
    name = "blk.1.ffn_up_exps.weight"
    (tensor,) = (tensor for tensor in read_gguf(tiny_bf16_gguf).tensors if tensor.name == name)
    k, _, experts = tensor.ne
    wider = {name: (np.ones((experts, 2 * k), np.float32), np.ones(experts, np.float32))}
    said = quantize.fails(tiny_bf16_gguf, "--imatrix", synthetic.write_imatrix(quantize.folder / "wider.gguf", wider))
    assert (
        f"the imatrix belongs to another model: it has {2 * k * experts} values for tensor '{name}', not {k * experts}"
        in said
    )
    dense = {"blk.0.attn_q.weight": (np.ones((1, k), np.float32), np.ones(1, np.float32))}
    said = quantize.fails(tiny_bf16_gguf, "--imatrix", synthetic.write_imatrix(quantize.folder / "dense.gguf", dense))
    assert re.search(r"the imatrix has nothing for the \d+ tensors to become ccq2: it belongs to another model", said)


def test_an_imatrix_that_is_not_finite(quantize: Quantize, tiny_bf16_gguf: Path) -> None:
    name = "blk.1.ffn_up_exps.weight"
    (tensor,) = (tensor for tensor in read_gguf(tiny_bf16_gguf).tensors if tensor.name == name)
    k, _, experts = tensor.ne
    broken = {name: (np.full((experts, k), np.inf, np.float32), np.ones(experts, np.float32))}
    said = quantize.fails(tiny_bf16_gguf, "--imatrix", synthetic.write_imatrix(quantize.folder / "broken.gguf", broken))
    assert "imatrix contains non-finite value" in said
