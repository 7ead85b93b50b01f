"""Servers that several modules speak to: one whose chat template knows tools, one with the example's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .test_server import TOOLS_TEMPLATE, Server, serving


@pytest.fixture(scope="session")
def tools_server(
    built_library: None, tiny_ccq2_gguf: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server with a chat template that knows tools."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "template.jinja").write_text(TOOLS_TEMPLATE)
    with serving(tiny_ccq2_gguf, folder / "log", "--chat-template-file", folder / "template.jinja") as server:
        yield server


@pytest.fixture(scope="session")
def plain_server(
    built_library: None, tiny_ccq2_gguf: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    with serving(tiny_ccq2_gguf, tmp_path_factory.mktemp("server") / "log") as server:
        yield server
