"""How long a picture takes, and what the eyes cost a text: ERNIE-4.5-VL-28B's shapes with fewer blocks and layers.

For each size of picture: milliseconds of the tower and resampler, beside Qwen2-VL's tower of the same widths and
patches, milliseconds of the picture's tokens in the language model, and the memory that either takes to work, besides
weights and KV cache (on a GPU it includes what CUDA loads at first use). Then prompt and generation of a text with
the file that has vision experts, beside the `--text-only` file of the same checkpoint. Weights are random.

    python benchmarks/pictures_speed.py --sides 224 448
    python benchmarks/pictures_speed.py --device cuda --blocks 32 --rounds 10
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    REPOSITORY,
    add_folder,
    add_rounds,
    add_threads,
    benchmark_parser,
    machine,
    nvidia_smi,
    positive,
    process_memory,
    report,
)
from ernie_gguf.checkpoint.config import ErnieConfig, parse_config
from ernie_gguf.convert import prepare, write_gguf
from ernie_gguf.expected import Expected, model_tensors, projector_tensors
from ernie_gguf.gguf_file.outtype import Outtype
from ernie_llama import Llama
from ernie_llama._engine.vision import Image, VisionEncoder
from ernie_llama._lib import library, mtmd
from gguf import GGUFWriter
from rich.table import Column, Table
from safetensors.numpy import save_file

TINY = REPOSITORY / "examples" / "ernie-tiny"
TEXT = 256  # tokens of the text prompt
LAYERS = 3  # one is dense; of the last one's experts llama.cpp computes only what the outputs need: one token's


def config(blocks: int) -> dict[str, Any]:
    """The 28B's config.json with fewer layers, 16 experts of each kind instead of 64, and a tower of so many blocks."""
    return {
        "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"],
        "hidden_size": 2560,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 20,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 12288,
        "moe_num_experts": [16, 16],
        "moe_intermediate_size": [1536, 512],
        "moe_k": 6,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "vocab_size": 4096,
        "im_patch_id": 4000,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "vision_config": {"depth": blocks, "embed_dim": 1280, "num_heads": 16},
    }


