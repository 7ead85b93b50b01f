"""What the pages promise exists: links, files, commands and their options."""

from __future__ import annotations

import re
import shlex
import subprocess
from functools import cache
from pathlib import Path

import pytest
import typer
from ernie_gguf.cli import app

from docs.pages import PAGES, ROOT, anchors, commands, links, name, spans

each_page = pytest.mark.parametrize("page", PAGES, ids=name)
OPTION = re.compile(r"(?<![\w-])--?[A-Za-z][\w-]*")
OTHERS = {"llama-swap"}  # called like a program of llama.cpp, but none
SOURCE = re.compile(r"(?:convert|bindings|tests|benchmarks|examples|docs|ggml_patch)/[\w./*-]+")


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        if path.startswith(("https://", "http://")):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name(page)}: {link}"
        assert not anchor or anchor in anchors(target), f"{name(page)}: {link}: {sorted(anchors(target))}"


def test_every_page_is_reached_from_the_readme() -> None:
    reached, front = set[Path](), [ROOT / "README.md"]
    while front:
        page = front.pop()
        reached.add(page)
        targets = [(page.parent / link.partition("#")[0]).resolve() for link in links(page)]
        front += [each for each in targets if each.suffix == ".md" and each.exists() and each not in reached]
    assert set(PAGES) - reached == set()


@each_page
def test_files_that_are_named_exist(page: Path) -> None:
    for span in spans(page):
        if SOURCE.fullmatch(span):
            assert list(ROOT.glob(span.rstrip("/"))), f"{name(page)}: {span}"


@cache
def makefile_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@each_page
def test_make_knows_its_targets(page: Path) -> None:
    for command in commands(page):
        words = command.split()
        if words[0] == "make":
            targets = [word for word in words[1:] if "=" not in word]
            assert set(targets) <= makefile_targets(), f"{name(page)}: {command}"


@cache
def options_of(program: str) -> frozenset[str]:
    """All options that a program's help names."""
    done = subprocess.run([program, "--help"], capture_output=True, text=True, check=False, timeout=60)
    return frozenset(OPTION.findall(done.stdout + done.stderr))


@each_page
def test_ernie_gguf_knows_its_options(page: Path, llama_bin: Path) -> None:
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for command in commands(page):
        words = shlex.split(command)
        if not words[0].endswith("ernie-gguf") or len(words) == 1 or words[1].startswith("-"):
            continue
        assert words[1] in known, f"{name(page)}: {command}"
        allowed = {option for each in known[words[1]].params for option in (*each.opts, *each.secondary_opts)}
        if words[1] == "serve":
            allowed |= options_of(str(llama_bin / "llama-server"))
        asked = OPTION.findall(" ".join(words[2:]).partition(" -- ")[0])
        assert set(asked) <= {*allowed, "--help"}, f"{name(page)}: {command}"


@each_page
def test_programs_of_llama_cpp_know_their_options(page: Path, llama_bin: Path) -> None:
    if "results" in page.parts:
        pytest.skip("what was run then")
    for command in commands(page):
        words = shlex.split(command)
        program = words[0].rpartition("/")[2]
        if program.startswith("llama-") and program not in OTHERS and len(words) > 1:
            assert (llama_bin / program).exists(), f"{name(page)}: {command}"
            asked = {word for word in words[1:] if OPTION.fullmatch(word)}
            assert asked <= options_of(str(llama_bin / program)), f"{name(page)}: {command}"


def test_the_table_of_patches_holds_the_series() -> None:
    series = [line for line in (ROOT / "ggml_patch" / "series").read_text().splitlines() if not line.startswith("#")]
    assert sorted(link for link in links(ROOT / "ggml_patch" / "README.md") if link.endswith(".patch")) == sorted(
        series
    )


def test_the_index_of_examples_is_complete() -> None:
    programs = {path.name for pattern in ("*.py", "*.sh") for path in (ROOT / "examples").glob(pattern)}
    assert programs <= set(links(ROOT / "examples" / "README.md"))


def test_pre_commit_runs_what_lint_runs() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text()
    pinned = re.findall(r"additional_dependencies: \[(.*)\]", (ROOT / ".pre-commit-config.yaml").read_text())
    assert len(pinned) == 3
    assert [tool for tool in pinned if f'"{tool}"' not in pyproject] == []
