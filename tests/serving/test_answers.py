"""What serve, chat and a stopped command say before any model is loaded."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import pytest
from ernie_gguf.errors import Stopped, leaving
from ernie_gguf.serving.chat import ChatError, context
from ernie_gguf.serving.model_file import check_mmproj, check_model
from ernie_gguf.serving.serve import ServeError, check_port
from gguf import GGUFWriter
from support.checkpoints import Spec, make
from support.models import convert


def mmproj_file(path: Path) -> Path:
    writer = GGUFWriter(path, "clip")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_model_and_its_mmproj_mixed_up(tmp_path: Path) -> None:
    model = convert(make(tmp_path / "source", Spec(layers=1, first_moe=0, experts=2)), tmp_path / "model.gguf").path
    mmproj = mmproj_file(tmp_path / "mmproj.gguf")
    assert check_model(model, ChatError)["general.architecture"] == "ernie4_5-moe"
    check_mmproj(mmproj, ServeError)
    with pytest.raises(
        ChatError, match=r"mmproj\.gguf is an mmproj, the vision encoder of a vision-language model: give the mod"
    ):
        check_model(mmproj, ChatError)
    with pytest.raises(ServeError, match=r"model\.gguf is a model \(ernie4_5-moe\), expected the mmproj that was made"):
        check_mmproj(model, ServeError)


@pytest.mark.parametrize(("wanted", "found"), [(8192, 4096), (4096, 4096), (512, 512), (0, 0)])
def test_no_more_context_than_the_model_was_trained_with(
    capsys: pytest.CaptureFixture[str], wanted: int, found: int
) -> None:
    assert context({"general.architecture": "x", "x.context_length": 4096}, wanted) == found
    assert ("was trained" in capsys.readouterr().err) == (wanted > 4096)
    assert context({}, wanted) == wanted


def test_a_port_that_is_taken_is_known_before_the_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        with pytest.raises(ServeError, match=rf"^127\.0\.0\.1:{port}: Address already in use; give another --port$"):
            check_port(["--port", port])
    check_port([f"--port={port}"])
    check_port(["--port", "0"])
    check_port(["--host", "/tmp/x.sock"])


def test_a_stopped_command_says_one_thing_of_what_it_leaves() -> None:
    with pytest.raises(Stopped) as outer, leaving("; nothing"), leaving(lambda: ": three layers"):
        raise Stopped(signal.SIGINT)
    assert outer.value.left == ": three layers"
