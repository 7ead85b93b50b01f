"""Checks, before a build starts, that the machine has what it takes; the error names the packages to install."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from ..errors import ErnieGgufError
from ..files import free_bytes
from . import vulkan
from .recipe import CUDA_ARCHITECTURES, Flavour, Job

# For CMAKE_CUDA_ARCHITECTURES, and to compress the page; ggml-vulkan says 3.19 itself.
CMAKE_LEAST = {Flavour.CPU: (3, 18), Flavour.PORTABLE: (3, 18), Flavour.CUDA: (3, 18), Flavour.VULKAN: (3, 19)}
# Tool: its package for each package manager.
PACKAGES = {
    "c++": {"apt-get": "g++", "dnf": "gcc-c++", "pacman": "gcc"},
    "cmake": {"apt-get": "cmake", "dnf": "cmake", "pacman": "cmake"},
    "ninja": {"apt-get": "ninja-build", "dnf": "ninja-build", "pacman": "ninja"},
    "git": {"apt-get": "git", "dnf": "git", "pacman": "git"},
    "nvcc": {"apt-get": "nvidia-cuda-toolkit", "dnf": "cuda-toolkit", "pacman": "cuda"},
    "glslc": {"apt-get": "glslc", "dnf": "glslc", "pacman": "shaderc"},
    "libvulkan": {"apt-get": "libvulkan-dev", "dnf": "vulkan-loader-devel", "pacman": "vulkan-icd-loader"},
    "vulkan.hpp": {"apt-get": "libvulkan-dev", "dnf": "vulkan-headers", "pacman": "vulkan-headers"},
    "spirv.hpp": {"apt-get": "spirv-headers", "dnf": "spirv-headers-devel", "pacman": "spirv-headers"},
}
INSTALL = {"apt-get": "apt-get install", "dnf": "dnf install", "pacman": "pacman -S"}
# Bytes that a build takes; the CPU's was measured, with tests. A GPU's grows with the architectures.
DISK = {Flavour.CPU: 10**9, Flavour.PORTABLE: 2 * 10**9, Flavour.CUDA: 5 * 10**9, Flavour.VULKAN: 2 * 10**9}


class ToolError(ErnieGgufError):
    """A tool is missing or too old, or the disk is too small."""


def find(tool: str) -> str | None:
    """Path of a tool: beside this Python, where pip puts it, on PATH, or in CUDA's own folder; Vulkan's SDK first."""
    beside = str(Path(sys.executable).parent)
    places = [beside, os.environ.get("PATH", os.defpath)]
    if tool == "nvcc":
        places += [str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin")]
    if tool == "glslc" and (sdk := os.environ.get("VULKAN_SDK")):
        places.insert(0, str(Path(sdk) / "bin"))
    return shutil.which(tool, path=os.pathsep.join(places))


def check(job: Job) -> None:
    """Raises ToolError unless `job` can be built here."""
    needed = {Flavour.CUDA: ["nvcc"], Flavour.VULKAN: ["glslc"]}.get(job.flavour, [])
    missing = [tool for tool in ("c++", "cmake", "ninja", *needed) if find(tool) is None]
    if find("git") is None and find("patch") is None:
        missing.append("git")
    if job.flavour is Flavour.VULKAN and "c++" not in missing:
        missing += vulkan.missing_headers(str(find("c++")))
    if missing:
        raise ToolError(f"{' and '.join(missing)} not found; {how_to_install(missing)}")
    if importlib.util.find_spec("pip") is None:
        raise ToolError("pip is missing in this environment, and it downloads llama.cpp: python -m ensurepip")
    version = _version("cmake", r"version (\d+)\.(\d+)")
    if version < CMAKE_LEAST[job.flavour]:
        found, least = (".".join(map(str, each)) for each in (version, CMAKE_LEAST[job.flavour]))
        raise ToolError(f"{find('cmake')} has version {found}, too old: {least} is needed; pip install cmake")
    if job.flavour is Flavour.CUDA:
        check_cuda(cuda_version(), driver_version())
    free, wanted = free_bytes(_existing(job.folder)), DISK[job.flavour]
    if not (job.build / "build.ninja").exists() and free < wanted:
        raise ToolError(f"{job.folder} has {free / 1e9:.1f} GB free, and the build takes {wanted / 1e9:.0f} GB")


def how_to_install(missing: list[str]) -> str:
    """The command for this machine's package manager, or for all that are known."""
    here = [manager for manager in INSTALL if shutil.which(manager)][:1] or list(INSTALL)
    commands = [
        f"{INSTALL[manager]} {' '.join(dict.fromkeys(PACKAGES[tool][manager] for tool in missing))}" for manager in here
    ]
    by_pip = [tool for tool in missing if tool in {"cmake", "ninja"}]
    if by_pip == missing:
        commands.append(f"pip install {' '.join(by_pip)}")
    return " or: ".join(commands)


def check_cuda(compiler: tuple[int, int], driver: tuple[int, int] | None) -> None:
    """Raises ToolError if programs of this nvcc will not start under this driver.

    A driver runs what was built with its own major version of CUDA, or with an older one. `driver` is None where no
    GPU is there: the build may be for another machine.
    """
    if driver is not None and compiler[0] > driver[0]:
        found, supported = (".".join(map(str, each)) for each in (compiler, driver))
        raise ToolError(
            f"nvcc is of CUDA {found}, but the driver supports CUDA {supported} at most: update the driver, or install "
            f"the toolkit of CUDA {supported} and set CUDA_HOME to it"
        )


def driver_version() -> tuple[int, int] | None:
    """The newest CUDA that the NVIDIA driver supports; None without a driver."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return None
    done = subprocess.run([smi], capture_output=True, text=True, check=False)
    match = re.search(r"CUDA Version: (\d+)\.(\d+)", done.stdout)
    return (int(match[1]), int(match[2])) if match else None


def cuda_version() -> tuple[int, int]:
    """The version of nvcc. Raises ToolError if it does not tell."""
    return _version("nvcc", r"release (\d+)\.(\d+)")


def every_architecture(compiler: tuple[int, int]) -> str:
    """The GPUs of `CUDA_ARCHITECTURES` that an nvcc of this version knows, as CMake wants them: "80;86"."""
    return ";".join(name for name, least in CUDA_ARCHITECTURES.items() if compiler >= least)


def _version(tool: str, pattern: str) -> tuple[int, int]:
    done = subprocess.run([str(find(tool)), "--version"], capture_output=True, text=True, check=False)
    match = re.search(pattern, done.stdout)
    if match is None:
        raise ToolError(f"{find(tool)} --version does not tell its version: {(done.stdout + done.stderr)[:200]}")
    return int(match[1]), int(match[2])


def _existing(folder: Path) -> Path:
    """The nearest parent that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())
