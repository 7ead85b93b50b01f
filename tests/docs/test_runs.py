"""Blocks of the pages are run: those marked `console` print what the page says, those marked `python` end well."""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from docs.pages import PAGES, ROOT, Block, blocks

pytestmark = [pytest.mark.build, pytest.mark.usefixtures("built_library")]

BLOCKS = [block for page in PAGES for block in blocks(page)]


@pytest.fixture
def folder(tmp_path: Path, llama_bin: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the commands run: the examples are there, and our programs and llama.cpp's are found."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), str(llama_bin), os.environ["PATH"]]))
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("MAKEFLAGS", raising=False)
    return tmp_path


def output(command: str, folder: Path) -> str:
    """What a command prints, without blanks at the ends of lines."""
    if command.startswith("make "):  # without the build, which is there, and with the Python of the tests
        programs, target = Path(sys.executable).parent, command.removeprefix("make ")
        up_to_date = f"-o build -o {programs}/ernie-gguf BIN={programs}"
        command = f"make --no-print-directory -C {ROOT} {up_to_date} DEMO={folder}/demo {target}"
    done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return re.sub(r" +$", "", done.stdout, flags=re.MULTILINE)


@pytest.mark.parametrize("block", [each for each in BLOCKS if each.language == "console"], ids=str)
def test_a_console_prints_what_the_page_says(block: Block, folder: Path) -> None:
    parts = re.split(r"^\$ (.*)\n", block.text, flags=re.MULTILINE)
    assert parts[0] == "", f"{block}: a console begins with $"
    for command, wanted in zip(parts[1::2], parts[2::2], strict=True):
        got = output(command, folder)
        same = doctest.OutputChecker().check_output(wanted, got, doctest.ELLIPSIS)
        assert same, f"{block}: {command}\n--- the page\n{wanted}\n--- printed\n{got}"


@pytest.mark.parametrize("block", [each for each in BLOCKS if each.language == "python"], ids=str)
def test_python_runs(block: Block, folder: Path, tiny_ccq2_gguf: Path) -> None:
    (folder / "ernie.gguf").symlink_to(tiny_ccq2_gguf)
    text = re.sub(r"n_ctx=\d+", "n_ctx=128", block.text)  # ends an answer sooner: the example rarely stops by itself
    done = subprocess.run(
        [sys.executable, "-c", text], cwd=folder, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, f"{block}\n{done.stderr}"
