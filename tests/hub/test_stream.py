"""--stream: the bytes of a conversion from a folder, whatever happens; nothing wrong under a final name."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import pytest
from ernie_gguf.checkpoint import storage
from ernie_gguf.convert import prepare
from ernie_gguf.files import pwrite
from ernie_gguf.gguf_file.outtype import Outtype
from ernie_gguf.gguf_file.reader import read_gguf
from ernie_gguf.hub import batches as batching
from ernie_gguf.hub import stream as streaming
from ernie_gguf.hub.batches import batches
from ernie_gguf.write import Piece, pieces, write_pieces
from reference.specimens import TINY
from support.checkpoints import Spec, make
from support.command_line import Command, Done
from support.hub_server import FakeHub
from support.models import convert
from support.paddle import make_plain, make_two_bits
from support.trained import make_trained
from support.vl import make_vl

from hub.conftest import REPO, Serve

KB = 1 << 10


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many batches and many requests of the example's 11 MB."""
    monkeypatch.setattr(batching, "BATCH_BYTES", 512 * KB)
    monkeypatch.setattr(storage, "PIECE_BYTES", 128 * KB)
    monkeypatch.setattr(streaming, "REQUEST_BYTES", 100_000)


@pytest.fixture
def wanted(checkpoint: Path, tmp_path: Path) -> bytes:
    """The file that a conversion of the folder makes."""
    convert(checkpoint, tmp_path / "wanted.gguf", "q8_0")
    return (tmp_path / "wanted.gguf").read_bytes()


Run = Callable[..., Done]


@pytest.fixture
def run(ernie_gguf: Command, tmp_path: Path) -> Run:
    """Convert the repository with --stream to here/out.gguf."""
    (tmp_path / "here").mkdir()

    def call(*options: str | Path, name: str = REPO, outtype: str = "q8_0") -> Done:
        out = tmp_path / "here" / "out.gguf"
        return ernie_gguf("convert", name, "--stream", "--outfile", out, "--outtype", outtype, *options)

    return call


def here(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "here").iterdir())


def held(tmp_path: Path) -> int:
    """Bytes of the source that lie in the folder of the run; 0 if a part is being dropped."""
    with contextlib.suppress(FileNotFoundError):
        windows = (tmp_path / "here" / "out.gguf.partial").glob("*.window/*")
        return sum(path.stat().st_blocks * 512 for path in windows)
    return 0


def test_the_bytes_of_the_folder(run: Run, hub: FakeHub, wanted: bytes, tmp_path: Path) -> None:
    most = 0

    def look(_: int) -> None:
        nonlocal most
        most = max(most, held(tmp_path))

    hub.on_bytes = look
    done = run()
    assert done.code == 0, done.err
    assert (tmp_path / "here" / "out.gguf").read_bytes() == wanted
    assert here(tmp_path) == ["out.gguf"]
    assert 0 < most <= 2 * 512 * KB + 64 * KB  # two batches, and what file systems round up
    assert "11.5 MB to download (1 s at 100 Mbit/s), nothing of it stays; the result has " in done.err
    assert hub.sent <= sum(p.stat().st_size for p in hub.folder.glob("*.safetensors")) + (3 << 20)  # each byte once


Maker = Callable[[Path], object]
SPEC = Spec(layers=3, experts=4, shards=3)
MAKERS: dict[str, Maker] = {
    "split": lambda folder: make(folder, SPEC),
    "fused": lambda folder: make(folder, Spec(layers=3, experts=4, shards=4, fused=True, mtp=True)),
    "one shard": lambda folder: make(folder, Spec(layers=2, experts=2, tied=False)),
    "paddle": lambda folder: make_plain(folder, SPEC),
    "two bits": lambda folder: make_trained(folder, TINY, "natural", int4_end=1),
    "two bits, shuffled": lambda folder: make_trained(folder, TINY, "shuffled", int4_end=1),
}


@pytest.mark.parametrize("outtype", ["auto", "f32", "ccq2"])
@pytest.mark.parametrize("form", MAKERS)
def test_every_form(serve: Serve, run: Run, tmp_path: Path, form: str, outtype: str) -> None:
    folder = tmp_path / "source" / "model"
    folder.parent.mkdir()
    MAKERS[form](folder)
    convert(folder, tmp_path / "wanted.gguf", outtype, k_order="auto")
    serve(folder, "baidu/model")
    done = run(name="baidu/model", outtype=outtype)
    assert done.code == 0, done.err
    assert (tmp_path / "here" / "out.gguf").read_bytes() == (tmp_path / "wanted.gguf").read_bytes()


