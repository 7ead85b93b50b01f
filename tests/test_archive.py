"""The release archives: layout, names and independence of this machine."""

import json
import os
import shutil
import subprocess
import tarfile
import urllib.request
from pathlib import Path

import pytest
from build_archive import Archive, ArchiveError, pack
from ernie_gguf.llama_build.recipe import PROGRAMS
from support.servers import free_port, running


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program of this machine, small and without run paths."""
    return Path(shutil.copy2("/bin/true", tmp_path_factory.mktemp("program") / "true"))


@pytest.fixture
def build(tmp_path: Path, program: Path) -> Path:
    """A folder like bin of a build."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in (*PROGRAMS, "libllama.so.0.0.1", "libggml-cpu.so.0.26.0"):
        shutil.copy2(program, folder / name)
    for link, target in (("libllama.so", "libllama.so.0"), ("libllama.so.0", "libllama.so.0.0.1")):
        (folder / link).symlink_to(target)
    return folder


def packed(build: Path, out: Path, backend: str = "cpu") -> Path:
    return pack(Archive(build, backend, "1.2.3"), out, 1_700_000_000)


def test_layout(build: Path, tmp_path: Path) -> None:
    path = packed(build, tmp_path / "dist")
    assert path.name == "ernie-gguf-1.2.3-bin-linux-x64-cpu.tar.gz"
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    assert [m.name for m in members][:2] == ["ernie-gguf-1.2.3", "ernie-gguf-1.2.3/LICENSE"]
    assert all(m.name.count("/") == 1 for m in members[1:])
    assert {m.name.split("/")[1] for m in members[1:]} == {"LICENSE", *(path.name for path in build.iterdir())}
    links = {m.name: m.linkname for m in members if m.issym()}
    assert links["ernie-gguf-1.2.3/libllama.so"] == "libllama.so.0"
    assert {(m.uid, m.gid, m.mtime) for m in members} == {(0, 0, 1_700_000_000)}
    assert {oct(m.mode) for m in members if not m.issym()} == {"0o755", "0o644"}


def test_the_same_bytes_again(build: Path, tmp_path: Path) -> None:
    first = packed(build, tmp_path / "a").read_bytes()
    os.utime(build / "llama-server")
    assert packed(build, tmp_path / "b").read_bytes() == first


def test_what_cannot_be_packed(build: Path, tmp_path: Path) -> None:
    out = tmp_path / "dist"
    with pytest.raises(ArchiveError, match="it is not a build for cuda"):
        packed(build, out, "cuda")
    (build / "libfar.so").symlink_to(build / "libllama.so")
    with pytest.raises(ArchiveError, match="expected one inside the folder"):
        packed(build, out)
    (build / "libfar.so").unlink()
    (build / "llama-bench").unlink()
    with pytest.raises(ArchiveError, match="llama-bench is missing: build it first"):
        packed(build, out)
    assert not out.exists()


def test_a_path_of_this_machine(build: Path, tmp_path: Path) -> None:
    (tmp_path / "a.c").write_text("int main() { return 0; }")
    command = ["cc", tmp_path / "a.c", "-o", build / "llama-cli", f"-Wl,-rpath,{tmp_path}"]
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    subprocess.run(list(map(str, command)), check=True)
    with pytest.raises(ArchiveError, match=f"looks for libraries in {tmp_path}: expected"):
        packed(build, tmp_path / "dist")


@pytest.mark.build
def test_the_unpacked_build_serves(llama_bin: Path, tiny_bf16_gguf: Path, tmp_path: Path) -> None:
    """From another place, with nothing in the environment that leads to the build."""
    path = packed(llama_bin, tmp_path / "dist")
    with tarfile.open(path) as tar:
        tar.extractall(tmp_path / "else where", filter="data")
    folder = tmp_path / "else where" / "ernie-gguf-1.2.3"
    libraries = subprocess.run(["ldd", folder / "llama-server"], capture_output=True, text=True, check=True).stdout
    ours = [line for line in libraries.splitlines() if "llama" in line or "ggml" in line or "mtmd" in line]
    assert ours
    assert all(str(folder) in line for line in ours)
    port = free_port()
    command: list[str | Path] = [
        "env",
        "-i",
        folder / "llama-server",
        "-m",
        tiny_bf16_gguf,
        "--port",
        str(port),
        "-c",
        "512",
        "-t",
        "1",
    ]

    def ready() -> bool:
        try:
            return bool(urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200)
        except OSError:
            return False

    with running(command, tmp_path / "log", ready):
        body = json.dumps({"prompt": "def read_", "max_tokens": 4, "temperature": 0}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", body)
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["choices"][0]["text"]
