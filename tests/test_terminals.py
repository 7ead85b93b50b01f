"""Every terminal and locale gets an answer: encodings that lack a letter, paths that are no text, narrow windows."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ernie_gguf import report
from ernie_gguf.engine import info
from ernie_gguf.gguf_file.reader import read_gguf
from reference.specimens import TINY
from rich.console import Console
from rich.table import Table
from support.checkpoints import Spec, make
from support.command_line import Command
from support.models import convert

SPEC = Spec(layers=2, experts=2)
ROOT = Path(__file__).parent.parent
C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
ENVIRONMENTS: dict[str, dict[str, str]] = {
    "utf-8": {"PYTHONUTF8": "1"},
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "C locale": C_LOCALE,
    "C locale, latin-1": {**C_LOCALE, "PYTHONIOENCODING": "latin-1"},
}
NAMES = {
    "accents": "\u00e9\u00df".encode(),
    "Chinese": "\u6587\u5fc3 \U0001f600".encode(),
    "no text": b"caf\xe9 \xff\n.",
}


# Runs several commands, each up to NEXT, in one process, and writes a line with its exit code after each.
SCRIPT = """
import sys
from ernie_gguf.cli import main
words = sys.argv[1:]
while words:
    end = words.index("NEXT")
    sys.argv, words = ["ernie-gguf", *words[:end]], words[end + 1:]
    try:
        main()
    except SystemExit as stop:
        for stream in (sys.stdout, sys.stderr):
            print(f"EXIT {stop.code or 0}", file=stream, flush=True)
"""


def run(environment: dict[str, str], *commands: tuple[bytes, ...]) -> list[tuple[bytes, bytes]]:
    """Standard output and error of each command, ending in its exit code."""
    words = [word for command in commands for word in (*command, b"NEXT")]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *words], env={**os.environ, **environment}, capture_output=True, check=True
    )
    out, err = (re.findall(rb"(?s)(.*?EXIT \d+)\n", stream) for stream in (done.stdout, done.stderr))
    assert len(out) == len(err) == len(commands), done.stderr
    return list(zip(out, err, strict=True))


@pytest.mark.parametrize("environment", ENVIRONMENTS)
@pytest.mark.parametrize("name", NAMES)
def test_paths_and_names_of_any_kind(tmp_path: Path, name: str, environment: str) -> None:
    here = ENVIRONMENTS[environment]
    folder = os.fsencode(make(tmp_path / "source", SPEC).rename(tmp_path / os.fsdecode(NAMES[name])))
    template = Path(os.fsdecode(folder)) / "chat_template.jinja"
    template.write_text("{{ '\u4f60\u597d \U0001f600' }}", encoding="utf-8")
    out = os.fsencode(tmp_path) + b"/" + NAMES[name].strip() + b".gguf"
    to = (b"convert", folder, b"--outfile", out)
    *shown, in_json, again, absent = run(
        here,
        *((*to, b"--dry-run"), to, (b"inspect", out), (b"verify", folder, out)),
        *((b"inspect", out, b"--json"), to, (b"inspect", folder + b"absent")),
    )
    assert [(err, out[-6:]) for out, err in shown] == [(b"EXIT 0", b"EXIT 0")] * 4
    found = json.loads(in_json[0][:-6].decode(here.get("PYTHONIOENCODING", "utf-8")))
    assert found["metadata"]["tokenizer.chat_template"] == "{{ '\u4f60\u597d \U0001f600' }}"
    assert read_gguf(Path(os.fsdecode(out))).metadata["general.name"] == NAMES[name].decode(errors="replace")
    assert re.fullmatch(rb"error: [^\n]*: exists already; give --overwrite to replace it\nEXIT 1", again[1])
    assert re.fullmatch(rb"error: [^\n]*: no such file\nEXIT 1", absent[1])


@pytest.fixture
def narrow(ernie_gguf: Command, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What a command prints on a terminal of some columns."""

    def run(columns: int, *args: str | Path) -> str:
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("FORCE_COLOR", "1")
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", ernie_gguf(*args).out)

    return run


