"""Interrupted runs: what is kept, that resuming gives the bytes of an uninterrupted run, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from support.checkpoints import make

from quantize.small import QUICK, SMALL, Quantize

pytest.importorskip("torch", reason="torch is not installed (extra `quantize`)")

from ernie_gguf.checkpoint.config import ErnieConfig
from ernie_gguf.errors import WorkspaceError
from ernie_gguf.partial import partial_path
from ernie_gguf.quantize import run
from ernie_gguf.quantize.experts import EncodedExpert
from ernie_gguf.quantize.model import Layer, Weights
from ernie_gguf.quantize.stats import MatrixStats
from ernie_gguf.quantize.workspace import Workspace, layers_done

LAYERS = range(SMALL.layers)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.gguf"


KILLED = """
import os, signal
from ernie_gguf.cli import main
from ernie_gguf.quantize import run
from ernie_gguf.quantize.workspace import Workspace

finish, publish, write = Workspace.finish_layer, Workspace.publish, run._write_expert
def kill(): os.kill(os.getpid(), signal.SIGKILL)
def finish_layer(self, number, *args):
    finish(self, number, *args)
    if place == "after layer 1" and number == 1: kill()
def write_expert(fd, offsets, number, encoded):
    write(fd, offsets, number, encoded)
    if place == "within layer 1" and number == 1 and encoded.expert == 1: kill()
def published(self, *args):
    publish(self, *args)
    kill()
Workspace.finish_layer, run._write_expert = finish_layer, write_expert
if place == "with its name": Workspace.publish = published
main()
"""


def quantize_and_kill(place: str, source: Path, out: Path, text: Path) -> int:
    """Run in a process that kills itself at `place` if it gets there. Returns its exit status."""
    code = f"place = {place!r}\n{KILLED}"
    options = ("quantize", source, "--outfile", out, "--calibration", text, *QUICK)
    return subprocess.run([sys.executable, "-c", code, *options], check=False, capture_output=True).returncode


@pytest.fixture(scope="module")
def in_one_go(small: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of an uninterrupted run."""
    path = tmp_path_factory.mktemp("once") / "out.gguf"
    assert quantize_and_kill("nowhere", small, path, text) == 0
    return path.read_bytes()


