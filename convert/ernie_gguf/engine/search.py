"""Compiles the encoder's search, which chooses its instruction set when it runs."""

from __future__ import annotations

from pathlib import Path

from . import tools
from .process import run

SOURCE = Path(__file__).resolve().parents[1] / "ccq2" / "search.cpp"
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-Wall", "-Wextra", "-shared", "-fPIC")
LIBRARY = "libccq_search.so"


def compile_search(folder: Path) -> Path:
    """Make the library in `folder`; its path.

    Raises:
        BuildError: the compiler failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / LIBRARY
    log = folder / "search.log"
    run([str(tools.find("c++")), *FLAGS, "-o", str(library), str(SOURCE)], log, lambda _: None)
    log.unlink()
    return library
