"""Every target of the Makefile has what it needs: `make -n` says so without doing anything."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).resolve().parents[1] / "Makefile"
TARGETS = re.findall(r"^([a-z-]+):.*## ", MAKEFILE.read_text(), re.MULTILINE)

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.mark.parametrize("target", [target for target in TARGETS if target != "release"])  # -n runs its $(MAKE)
def test_a_fresh_environment_is_enough(target: str, tmp_path: Path) -> None:
    variables = [f"VENV={tmp_path / 'venv'}", f"BUILD_DIR={tmp_path / 'build'}"]
    command = ["make", "-n", "-C", str(MAKEFILE.parent), *variables, target]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not any(tmp_path.iterdir())
