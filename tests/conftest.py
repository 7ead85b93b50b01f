"""What tests share: the build under test and the example model in both types."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ernie_gguf import cli
from reference import specimens
from support.command_line import Command, Done
from support.models import convert
from support.paddle import make_two_bits

ROOT = Path(__file__).parent.parent


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell sets it for what runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def llama_bin() -> Path:
    """The bin folder of the patched build; `make test` names it, and then it must be there."""
    named = os.environ.get("LLAMA_CPP_BIN")
    folder = Path(named) if named else ROOT / "bindings" / "ernie_llama" / "lib"
    if not (folder / "llama-completion").exists():
        if named:
            pytest.fail(f"LLAMA_CPP_BIN={named} holds no llama-completion: run make build")
        pytest.skip(f"llama.cpp is not built ({folder} holds no llama-completion): run make test")
    return folder.resolve()


@pytest.fixture(scope="session")
def built_library(llama_bin: Path) -> Iterator[None]:
    """Make the bindings load the library of the build under test, here and in subprocesses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ERNIE_LLAMA_LIB_PATH", str(llama_bin))
        yield


@pytest.fixture(scope="session")
def llama_tree() -> Path:
    """The patched llama.cpp tree that the build was made of; `make test` names it."""
    tree = Path(os.environ.get("LLAMA_CPP_TREE") or ROOT / "build" / "llama.cpp")
    if not (tree / "include" / "llama.h").is_file():
        pytest.skip(f"no llama.cpp tree at {tree}: run `make checkout` or set LLAMA_CPP_TREE")
    return tree


@pytest.fixture(scope="session")
def tiny_bf16_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(specimens.TINY, tmp_path_factory.mktemp("bf16") / "ernie-tiny-bf16.gguf", "bf16").path


@pytest.fixture(scope="session")
def tiny_ccq2_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(specimens.TINY, tmp_path_factory.mktemp("ccq2") / "ernie-tiny-ccq2.gguf", "ccq2").path


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint that a golden file was made from, by its name; random ones are made once."""
    made: dict[str, Path] = {}

    def find(name: str) -> Path:
        if name == "ernie-mini" and specimens.MINI is None:
            pytest.skip("ERNIE_MINI names no folder: the checkpoint ernie-mini is too large for the repository")
        if name not in made and name == "two-bits":
            made[name] = tmp_path_factory.mktemp("made") / name
            make_two_bits(made[name])
        elif name not in made:
            made[name] = specimens.checkpoint_of(name, tmp_path_factory.mktemp("made"))
        return made[name]

    return find


@pytest.fixture
def ernie_gguf(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """Run the entry point in this process, and put back the signal handlers that it installs."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def call(*args: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["ernie-gguf", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capfd.readouterr()
        return Done(stop.value.code, captured.out, captured.err)

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)
