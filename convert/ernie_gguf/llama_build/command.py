"""The command `build`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer


def build(  # noqa: PLR0917 - typer makes options of the parameters
    cmake_args: Annotated[
        list[str] | None, typer.Argument(metavar="[-- ARGS]...", help="More options for CMake: -- -DGGML_NATIVE=OFF")
    ] = None,
    cuda: Annotated[bool, typer.Option("--cuda", help="For NVIDIA GPUs as well; needs the CUDA toolkit.")] = False,
    vulkan: Annotated[
        bool, typer.Option("--vulkan", help="For GPUs with Vulkan (Radeon, Arc, GeForce) as well; needs glslc.")
    ] = False,
    arch: Annotated[
        str | None,
        typer.Option(
            help="GPU architectures: 86 for a 3090, several: '80;86', or every: from Ampere on, as far as nvcc knows "
            "them. Default: those of the GPUs here.",
            show_default=False,
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Parallel compile jobs.")] = os.cpu_count() or 1,
    llama_cpp: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="A llama.cpp checkout instead of the pinned one.", show_default=False),
    ] = None,
    page: Annotated[
        bool, typer.Option("--page/--no-page", help="Build the page that the server shows in a browser, with npm.")
    ] = True,
    clean: Annotated[
        bool, typer.Option("--clean", help="Remove all that this command has built and installed.")
    ] = False,
    folder: Annotated[
        Path | None,
        typer.Option(
            help="Build in this folder, with llama.cpp's tests of ccq2, and install nothing.", show_default=False
        ),
    ] = None,
    sources_only: Annotated[
        bool, typer.Option("--sources-only", help="Stop when the patched sources are there.")
    ] = False,
    portable: Annotated[bool, typer.Option("--portable", hidden=True)] = False,
    backend_only: Annotated[bool, typer.Option("--backend-only", hidden=True)] = False,
) -> None:
    """Build the patched llama.cpp for this machine and install it for this user."""
    from ernie_llama import data_folder

    from ..progress import steps
    from . import build as making
    from .install import install, install_search
    from .page import page_state
    from .recipe import Flavour, Job

    data = data_folder()
    if clean:
        size = making.remove(data.parent) if data.parent.is_dir() else 0
        typer.echo(f"removed {data.parent}: {size / 1e6:.0f} MB")
        return
    if cuda and vulkan:
        raise typer.BadParameter("--cuda and --vulkan are two builds: run the command once with each")
    job = Job(
        folder=(folder or data / "build").absolute(),
        flavour=(Flavour.PORTABLE if portable else Flavour.CUDA if cuda else Flavour.VULKAN if vulkan else Flavour.CPU),
        jobs=jobs,
        source=llama_cpp,
        architectures=_architectures(arch) if cuda else "",
        cmake_args=tuple(cmake_args or ()),
        tests=folder is not None and not portable,
        backend_only=backend_only,
        page=page and not backend_only,
    )
    with steps() as report:
        if sources_only:
            with making.locked(job.folder):
                making.prepare_tree(job, report)
            typer.echo(job.tree)
            return
        making.build(job, report)
        built = job.bin if folder else install(job, data)
        if not folder:
            install_search(job, data)
    if not backend_only and (why := page_state(job)):
        sys.stderr.write(f"note: llama-server has no page for browsers: {why}\n")
    typer.echo(built)


def _architectures(arch: str | None) -> str:
    """The GPUs that CMake is told to build for. Without nvcc any will do: the checks before the build miss it."""
    from . import tools

    if arch and arch != "every":
        return arch
    if (arch is None and tools.driver_version()) or tools.find("nvcc") is None:
        return "native"
    return tools.every_architecture(tools.cuda_version())
