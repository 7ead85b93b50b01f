"""A library with other structs is refused, with the reason, before anything is passed to it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from ernie_llama._lib import functions, structs

pytestmark = pytest.mark.build

LOAD = """
from ernie_llama import Llama
try:
    Llama("model.gguf")
except (OSError, ValueError) as error:
    print(type(error).__name__, error)
"""


def build(tree: Path, folder: Path, *, version: str = "0.6.0-dev", before: str = "", after: str = "") -> Path:
    """A library with every function, extra fields in its structs, and calls that do nothing."""
    plain = [
        name
        for name in functions.FUNCTIONS
        if name != "llama_version" and not name.endswith(("model_default_params", "context_default_params"))
    ]
    header = (tree / "include" / "llama.h").read_text()
    for struct in ("llama_model_params", "llama_context_params"):
        start = header.index(f"    struct {struct} {{\n") + len(f"    struct {struct} {{\n")
        end = header.index("    };\n", start)
        header = header[:start] + f"        {before}\n" + header[start:end] + f"        {after}\n" + header[end:]
    stubs = [f'extern "C" void * {name}_() {{ return nullptr; }}' for name in plain]
    (folder / "llama_changed.h").write_text(header)
    (folder / "fake.cpp").write_text(
        '#include "llama_changed.h"\n'
        + f'const char * llama_version(void) {{ return "{version}"; }}\n'
        + defaults("llama_model_params", DEFAULTS_MODEL)
        + defaults("llama_context_params", DEFAULTS_CONTEXT)
        + "\n".join(stubs)
    )
    path = folder / "libllama.so"
    # The other functions get their names by the linker: the header declares them with other types.
    renamed = [f"-Wl,--defsym={name}={name}_" for name in plain]
    includes = [f"-I{tree / 'ggml' / 'include'}", f"-I{tree / 'include'}"]
    command = ["c++", "-shared", "-fPIC", "-O1", "-Wno-deprecated-declarations", *includes]
    compiled = subprocess.run(
        [*command, str(folder / "fake.cpp"), "-o", str(path), *renamed], capture_output=True, text=True, check=False
    )
    assert compiled.returncode == 0, compiled.stderr[:4000]
    return path


DEFAULTS_MODEL = {
    "n_gpu_layers": "-1",
    "split_mode": "LLAMA_SPLIT_MODE_LAYER",
    "load_mode": "LLAMA_LOAD_MODE_AUTO",
    "lazy_mode": "LLAMA_LAZY_MODE_AUTO",
    "use_extra_bufts": "true",
}
DEFAULTS_CONTEXT = {
    "n_ctx": "512",
    "n_batch": "2048",
    "n_ubatch": "512",
    "n_seq_max": "1",
    "n_outputs_max_per_seq": "1",
    "pooling_type": "LLAMA_POOLING_TYPE_UNSPECIFIED",
    "flash_attn_type": "LLAMA_FLASH_ATTN_TYPE_AUTO",
    "yarn_ext_factor": "-1.0f",
    "yarn_beta_slow": "-1.0f",
    "defrag_thold": "-1.0f",
    "type_k": "GGML_TYPE_F16",
    "type_v": "GGML_TYPE_F16",
    "offload_kqv": "true",
    "op_offload": "true",
    "swa_full": "true",
}


def defaults(struct: str, fields: dict[str, str]) -> str:
    name = struct.replace("_params", "_default_params")
    lines = "".join(f"    result.{field} = {value};\n" for field, value in fields.items())
    return f"{struct} {name}(void) {{\n    {struct} result = {{}};\n{lines}    return result;\n}}\n"


def load(library: Path) -> str:
    environment = {**os.environ, "ERNIE_LLAMA_LIB_PATH": str(library)}
    done = subprocess.run([sys.executable, "-c", LOAD], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_matching_structs_are_accepted(llama_tree: Path, tmp_path: Path) -> None:
    """Unchanged, the fake library is accepted, so a refusal is due to what a test changes."""
    assert load(build(llama_tree, tmp_path)) == "ValueError model.gguf does not exist"


def test_another_version_is_refused(llama_tree: Path, tmp_path: Path) -> None:
    assert load(build(llama_tree, tmp_path, version="0.7.1")) == (
        f"OSError {tmp_path}/libllama.so is not the version of llama.cpp that these bindings need: "
        f"it is version 0.7.1 of llama.cpp, expected {structs.VERSION}; "
        f"build that version with `ernie-gguf build`, or `make build` in a checkout"
    )


def test_an_extra_field_at_the_start_is_found_by_the_defaults(llama_tree: Path, tmp_path: Path) -> None:
    said = load(build(llama_tree, tmp_path, before="int64_t added;"))
    assert "its llama_model_default_params gives n_gpu_layers = " in said
    assert "expected -1: llama_model_params has another layout; build that version" in said


@pytest.mark.skipif(
    platform.machine() not in {"x86_64", "AMD64"}, reason="elsewhere the size of a returned struct cannot be seen"
)
def test_an_extra_field_at_the_end_is_found_by_the_size(llama_tree: Path, tmp_path: Path) -> None:
    assert "its llama_model_params has 88 bytes, expected 80" in load(
        build(llama_tree, tmp_path, after="int64_t added;")
    )
