"""Builds the patched llama.cpp: sources, page, CMake, ninja. A step that is up to date is not repeated."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from ..progress import Report
from . import tools, vulkan
from .page import provide_page
from .process import BuildError, run
from .recipe import Flavour, Job, digest, patch_dir


def build(job: Job, report: Report) -> None:
    """Build `job`, so that `job.bin` holds the library and the programs.

    An interrupted build resumes.

    Raises:
        ToolError: a tool is missing or too old, or the disk is too small.
        BuildError: another build runs in the same folder, or a step failed.
    """
    tools.check(job)
    with locked(job.folder):
        prepare_tree(job, report)
        if job.flavour is Flavour.VULKAN:
            for note in vulkan.notes(str(tools.find("glslc")), job.tree):
                sys.stderr.write(f"note: {note}\n")
        has_page = job.page and provide_page(job, report)
        configure(job, report, has_page)
        compile_targets(job, report)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which ends with the process.

    Raises:
        BuildError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BuildError(f"another build is running in {folder}: wait for it, or choose another folder") from error
        yield


def prepare_tree(job: Job, report: Report) -> None:
    """Make the patched tree with tree.py, unless it was made from these patches and this source."""
    stamp, wanted = job.folder / ".patched", f"{digest(patch_dir())} {job.source or 'pinned'}\n"
    if job.tree.is_dir() and stamp.is_file() and stamp.read_text() == wanted:
        return
    report("download and patch llama.cpp", 0, 0)
    source = ["--source", str(job.source.absolute())] if job.source else []
    script = [sys.executable, str(patch_dir() / "tree.py"), "checkout", "--tree", str(job.tree)]
    done = subprocess.run(
        [*script, "--cache", str(job.folder), *source], capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode != 0:
        # The message of tree.py may span lines: how to mend a patch. Its own lines stay lines.
        message, _, rest = done.stderr[max(done.stderr.rfind("error: "), 0) :].strip().partition("\n")
        sys.stderr.write(f"{rest}\n" if rest else "")
        raise BuildError(message.removeprefix("error: "))
    stamp.write_text(wanted)


def configure(job: Job, report: Report, has_page: bool) -> None:
    """Run CMake, unless it ran with these options."""
    ninja = tools.find("ninja")
    command = [str(tools.find("cmake")), "-S", str(job.tree), "-B", str(job.build), "-G", "Ninja"]
    command += [f"-DCMAKE_MAKE_PROGRAM={ninja}", *job.options(has_page)]
    if nvcc := tools.find("nvcc"):
        command.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
    if job.flavour is Flavour.VULKAN:
        command.append(f"-DVulkan_GLSLC_EXECUTABLE={tools.find('glslc')}")
    stamp, wanted = job.build / ".configured", "\n".join(command)
    if (job.build / "build.ninja").exists() and stamp.is_file() and stamp.read_text() == wanted:
        return
    report("configure", 0, 0)
    job.build.mkdir(exist_ok=True)
    stamp.unlink(missing_ok=True)
    run(command, job.folder / f"cmake-{job.flavour.value}.log", lambda _: None)
    stamp.write_text(wanted)


def compile_targets(job: Job, report: Report) -> None:
    """Run ninja, unless it ran after the last change of tree and options: llama.cpp's build always has some step."""
    stamp, wanted = job.build / ".built", "\n".join(job.targets)
    if stamp.is_file() and stamp.read_text() == wanted and not _newer(job, stamp.stat().st_mtime):
        return

    def line(text: str) -> None:
        if step := re.match(r"\[(\d+)/(\d+)\] ", text):
            report("compile", int(step[1]), int(step[2]))

    stamp.unlink(missing_ok=True)
    command = [str(tools.find("ninja")), "-C", str(job.build), "-j", str(job.jobs), *job.targets]
    run(command, job.folder / f"build-{job.flavour.value}.log", line)
    stamp.write_text(wanted)


def _newer(job: Job, time: float) -> bool:
    """Whether a file of the tree, or CMake's plan, has changed since `time`."""
    if (job.build / ".configured").stat().st_mtime > time:
        return True
    for folder, folders, names in os.walk(job.tree):
        folders[:] = [each for each in folders if each != ".git"]
        if any((Path(folder) / name).lstat().st_mtime > time for name in names):
            return True
    return False


def remove(folder: Path) -> int:
    """Remove a folder with all that is in it; returns its bytes."""
    size = sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())
    shutil.rmtree(folder)
    return size
