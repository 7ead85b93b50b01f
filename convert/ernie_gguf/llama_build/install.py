"""Puts a build into the user's data folder, where the bindings, `serve` and `chat` look for it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from .process import BuildError
from .recipe import Job, digest, patch_dir
from .search import up_to_date

MANIFEST = "build.json"  # beside the library: how it was built


def manifest(job: Job) -> dict[str, str]:
    """How `job` was built, for `info` to show."""
    pin = (patch_dir() / "upstream.txt").read_text().splitlines()
    compiler = subprocess.run(["c++", "--version"], capture_output=True, text=True, check=False).stdout
    return {
        "ernie_gguf": version("ernie-gguf"),
        "llama_cpp": str(job.source or next(line.split()[0] for line in pin if line and not line.startswith("#"))),
        "patches": digest(patch_dir()),
        "flavour": job.flavour.value,
        "options": " ".join(job.options(True)),
        "compiler": compiler.partition("\n")[0],
    }


def install(job: Job, folder: Path) -> Path:
    """Copy the build to `folder` as `cpu`, `cuda` or `vulkan`, in one step; returns that path.

    What was installed before stays in use until the new build has loaded once.

    Raises:
        BuildError: the library that was built cannot be loaded.
    """
    link = folder / job.flavour.value
    fresh = Path(tempfile.mkdtemp(prefix=f"{job.flavour.value}-", dir=folder))
    try:
        shutil.copytree(job.bin, fresh, symlinks=True, dirs_exist_ok=True)
        built = {**manifest(job), "built": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        (fresh / MANIFEST).write_text(json.dumps(built, indent=1) + "\n")
        fresh.chmod(0o755)
        check_loads(fresh)
        pointer = folder / f".{link.name}.new"
        pointer.unlink(missing_ok=True)
        pointer.symlink_to(fresh.name)
        pointer.replace(link)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    for other in folder.glob(f"{link.name}-*"):
        if other != fresh:
            shutil.rmtree(other, ignore_errors=True)
    return link


def install_search(job: Job, folder: Path) -> None:
    """Put the encoders' search into `folder`, in one step; it is compiled if its sources have changed."""
    built = up_to_date(job.folder / "search")
    target = folder / "search" / built.name
    target.parent.mkdir(exist_ok=True)
    fresh = target.with_suffix(".new")
    shutil.copy2(built, fresh)
    fresh.replace(target)


def check_loads(folder: Path) -> None:
    """Load the library of `folder` in another process, and have it name its devices.

    Raises:
        BuildError: that fails; says why.
    """
    environment = {**os.environ, "ERNIE_LLAMA_LIB_PATH": str(folder)}
    code = "import ernie_llama; ernie_llama.info()"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it ended without a message"])[-1]
        raise BuildError(f"the library was built but does not load: {last}")


def read_manifest(library: Path) -> dict[str, str]:
    """How the library was built; empty for one that came otherwise."""
    path = library.parent / MANIFEST
    try:
        return {str(key): str(value) for key, value in json.loads(path.read_text()).items()}
    except (OSError, ValueError, AttributeError):
        return {}
