"""Whatever is wrong with a name or a repository ends in one line, exit code 1, and no file."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from ernie_gguf.hub import huggingface
from support.command_line import Command, Done
from support.hub_server import FakeHub

from hub.conftest import REPO, Serve

NAME = "baidu/ERNIE-4.5-21B-A3B-PT"
Fails = Callable[..., Done]


@pytest.fixture
def fails(ernie_gguf: Command, tmp_path: Path) -> Fails:
    """Convert, with and without --stream and as a dry run: each fails with the same one line and leaves nothing."""

    def call(name: str = REPO, *parts: str) -> Done:
        out = tmp_path / "here"
        out.mkdir(exist_ok=True)
        for options in (("--dry-run",), (), ("--stream",)):
            done = ernie_gguf("convert", name, "--outfile", out / "out.gguf", *options)
            assert done.code == 1, (options, done)
            lines = done.err.splitlines()
            assert len(lines) == 1, done.err
            assert lines[0].startswith("error: "), done.err
            assert "Traceback" not in done.err
            for part in parts:
                assert part in lines[0], (options, done.err)
            assert list(out.iterdir()) == []
        return done

    return call


def test_a_typing_error(fails: Fails, hub: FakeHub) -> None:
    fails("baidu/ERNIE-4.5-21B-A3B", "no repository of that name on the Hugging Face Hub", f"did you mean {NAME} or ")
    fails("ERNIE-4.5-21B-A3B-PT", "ERNIE-4.5-21B-A3B-PT: no such folder", f"did you mean {NAME}?")
    done = fails("some/thing-else", "no repository of that name")
    assert "did you mean" not in done.err


def test_no_such_revision(fails: Fails, hub: FakeHub) -> None:
    fails(f"{REPO}@nowhere", "has no branch, tag or commit 'nowhere'")


def test_a_private_repository(fails: Fails, hub: FakeHub) -> None:
    hub.token = "good"
    fails(REPO, "or private: then log in with `hf auth login`, or set HF_TOKEN")


def test_a_wrong_token(fails: Fails, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "wrong")
    fails(REPO, "does not know the token", "HF_TOKEN")


def test_a_gated_repository(fails: Fails, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files_error = (401, "GatedRepo")
    fails(REPO, "a gated repository: its terms are accepted at", f"/{REPO}", "then log in with `hf auth login`")
    hub.files_error = (403, "GatedRepo")
    monkeypatch.setenv("HF_TOKEN", "good")
    fails(REPO, "a gated repository", "this token's account has not")


def test_no_ernie(fails: Fails, hub: FakeHub) -> None:
    config = json.loads((hub.folder / "config.json").read_text())
    (hub.folder / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    fails(REPO, f"{REPO}: config.json: unknown architecture 'LlamaForCausalLM'")
    assert hub.sent == 0  # no shard was looked at


def test_no_config(fails: Fails, hub: FakeHub) -> None:
    (hub.folder / "config.json").unlink()
    fails(REPO, "config.json is missing: not a checkpoint in the form of transformers")


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("pytorch_model.bin", "no safetensors file; it holds PyTorch's files"),
        ("model_state.pdparams", "no safetensors file; it holds Paddle's own (.pdparams) files"),
        ("ernie-q4_0.gguf", "it holds GGUF files, which need no conversion"),
        ("rank0/model.safetensors", "split into folders per GPU (rank0, …)"),
        ("part/model.safetensors", "only in folders (part/model.safetensors): a split for several GPUs?"),
    ],
)
def test_no_safetensors(fails: Fails, hub: FakeHub, file: str, says: str) -> None:
    for path in hub.folder.glob("*.safetensors"):
        path.unlink()
    (hub.folder / file).parent.mkdir(exist_ok=True)
    (hub.folder / file).write_bytes(b"weights")
    fails(REPO, says)


def test_a_split_for_several_gpus(serve: Serve, checkpoint: Path, fails: Fails) -> None:
    name = "baidu/ERNIE-4.5-300B-A47B-2Bits-TP2-Paddle"
    hub = serve(checkpoint, name)
    fails(name, f"{name}: split for 2 GPUs", "use ERNIE-4.5-300B-A47B-2Bits-Paddle")
    assert hub.sent == 0


def test_a_missing_shard(fails: Fails, hub: FakeHub) -> None:
    (hub.folder / "model-00002-of-00003.safetensors").unlink()
    fails(REPO, f"{REPO}", "model.safetensors.index.json names 3 shards, 1 of them missing")


def test_a_shard_that_is_none(fails: Fails, hub: FakeHub) -> None:
    path = hub.folder / "model-00002-of-00003.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    fails(REPO, f"{REPO}: model-00002-of-00003.safetensors: header of", "truncated, or no safetensors file")


def test_an_empty_shard(fails: Fails, hub: FakeHub) -> None:
    (hub.folder / "model-00002-of-00003.safetensors").write_bytes(b"")
    fails(REPO, f"{REPO}: model-00002-of-00003.safetensors: truncated: 0 bytes")


def test_offline(fails: Fails, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    fails(REPO, "HF_HUB_OFFLINE is set, and the cache (", "does not hold the whole repository")
    assert hub.log == []


def test_no_network(fails: Fails, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    fails(REPO, "cannot reach http://127.0.0.1:1: ", "with HF_HUB_OFFLINE=1 only the cache is used")


def test_a_server_in_trouble(fails: Fails, hub: FakeHub) -> None:
    hub.error = (503, "")
    fails(REPO, f"{hub.endpoint} answered 503; run the command again later")


def test_no_hub_at_all(fails: Fails, hub: FakeHub) -> None:
    hub.commit = ""  # some other web server
    fails(REPO, "does not say which commit it has")


def test_no_client(fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "huggingface_hub" else real(name))
    fails(NAME, "no such folder here", "pip install 'ernie-gguf[hub]'")


def test_modelscope(fails: Fails) -> None:
    fails(f"ms:{NAME}", f"fetch it with `modelscope download --model {NAME} --local_dir FOLDER`, and give FOLDER")


def test_a_file_that_goes_away(fails: Fails, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Listed, but 404 when it is asked for."""
    listed = hub.names()
    monkeypatch.setattr(hub, "names", lambda: listed)
    monkeypatch.setattr(hub, "etag", lambda name: "0" * 40)
    data = {name: hub.data(name) for name in listed}
    monkeypatch.setattr(hub, "data", data.__getitem__)
    (hub.folder / "model-00003-of-00003.safetensors").unlink()
    fails(REPO, "model-00003-of-00003.safetensors")


def test_quiet_about_retries(ernie_gguf: Command, hub: FakeHub) -> None:
    hub.faults.extend(["status 503", "truncate", "reset"])
    done = ernie_gguf("convert", REPO, "--dry-run", "--json")
    assert (done.code, len(done.err.splitlines())) == (0, 1)


def test_other_errors_keep_their_words() -> None:
    from ernie_gguf.hub.names import HubName

    assert "no route" in str(huggingface.explained(HubName("hf", "a/b"), OSError("no route\nsecond line")))
