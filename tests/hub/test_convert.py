"""Names where folders are expected: the same plans, the same bytes, and no more of the source than is needed."""

import json
import shutil
from pathlib import Path

import pytest
from ernie_gguf.hub import source
from reference.specimens import TINY
from support.checkpoints import Spec
from support.command_line import Command, snapshot
from support.hub_server import FakeHub
from support.vl import make_vl

from hub.conftest import REPO, Serve


def test_a_dry_run_reads_headers_only(ernie_gguf: Command, hub: FakeHub, checkpoint: Path, tmp_path: Path) -> None:
    options = ("--outtype", "q8_0", "--outfile", tmp_path / "out.gguf", "--dry-run", "--json")
    named = ernie_gguf("convert", REPO, *options)
    assert named.code == 0
    assert json.loads(named.out) == json.loads(ernie_gguf("convert", checkpoint, *options).out)
    shards = sorted(checkpoint.glob("*.safetensors"))
    assert hub.sent <= len(shards) << 18
    ranges = {path: asked for _, path, asked, _ in hub.log if path.startswith("/storage/")}
    assert set(ranges.values()) == {"bytes=0-262143"}
    assert "11.6 MB to download (1 s at 100 Mbit/s)" in named.err
    assert "With --stream nothing is kept: " in named.err
    assert not list(tmp_path.glob("*.gguf*"))


