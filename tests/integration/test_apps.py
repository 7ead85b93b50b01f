"""docs/apps.md: its configuration files, as they stand there, with our server."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from support.servers import free_port, running

pytestmark = pytest.mark.build

PAGE = Path(__file__).parents[2] / "docs" / "apps.md"
CLI = [sys.executable, "-c", "from ernie_gguf.cli import main; main()"]


def section(title: str) -> str:
    """The text of a section of the page."""
    return PAGE.read_text().split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def configuration(title: str) -> str:
    """The configuration file that a section shows."""
    (found,) = re.findall(r"```yaml\n(.*?)```", section(title), re.DOTALL)
    return str(found)


def ask(url: str, body: dict[str, Any]) -> Any:  # noqa: ANN401 - JSON
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def healthy(port: int) -> bool:
    try:
        return bool(urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200)
    except OSError:
        return False


def test_llama_swap(llama_bin: Path, tiny_bf16_gguf: Path, tmp_path: Path) -> None:
    """The command of the file as llama-swap runs it: ${PORT} filled in, /health asked, requests passed on."""
    yaml = pytest.importorskip("yaml")
    model = yaml.safe_load(configuration("llama-swap"))["models"]["ernie"]
    assert set(model) == {"cmd", "ttl"}
    port = free_port()
    command = shlex.split(model["cmd"].replace("${PORT}", str(port)))
    places = {
        "/opt/ernie-gguf/llama-server": str(llama_bin / "llama-server"),
        "/models/ernie.gguf": str(tiny_bf16_gguf),
    }
    assert set(places) <= set(command)
    with running([*(places.get(part, part) for part in command), "-t", "1"], tmp_path / "log", lambda: healthy(port)):
        body = {"model": "ernie", "messages": [{"role": "user", "content": "def f"}], "max_tokens": 4}
        assert ask(f"http://127.0.0.1:{port}/v1/chat/completions", body)["choices"][0]["message"]["content"]


@pytest.mark.usefixtures("built_library")
def test_llm(tiny_bf16_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program `llm` with the file of the page and nothing else."""
    pytest.importorskip("llm")
    port = free_port()
    (tmp_path / "ernie.gguf").symlink_to(tiny_bf16_gguf)
    text = configuration("llm")
    assert "127.0.0.1:8080" in text
    (tmp_path / "extra-openai-models.yaml").write_text(text.replace("8080", str(port)))
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    monkeypatch.setenv("LLM_LOAD_PLUGINS", "")  # llm-gguf, where it is installed, wants llama-cpp-python
    serve = [*CLI, "serve", str(tmp_path / "ernie.gguf"), "--port", str(port), "-c", "512", "-t", "1"]
    with running(serve, tmp_path / "log", lambda: healthy(port)):
        options = ["-m", "ernie", "def main", "--key", "none", "-o", "max_tokens", "8", "--no-log"]
        done = subprocess.run(
            [sys.executable, "-m", "llm", *options], capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()


def test_the_table_says_what_is_run() -> None:
    """Every section is in the table, and only what a test here runs is said to be run."""
    rows = dict(re.findall(r"^\| \[([^]]+)\]\([^)]*\)[^|]*\|[^|]*\| ([^|]*) \|$", PAGE.read_text(), re.MULTILINE))
    titles = re.findall(r"^## (.+)$", PAGE.read_text(), re.MULTILINE)
    assert {title.lower() for title in rows} == {title.lower() for title in titles}
    assert {title for title, run in rows.items() if run == "yes"} == {"llm"}
