"""hatchling's hook for wheels: puts the built llama.cpp into the wheel if build_wheel.py names its folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class EngineHook(BuildHookInterface):  # type: ignore[misc]  # mypy sees no hatchling
    """Adds the files of the folder ERNIE_GGUF_ENGINE at the places that they have in it."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before it collects the files."""
        named = os.environ.get("ERNIE_GGUF_ENGINE")
        if not named or version != "standard":
            return
        folder = Path(named)
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-linux_x86_64"  # no code of ours depends on the Python; auditwheel names the glibc
        for path in sorted(each for each in folder.rglob("*") if each.is_file()):
            build_data["force_include"][str(path)] = path.relative_to(folder).as_posix()