def test_several_files_and_eyes(serve: Serve, run: Run, ernie_gguf: Command, tmp_path: Path) -> None:
    folder = make_vl(tmp_path / "source" / "model", Spec(layers=2, experts=3, shards=2))
    split = ("--split-max-size", "1M", "--mmproj")
    (tmp_path / "wanted").mkdir()
    there = tmp_path / "wanted" / "out.gguf"
    assert (
        ernie_gguf("convert", folder, "--outfile", there, "--outtype", "q8_0", *split, there.with_name("mm")).code == 0
    )
    serve(folder, "baidu/model")
    done = run(*split, tmp_path / "here" / "mm", name="baidu/model")
    assert done.code == 0, done.err
    assert here(tmp_path) == sorted(path.name for path in there.parent.iterdir())
    assert len(here(tmp_path)) > 3
    for path in there.parent.iterdir():
        assert (tmp_path / "here" / path.name).read_bytes() == path.read_bytes(), path.name


def test_batches_cover_every_piece_once(tmp_path: Path) -> None:
    make_two_bits(tmp_path / "model")
    plan = prepare(tmp_path / "model", Outtype.AUTO).plan
    found = batches([(plan, 64)], 512 * KB)
    assert len(found) > 3

    def key(piece: Piece) -> tuple[int, int, int]:
        return piece.offset, piece.row, piece.rows

    assert sorted(key(piece) for batch in found for _, piece in batch.pieces) == sorted(map(key, pieces(plan, 64)))
    for batch in found:
        for spans in batch.spans.values():
            assert all(a[1] < b[0] for a, b in pairwise(spans))  # joined
    read = sum(batch.nbytes for batch in found)
    used = {h for t in plan.tensors for p in t.parts for h in p.source.tensors.values()}
    assert read == sum(header.nbytes for header in used)  # no byte twice


FAULTS = ["truncate", "reset", "status 429 0", "status 429", "status 503", "status 500", "status 403", "status 408"]


@pytest.mark.parametrize("redirects", [True, False])
def test_breaks_on_the_way(run: Run, hub: FakeHub, wanted: bytes, tmp_path: Path, redirects: bool) -> None:
    hub.redirects = redirects
    rng = random.Random(1)
    hub.faults.extend(rng.choice([*FAULTS, *[""] * len(FAULTS)]) for _ in range(60))
    done = run()
    assert done.code == 0, done.err
    assert not hub.faults
    assert (tmp_path / "here" / "out.gguf").read_bytes() == wanted


@pytest.mark.parametrize("fault", ["shift range", "ignore range", "status 404", "status 416"])
def test_wrong_bytes_end_the_run(run: Run, hub: FakeHub, wanted: bytes, tmp_path: Path, fault: str) -> None:
    hub.faults.extend([*[""] * 23, fault])
    done = run()
    assert (done.code, len(done.err.splitlines())) == (1, 2), done.err
    assert "out.gguf" not in here(tmp_path)
    hub.faults.clear()
    assert run().code == 0
    assert (tmp_path / "here" / "out.gguf").read_bytes() == wanted


def test_a_lost_connection_goes_on_where_it_was(run: Run, hub: FakeHub, wanted: bytes, tmp_path: Path) -> None:
    hub.limit = 8_000_000
    broken = run()
    assert (broken.code, len(broken.err.splitlines())) == (1, 2), broken.err
    assert "times in a row; run the command again later" in broken.err
    assert here(tmp_path) == ["out.gguf.partial"]
    state = json.loads((tmp_path / "here" / "out.gguf.partial" / "state.json").read_text())
    assert state["batches"] > 3
    hub.limit, before = None, hub.sent
    done = run()
    assert done.code == 0, done.err
    assert f"; {state['batches']} of " in done.err
    left = (15 << 20) - state["batches"] * 500_000  # headers, and what is not written yet
    assert hub.sent - before < left
    assert (tmp_path / "here" / "out.gguf").read_bytes() == wanted
    assert here(tmp_path) == ["out.gguf"]


def test_nothing_is_left_of_a_run_that_wrote_nothing(run: Run, hub: FakeHub, tmp_path: Path) -> None:
    hub.limit = 1_000_000  # the headers, and no batch
    assert run().code == 1
    assert here(tmp_path) == []