@pytest.fixture(scope="module")
def killed_after_layer_1(small: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a killed run left."""
    path = tmp_path_factory.mktemp("killed") / "out.gguf"
    assert quantize_and_kill("after layer 1", small, path, text) == -signal.SIGKILL
    return partial_path(path)


@pytest.fixture
def left(killed_after_layer_1: Path, out: Path) -> Path:
    """A copy of it, to be resumed to `out`."""
    return shutil.copytree(killed_after_layer_1, partial_path(out))


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Records the layers that begin."""
    numbers: list[int] = []

    def layer(weights: Weights, config: ErnieConfig, number: int) -> Layer:
        numbers.append(number)
        return Layer(weights, config, number)

    monkeypatch.setattr(run, "Layer", layer)
    return numbers


def interrupt_after(monkeypatch: pytest.MonkeyPatch, layer: int, interrupt: Callable[[], None]) -> None:
    """Interrupt once, when the layer is finished."""
    finish = Workspace.finish_layer

    def finish_and_interrupt(
        self: Workspace, number: int, stats: Sequence[MatrixStats], seconds: float, model_fd: int
    ) -> None:
        finish(self, number, stats, seconds, model_fd)
        if number == layer:
            monkeypatch.setattr(Workspace, "finish_layer", finish)
            interrupt()

    monkeypatch.setattr(Workspace, "finish_layer", finish_and_interrupt)


def interrupted_after(quantize: Quantize, monkeypatch: pytest.MonkeyPatch, small: Path, out: Path, layer: int) -> Path:
    """Interrupt a run after a layer. Returns its folder."""
    interrupt_after(monkeypatch, layer, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert quantize(small, out).code == 130
    return partial_path(out)


def kept(out: Path, layers: int) -> str:
    return (
        f"{layers} of {SMALL.layers} layers are done and kept in {partial_path(out)}; the same command resumes the run"
    )


def full_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_run_that_ends_leaves_no_folder(quantize: Quantize, small: Path, out: Path, in_one_go: bytes) -> None:
    assert quantize(small, out).code == 0
    assert out.read_bytes() == in_one_go
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize(
    ("layer", "stop"),
    [(0, signal.SIGINT), (1, signal.SIGTERM), (1, None), (2, signal.SIGINT)],  # after the last a name is all that lacks
)
def test_resuming_after_a_layer(
    quantize: Quantize,
    monkeypatch: pytest.MonkeyPatch,
    small: Path,
    out: Path,
    *,
    in_one_go: bytes,
    begun: list[int],
    layer: int,
    stop: signal.Signals | None,
) -> None:
    interrupt_after(monkeypatch, layer, full_disk if stop is None else lambda: os.kill(os.getpid(), stop))
    done = quantize(small, out)
    if stop is None:
        last = f"note: {kept(out, layer + 1)}\nerror: {out}: No space left on device; the model was not written\n"
    else:
        last = f"error: stopped by {stop.name}: {kept(out, layer + 1)}\n"
    assert (done.code, done.out) == (1 if stop is None else 128 + stop, "")
    assert done.err.endswith(last)
    assert not out.exists()
    names = {path.name for path in partial_path(out).iterdir()} - {"scratch.f32"}
    assert names == {"model.gguf", "state.json", f"activations-{layer + 1}.f32"}
    assert (partial_path(out) / "model.gguf").read_bytes()[:4] == bytes(4)
    begun.clear()
    done = quantize(small, out)
    assert done.code == 0
    assert begun == list(LAYERS)[layer + 1 :]
    assert f"resuming an interrupted run after layer {layer}/2\n" in done.err
    assert out.read_bytes() == in_one_go
    assert list(out.parent.iterdir()) == [out]


def test_the_report_of_a_resumed_run_is_complete(
    quantize: Quantize, monkeypatch: pytest.MonkeyPatch, small: Path, out: Path
) -> None:
    interrupted_after(quantize, monkeypatch, small, out, 1)
    went_on = json.loads(quantize(small, out, "--json").out)
    in_one = json.loads(quantize(small, out, "--json", "--overwrite").out)
    assert went_on.pop("seconds") > 0
    del in_one["seconds"]
    assert went_on == in_one


@pytest.mark.parametrize("layer", [1, 2])
def test_resuming_within_a_layer(
    quantize: Quantize, monkeypatch: pytest.MonkeyPatch, small: Path, out: Path, *, in_one_go: bytes, layer: int
) -> None:
    write = run._write_expert

    def write_and_stop(fd: int, offsets: dict[str, int], number: int, encoded: EncodedExpert) -> None:
        write(fd, offsets, number, encoded)
        if (number, encoded.expert) == (layer, 2):
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(run, "_write_expert", write_and_stop)
        done = quantize(small, out, "--threads", "2")
    assert done.code == 143
    assert kept(out, layer) in done.err
    assert quantize(small, out).code == 0
    assert out.read_bytes() == in_one_go


def test_nothing_is_kept_before_a_layer_is_done(
    quantize: Quantize, monkeypatch: pytest.MonkeyPatch, small: Path, out: Path
) -> None:
    monkeypatch.setattr(run, "_embed", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    done = quantize(small, out)
    assert done.code == 130
    assert "note: 0" not in done.err
    assert "kept" not in done.err
    assert not list(out.parent.iterdir())


def test_a_run_that_is_killed(quantize: Quantize, small: Path, out: Path, left: Path, in_one_go: bytes) -> None:
    """By SIGKILL, which no process can catch."""
    assert layers_done(left) == 2
    assert quantize(small, out).code == 0
    assert out.read_bytes() == in_one_go
    assert list(out.parent.iterdir()) == [out]


def test_a_run_that_is_killed_within_a_layer(
    quantize: Quantize, small: Path, text: Path, out: Path, in_one_go: bytes
) -> None:
    assert quantize_and_kill("within layer 1", small, out, text) == -signal.SIGKILL
    assert layers_done(partial_path(out)) == 1
    assert quantize(small, out).code == 0
    assert out.read_bytes() == in_one_go
    assert list(out.parent.iterdir()) == [out]


def test_a_run_that_is_killed_when_the_model_has_its_name(
    quantize: Quantize, small: Path, text: Path, out: Path, in_one_go: bytes
) -> None:
    """The remains of the folder do no harm."""
    assert quantize_and_kill("with its name", small, out, text) == -signal.SIGKILL
    assert out.read_bytes() == in_one_go
    out.unlink()
    missing = partial_path(out) / "model.gguf"
    done = quantize(small, out)
    assert done.err.endswith(f"error: {missing}: missing; give --restart to start over\n")
    assert quantize(small, out, "--restart").code == 0
    assert list(out.parent.iterdir()) == [out]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (("--maps", "3"), "settings"),
        (("--ctx-size", "64"), "calibration text"),
        (("--max-tokens", "256"), "calibration text"),
        (("--token-embedding-type", "bf16"), "tensor types"),
        (("--maps", "1", "--ctx-size", "64"), "calibration text and settings"),
    ],
)
def test_other_inputs_are_refused(
    quantize: Quantize, small: Path, out: Path, left: Path, *, options: tuple[str, ...], what: str
) -> None:
    before = content(left)
    done = quantize(small, out, *options)
    assert (done.code, done.out) == (1, "")
    assert done.err.endswith(
        f"error: {left}: an interrupted run with another {what}; give --restart to start over, or another --outfile\n"
    )
    assert "kept" not in done.err
    assert content(left) == before


def test_other_texts_and_checkpoints_are_refused(
    quantize: Quantize, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: Path
) -> None:
    source, out, other = make(tmp_path / "source", SMALL), tmp_path / "out.gguf", tmp_path / "other.txt"
    left = interrupted_after(quantize, monkeypatch, source, out, 1)
    other.write_text(text.read_text().replace("the", "a"))
    done = quantize(source, out, "--calibration", other)
    assert f"error: {left}: an interrupted run with another calibration text; give --restart" in done.err
    os.utime(source / "model.safetensors", (1, 1))
    done = quantize(source, out)
    assert f"error: {left}: an interrupted run with another checkpoint; give --restart" in done.err
    assert layers_done(left) == 2
    assert quantize(source, out, "--restart").code == 0
    assert not left.exists()


def test_threads_may_change(quantize: Quantize, small: Path, out: Path, left: Path, in_one_go: bytes) -> None:
    assert left.exists()
    assert quantize(small, out, "--threads", "2").code == 0
    assert out.read_bytes() == in_one_go


def test_restart_starts_over(quantize: Quantize, small: Path, out: Path, left: Path, begun: list[int]) -> None:
    assert left.exists()
    assert quantize(small, out, "--restart").code == 0
    assert begun == list(LAYERS)
    assert list(out.parent.iterdir()) == [out]


def test_two_runs_at_once(quantize: Quantize, small: Path, out: Path, left: Path) -> None:
    before = content(left)
    fingerprint = json.loads(before["state.json"])["fingerprint"]
    with Workspace(left, fingerprint, restart=False) as first:
        done = quantize(small, out)
        message = f"error: {left}: another run is using it; wait for it, or stop it\n"
        assert (done.code, done.err.splitlines(keepends=True)[-1]) == (1, message)
        assert "kept" not in done.err
        assert quantize(small, out, "--restart").code == 1
        assert content(left).keys() >= before.keys() - {"scratch.f32"}
        assert first.done == 2


def edit_state(folder: Path, change: Callable[[dict[str, object]], object]) -> None:
    state = json.loads((folder / "state.json").read_text())
    change(state)
    (folder / "state.json").write_text(json.dumps(state))


def truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(1000)


AGAIN = "give --restart to start over\n"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: truncate(f / "state.json"), ": state.json: not valid JSON: "),
        (lambda f: (f / "state.json").write_text("[]"), ": state.json: expected a JSON object, found list; "),
        (lambda f: edit_state(f, lambda s: s.update(version=0)), ": begun by another version of ernie-gguf; "),
        (lambda f: edit_state(f, lambda s: s.pop("stats")), "/state.json: damaged (KeyError('stats')); "),
        (lambda f: edit_state(f, lambda s: s.update(layers="x")), "/state.json: damaged (ValueError("),
        (lambda f: edit_state(f, lambda s: s.update(stats=[{}])), "/state.json: damaged (KeyError('scales')); "),
        (lambda f: (f / "activations-2.f32").unlink(), "/activations-2.f32: missing; "),
        (lambda f: truncate(f / "activations-2.f32"), "/activations-2.f32: 1000 bytes, expected "),
        (lambda f: (f / "model.gguf").unlink(), "/model.gguf: missing; "),
        (lambda f: truncate(f / "model.gguf"), "/model.gguf: 1000 bytes, expected "),
    ],
)
def test_damaged_folders(
    quantize: Quantize, small: Path, out: Path, left: Path, *, damage: Callable[[Path], object], message: str
) -> None:
    damage(left)
    done = quantize(small, out)
    assert (done.code, done.out) == (1, "")
    last = done.err.splitlines(keepends=True)[-1]
    assert last.startswith(f"error: {left}{message}")
    assert last.endswith(AGAIN)
    assert "kept" not in done.err
    assert left.exists()