def random_bf16(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Magnitudes from 2^-7 to 2^-5, as the bits of bfloat16."""
    bits = rng.integers(0, 1 << 16, shape, dtype=np.uint16)
    return bits & np.uint16(0x80FF) | np.uint16(0x3C00)


def tensors(parsed: ErnieConfig) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """(name, shape, float32) of everything that conversion looks for."""
    if parsed.vision is None or parsed.moe is None:
        raise ValueError("not a VL config")
    expected: list[Expected] = [*model_tensors(parsed, False), *projector_tensors(parsed.vision, parsed.hidden)]
    for each in expected:
        for name in each.sources:
            shape = each.shape[-2:]
            if "e_score_correction_bias" in name:
                yield name, (2, parsed.moe.experts), True
            elif ".mlp.gate.weight" in name:
                yield name, shape[::-1], True
            else:
                yield name, shape, False


def router(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Weights around 0; biases of 0, as random ones would choose the same experts for all tokens."""
    scale = 0 if "bias" in name else 0.02
    return rng.uniform(-scale, scale, shape).astype(np.float32)


def make_checkpoint(folder: Path, blocks: int) -> Path:
    """A random checkpoint with the tokenizer of the example."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config(blocks)))
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (folder / name).write_bytes((TINY / name).read_bytes())
    rng = np.random.default_rng(0)
    made: dict[str, Any] = {}
    for name, shape, wide in tensors(parse_config(config(blocks))):
        if name not in made:
            made[name] = router(rng, name, shape) if wide else random_bf16(rng, shape)
    made["model.embed_tokens.weight"] |= np.uint16(0x3F00)  # large, so that tokens keep their own experts
    save_bf16(folder / "model.safetensors", made)
    return folder


def save_bf16(path: Path, made: dict[str, Any]) -> None:
    """A safetensors file whose uint16 tensors are bfloat16."""
    save_file(made, path)
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length].replace(b'"U16"', b'"BF16"')
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])


def make_qwen2vl(path: Path, blocks: int) -> Path:
    """Qwen2-VL's tower and merger in the widths of ERNIE's, bf16."""
    rng, width, hidden = np.random.default_rng(1), 1280, 2560
    writer = GGUFWriter(path, "clip")
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("qwen2vl_merger")
    writer.add_vision_projection_dim(hidden)
    writer.add_vision_image_size(560)
    writer.add_vision_patch_size(14)
    writer.add_vision_embedding_length(width)
    writer.add_vision_feed_forward_length(4 * width)
    writer.add_vision_block_count(blocks)
    writer.add_vision_head_count(16)
    writer.add_vision_attention_layernorm_eps(1e-6)
    writer.add_vision_image_mean([0.48, 0.46, 0.41])
    writer.add_vision_image_std([0.27, 0.26, 0.28])

    def vector(name: str, n: int) -> None:
        writer.add_tensor(name, rng.uniform(0.5, 1, n).astype(np.float32))

    def linear(name: str, n: int, k: int) -> None:
        writer.add_tensor(f"{name}.weight", random_bf16(rng, (n, k)).view(np.uint8), raw_dtype=BF16)
        vector(f"{name}.bias", n)

    for name in ("v.patch_embd.weight", "v.patch_embd.weight.1"):
        writer.add_tensor(name, rng.uniform(-0.02, 0.02, (width, 3, 14, 14)).astype(np.float32))
    for i in range(blocks):
        for letter in ("q", "k", "v", "out"):
            linear(f"v.blk.{i}.attn_{letter}", width, width)
        for part in ("ln1", "ln2"):
            vector(f"v.blk.{i}.{part}.weight", width)
            vector(f"v.blk.{i}.{part}.bias", width)
        linear(f"v.blk.{i}.ffn_up", 4 * width, width)
        linear(f"v.blk.{i}.ffn_down", width, 4 * width)
    for part in ("weight", "bias"):
        vector(f"v.post_ln.{part}", width)
    linear("mm.0", 4 * width, 4 * width)
    linear("mm.2", hidden, 4 * width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


BF16: Any = 30


def encoding(encoder: VisionEncoder, side: int) -> tuple[Callable[[], object], Image]:
    """The call that runs the tower on a square picture of noise, and the picture."""
    pixels = np.random.default_rng(2).integers(0, 256, (side, side, 3), dtype=np.uint8)
    libmtmd = mtmd.load()
    bitmap = libmtmd.mtmd_bitmap_init(side, side, pixels.tobytes())
    try:
        parts = encoder._tokenize(encoder.marker, [bitmap], False, ["0" * 64])
    finally:
        libmtmd.mtmd_bitmap_free(bitmap)
    (picture,) = (part for part in parts if not isinstance(part, int))
    return lambda: encoder.encode(picture), picture


def milliseconds(calls: list[Callable[[], object]], rounds: int) -> list[float]:
    """The median of each call; all run in turn, forth and back, after a first round that does not count."""
    found: list[list[float]] = [[] for _ in calls]
    for number in range(rounds + 1):
        for samples, call in list(zip(found, calls, strict=True))[:: -1 if number % 2 else 1]:
            begin = time.perf_counter()
            call()
            if number:
                samples.append(1e3 * (time.perf_counter() - begin))
    return [statistics.median(samples) for samples in found]


def memory(gpu: bool) -> float:
    """MB in use: of the first GPU, or of this process without the pages of mapped files."""
    if gpu:
        return float(nvidia_smi("memory.used")[0]) * 2**20 / 1e6
    return process_memory(os.getpid())["RssAnon"] / 1e6


def work_memory(calls: Iterable[Callable[[], object]], gpu: bool) -> list[int]:
    """MB in use after each call beyond those before the first. llama.cpp keeps its largest buffers."""
    before, out = memory(gpu), []
    for call in calls:
        call()
        out.append(round(memory(gpu) - before))
    return out


def finish(llm: Llama) -> None:
    """Wait for the GPU."""
    library.load().llama_synchronize(llm.ctx)


def text_calls(llm: Llama) -> tuple[Callable[[], object], Callable[[], object]]:
    """A prompt of TEXT tokens, and 16 tokens after it."""
    tokens = np.random.default_rng(3).integers(10, 3000, TEXT).tolist()

    def prompt() -> None:
        llm.reset()
        llm.eval(tokens)
        finish(llm)

    def generation() -> None:
        for token in tokens[:16]:
            llm.eval([token])
            finish(llm)

    return prompt, generation


@dataclass(frozen=True)
class Files:
    """What is measured."""

    vl: Path
    text: Path
    eyes: Path
    qwen: Path


def make_files(folder: Path, blocks: int) -> Files:
    """The files of this many blocks, made if they are not there."""
    names = [f"{name}-{blocks}.gguf" for name in ("vl", "text", "eyes", "qwen")]
    files = Files(*(folder / name for name in names))
    if not files.qwen.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            checkpoint = make_checkpoint(Path(scratch) / "checkpoint", blocks)
            write_gguf(prepare(checkpoint, Outtype.Q8_0), files.vl, 2, True, lambda _: None, mmproj=files.eyes)
            write_gguf(prepare(checkpoint, Outtype.Q8_0, text_only=True), files.text, 2, True, lambda _: None)
        make_qwen2vl(files.qwen, blocks)
    return files


def main() -> None:
    """Make the files and measure."""
    parser = benchmark_parser(__doc__ or "")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--steps", nargs="+", choices=("pictures", "text"), default=["pictures", "text"])
    parser.add_argument("--sides", type=positive, nargs="+", default=[224, 448, 896], help="of square pictures, pixels")
    parser.add_argument("--blocks", type=positive, default=4, help="of the tower, which has 32 in the 28B")
    parser.add_argument("--files", type=Path, help="folder of files that an earlier run made; they are kept")
    add_rounds(parser, 3)
    add_threads(parser)
    add_folder(parser, "4 GB")
    options = parser.parse_args()
    if options.files:
        options.files.mkdir(exist_ok=True)
    with nullcontext(options.files) if options.files else tempfile.TemporaryDirectory(dir=options.folder) as name:
        found = measure(make_files(Path(name), options.blocks), options)
    gpu = nvidia_smi("name")[0] if options.device == "cuda" else ""
    results = {"machine": machine(gpu), "blocks": options.blocks, "threads": options.threads, **found}
    where = "" if gpu else f", {options.threads} threads"
    columns = ("side", "tokens", "tower ms", "Qwen2-VL's ms", "ratio", f"in {LAYERS} layers ms", "MB", "Qwen2-VL's MB")
    titles: dict[str, tuple[str, tuple[str, ...]]] = {
        "pictures": (f"pictures: {options.blocks} of 32 blocks{where}", columns),
        "text": (f"text: {LAYERS} layers{where}", ("milliseconds", "file with vision experts", "--text-only file")),
    }
    for step, rows in found.items():
        report(results, table(*titles[step], rows), options)
        if options.json:
            break


def table(title: str, columns: tuple[str, ...], rows: list[list[Any]]) -> Table:
    """A table of numbers."""
    out = Table(*(Column(name, justify="right") for name in columns), title=title)
    for row in rows:
        out.add_row(*map(str, row))
    return out


def measure(files: Files, options: argparse.Namespace) -> dict[str, list[list[Any]]]:
    """All figures, by step."""
    gpu = options.device == "cuda"
    common: dict[str, Any] = {"n_ctx": 2048, "n_threads": options.threads, "n_gpu_layers": 99 if gpu else 0}
    out: dict[str, list[list[Any]]] = {}
    with Llama(files.vl, mmproj_path=files.eyes, **common) as seeing, Llama(files.text, **common) as reading:
        if "pictures" in options.steps:
            peer = VisionEncoder(files.qwen, reading._model, options.threads)
            out["pictures"] = picture_rows(seeing, peer, options)
        seeing.reset()
        if "text" in options.steps:
            names = (f"prompt of {TEXT}", "16 tokens")
            for name, *calls in zip(names, text_calls(seeing), text_calls(reading), strict=True):
                out.setdefault("text", []).append(
                    [name, *(round(each, 1) for each in milliseconds(calls, options.rounds))]
                )
    return out


def picture_rows(seeing: Llama, peer: VisionEncoder, options: argparse.Namespace) -> list[list[Any]]:
    """The figures of square pictures of each side."""
    own, gpu, sides = seeing._engine.images.encoder, options.device == "cuda", sorted(options.sides)
    if own is None:
        raise ValueError("the mmproj was not loaded")
    pictures = [encoding(own, side) for side in sides]
    others = [encoding(peer, side)[0] for side in sides]

    def model(picture: Image) -> Callable[[], object]:
        def call() -> None:
            seeing.reset()
            own.decode(picture, seeing.ctx, 0, seeing.n_batch)
            finish(seeing)

        return call

    wholes = [model(picture) for _, picture in pictures]
    needed, of_others = work_memory(wholes, gpu), work_memory(others, gpu)
    rows = []
    for i, (tower, picture) in enumerate(pictures):
        ours, theirs, both = milliseconds([tower, others[i], wholes[i]], options.rounds)
        times = [round(ours, 1), round(theirs, 1), round(ours / theirs, 2), round(both - ours, 1)]
        rows.append([sides[i], picture.tokens, *times, needed[i], of_others[i]])
    return rows


if __name__ == "__main__":
    main()
