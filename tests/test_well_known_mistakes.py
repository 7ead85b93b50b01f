"""What people give that is no checkpoint: each in one line that says what it is and what to do; nothing is written."""

from __future__ import annotations

import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ernie_gguf.convert import prepare
from ernie_gguf.errors import CheckpointError
from ernie_gguf.gguf_file.outtype import Outtype
from ernie_gguf.gguf_file.reader import read_gguf
from support.checkpoints import (
    EXAMPLE,
    Spec,
    Stored,
    config,
    make,
    stored,
    write_checkpoint,
    write_safetensors,
    write_tensors,
)
from support.command_line import Command, snapshot
from support.models import convert, data

SPEC = Spec(layers=2, experts=2, shards=2)
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + 32 * b"4d" + b"\nsize 12345\n"
PAGE = b"<!DOCTYPE html>\n<html><head><title>Hugging Face</title></head></html>\n"
FILES = {
    "model-00001-of-00002.safetensors": "a safetensors file",
    "model.safetensors.index.json": "JSON",
    "config.json": "JSON",
    "tokenizer_config.json": "JSON",
    "generation_config.json": "JSON",
    "tokenizer.model": "a SentencePiece model",
}
CONTENTS = {
    "lfs": (LFS, "a Git LFS pointer, not the file itself: run `git lfs install && git lfs pull`"),
    "page": (PAGE, "a web page, not the file itself: download it again; a link to a file on the Hub has /resolve/"),
    "error": (
        b'{"error":"Repository is gated"} ' + bytes(600),
        "a server's error, not the file itself: download it again",
    ),
    "gguf": (b"GGUF\x03\x00\x00\x00" + bytes(600), "a GGUF file, which is converted already"),
    "zip": (b"PK\x03\x04" + bytes(600), "a zip archive or a PyTorch file: unpack the one"),
    "gzip": (b"\x1f\x8b\x08" + bytes(600), "a gzip archive: unpack it"),
    "pickle": (b"\x80\x04\x95" + bytes(600), "a pickle of PyTorch or Paddle, which can run code and is not read"),
    "zeros": (bytes(600), "all zeros at its beginning, an unfinished download: download it again"),
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make(tmp_path / "source", SPEC)


def refusal(ernie_gguf: Command, *args: str | Path) -> str:
    """The one line of a command that refuses."""
    done = ernie_gguf(*args)
    assert (done.code, done.out) == (1, ""), done
    assert done.err.startswith("error: "), done.err
    assert done.err.count("\n") == 1, done.err
    return done.err.removeprefix("error: ").strip()


@pytest.mark.parametrize("kind", CONTENTS)
@pytest.mark.parametrize("name", FILES)
def test_another_file_under_the_name(ernie_gguf: Command, source: Path, tmp_path: Path, name: str, kind: str) -> None:
    content, what = CONTENTS[kind]
    (source / name).write_bytes(content)
    if name.endswith(".json") and kind == "error":
        (source / name).write_bytes(content.replace(b"} ", b""))  # cut short: else it is JSON
    before = snapshot(tmp_path)
    said = refusal(ernie_gguf, "convert", source, "--outfile", tmp_path / "out.gguf")
    assert said.startswith(f"{name}: this is {what}"), said
    assert said.endswith(f"(expected {FILES[name]})"), said
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("kind", [kind for kind in CONTENTS if kind != "gguf"])
def test_another_file_for_a_gguf(ernie_gguf: Command, tmp_path: Path, kind: str) -> None:
    (tmp_path / "x.gguf").write_bytes(CONTENTS[kind][0])
    said = refusal(ernie_gguf, "inspect", tmp_path / "x.gguf")
    assert said.startswith(f"x.gguf: this is {CONTENTS[kind][1]}"), said


ADDRESSES = [
    "https://huggingface.co/baidu/ERNIE-4.5-21B-A3B-PT",
    "http://localhost/x",
]


@pytest.mark.parametrize("command", [("convert",), ("verify",), ("quantize",)])
@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address(ernie_gguf: Command, tmp_path: Path, address: str, command: tuple[str, ...]) -> None:
    convert(make(tmp_path / "source", SPEC), tmp_path / "x.gguf")
    more: dict[str, list[str | Path]] = {
        "verify": [tmp_path / "x.gguf"],
        "quantize": ["--calibration", tmp_path / "x.gguf"],
        "convert": [],
    }
    said = refusal(ernie_gguf, *command, address, *more[command[0]])
    assert said.endswith(": this is an address: download the repository and give its folder"), said


def test_a_name_on_the_hub_where_only_a_folder_will_do() -> None:
    """The commands take names (tests/hub); who calls `prepare` gives a folder."""
    with pytest.raises(CheckpointError) as refused:
        prepare(Path("baidu/ERNIE-4.5-21B-A3B-PT@main"), Outtype.AUTO)
    assert str(refused.value) == (
        "baidu/ERNIE-4.5-21B-A3B-PT@main: no such folder; if it is a name on the Hugging Face Hub, download it first, "
        "`hf download baidu/ERNIE-4.5-21B-A3B-PT --local-dir ERNIE-4.5-21B-A3B-PT`, and give that folder"
    )


def pack_zip(folder: Path) -> None:
    with zipfile.ZipFile(folder / "model.zip", "w") as archive:
        archive.writestr("config.json", "{}")


def pack_tar(folder: Path) -> None:
    with tarfile.open(folder / "model.tar", "w") as archive:
        archive.add(folder / "config.json", "config.json")


@pytest.mark.parametrize(
    ("prepare", "name", "message"),
    [
        (
            lambda folder: None,
            "model-00001-of-00002.safetensors",
            "this is one file of a checkpoint; give its folder, ",
        ),
        (lambda folder: None, "config.json", "this is one file of a checkpoint; give its folder, "),
        (
            lambda folder: convert(folder, folder / "x.gguf"),
            "x.gguf",
            "this is a GGUF file, which is converted already",
        ),
        (pack_zip, "model.zip", "this is a zip archive or a PyTorch file: unpack the one"),
        (pack_tar, "model.tar", "this is a tar archive: unpack it; SRC is the folder of a checkpoint"),
        (lambda folder: (folder / "notes.txt").write_text("x"), "notes.txt", "this is a file; SRC is the folder of"),
    ],
)
def test_a_file(ernie_gguf: Command, source: Path, prepare: Callable[[Path], object], name: str, message: str) -> None:
    prepare(source)
    said = refusal(ernie_gguf, "convert", source / name)
    assert said.startswith(f"{source / name}: {message}"), said


HOLDS: dict[str, tuple[dict[str, bytes], str]] = {
    "nothing": ({}, "config.json is missing; the folder is empty"),
    "an adapter": (
        {"adapter_config.json": b'{"base_model_name_or_path": "baidu/X"}', "adapter_model.safetensors": b""},
        "config.json is missing; this is a LoRA adapter of baidu/X, not a model: merge it into its base",
    ),
    "pickles of PyTorch": (
        {"config.json": b"", "pytorch_model-00001-of-00002.bin": b"", "pytorch_model.bin.index.json": b"{}"},
        "there are no safetensors, only pytorch_model-00001-of-00002.bin: pickles of PyTorch, which can run code",
    ),
    "pickles of Paddle": (
        {"config.json": b"", "model_state.pdparams": b""},
        "there are no safetensors, only model_state.pdparams: Paddle's pickles; the -PT and the -Paddle",
    ),
    "other formats": ({"config.json": b"", "model.onnx": b""}, "there are no safetensors, only model.onnx: weights in"),
    "an archive": (
        {"ernie.tar.gz": b""},
        "config.json is missing; there are no safetensors, only ernie.tar.gz: an archive",
    ),
    "a GGUF": (
        {"x.gguf": b""},
        "config.json is missing; there is a GGUF file instead, x.gguf, which is converted already",
    ),
    "a folder deeper": ({"inner/config.json": b"{}"}, "config.json is missing; config.json is in {folder}/inner; give"),
    "the Hub's cache": (
        {"models--baidu--X/refs/main": b"a", "version.txt": b"1"},
        "config.json is missing; this is a cache of the Hub; give one of its folders, such as models--baidu--X",
    ),
    "half a download": (
        {"config.json": b"", ".cache/huggingface/download/a.incomplete": b"", "README.md": b""},
        "neither model.safetensors nor model.safetensors.index.json is there; a download is not finished (a.incompl",
    ),
    "something else": ({"model.safetensors": b""}, "config.json is missing; expected a Hugging Face checkpoint folder"),
}


@pytest.mark.parametrize("kind", HOLDS)
def test_a_folder_that_holds_something_else(ernie_gguf: Command, tmp_path: Path, kind: str) -> None:
    files, message = HOLDS[kind]
    (folder := tmp_path / "folder").mkdir()
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(json.dumps(config(SPEC)).encode() if name == "config.json" else content)
    said = refusal(ernie_gguf, "convert", folder)
    assert said.startswith(f"{folder}: "), said
    assert message.format(folder=folder) in said, said


QUANTIZED: dict[str, dict[str, Any]] = {
    "GPTQ": {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}},
    "AWQ": {"quantization_config": {"quant_method": "awq", "bits": 4}},
    "bitsandbytes": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    "compressed-tensors": {"quantization_config": {"quant_method": "compressed-tensors"}},
    "FP8 of transformers": {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
    "MLX": {"quantization": {"group_size": 64, "bits": 4}, "quantization_config": {"group_size": 64, "bits": 4}},
}


@pytest.mark.parametrize("method", [*QUANTIZED, "MLX, of older versions"])
def test_quantized_by_others(ernie_gguf: Command, source: Path, method: str) -> None:
    changes = QUANTIZED.get(method) or {"quantization": {"group_size": 64, "bits": 4}}
    (source / "config.json").write_text(json.dumps(config(SPEC) | changes))
    said = refusal(ernie_gguf, "convert", source)
    name = method.partition(",")[0]
    assert said.startswith(f"config.json: quantization_config: quantized with {name}, which is not read"), said
    assert said.endswith("convert the BF16 repository that it was made of (-PT or -Paddle)"), said


def test_another_architecture(ernie_gguf: Command, source: Path) -> None:
    (source / "config.json").write_text('{"architectures": ["Qwen3MoeForCausalLM"]}')
    said = refusal(ernie_gguf, "convert", source)
    assert said.startswith("config.json: unknown architecture 'Qwen3MoeForCausalLM', expected one of Ernie4_5_Moe"), (
        said
    )
    assert said.endswith("llama.cpp's own convert_hf_to_gguf.py converts other models"), said


def test_tokenizer_json_alone(ernie_gguf: Command, source: Path) -> None:
    (source / "tokenizer.model").unlink()
    (source / "tokenizer.json").write_text("{}")
    assert refusal(ernie_gguf, "convert", source).endswith("copy it here; tokenizer.json alone does not do")


def cache(folder: Path, *snapshots: str, main: str | None = None) -> Path:
    """A repository in the Hub's cache: files are links to blobs."""
    repository = folder / "hub" / "models--baidu--ERNIE-4.5-tiny"
    for name in snapshots:
        made = make(folder / name, SPEC)
        (blobs := repository / "blobs").mkdir(parents=True, exist_ok=True)
        (repository / "snapshots" / name).mkdir(parents=True)
        for file in made.iterdir():
            shutil.move(file, blobs / f"{name}-{file.name}")
            (repository / "snapshots" / name / file.name).symlink_to(f"../../blobs/{name}-{file.name}")
        made.rmdir()
    if main:
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(main)
    return repository


@pytest.mark.parametrize("given", ["", "snapshots", "snapshots/b"])
def test_a_repository_in_the_hubs_cache(ernie_gguf: Command, tmp_path: Path, given: str) -> None:
    repository = cache(tmp_path, "a", "b", main="b")
    before = snapshot(repository)
    done = ernie_gguf("convert", repository / given, "--outfile", tmp_path)
    assert (done.code, done.err) == (0, "")
    made = read_gguf(tmp_path / "ERNIE-4.5-tiny-BF16.gguf")
    assert made.metadata["general.name"] == "ERNIE-4.5-tiny"
    assert snapshot(repository) == before
    assert ernie_gguf("verify", repository / given, made.path).code == 0


def test_a_cache_that_does_not_say_which(ernie_gguf: Command, tmp_path: Path) -> None:
    repository = cache(tmp_path, "a", "b")
    said = refusal(ernie_gguf, "convert", repository)
    assert said.startswith(f"{repository}: a folder of the Hub's cache with 2 snapshots; give one: {repository}/snapsh")
    shutil.rmtree(repository / "snapshots")
    assert "without a snapshot" in refusal(ernie_gguf, "convert", repository)


@pytest.mark.parametrize("index", [True, False])
def test_a_stale_single_file_beside_shards(ernie_gguf: Command, source: Path, tmp_path: Path, index: bool) -> None:
    """transformers reads model.safetensors; nobody learns that from it."""
    if not index:
        (source / "model.safetensors.index.json").unlink()
    other = stored(replace(SPEC, seed=1))
    write_safetensors(source / "model.safetensors", other)
    done = ernie_gguf("convert", source, "--outfile", tmp_path / "out.gguf")
    assert done.code == 0
    note = (
        "note: model.safetensors was read, as by transformers, and 2 shards beside it were not; remove what is stale\n"
    )
    assert note in done.out
    norm = next(tensor for tensor in read_gguf(tmp_path / "out.gguf").tensors if tensor.name == "output_norm.weight")
    bits = np.frombuffer(other["model.norm.weight"].data, np.uint16).astype(np.uint32) << 16
    assert read_gguf(tmp_path / "out.gguf").rows(norm).tobytes() == bits.tobytes()
    write_safetensors(source / "model.safetensors", {"model.norm.weight": other["model.norm.weight"]})
    said = refusal(ernie_gguf, "convert", source)
    assert said.startswith(f"{source}: two sets of weights: model.safetensors (1 tensors) and 2 shards ("), said


def fused(tensors: dict[str, Stored], how: str) -> dict[str, Stored]:
    """The experts of each layer in one tensor, in one of the ways that occur."""
    out = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in range(1, SPEC.layers):
        prefix = f"model.layers.{layer}.mlp.experts"

        def stack(name: str, *parts: str, prefix: str = prefix) -> None:
            pieces = [tensors[f"{prefix}.{e}.{part}.weight"] for e in range(SPEC.experts) for part in parts]
            shape = (SPEC.experts, len(parts) * pieces[0].shape[0], pieces[0].shape[1])
            out[f"{prefix}.{name}"] = Stored("BF16", shape, b"".join(piece.data for piece in pieces))

        if how == "apart":
            stack("gate_proj.weight", "gate_proj")
            stack("up_proj.weight", "up_proj")
        else:
            stack(how, "gate_proj", "up_proj")
        stack("down_proj" if how == "gate_up_proj" else "down_proj.weight", "down_proj")
        if how == "gate_up_proj":  # where transformers' modules have it
            bias = out.pop(f"model.layers.{layer}.mlp.moe_statics.e_score_correction_bias")
            out[f"model.layers.{layer}.mlp.gate.moe_statics.e_score_correction_bias"] = bias
    return out


@pytest.mark.parametrize("how", ["gate_up_proj", "up_gate_proj.weight", "apart"])
@pytest.mark.parametrize("outtype", ["auto", "ccq2"])
def test_fused_experts_are_converted(ernie_gguf: Command, source: Path, tmp_path: Path, how: str, outtype: str) -> None:
    wanted = data(convert(source, tmp_path / "a.gguf", outtype))
    other = write_checkpoint(tmp_path / "fused", config(SPEC), fused(stored(SPEC), how), shards=2)
    assert data(convert(other, tmp_path / "b.gguf", outtype)) == wanted
    assert ernie_gguf("verify", other, tmp_path / "b.gguf").code == 0
    assert ernie_gguf("verify", other, tmp_path / "a.gguf").code == 0


def test_the_state_that_transformers_holds(tmp_path: Path) -> None:
    """Saved without save_pretrained, which would give the tensors their published names."""
    transformers = pytest.importorskip("transformers", reason="extra `reference`")
    torch_files = pytest.importorskip("safetensors.torch", reason="extra `reference`")
    source = shutil.copytree(EXAMPLE, tmp_path / "source")
    wanted = data(convert(source, tmp_path / "a.gguf", "bf16"))
    state = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto").state_dict()
    assert "model.layers.1.mlp.experts.gate_up_proj" in state
    for path in source.glob("model*"):
        path.unlink()
    del state["lm_head.weight"]  # the embedding again
    torch_files.save_file(state, source / "model.safetensors")
    assert data(convert(source, tmp_path / "b.gguf", "bf16")) == wanted


def test_fused_experts_in_another_layout_are_refused(ernie_gguf: Command, tmp_path: Path) -> None:
    tensors = fused(stored(SPEC), "gate_up_proj")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    e, n, k = tensors[name].shape
    other = write_checkpoint(tmp_path / "a", config(SPEC), tensors | {name: replace(tensors[name], shape=(e, k, n))})
    said = refusal(ernie_gguf, "convert", other)
    assert said.startswith(f"tensor {name}[0]: expected shape [{n}, {k}] from config.json, found [{k}, {n}]"), said
    write_tensors(other, tensors | {name: replace(tensors[name], shape=(e * n, k))})
    assert refusal(ernie_gguf, "convert", other) == (
        f"tensor {name}: shape [{e * n}, {k}], expected [experts, rows, columns]"
    )
    write_tensors(other, tensors | {f"{name[:-12]}0.up_gate_proj.weight": Stored("BF16", (n, k), bytes(2 * n * k))})
    assert f"tensor {name}: holds expert 0, which " in refusal(ernie_gguf, "convert", other)


def test_names_of_transformers_own_modules(ernie_gguf: Command, source: Path) -> None:
    write_tensors(
        source, {"model.language_model.layers.1.mlp.text_moe.experts.down_proj": Stored("BF16", (1, 1), bytes(2))}
    )
    for shard in source.glob("model-*"):
        shard.unlink()
    assert refusal(ernie_gguf, "convert", source).endswith(
        "a name of transformers' own modules; save the model with save_pretrained, which writes the published names"
    )
