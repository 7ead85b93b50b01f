"""ggml_patch/tree.py: the patched tree is made without fuzz, edits are never lost, a failure says how to go on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tree as tree_script

PATCH = """\
From 0000000000000000000000000000000000000000 Mon Sep 17 00:00:00 2001
From: ernie-gguf <ernie-gguf@example.invalid>
Date: Sun, 22 Nov 2026 02:14:24 +0000
Subject: ggml: count in Roman

Because we can.
---
 ggml/include/ggml.h | 2 +-
 1 file changed, 1 insertion(+), 1 deletion(-)

diff --git a/ggml/include/ggml.h b/ggml/include/ggml.h
--- a/ggml/include/ggml.h
+++ b/ggml/include/ggml.h
@@ -1,3 +1,3 @@
 one
-two
+II
 three
"""


@pytest.fixture
def upstream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small llama.cpp, and a series of one patch and one new file for it."""
    source = tmp_path / "upstream"
    (source / "ggml" / "include").mkdir(parents=True)
    (source / "ggml" / "include" / "ggml.h").write_text("one\ntwo\nthree\n")
    (source / "other.c").write_text("int other;\n")
    patch_dir = tmp_path / "ggml_patch"
    (patch_dir / "src").mkdir(parents=True)
    (patch_dir / "src" / "new.c").write_text("int new_file;\n")
    (patch_dir / "series").write_text("# Why.\n\nggml-count-in-roman.patch # and how\n")
    (patch_dir / "ggml-count-in-roman.patch").write_text(PATCH)
    monkeypatch.setattr(tree_script, "PATCH_DIR", patch_dir)
    monkeypatch.setattr(tree_script, "NEW_FILES", patch_dir / "src")
    monkeypatch.setattr(tree_script, "SERIES", patch_dir / "series")
    return source


