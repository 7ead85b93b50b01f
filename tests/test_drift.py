"""tools/drift.py: says which patches apply to another llama.cpp."""

from __future__ import annotations

from pathlib import Path

import drift
import pytest
import tree
from test_tree import PATCH


@pytest.fixture
def upstream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small llama.cpp, and a series of two patches: one applies to it, one does not."""
    source = tmp_path / "upstream"
    (source / "ggml" / "include").mkdir(parents=True)
    (source / "ggml" / "include" / "ggml.h").write_text("one\ntwo\nthree\n")
    patches = tmp_path / "ggml_patch"
    (patches / "src").mkdir(parents=True)
    (patches / "src" / "new.c").write_text("int new_file;\n")
    (patches / "series").write_text("fits.patch\ndoes-not.patch\n")
    (patches / "fits.patch").write_text(PATCH)
    (patches / "does-not.patch").write_text(PATCH.replace("one", "eleven"))
    monkeypatch.setattr(tree, "PATCH_DIR", patches)
    monkeypatch.setattr(tree, "NEW_FILES", patches / "src")
    monkeypatch.setattr(tree, "SERIES", patches / "series")
    return source


def test_each_patch_is_tried(upstream: Path) -> None:
    assert drift.try_patches(upstream) == {"fits.patch": "", "does-not.patch": "ggml/include/ggml.h:1"}
    assert (upstream / "ggml" / "include" / "ggml.h").read_text() == "one\nII\nthree\n"


def test_a_file_of_our_name_upstream_is_named(upstream: Path) -> None:
    (upstream / "new.c").write_text("theirs\n")
    with pytest.raises(SystemExit, match=r"upstream has files of the names of ours: new\.c"):
        drift.try_patches(upstream)
