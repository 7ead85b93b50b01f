"""A small checkpoint, a short text, and the command `quantize` on them."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.checkpoints import make
from support.command_line import Command, Done

from quantize.small import QUICK, SMALL, Quantize

PROSE = Path(__file__).parents[2] / "docs" / "formats.md"


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 900 tokens of the repository's own prose."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_bytes(PROSE.read_bytes()[:2500])
    return path


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the shape SMALL; a test that modifies it must make its own."""
    return make(tmp_path_factory.mktemp("small") / "small", SMALL)


@pytest.fixture
def quantize(ernie_gguf: Command, text: Path) -> Quantize:
    """`ernie-gguf quantize SRC OUTFILE …` on the text (another one if it is given), in settings that are quick."""

    def call(source: Path, outfile: Path, *options: str | Path) -> Done:
        calibration = () if "--calibration" in options else ("--calibration", text)
        return ernie_gguf("quantize", source, "--outfile", outfile, *calibration, *QUICK, *options)

    return call