def test_files_of_others_are_not_touched(quantize: Quantize, small: Path, out: Path) -> None:
    folder = partial_path(out)
    folder.mkdir()
    (folder / "letter.txt").write_text("dear")
    (folder / "model.gguf").write_text("old")
    for options in ((), ("--restart",)):
        done = quantize(small, out, *options)
        assert done.err.endswith(
            f"error: {folder / 'letter.txt'}: not of an interrupted run; move it, or give another --outfile\n"
        )
        assert content(folder) == {"letter.txt": b"dear", "model.gguf": b"old"}


def test_a_folder_without_a_state_starts_over(
    quantize: Quantize, small: Path, out: Path, left: Path, in_one_go: bytes
) -> None:
    """A power cut before the first layer was done."""
    (left / "state.json").unlink()
    assert quantize(small, out).code == 0
    assert out.read_bytes() == in_one_go


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Records syncs, renames and removals in order."""
    events: list[str] = []
    fsync, replace, unlink = os.fsync, Path.replace, Path.unlink

    def log_fsync(fd: int) -> None:
        events.append(f"fsync {Path(f'/proc/self/fd/{fd}').readlink().name}")
        fsync(fd)

    def log_replace(self: Path, target: Path) -> Path:
        events.append(f"replace {target.name}")
        return replace(self, target)

    def log_unlink(self: Path, missing_ok: bool = False) -> None:
        events.append(f"unlink {self.name}")
        unlink(self, missing_ok)

    monkeypatch.setattr(os, "fsync", log_fsync)
    monkeypatch.setattr(Path, "replace", log_replace)
    monkeypatch.setattr(Path, "unlink", log_unlink)
    yield events
    monkeypatch.undo()


def test_a_state_names_only_what_is_on_the_disk(tmp_path: Path, synced: list[str]) -> None:
    folder = tmp_path / "x.partial"
    with Workspace(folder, {}, restart=False) as work:
        work.model.write_bytes(bytes(100))
        work.activations(0, (2, 3), new=True)
        work.activations(1, (2, 3), new=True)
        with work.open_model() as fd:
            work.finish_layer(0, [], 1.5, fd)
        assert synced == [
            "fsync model.gguf",
            "fsync activations-1.f32",
            "fsync state.tmp",
            "replace state.json",
            "fsync x.partial",
            "unlink activations-0.f32",
        ]
        shutil.copytree(folder, tmp_path / "copy")
    assert (work.done, work.seconds) == (1, 1.5)
    with Workspace(folder, {}, restart=False) as again:
        assert (again.done, again.seconds, again.stats) == (1, 1.5, [])
    with pytest.raises(WorkspaceError, match="another a;"), Workspace(tmp_path / "copy", {"a": 1}, restart=False):
        pass
