"""Compiles the encoders, which choose their instruction set when they run."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from . import recipe, tools
from .process import run

_PACKAGE = Path(__file__).resolve().parents[1]
SEARCHES = (_PACKAGE / "ccq2" / "search.cpp", _PACKAGE / "stock" / "search.cpp")
FLAGS = ("-std=c++17", "-O3", "-Wall", "-Wextra", "-Wno-psabi", "-fPIC")
LIBRARY = "libccq_search.so"


def compile_search(folder: Path) -> Path:
    """Make the library in `folder`; its path.

    The plain encoder is ggml's and gives the same bytes on every machine: it must not be contracted to fused
    multiply-adds. The calibrated one's search is faster with them.

    Raises:
        BuildError: the compiler failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    library, encoder, log = folder / LIBRARY, folder / "encode.o", folder / "search.log"
    compiler = str(tools.find("c++"))
    plain = _ggml() / "ggml-ccq-encode.cpp"
    run([compiler, *FLAGS, "-ffp-contract=off", "-c", "-o", str(encoder), str(plain)], log, lambda _: None)
    command = [compiler, *FLAGS, "-fno-math-errno", f"-I{_ggml()}", "-shared", "-o", str(library)]
    command += [*map(str, SEARCHES), str(encoder)]
    run(command, log, lambda _: None)
    encoder.unlink()
    log.unlink()
    return library


def _ggml() -> Path:
    return recipe.patch_dir() / "src" / "ggml" / "src"


def up_to_date(folder: Path) -> Path:
    """The library in `folder`, which is compiled unless it was made of these sources in this way.

    Raises:
        BuildError: the compiler failed.
    """
    sources = (*SEARCHES, *sorted(_ggml().glob("ggml-ccq-*")), Path(__file__))
    wanted = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    library, stamp = folder / LIBRARY, folder / ".compiled"
    if not (library.is_file() and stamp.is_file() and stamp.read_text() == wanted):
        stamp.unlink(missing_ok=True)
        compile_search(folder)
        stamp.write_text(wanted)
    return library


if __name__ == "__main__":
    compile_search(Path(sys.argv[1]))
