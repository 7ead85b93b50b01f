"""What tests share: the build under test and the example model in both types."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ernie_gguf import cli
from ernie_gguf.convert import prepare, write_gguf
from ernie_gguf.gguf_file.outtype import Outtype
from support.command_line import Command, Done

ROOT = Path(__file__).parent.parent
TINY = ROOT / "examples" / "ernie-tiny"


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


def _convert(outtype: Outtype, folder: Path) -> Path:
    path = folder / f"ernie-tiny-{outtype.value}.gguf"
    write_gguf(prepare(TINY, outtype), path, threads=1, overwrite=False, progress=lambda _: None)
    return path


@pytest.fixture(scope="session")
def tiny_bf16_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _convert(Outtype.BF16, tmp_path_factory.mktemp("bf16"))


@pytest.fixture(scope="session")
def tiny_ccq2_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _convert(Outtype.CCQ2, tmp_path_factory.mktemp("ccq2"))


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
