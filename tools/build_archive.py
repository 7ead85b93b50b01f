"""`make archives`: packs a build as llama.cpp packs its releases, so that what unpacks those takes ours.

One top folder with every program, every library beside them under all its names, and the licences; the programs find
the libraries by $ORIGIN, wherever the folder lies. The same build gives the same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from ernie_gguf.llama_build.recipe import PROGRAMS

ROOT = Path(__file__).resolve().parent.parent
BUILDS = "cpu, cuda or vulkan, and its bin folder; after + a backend that its programs load, from another build"
BACKENDS = {"cpu": "libggml-cpu", "cuda": "libggml-cuda", "vulkan": "libggml-vulkan"}


class ArchiveError(Exception):
    """The build cannot be packed; says why."""


@dataclass(frozen=True)
class Archive:
    """A build's folder of programs and libraries, and what it becomes."""

    bin: Path
    backend: str
    version: str

    @property
    def top(self) -> str:
        """The one folder that it unpacks to."""
        return f"ernie-gguf-{self.version}"

    @property
    def name(self) -> str:
        """The file's name."""
        return f"ernie-gguf-{self.version}-bin-linux-x64-{self.backend}.tar.gz"

    @property
    def members(self) -> list[Path]:
        """Programs, and libraries under each of their names: links stay links."""
        return [*(self.bin / name for name in PROGRAMS), *sorted(self.bin.glob("*.so*"))]


def check(archive: Archive) -> None:
    """Raise ArchiveError unless the build is whole, is for that backend, and is tied to no place on this machine."""
    for path in archive.members:
        if not path.exists():
            raise ArchiveError(f"{path} is missing: build it first")
        if path.is_symlink() and path.readlink().is_absolute():
            raise ArchiveError(f"{path} is a link to {path.readlink()}: expected one inside the folder")
    if not any(path.name.startswith(BACKENDS[archive.backend]) for path in archive.members):
        raise ArchiveError(
            f"{archive.bin} has no {BACKENDS[archive.backend]}*.so: it is not a build for {archive.backend}"
        )
    for path in archive.members:
        for where in run_paths(path):
            if not where.startswith("$ORIGIN"):
                raise ArchiveError(f"{path} looks for libraries in {where}: expected $ORIGIN alone")


def run_paths(path: Path) -> list[str]:
    """Where a program or library looks for others."""
    found = subprocess.run(["readelf", "-d", str(path)], capture_output=True, text=True, check=True).stdout
    lines = [line for line in found.splitlines() if "(RUNPATH)" in line or "(RPATH)" in line]
    return [part for line in lines for part in line.rsplit("[", 1)[1].rstrip("]").split(":") if part]


def pack(archive: Archive, out: Path, time: int) -> Path:
    """Write the archive into `out`; every file gets this time.

    Raises:
        ArchiveError: the build is not one that can be packed.
    """
    check(archive)
    out.mkdir(exist_ok=True)
    path = out / archive.name
    temporary = path.with_suffix(".tmp")

    def tidy(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.uid = info.gid = 0
        info.uname = info.gname = "root"
        info.mtime = time
        info.mode = 0o755 if info.isdir() or info.mode & 0o100 else 0o644
        return info

    with (
        temporary.open("wb") as raw,
        gzip.GzipFile("", "wb", 9, raw, mtime=time) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as tar,
    ):
        folder = tarfile.TarInfo(archive.top)
        folder.type, folder.mode = tarfile.DIRTYPE, 0o755
        tar.addfile(tidy(folder))
        tar.add(ROOT / "LICENSE", f"{archive.top}/LICENSE", filter=tidy)
        for member in archive.members:
            tar.add(member, f"{archive.top}/{member.name}", filter=tidy)
    temporary.replace(path)
    return path


def stripped(folder: Path, target: Path, added: Path | None = None) -> Path:
    """A copy of a build's folder, with a backend from another build, without symbols that only debuggers read."""
    shutil.copytree(folder, target, symlinks=True, ignore=lambda _, names: [n for n in names if n.startswith("test-")])
    if added:
        shutil.copy2(added, target)
    wanted = Archive(target, "cpu", "").members
    files = [str(path) for path in wanted if path.is_file() and not path.is_symlink()]
    subprocess.run(["strip", "--strip-unneeded", *files], check=True)
    return target


def main() -> None:
    """Pack each build that is given as BACKEND=FOLDER."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("builds", nargs="+", metavar="BACKEND=BIN[+FILE]", help=BUILDS)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder for the archives")
    args = parser.parse_args()
    log = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True, check=True)
    for build in args.builds:
        backend, _, folder = build.partition("=")
        if backend not in BACKENDS:
            parser.error(f"{build}: expected {', '.join(BACKENDS)} and =BIN")
        folder, _, added = folder.partition("+")
        try:
            with tempfile.TemporaryDirectory(prefix="ernie-gguf-") as work:
                bare = stripped(Path(folder).absolute(), Path(work) / "bin", Path(added) if added else None)
                path = pack(Archive(bare, backend, version("ernie-gguf")), args.out, int(log.stdout))
        except ArchiveError as error:
            sys.exit(f"error: {error}")
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