def test_a_file_that_changes(run: Run, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same commit, other bytes: seen when the next link to them is asked for."""
    from ernie_gguf.hub import huggingface

    monkeypatch.setattr(huggingface, "LINK_SECONDS", 0)
    path = hub.folder / "model-00002-of-00003.safetensors"
    original = path.read_bytes()

    def change(sent: int) -> None:
        if sent > 6_000_000 and path.read_bytes() == original:
            other = path.with_name("other")
            other.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
            other.replace(path)

    hub.on_bytes = change
    done = run()
    assert done.code == 1
    assert "model-00002-of-00003.safetensors: another file than before (etag " in done.err
    assert "out.gguf" not in here(tmp_path)
    again = run()  # what the finished part was made of is gone for good
    assert again.code == 1
    assert "an interrupted run with another source; give --restart to start over" in again.err
    assert run("--restart").code == 0
    convert(hub.folder, tmp_path / "wanted.gguf", "q8_0")
    assert (tmp_path / "here" / "out.gguf").read_bytes() == (tmp_path / "wanted.gguf").read_bytes()


def test_a_file_that_grows(run: Run, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = hub.folder / "model-00003-of-00003.safetensors"
    original = path.read_bytes()
    etag = hub.etag
    # A mirror that tells nothing of the shards.
    monkeypatch.setattr(hub, "etag", lambda name: "0" * 64 if name.startswith("model-") else etag(name))

    def change(sent: int) -> None:
        if sent > 6_000_000 and path.stat().st_size == len(original):
            path.write_bytes(original + b"x")

    hub.on_bytes = change
    done = run()
    assert done.code == 1
    assert f": {len(original)} bytes before, now " in done.err
    assert "out.gguf" not in here(tmp_path)


def test_another_commit(run: Run, hub: FakeHub, wanted: bytes, tmp_path: Path) -> None:
    hub.limit = 8_000_000
    assert run().code == 1
    hub.limit, old, hub.commit = None, hub.commit, "f" * 40
    done = run()
    assert done.code == 1
    assert f"an interrupted run of commit {old}, and hf:{REPO} is at {'f' * 40} now" in done.err
    assert f"name it with @{old} to go on, or give --restart" in done.err
    hub.commit = old
    assert run(name=f"{REPO}@{old}").code == 0
    assert (tmp_path / "here" / "out.gguf").read_bytes() == wanted


@pytest.mark.parametrize(
    "change", [("--outtype", "bf16"), ("--token-embedding-type", "f16"), ("--vision-tokens", "marks")]
)
def test_other_options(run: Run, hub: FakeHub, tmp_path: Path, change: tuple[str, str]) -> None:
    hub.limit = 8_000_000
    assert run().code == 1
    hub.limit = None
    done = run(*change)
    if change[0] == "--vision-tokens":  # means nothing to a model without eyes
        assert done.code == 0
        return
    assert (done.code, "an interrupted run with another " in done.err, "--restart" in done.err) == (1, True, True)


def test_damage_between_runs(run: Run, hub: FakeHub, wanted: bytes, tmp_path: Path) -> None:
    partial = tmp_path / "here" / "out.gguf.partial"
    hub.limit = 8_000_000
    assert run().code == 1
    hub.limit = None
    for damage in ("{", "[]", "{}", '{"version": 9}', '{"version": 1, "fingerprint": 3, "batches": "x"}'):
        (partial / "state.json").write_text(damage)
        done = run()
        assert (done.code, "--restart" in done.err, "Traceback" in done.err) == (1, True, False), damage
        assert here(tmp_path) == ["out.gguf.partial"]
    (partial / "mine.txt").write_text("a user's")
    done = run("--restart")
    assert (done.code, "mine.txt: not of an interrupted run" in done.err) == (1, True)
    (partial / "mine.txt").unlink()
    assert run("--restart").code == 0
    assert (tmp_path / "here" / "out.gguf").read_bytes() == wanted


def test_two_runs_at_once(run: Run, hub: FakeHub, tmp_path: Path) -> None:
    partial = tmp_path / "here" / "out.gguf.partial"
    partial.mkdir()
    import fcntl

    lock = os.open(partial, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    done = run()
    os.close(lock)
    assert (done.code, "another run is using it" in done.err) == (1, True)


def test_bad_weights(serve: Serve, run: Run, tmp_path: Path) -> None:
    """A NaN would only come again: the folder goes."""
    from support.checkpoints import store, stored, weights, write_tensors

    folder = make(tmp_path / "source" / "model", SPEC)
    values = weights(SPEC)
    bad = "model.layers.2.mlp.experts.2.up_proj.weight"
    values[bad][100, 7] = float("nan")
    write_tensors(folder, stored(SPEC) | {bad: store(values[bad], "BF16")}, 3)
    serve(folder, "baidu/model")
    done = run(name="baidu/model")
    assert (done.code, f"tensor {bad}: row 100, column 7: nan" in done.err) == (1, True)
    assert here(tmp_path) == []


PROGRAM = """
import sys
from ernie_gguf.hub import batches, stream
batches.BATCH_BYTES, stream.REQUEST_BYTES = 512 << 10, 100_000
from ernie_gguf.cli import main
main()
"""


def start(hub: FakeHub, tmp_path: Path, *options: str) -> "subprocess.Popen[str]":
    environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}
    out = tmp_path / "here" / "out.gguf"
    command = ["convert", REPO, "--stream", "--outfile", str(out), "--outtype", "q8_0", *options]
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *command],
        env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def signal_at(hub: FakeHub, process: "subprocess.Popen[str]", limit: int, number: signal.Signals) -> None:
    """Let the server send the signal once, as soon as it has sent so many bytes."""
    once = threading.Lock()

    def on_bytes(sent: int) -> None:
        if sent >= limit and once.acquire(blocking=False):
            process.send_signal(number)

    hub.on_bytes = on_bytes


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_stopped_anywhere(hub: FakeHub, wanted: bytes, tmp_path: Path, number: signal.Signals) -> None:
    """Stopped three times, each time at other bytes, it ends with the right ones."""
    (tmp_path / "here").mkdir()
    rng = random.Random(int(number))
    for _ in range(3):
        process = start(hub, tmp_path)
        signal_at(hub, process, hub.sent + rng.randrange(1_500_000, 3_500_000), number)  # of 11.6 million
        _, err = process.communicate(timeout=60)
        assert process.returncode in (-number, 128 + number), err
        assert "Traceback" not in err
        assert "out.gguf" not in here(tmp_path)
    hub.on_bytes = lambda _: None
    process = start(hub, tmp_path)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert here(tmp_path) == ["out.gguf"]
    assert (tmp_path / "here" / "out.gguf").read_bytes() == wanted


class Stop(BaseException):
    """The machine stops."""


def test_stopped_between_the_last_names(
    run: Run, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several files: a stop between two renames leaves whole files, and the next run names the others."""
    from ernie_gguf.hub.huggingface import HuggingFace
    from ernie_gguf.hub.names import HubName

    replace, left = Path.replace, [0]

    def fails(self: Path, target: Path) -> Path:
        if target.suffix == ".gguf":
            left[0] += 1
            if left[0] == 2:
                raise Stop
        return replace(self, target)

    job = prepare(hub.folder, Outtype.Q8_0)
    repository = HuggingFace(HubName("hf", REPO))
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Path, "replace", fails)
        stream = streaming.plan_stream(job, repository, tmp_path / "here" / "out.gguf", 1_000_000, None)
        streaming.convert_stream(stream, 2, False, False, lambda _: nullcontext(lambda _: None))
    names = [name for name in here(tmp_path) if name != "out.gguf.partial"]
    assert len(names) == 1
    assert not names[0].startswith("out-00001-")  # the one that users load comes last
    done = run("--split-max-size", "1M")
    assert done.code == 0, done.err
    assert "out.gguf.partial" not in here(tmp_path)
    read_gguf(next(tmp_path.glob("here/out-00001-of-*.gguf")))


