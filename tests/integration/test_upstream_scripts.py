"""The Python scripts of the patched llama.cpp tree read our files: gguf-py knows the type and its rows."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ernie_gguf.gguf_file.reader import read_gguf


@pytest.fixture(scope="module")
def scripts(llama_tree: Path) -> Path:
    return llama_tree / "gguf-py" / "gguf" / "scripts"


def run(script: Path, *args: str | Path) -> str:
    done = subprocess.run([sys.executable, script, *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def dump(scripts: Path, gguf: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(scripts / "gguf_dump.py", "--json", gguf))
    return found


def test_gguf_dump_lists_every_tensor(scripts: Path, tiny_ccq2_gguf: Path) -> None:
    listed = dump(scripts, tiny_ccq2_gguf)["tensors"]
    expected = {tensor.name: (list(tensor.ne), tensor.type_name) for tensor in read_gguf(tiny_ccq2_gguf).tensors}
    assert {name: (entry["shape"], entry["type"].lower()) for name, entry in listed.items()} == expected
    assert "CCQ2" in {entry["type"] for entry in listed.values()}


def test_gguf_hash_reads_every_byte(scripts: Path, tiny_ccq2_gguf: Path, tmp_path: Path) -> None:
    """Another last byte of a ccq2 tensor is another hash: its size is not that of its blocks alone."""

    def hashes(path: Path) -> list[str]:
        lines = run(scripts / "gguf_hash.py", path).splitlines()
        return [line.split()[1] for line in lines if line.startswith("sha256") and "_exps" in line]

    tensor = next(tensor for tensor in read_gguf(tiny_ccq2_gguf).tensors if tensor.type_name == "ccq2")
    content = bytearray(tiny_ccq2_gguf.read_bytes())
    content[tensor.offset + tensor.nbytes - 1] ^= 1
    changed = tmp_path / "changed.gguf"
    changed.write_bytes(content)
    before, after = hashes(tiny_ccq2_gguf), hashes(changed)
    assert sum(a != b for a, b in zip(before, after, strict=True)) == 1


def test_gguf_new_metadata_copies_the_tensors(scripts: Path, tiny_ccq2_gguf: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.gguf"
    run(scripts / "gguf_new_metadata.py", "--general-name", "renamed", tiny_ccq2_gguf, copy)
    before, after = read_gguf(tiny_ccq2_gguf), read_gguf(copy)
    assert after.metadata["general.name"] == "renamed"
    assert after.metadata["ernie_gguf.ccq.layout"] == 1
    old, new = tiny_ccq2_gguf.read_bytes(), copy.read_bytes()
    for a, b in zip(before.tensors, after.tensors, strict=True):
        assert (a.name, a.ne, a.type_name, a.nbytes) == (b.name, b.ne, b.type_name, b.nbytes)
        assert old[a.offset : a.offset + a.nbytes] == new[b.offset : b.offset + b.nbytes]
