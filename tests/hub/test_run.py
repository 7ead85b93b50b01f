"""`run` and `serve` with a name: the steps are said, a file is made once, and the model answers."""

import subprocess
import sys
from pathlib import Path

import pytest
from ernie_gguf.serving import ready as getting
from ernie_gguf.serving import types as weighing
from ernie_gguf.serving.cards import OWN_CARDS
from ernie_gguf.serving.memory import Question
from ernie_gguf.serving.types import weigh
from support.command_line import Command
from support.hub_server import FakeHub

from hub.conftest import REPO

pytestmark = [pytest.mark.build, pytest.mark.usefixtures("built_library")]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    return tmp_path / "user" / "ernie-gguf" / "models"


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start nothing: what matters is what comes before."""
    from ernie_gguf.serving import chat

    monkeypatch.setattr(chat, "talk", lambda *_, **__: None)


def made(cache: Path) -> list[str]:
    return sorted(str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file())


def test_a_name_becomes_an_answer(
    ernie_gguf: Command, hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ernie_gguf.serving import chat

    done = ernie_gguf("run", REPO, "def main", "--temp", "0", "-c", "96", "--threads", "1", "--outtype", "q8_0")
    assert done.code == 0, done.err
    assert done.out.strip()
    steps = [line for line in done.err.splitlines() if line[:2] in ("1.", "2.", "3.")]
    assert steps[0] == f"1. {REPO}: reading headers, to choose a type"
    assert "2. downloading 11.6 MB (1 s at 100 Mbit/s) and converting it on the way; 6.2 MB stay in " in done.err
    assert [line[:2] for line in steps] == ["1.", "2.", "3."]
    file = f"{REPO.replace('/', '--')}/ERNIE-4.5-21B-A3B-PT-Q8_0.gguf"
    assert made(cache) == [file]
    before, asked = hub.sent, len(hub.log)
    monkeypatch.setattr(chat, "talk", lambda *_, **__: None)
    again = ernie_gguf("run", REPO)
    assert again.code == 0, again.err
    assert (hub.sent, len(hub.log)) == (before, asked)  # made once, and then no question to anyone
    assert f"{file} was made before" in again.err


@pytest.mark.usefixtures("quiet")
def test_the_most_exact_type_that_fits(
    ernie_gguf: Command, hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {each.outtype.value: each for each in weigh(hub.folder, Question(96, "q8_0", ()), OWN_CARDS)}
    assert found["q8_0"].in_memory < found["bf16"].in_memory
    monkeypatch.setattr(weighing, "main_memory", lambda: found["q8_0"].in_memory)
    assert ernie_gguf("run", REPO, "x", "-c", "96", "--temp", "0").code == 0
    assert [Path(name).name for name in made(cache)] == ["ERNIE-4.5-21B-A3B-PT-Q8_0.gguf"]
    for path in cache.rglob("*.gguf"):
        path.unlink()
    monkeypatch.setattr(weighing, "main_memory", lambda: 1000)
    refused = ernie_gguf("run", REPO, "x", "-c", "96")
    assert (refused.code, "no type of it fits this machine" in refused.err) == (1, True)
    assert made(cache) == []


@pytest.mark.usefixtures("quiet")
def test_large_downloads_are_asked_about(
    ernie_gguf: Command, hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(getting, "ASK_ABOVE", 1_000_000)
    options = ("--temp", "0", "-c", "96", "--outtype", "q8_0")
    done = ernie_gguf("run", REPO, "x", *options)
    assert (done.code, "nobody to ask: give --yes" in done.err) == (1, True)
    assert made(cache) == []
    assert hub.sent <= 3 << 20
    assert ernie_gguf("run", REPO, "x", "--yes", *options).code == 0


@pytest.mark.usefixtures("quiet")
def test_an_interrupted_run_goes_on(
    ernie_gguf: Command, hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ernie_gguf.hub import batches

    monkeypatch.setattr(batches, "BATCH_BYTES", 1 << 20)
    hub.limit = 9_000_000
    options = ("--temp", "0", "-c", "96", "--outtype", "q8_0")
    assert ernie_gguf("run", REPO, "x", *options).code == 1
    assert all(".partial/" in name for name in made(cache))
    hub.limit = None
    done = ernie_gguf("run", REPO, "x", *options)
    assert (done.code, " parts are done" in done.err) == (0, True)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (".", "a folder: make a file of it first: ernie-gguf convert ."),
        ("ERNIE-4.5-0.3B-PT", "no such file, and not a name on the Hub; did you mean baidu/ERNIE-4.5-0.3B-PT?"),
        ("missing.gguf", "missing.gguf: no such file, and not a name on the Hub"),
        ("baidu/ERNIE-4.5-0.3B", "no repository of that name on the Hugging Face Hub"),
    ],
)
def test_bad_names(ernie_gguf: Command, hub: FakeHub, source: str, says: str) -> None:
    done = ernie_gguf("run", source, "x")
    assert (done.code, says in done.err) == (1, True), done.err
    assert len([line for line in done.err.splitlines() if line.startswith("error: ")]) == 1


def test_run_takes_a_file(ernie_gguf: Command, tiny_bf16_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ernie_gguf.serving import chat

    given: list[tuple[Path, object]] = []
    monkeypatch.setattr(chat, "talk", lambda file, **options: given.append((file, options["prompt"])))
    assert ernie_gguf("run", tiny_bf16_gguf, "def main").code == 0
    assert given == [(tiny_bf16_gguf, "def main")]


def test_serve_takes_a_name(ernie_gguf: Command, hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ernie_gguf.serving import serve

    started: list[list[str]] = []
    monkeypatch.setattr(serve, "_execute", lambda command: started.append(list(command)))
    assert ernie_gguf("serve", REPO, "--port", "8099", "-c", "96").code == 0
    (command,) = started
    assert command[command.index("--model") + 1] == str(cache / made(cache)[0])


def test_help_is_quick() -> None:
    """What the Hub needs is imported by the commands that need it."""
    program = "import sys; import ernie_gguf.cli; print([m for m in sys.modules if m in ('huggingface_hub', 'numpy')])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
