"""On a GPU: the same encoder by other kernels. Skipped where torch sees none; CI has none."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the extra `quantize` is not installed")

if not torch.cuda.is_available():
    pytest.skip("torch sees no GPU", allow_module_level=True)

from ernie_gguf.ccq2.code_maps import CODE_MAPS  # noqa: E402
from ernie_gguf.ccq2.rows import dequantize_rows  # noqa: E402
from ernie_gguf.convert import prepare  # noqa: E402
from ernie_gguf.gguf_file.outtype import Outtype  # noqa: E402
from ernie_gguf.gguf_file.reader import read_gguf  # noqa: E402
from ernie_gguf.quantize.encoder import Pipeline  # noqa: E402
from ernie_gguf.quantize.kernels import make_codebooks  # noqa: E402
from ernie_gguf.quantize.kernels_torch import TorchKernels  # noqa: E402
from ernie_gguf.quantize.kernels_triton import TritonKernels  # noqa: E402
from ernie_gguf.quantize.run import run_quantize  # noqa: E402
from ernie_gguf.quantize.settings import Settings, kernels_for  # noqa: E402
from ernie_gguf.quantize.text import calibration_sequences  # noqa: E402

ROOT = Path(__file__).parents[2]


def test_triton_is_taken() -> None:
    kernels, note = kernels_for("cuda")
    assert (type(kernels).__name__, note) == ("TritonKernels", "")


@pytest.mark.parametrize("n", [16, 48, 64, 160])
def test_the_search_is_that_of_torch(n: int) -> None:
    torch.manual_seed(n)
    y = torch.randn(3, 4, n, device="cuda")
    tables = torch.randn(3, 2, 16, 256, 5, device="cuda")[:, :, 7]
    map_index = torch.randint(2, (3, n // 16), dtype=torch.int32, device="cuda")
    assert torch.equal(TritonKernels().search(y, tables, map_index), TorchKernels().search(y, tables, map_index))


def test_of_equal_scores_the_lowest_byte_wins() -> None:
    tables = torch.ones(1, 1, 256, 5, device="cuda")
    tables[:, :, 3:6] = 2
    y, map_index = torch.ones(1, 4, 16, device="cuda"), torch.zeros(1, 1, dtype=torch.int32, device="cuda")
    assert TritonKernels().search(y, tables, map_index).tolist() == [[3] * 16]


def test_matrices_cost_the_same_as_on_the_cpu() -> None:
    torch.manual_seed(0)
    x = torch.randn(2000, 512) @ torch.randn(512, 512)
    w, h = torch.randn(2, 64, 512), (x.T @ x).expand(2, -1, -1)
    costs = {}
    for device in ("cpu", "cuda"):
        pipeline = Pipeline(make_codebooks(CODE_MAPS[:4], device), kernels_for(device)[0])
        costs[device] = pipeline.encode(w.to(device), h.to(device)).cost.sum().item()
    assert costs["cuda"] == pytest.approx(costs["cpu"], rel=1e-3)  # near ties fall differently


def test_a_whole_model(tmp_path: Path) -> None:
    tiny = ROOT / "examples" / "ernie-tiny"
    job = prepare(tiny, Outtype.CCQ2)
    text = calibration_sequences(
        [ROOT / "docs" / "formats.md", ROOT / "docs" / "kernels.md"], tiny, job.vocab, 256, 8192
    )
    errors, data = {}, {}
    for name, device in (("cpu", "cpu"), ("one", "cuda"), ("two", "cuda")):
        path = tmp_path / f"{name}.gguf"
        settings = Settings(device, 2, maps=2)
        kernels, _ = kernels_for(device)
        result = run_quantize(job, text, settings, kernels, path, overwrite=False, restart=False, listen=lambda _: None)
        errors[name] = sum(stats.metric_error for stats in result.matrices)
        data[name] = path.read_bytes()
    assert data["one"] == data["two"]
    assert errors["one"] == pytest.approx(errors["cpu"], rel=5e-3)
    file = read_gguf(tmp_path / "one.gguf")
    for tensor in file.tensors:
        if tensor.type_name == "ccq2":
            assert dequantize_rows(file.rows(tensor), tensor.ne[0]).any()