def test_the_disk_fills_up(
    run: Run, hub: FakeHub, wanted: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = [0]

    def full(fd: int, data: memoryview, offset: int) -> None:
        written[0] += len(data)
        if written[0] > 5_000_000:
            raise OSError(28, "No space left on device")
        pwrite(fd, data, offset)

    monkeypatch.setattr(streaming, "pwrite", full)
    done = run()
    assert (done.code, "No space left on device" in done.err) == (1, True)
    assert here(tmp_path) == ["out.gguf.partial"]
    monkeypatch.setattr(streaming, "pwrite", pwrite)
    assert run().code == 0
    assert (tmp_path / "here" / "out.gguf").read_bytes() == wanted


def test_an_existing_file(run: Run, hub: FakeHub, wanted: bytes, tmp_path: Path) -> None:
    (tmp_path / "here" / "out.gguf").write_text("mine")
    done = run()
    assert (done.code, "give --overwrite to replace it" in done.err) == (1, True)
    assert (tmp_path / "here" / "out.gguf").read_text() == "mine"
    assert run("--overwrite").code == 0
    assert (tmp_path / "here" / "out.gguf").read_bytes() == wanted


def test_downloads_overlap_conversion(run: Run, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    fetching, overlaps = threading.Event(), []
    real_fetch, real_write = streaming._fetch, write_pieces

    def fetch(*args: object) -> None:
        fetching.set()
        real_fetch(*args)  # type: ignore[arg-type]

    def write(*args: object) -> object:
        fetching.clear()
        overlaps.append(fetching.wait(0.2))
        return real_write(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(streaming, "_fetch", fetch)
    monkeypatch.setattr(streaming, "write_pieces", write)
    assert run().code == 0
    assert any(overlaps)
