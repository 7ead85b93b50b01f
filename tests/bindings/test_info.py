"""`ernie_llama.info()` says which library is loaded and what it supports."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import ernie_llama
import pytest

pytestmark = pytest.mark.build


def test_info_names_the_library_its_build_and_its_abilities(built_library: None, llama_bin: Path) -> None:
    info = ernie_llama.info()
    assert info.path.samefile(llama_bin / "libllama.so")
    assert info.origin == "environment variable ERNIE_LLAMA_LIB_PATH"
    version = subprocess.run([llama_bin / "llama-server", "--version"], capture_output=True, text=True, check=True)
    assert f"version: {info.version} (build {info.build_number}, " in version.stdout + version.stderr
    assert info.ccq2
    assert info.cuda == (llama_bin / "libggml-cuda.so").exists()
    assert info.rpc == (llama_bin / "libggml-rpc.so").exists()
    assert info.vulkan == (llama_bin / "libggml-vulkan.so").exists()
    assert any(device.name == "CPU" for device in info.devices)
    assert all(device.ccq2 for device in info.devices)
    assert re.search(r"ccq2: yes, CUDA: (yes|no), Vulkan: (yes|no), RPC: (yes|no)\n", str(info))


def test_the_build_number_is_unknown_without_the_library_that_holds_it(llama_bin: Path, tmp_path: Path) -> None:
    for library in llama_bin.glob("*.so*"):
        if not library.name.startswith("libllama-common"):
            (tmp_path / library.name).symlink_to(library)
    code = "import ernie_llama; i = ernie_llama.info(); print(i.build_number, i.path, '(build unknown)' in str(i))"
    environment = {**os.environ, "ERNIE_LLAMA_LIB_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == f"None {tmp_path}/libllama.so True\n"