def test_a_long_header_is_read_whole(
    serve: Serve, checkpoint: Path, ernie_gguf: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ernie_gguf.hub import skeleton

    monkeypatch.setattr(skeleton, "FIRST", 100)
    hub = serve(checkpoint)
    assert ernie_gguf("convert", REPO, "--dry-run").code == 0
    assert hub.sent < 30_000


def test_the_file_is_that_of_the_folder(ernie_gguf: Command, hub: FakeHub, checkpoint: Path, tmp_path: Path) -> None:
    for origin, name in ((checkpoint, "folder.gguf"), (REPO, "name.gguf"), (f"hf:{REPO}@v1", "tag.gguf")):
        done = ernie_gguf("convert", origin, "--outtype", "q8_0", "--outfile", tmp_path / name)
        assert done.code == 0, done.err
    assert (tmp_path / "name.gguf").read_bytes() == (tmp_path / "folder.gguf").read_bytes()
    assert (tmp_path / "tag.gguf").read_bytes() == (tmp_path / "folder.gguf").read_bytes()
    total = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    assert hub.sent <= total + 2 * (3 << 20)  # downloaded once; the headers twice


def test_the_result_goes_to_this_folder(
    ernie_gguf: Command, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert ernie_gguf("convert", REPO, "--outtype", "q8_0").code == 0
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["ERNIE-4.5-21B-A3B-PT-Q8_0.gguf"]


def test_the_token_goes_to_the_hub_alone(
    ernie_gguf: Command, hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.token = "secret"
    monkeypatch.setenv("HF_TOKEN", "secret")
    for more in ((), ("--stream",)):
        done = ernie_gguf("convert", REPO, "--outfile", tmp_path / f"{len(more)}.gguf", *more)
        assert done.code == 0, done.err
    assert {token for _, path, _, token in hub.log if path.startswith("/storage/")} == {False}
    assert {token for _, path, _, token in hub.log if not path.startswith("/storage/")} == {True}


def test_offline_takes_the_cache(
    ernie_gguf: Command, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    assert ernie_gguf("convert", REPO, "--outfile", tmp_path / "a.gguf").code == 0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = len(hub.log)
    done = ernie_gguf("convert", REPO, "--outfile", tmp_path / "b.gguf")
    assert (done.code, len(hub.log)) == (0, before)
    assert "the copy in " in done.err
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert ernie_gguf("convert", REPO, "--dry-run").code == 0


def test_verify_and_quantize_take_names(ernie_gguf: Command, hub: FakeHub, tmp_path: Path) -> None:
    out, text = tmp_path / "out.gguf", tmp_path / "text.txt"
    text.write_text("def main():\n    return 0\n" * 4000)
    planned = ernie_gguf("quantize", REPO, "--calibration", text, "--outfile", tmp_path / "q.gguf", "--dry-run")
    assert planned.code == 0, planned.err
    assert hub.sent <= 3 << 20
    assert ernie_gguf("convert", REPO, "--outfile", out, "--outtype", "q8_0").code == 0
    verified = ernie_gguf("verify", REPO, out)
    assert verified.code == 0, verified.err
    assert verified.out.splitlines()[-2].endswith("0 wrong") or "0 wrong" in verified.out


def test_inspect_shows_a_checkpoint(ernie_gguf: Command, hub: FakeHub, checkpoint: Path) -> None:
    named, folder = ernie_gguf("inspect", REPO), ernie_gguf("inspect", checkpoint)
    assert (named.code, folder.code) == (0, 0)
    assert hub.sent <= 3 << 20
    assert "model.layers.1.mlp.gate.weight 8 x 256 BF16 4.1 kB" in named.rows
    assert named.out.replace(REPO, str(checkpoint)) == folder.out
    summary = json.loads(ernie_gguf("inspect", REPO, "--json").out)
    assert summary["config"]["architecture"] == "ernie4_5-moe"
    assert {tensor["dtype"] for tensor in summary["tensors"]} == {"BF16"}


def test_a_vision_language_repository(serve: Serve, ernie_gguf: Command, tmp_path: Path) -> None:
    folder = make_vl(tmp_path / "source" / "vl", Spec(layers=2, experts=3, shards=2))
    serve(folder, "baidu/vl")
    for origin, name in ((folder, "folder"), ("baidu/vl", "name")):
        done = ernie_gguf(
            "convert", origin, "--outfile", tmp_path / f"{name}.gguf", "--mmproj", tmp_path / f"{name}.mm"
        )
        assert done.code == 0, done.err
    assert (tmp_path / "name.gguf").read_bytes() == (tmp_path / "folder.gguf").read_bytes()
    assert (tmp_path / "name.mm").read_bytes() == (tmp_path / "folder.mm").read_bytes()


def test_no_disk_for_the_download(
    ernie_gguf: Command, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "free_bytes", lambda _: 20_000_000)
    done = ernie_gguf("convert", REPO, "--outfile", tmp_path / "out.gguf")
    assert done.code == 1
    assert "needs 11.6 MB for the download and 11.6 MB for the result, the disk has 20.0 MB free" in done.err
    assert "; with --stream it needs " in done.err
    assert not (tmp_path / "cache" / "models--baidu--ERNIE-4.5-21B-A3B-PT" / "blobs" / "x").exists()
    assert hub.sent <= 3 << 20
    monkeypatch.setattr(source, "free_bytes", lambda _: 15_000_000)
    streamed = ernie_gguf("convert", REPO, "--outfile", tmp_path / "out.gguf", "--stream")
    assert (streamed.code, not (tmp_path / "out.gguf").exists()) == (1, True)
    assert "for the result and the part of the source in work, the disk has 15.0 MB free" in streamed.err


def test_an_existing_file_is_refused_before_the_download(ernie_gguf: Command, hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "out.gguf").write_text("mine")
    done = ernie_gguf("convert", REPO, "--outfile", tmp_path / "out.gguf")
    assert (done.code, "exists already; give --overwrite" in done.err) == (1, True)
    assert hub.sent <= 3 << 20
    assert (tmp_path / "out.gguf").read_text() == "mine"


def test_folders_need_no_client(ernie_gguf: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversion of a folder neither imports the Hub's client nor says a word of it."""
    copied = shutil.copytree(TINY, tmp_path / "a" / "b")
    monkeypatch.chdir(tmp_path)
    before = snapshot(copied)
    done = ernie_gguf("convert", "a/b", "--outfile", "out.gguf", "--outtype", "q8_0")
    assert (done.code, done.err) == (0, "")
    assert snapshot(copied) == before
    refused = ernie_gguf("convert", "a/b", "--stream")
    assert (refused.code, "is here already" in refused.err) == (2, True)
