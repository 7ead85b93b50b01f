"""Run each CPU variant of an installed wheel that this machine can: the dot product of ccq2, and a greedy text.

The library chooses one variant when it is loaded; here it is given a folder that holds no other. To be run with the
Python of the environment in which the wheel is installed.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import ernie_llama
import numpy as np
from ernie_gguf.ccq2.rows import Ccq2Rows, dequantize_rows, pack_rows

PREFIX = "libggml-cpu-"
LENGTHS = (256, 1280, 8192)
ROWS = 16
# Prints the library that was chosen and what it writes; the prompt is long enough for the kernels of prompts. The first
# six tokens lead by 1.8 in log-probability or more, while variants differ by up to 0.3, as they round activations and
# sums in their own order; the fourteenth leads by 0.2, and there some take another.
WRITE = """
import json, sys
from ernie_llama import Llama
with Llama(sys.argv[1], n_ctx=512, n_threads=1) as llm:
    text = llm("def read_file(path):\\n    return open(path).read()\\n\\n" * 8, max_tokens=6, temperature=0)
chosen = {line.split()[-1] for line in open("/proc/self/maps") if "libggml-cpu-" in line}
print(json.dumps([sorted(chosen), text["choices"][0]["text"]]))
"""


def runs_here(variant: ctypes.CDLL) -> bool:
    """Whether this machine has the instructions of the variant."""
    return int(variant.ggml_backend_score()) > 0


def dot_product_error(base: ctypes.CDLL, variant: ctypes.CDLL) -> float:
    """The largest error of the dot product, relative to the sum of the products' absolute values."""
    worst = 0.0
    for k in LENGTHS:
        rng = np.random.default_rng(k)
        rows = Ccq2Rows(
            m=rng.integers(0, 2**32, ROWS, dtype=np.uint32),
            z=rng.integers(0, 2**32, ROWS, dtype=np.uint32),
            d=np.full(ROWS, 1e-3, np.float32),
            codes=rng.integers(0, 256, (ROWS, k // 4), dtype=np.uint8),
            scales=rng.integers(0, 16, (ROWS, k // 64), dtype=np.uint8),
        )
        data = pack_rows(rows)
        x = rng.integers(-127, 128, k).astype(np.float32)
        x[::256] = -127  # the largest of each block: q8_K then holds all of them exactly
        activations = np.zeros(k // 256 * 292, np.uint8)
        base.quantize_row_q8_K_ref(pointer(x), pointer(activations), ctypes.c_int64(k))
        weights = dequantize_rows(data, k).astype(np.float64)
        for row, expected, size in zip(data, weights @ x, np.abs(weights) @ np.abs(x), strict=True):
            found, zero = ctypes.c_float(float("nan")), ctypes.c_size_t(0)
            arguments = (zero, pointer(row), zero, pointer(activations), zero, 1)
            variant.ggml_vec_dot_ccq2_q8_K(k, ctypes.byref(found), *arguments)
            worst = max(worst, abs(found.value - expected) / size)
    return worst


def pointer(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> ctypes.c_void_p:
    """The address of the first element."""
    return ctypes.c_void_p(array.ctypes.data)


def text_of(library: Path, variant: Path, model: Path) -> str:
    """What the model writes with `variant` alone."""
    with tempfile.TemporaryDirectory() as name:
        for path in library.iterdir():
            if path.is_file() and (path == variant or not path.name.startswith(PREFIX)):
                shutil.copy2(path, name)
        # What auditwheel has added lies beside the package, which the copies do not.
        added = library.parents[1] / "ernie_gguf.libs"
        environment = {**os.environ, "ERNIE_LLAMA_LIB_PATH": name, "LD_LIBRARY_PATH": str(added)}
        command = [sys.executable, "-c", WRITE, str(model)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            sys.exit(f"error: {variant.name} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        chosen, text = json.loads(done.stdout)
        if [Path(path).name for path in chosen] != [variant.name]:
            sys.exit(f"error: {variant.name} was to be used, the library chose {chosen}")
        return str(text)


def main() -> None:
    """Check all variants; the text of the plainest one is what all are to write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="a ccq2 file of the example")
    model = parser.parse_args().model.absolute()
    library = Path(ernie_llama.info().path).parent
    base = ctypes.CDLL(str(library / "libggml-base.so"))
    plain = library / f"{PREFIX}x64.so"
    variants = [plain, *sorted(path for path in library.glob(f"{PREFIX}*.so") if path != plain)]
    expected, elsewhere = "", []
    for path in variants:
        variant = ctypes.CDLL(str(path))
        name = path.stem.removeprefix(PREFIX)
        if not runs_here(variant):
            elsewhere.append(name)
            continue
        error, text = dot_product_error(base, variant), text_of(library, path, model)
        expected = expected or text
        if not error < 1e-6:
            sys.exit(f"error: the dot product of {name} is wrong by {error:.1e}")
        if text != expected:
            sys.exit(f"error: {name} writes {text!r}, x64 writes {expected!r}")
        print(f"  {name:16} dot product within {error:.0e}, the same text")
    print(f"  not for this machine: {', '.join(elsewhere) or 'none'}")


if __name__ == "__main__":
    main()
