"""Pictures with eyes in each type of --mmproj-type, models in common types, on the CPU and on a GPU if there is one.

Compared with transformers in float32. Errors of embeddings are relative to their largest value. Errors of logits are
the root of the mean square at a position over the spread there; the median of all positions counts, as rounding sends
a few tokens of this random model to other experts. `pytest -s` prints what was measured. A build without a GPU skips
the tests on one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from ernie_gguf.convert import prepare, write_gguf
from ernie_gguf.gguf_file.outtype import FloatType, Outtype
from ernie_gguf.plan import choose
from ernie_llama import Llama
from ernie_llama._lib import library, mtmd
from reference import vl_golden
from reference.golden import sampled_ids
from reference.vl_golden import PICTURES, PROMPTS, GoldenPictures

from integration.test_pictures import Files, float32, load, logits, picture

pytestmark = pytest.mark.build

__all__ = ["float32"]  # a fixture

WHOLE = slice(0, 3)  # the pictures that are not resized: Pillow rounds otherwise
# Measured on a CPU: 4e-4, 7e-4, 6e-3, 2.5e-2, and 1e-6, 5e-3, 3e-2
EYES = {FloatType.F32: 1e-3, FloatType.F16: 3e-3, FloatType.BF16: 2e-2, FloatType.Q8_0: 5e-2}
MODELS = {Outtype.F32: 1e-5, Outtype.BF16: 2e-2, Outtype.Q8_0: 8e-2}
LEAST_ON_GPU = 2e-2  # a bound on a GPU at least: tensor cores round float32 to 10 bits


@pytest.fixture(scope="module", autouse=True)
def _built_library(llama_bin: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ERNIE_LLAMA_LIB_PATH", str(llama_bin))
        patch.setenv("NVIDIA_TF32_OVERRIDE", "0")
        yield


@pytest.fixture(params=["cpu", "gpu"])
def device(request: pytest.FixtureRequest) -> str:
    """Where everything runs."""
    name: str = request.param
    llama = library.load()
    devices = [llama.ggml_backend_dev_get(i) for i in range(llama.ggml_backend_dev_count())]
    names = [llama.ggml_backend_dev_name(each).decode() for each in devices]
    if name == "gpu" and all(each.startswith(("CPU", "BLAS")) for each in names):
        pytest.skip("this build of llama.cpp sees no GPU")
    return name


def bound_on(device: str, bound: float) -> float:
    return max(bound, LEAST_ON_GPU) if device == "gpu" else bound


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vl_golden.checkpoint(tmp_path_factory.mktemp("types") / "checkpoint")


def converted(checkpoint: Path, folder: Path, outtype: Outtype, projector: FloatType) -> Files:
    out = Files(checkpoint, folder / "model.gguf", folder / "eyes.gguf")
    job = prepare(checkpoint, outtype, choices=choose(projector=projector))
    write_gguf(job, out.model, 1, False, lambda _: None, mmproj=out.eyes)
    return out


def opened(files: Files, device: str) -> Llama:
    return load(files, n_gpu_layers=99 if device == "gpu" else 0)


@pytest.mark.usefixtures("float32")
@pytest.mark.parametrize("projector", EYES)
def test_eyes(checkpoint: Path, tmp_path: Path, device: str, projector: FloatType) -> None:
    """Embeddings of three pictures."""
    errors, cosines = [], []
    with opened(converted(checkpoint, tmp_path, Outtype.BF16, projector), device) as llm:
        encoder = llm._engine.images.encoder
        assert encoder is not None
        for data, expected in zip(PICTURES[WHOLE], GoldenPictures.load().embeddings, strict=False):
            found = np.ctypeslib.as_array(encoder.encode(picture(llm, data)), expected.shape)
            errors.append(np.abs(found - expected).max() / np.abs(expected).max())
            cosines.append((found * expected).sum() / np.sqrt((found**2).sum() * (expected**2).sum()))
    bound = bound_on(device, EYES[projector])
    print(f"{device} eyes {projector.value:5} error {max(errors):.1e} of {bound:.0e}, cosine {min(cosines):.6f}")
    assert max(errors) < bound
    assert min(cosines) > 0.999


@pytest.mark.usefixtures("float32")
@pytest.mark.parametrize("outtype", MODELS)
def test_models(checkpoint: Path, tmp_path: Path, device: str, outtype: Outtype) -> None:
    """Logits after texts and pictures, with eyes in float32."""
    golden, errors = GoldenPictures.load(), []
    with opened(converted(checkpoint, tmp_path, outtype, FloatType.F32), device) as llm:
        for i, parts in enumerate(PROMPTS):
            if -1 - len(PICTURES[WHOLE]) in parts:
                continue
            found = logits(llm, parts)
            text = ~np.isnan(found[:, 0])
            error = found[:, sampled_ids(found.shape[1])] - golden.values[i]
            errors += [*(np.sqrt((error**2).mean(1)) / golden.spread[i])[text]]
    bound, median = bound_on(device, MODELS[outtype]), float(np.median(errors))
    print(f"{device} model {outtype.value:5} error {median:.1e} of {bound:.0e}, largest {max(errors):.1e}")
    assert median < bound


def test_the_eyes_are_where_the_model_is(checkpoint: Path, tmp_path: Path, device: str) -> None:
    """Layers on the CPU leave the eyes there too."""
    files = converted(checkpoint, tmp_path, Outtype.BF16, FloatType.BF16)
    libmtmd, seen = mtmd.load(), []
    make = libmtmd.mtmd_init_from_file

    def spy(path: bytes, model: object, params: mtmd.mtmd_context_params) -> object:
        seen.append(params.use_gpu)
        return make(path, model, params)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(libmtmd, "mtmd_init_from_file", spy)
        opened(files, device).close()
    assert seen == [device == "gpu"]
