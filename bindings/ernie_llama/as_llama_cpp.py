"""Runs a program, unchanged, with `ernie_llama` in place of llama-cpp-python.

    python -m ernie_llama.as_llama_cpp program.py ARGS...
    python -m ernie_llama.as_llama_cpp -m MODULE ARGS...

Its `import llama_cpp` then finds `ernie_llama`, also in processes that it starts. Without arguments, this prints the
folder that does it, for PYTHONPATH:

    PYTHONPATH="$(python -m ernie_llama.as_llama_cpp)" llm -m gguf/ernie "Hello"

A program of your own calls `install()` before its imports.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "compat"


def install() -> None:
    """Make `import llama_cpp` find `ernie_llama`, in this process and those that it starts.

    Raises:
        RuntimeError: llama-cpp-python is imported already.
    """
    if "llama_cpp" in sys.modules and sys.modules["llama_cpp"].__name__ != "ernie_llama":
        raise RuntimeError("llama_cpp is imported already: call install() before the first import of it")
    sys.path.insert(0, str(FOLDER))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(FOLDER), os.environ.get("PYTHONPATH")]))


def main(arguments: list[str]) -> None:
    """Run the program that `arguments` name, as `python` would."""
    if not arguments:
        print(FOLDER)
        return
    if arguments[0] in {"-h", "--help"}:
        print((__doc__ or "").strip())
        return
    install()
    if arguments[0] == "-m":
        if len(arguments) < 2:
            sys.exit("-m needs the name of a module")
        sys.argv = arguments[1:]
        sys.path.insert(0, "")
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