@pytest.mark.parametrize("columns", [40])
def test_no_table_hides_a_cell_on_a_narrow_terminal(narrow: Callable[..., str], tmp_path: Path, columns: int) -> None:
    model = convert(TINY, tmp_path / "x.gguf", "ccq2").path
    commands: dict[str, tuple[str | Path, ...]] = {
        "verify": ("verify", TINY, model),
        "inspect": ("inspect", model),
        "dry-run": ("convert", TINY, "--outfile", tmp_path / "y.gguf", "--dry-run"),
        "convert": ("convert", TINY, "--outfile", tmp_path / "z.gguf", "--overwrite"),
    }

    def words(text: str) -> set[str]:
        return {word for word in text.split() if not re.fullmatch(r"[\d.]+", word)}

    for name, args in commands.items():
        wide, found = narrow(400, *args), narrow(columns, *args)
        assert "\u2026" not in found.replace("\u2026 (", ""), name  # inspect shortens long values itself
        folded = re.sub(r"\s", "", found)
        if name == "verify":
            verdicts = Counter(re.findall(r" (exact|rounded|rms) ?[\d.]*$", found, re.MULTILINE))
            assert verdicts == {"exact": 11, "rounded": 22, "rms": 6}
        else:
            assert [w for w in words(wide) if w not in folded and "/" not in w] == [], name


def test_every_table_is_shown_whole() -> None:
    """Of a table with a column of each kind no cell is cut at any width."""
    cells = ("blk.53.ffn_gate_shexp.weight", "123,456", "a text of several words", "MISMATCH")
    shown = report.table(report.whole("name"), report.right("number"), "text", "verdict")
    shown.add_row(*cells)
    for width in range(10, 120, 7):
        console = Console(width=max(width, report.least_width(shown)), file=io.StringIO())
        console.print(shown)
        assert isinstance(console.file, io.StringIO)
        text = console.file.getvalue()
        assert "\u2026" not in text
        assert cells[0] in text and cells[1] in text and cells[3] in text


def test_info_lists_its_devices() -> None:
    found: dict[str, Any] = {
        **{"path": "/lib/libllama.so", "origin": "a test", "version": "1", "build_number": 2, "ggml_version": "3"},
        **{"built": None, "ccq2": True, "cuda": False, "vulkan": False, "rpc": True},
        **{"system_info": "AVX [/512]", "notes": ["[x]"]},
        "devices": [{"name": "CPU", "description": "Xeon [R]", "ccq2": True, "total": 2**34, "free": 2**33}],
    }
    lines = info._library_text(found)
    assert [type(line) for line in lines if not isinstance(line, str)] == [Table]
    assert not any("<" in line for line in lines if isinstance(line, str))


def test_brackets_are_not_markup(capsys: pytest.CaptureFixture[str]) -> None:
    shown = report.table("a")
    shown.add_row("Xeon [R] [/x]")
    report.show(["note: [x] of [/y]", shown])
    assert capsys.readouterr().out.split("\n") == ["note: [x] of [/y]", "a", "Xeon [R] [/x]", ""]


def test_nothing_is_shown_without_a_type() -> None:
    """What `show` prints is typed, so that a function in place of a table is mypy's error: no list[Any] leads there."""
    for path in (ROOT / "convert" / "ernie_gguf").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.endswith(("_text", "_table")) and node.returns:
                assert "Any" not in ast.unparse(node.returns), f"{path.name}: {node.name}"


COMMANDS = ["convert", "inspect", "verify", "quantize", "build", "info", "serve", "chat", "eval"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_no_repr(ernie_gguf: Command, command: str) -> None:
    text = ernie_gguf(command, "--help").out
    assert not re.search(r"<(?!=)|>(?!=)|[{}]| range", re.sub(r"\d?<=x<=\d+|\d+<=x|x[<>]=\d+", "", text)), text
    usage = text.splitlines()[0]
    assert re.search(rf" {command} \[OPTIONS\]( (\[?[A-Z]+\]?(\.\.\.)?|\[-- ARGS\]\.\.\.))+$", usage), usage


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_an_example_without_arguments_says_how_to_call_it(example: Path) -> None:
    done = subprocess.run(
        [sys.executable, example], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    if "ModuleNotFoundError: No module named 'langchain" in done.stderr:
        pytest.skip("extra `clients`")
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr
    assert re.search(rf"(python examples/|usage: ){example.name}", done.stderr)