@pytest.fixture(params=["git", "no git"])
def with_or_without_git(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "no git":
        monkeypatch.setattr(tree_script, "has_git", lambda: False)


def checkout(tmp_path: Path, upstream: Path) -> Path:
    tree = tmp_path / "tree"
    tree_script.checkout(tree, tmp_path, upstream)
    return tree


@pytest.mark.usefixtures("with_or_without_git")
def test_checkout_patches_and_adds(tmp_path: Path, upstream: Path) -> None:
    tree = checkout(tmp_path, upstream)
    assert (tree / "ggml" / "include" / "ggml.h").read_text() == "one\nII\nthree\n"
    assert (tree / "new.c").read_text() == "int new_file;\n"
    assert (upstream / "ggml" / "include" / "ggml.h").read_text() == "one\ntwo\nthree\n"


@pytest.mark.usefixtures("with_or_without_git")
def test_second_checkout_keeps_the_times_of_equal_files(tmp_path: Path, upstream: Path) -> None:
    tree = checkout(tmp_path, upstream)
    before = {path.name: path.stat().st_mtime_ns for path in tree.rglob("*.[ch]")}
    (upstream / "other.c").write_text("int changed;\n")
    checkout(tmp_path, upstream)
    after = {path.name: path.stat().st_mtime_ns for path in tree.rglob("*.[ch]")}
    assert {name for name in before if before[name] != after[name]} == {"other.c"}


@pytest.mark.usefixtures("with_or_without_git")
def test_a_patch_that_does_not_apply_says_how_to_go_on(tmp_path: Path, upstream: Path) -> None:
    (upstream / "ggml" / "include" / "ggml.h").write_text("one\n2\nthree\n")
    with pytest.raises(SystemExit) as stop:
        checkout(tmp_path, upstream)
    message = str(stop.value)
    assert message.startswith("error: ggml-count-in-roman.patch does not apply:")
    assert f"cd {tmp_path / 'tree'}" in message
    assert "git am --continue" in message
    assert "make refresh" in message


def test_no_fuzz(tmp_path: Path, upstream: Path) -> None:
    """A context line that differs is a failure, although patch could guess."""
    (upstream / "ggml" / "include" / "ggml.h").write_text("one\ntwo\n3\n")
    with pytest.raises(SystemExit, match="does not apply"):
        checkout(tmp_path, upstream)


def test_edits_are_not_lost(tmp_path: Path, upstream: Path) -> None:
    tree = checkout(tmp_path, upstream)
    (tree / "other.c").write_text("int edited;\n")
    with pytest.raises(SystemExit, match="holds edits that would be lost; export them with 'make refresh'"):
        checkout(tmp_path, upstream)
    assert (tree / "other.c").read_text() == "int edited;\n"


def test_refresh_of_an_untouched_tree_changes_nothing(tmp_path: Path, upstream: Path) -> None:
    tree = checkout(tmp_path, upstream)
    tree_script.refresh(tree)
    first = tree_script.patches()[0].read_text()
    tree_script.refresh(checkout(tmp_path, upstream))
    assert tree_script.SERIES.read_text() == "# Why.\n\nggml-count-in-roman.patch\n"
    assert tree_script.patches()[0].read_text() == first
    assert "-two\n+II\n" in first


def test_refresh_exports_new_commits_and_new_files(tmp_path: Path, upstream: Path) -> None:
    tree = checkout(tmp_path, upstream)
    (tree / "other.c").write_text("int edited;\n")
    (tree / "newer.c").write_text("int newer;\n")
    tree_script.git(tree, "add", "-A")
    tree_script.git(tree, "commit", "-q", "-m", "ggml: edit the other file\n\nWhy: a test.")
    tree_script.refresh(tree)
    names = [path.name for path in tree_script.patches()]
    assert names == ["ggml-count-in-roman.patch", "ggml-edit-the-other-file.patch"]
    assert (tree_script.NEW_FILES / "newer.c").read_text() == "int newer;\n"
    assert "newer.c" not in tree_script.patches()[1].read_text()
    assert (checkout(tmp_path, upstream) / "other.c").read_text() == "int edited;\n"


def test_refresh_removes_a_file_of_ours(tmp_path: Path, upstream: Path) -> None:
    tree = checkout(tmp_path, upstream)
    tree_script.git(tree, "rm", "-q", "new.c")
    tree_script.git(tree, "commit", "-q", "-m", "drop it")
    tree_script.refresh(tree)
    tree_script.refresh(tree)
    assert not (tree_script.NEW_FILES / "new.c").exists()
    assert [path.name for path in tree_script.patches()] == ["ggml-count-in-roman.patch"]


def test_refresh_wants_commits(tmp_path: Path, upstream: Path) -> None:
    tree = checkout(tmp_path, upstream)
    (tree / "other.c").write_text("int edited;\n")
    with pytest.raises(SystemExit, match="uncommitted edits"):
        tree_script.refresh(tree)


def test_source_must_be_llama_cpp(tmp_path: Path, upstream: Path) -> None:
    with pytest.raises(SystemExit, match=r"is no llama\.cpp checkout: it has no ggml/include/ggml\.h"):
        checkout(tmp_path, upstream / "ggml")


def test_a_wrong_archive_is_refused(tmp_path: Path) -> None:
    name, expected = tree_script.pinned()
    (tmp_path / name).write_bytes(b"not it")
    with pytest.raises(SystemExit) as stop:
        tree_script.fetch(tmp_path)
    assert f"expected {expected}" in str(stop.value)


def test_the_series_is_the_folder() -> None:
    """No patch is left out of the series, and each says why it is there and what upstream knows of it."""
    listed = tree_script.patches()
    assert sorted(listed) == sorted(tree_script.PATCH_DIR.glob("*.patch"))
    for patch in listed:
        text = patch.read_text()
        assert tree_script.patch_name(text) == patch.name
        assert "\nUpstream-status: " in text.split("\ndiff --git", maxsplit=1)[0]
        assert "\nDate: " in text


def test_command_line(tmp_path: Path) -> None:
    """A user's mistake is one line, not a traceback."""
    command = [sys.executable, str(Path(tree_script.__file__)), "checkout", "--tree", str(tmp_path / "tree")]
    options = ["--cache", str(tmp_path), "--source", str(tmp_path)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: LLAMA_CPP_SRC=")
    assert len(done.stderr.splitlines()) == 1
