"""Conversion speed: a large synthetic checkpoint, converted side by side with `cp` and with upstream's converter.

    python benchmarks/convert_speed.py --upstream TREE --upstream-python PYTHON_WITH_TORCH

makes a checkpoint of the layer shapes of ERNIE-4.5-21B-A3B (as many layers as fit `--size`) and runs, several times
interleaved: cp of its shards, `ernie-gguf convert --outtype bf16`, and convert_hf_to_gguf.py --outtype bf16 of a
llama.cpp tree. The checkpoint is in the page cache; what an earlier run wrote is flushed (sync) before the next begins,
outside the time. ccq2 is measured apart on one MoE layer: it is bound by computing, not by copying.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt
from common import (
    REPOSITORY,
    Run,
    add_folder,
    add_rounds,
    benchmark_parser,
    machine,
    median_run,
    our_command,
    progress,
    report,
    run_observed,
)
from rich.table import Table

TOKENIZER = REPOSITORY / "examples" / "ernie-tiny"

# ERNIE-4.5-21B-A3B
VOCAB, HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 103424, 2560, 20, 4, 128
DENSE_FFN, EXPERT_FFN, EXPERTS, EXPERTS_USED, SHARED = 12288, 1536, 64, 6, 2

SHARD_BYTES = 10**9
POOL = 2**23  # random values that all tensors are cut from

Shape = tuple[int, ...]


def mlp(prefix: str, width: int) -> Iterator[tuple[str, str, Shape]]:
    """Name, dtype and shape of gate, up and down."""
    yield f"{prefix}.gate_proj.weight", "BF16", (width, HIDDEN)
    yield f"{prefix}.up_proj.weight", "BF16", (width, HIDDEN)
    yield f"{prefix}.down_proj.weight", "BF16", (HIDDEN, width)


def layer_tensors(layer: int) -> Iterator[tuple[str, str, Shape]]:
    """Name, dtype and shape of one layer's tensors; layer 0 is dense, as in the 21B."""
    prefix = f"model.layers.{layer}"
    yield f"{prefix}.input_layernorm.weight", "BF16", (HIDDEN,)
    yield f"{prefix}.self_attn.q_proj.weight", "BF16", (HEADS * HEAD_DIM, HIDDEN)
    yield f"{prefix}.self_attn.k_proj.weight", "BF16", (KV_HEADS * HEAD_DIM, HIDDEN)
    yield f"{prefix}.self_attn.v_proj.weight", "BF16", (KV_HEADS * HEAD_DIM, HIDDEN)
    yield f"{prefix}.self_attn.o_proj.weight", "BF16", (HIDDEN, HEADS * HEAD_DIM)
    yield f"{prefix}.post_attention_layernorm.weight", "BF16", (HIDDEN,)
    if layer == 0:
        yield from mlp(f"{prefix}.mlp", DENSE_FFN)
        return
    yield f"{prefix}.mlp.gate.weight", "F32", (EXPERTS, HIDDEN)
    yield f"{prefix}.mlp.moe_statics.e_score_correction_bias", "F32", (1, EXPERTS)
    for expert in range(EXPERTS):
        yield from mlp(f"{prefix}.mlp.experts.{expert}", EXPERT_FFN)
    yield from mlp(f"{prefix}.mlp.shared_experts", EXPERT_FFN * SHARED)


def model_tensors(layers: int) -> list[tuple[str, str, Shape]]:
    """Name, dtype and shape of all tensors; the head is tied."""
    tensors: list[tuple[str, str, Shape]] = [("model.embed_tokens.weight", "BF16", (VOCAB, HIDDEN))]
    for layer in range(layers):
        tensors += layer_tensors(layer)
    return [*tensors, ("model.norm.weight", "BF16", (HIDDEN,))]


def nbytes(tensors: list[tuple[str, str, Shape]]) -> int:
    """Bytes of the tensors."""
    return sum(prod(shape) * (2 if dtype == "BF16" else 4) for _, dtype, shape in tensors)


def layers_that_fit(size: int) -> int:
    """At least the dense layer and one MoE layer."""
    layers = 2
    while nbytes(model_tensors(layers + 1)) <= size:
        layers += 1
    return layers


def make_checkpoint(folder: Path, layers: int) -> Path:
    """Write shards of about 1 GB, their index, config.json and the example's tokenizer."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    # Random sign, mantissa and lowest exponent bit: magnitudes from 2^-7 to 2^-5, always finite
    pool_bf16 = rng.integers(0, 2**16, POOL, np.uint16) & np.uint16(0x80FF) | np.uint16(0x3C00)
    pool_f32 = rng.standard_normal(POOL, np.float32)
    shards: list[list[tuple[str, str, Shape]]] = [[]]
    for tensor in model_tensors(layers):
        if nbytes([*shards[-1], tensor]) > SHARD_BYTES and shards[-1]:
            shards.append([])
        shards[-1].append(tensor)
    weight_map: dict[str, str] = {}
    for i, tensors in enumerate(progress(shards, "making the checkpoint")):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= {tensor: name for tensor, _, _ in tensors}
        write_shard(folder / name, tensors, {"BF16": pool_bf16, "F32": pool_f32}, rng)
    index = {"metadata": {"total_size": nbytes(model_tensors(layers))}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config(layers), indent=2))
    for file in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / file, folder)
    return folder


def write_shard(
    path: Path,
    tensors: list[tuple[str, str, Shape]],
    pools: dict[str, npt.NDArray[np.generic]],
    rng: np.random.Generator,
) -> None:
    """One safetensors file; each tensor is a run of pool values that begins at a random place."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + nbytes([tensor])
        header[tensor[0]] = {"dtype": tensor[1], "shape": tensor[2], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, dtype, shape in tensors:
            left = prod(shape)
            while left:
                start = int(rng.integers(POOL))
                piece = pools[dtype][start : start + left]
                file.write(piece.tobytes())
                left -= len(piece)


def config(layers: int) -> dict[str, object]:
    """config.json of the 21B with fewer layers."""
    return {
        "architectures": ["Ernie4_5_MoeForCausalLM"],
        "model_type": "ernie4_5_moe",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": DENSE_FFN,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "use_bias": False,
        "tie_word_embeddings": True,
        "moe_num_experts": EXPERTS,
        "moe_k": EXPERTS_USED,
        "moe_intermediate_size": EXPERT_FFN,
        "moe_num_shared_experts": SHARED,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": layers - 1,
        "moe_layer_interval": 1,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "torch_dtype": "bfloat16",
    }


@dataclass(frozen=True)
class Contender:
    """Something that turns the checkpoint into `output`."""

    name: str
    command: list[str | Path]
    output: Path


def contenders(checkpoint: Path, scratch: Path, upstream: list[str | Path] | None) -> list[Contender]:
    """cp, ours, and upstream's if there is one."""
    shards: list[str | Path] = [*sorted(checkpoint.glob("*.safetensors"))]
    copy, ours, theirs = scratch / "copy", scratch / "ours.gguf", scratch / "upstream.gguf"
    found = [
        # a copy on write would copy nothing
        Contender("cp", ["cp", "--reflink=never", "-t", copy, *shards], copy),
        Contender("ernie-gguf", [our_command(), "convert", checkpoint, "--outfile", ours, "--outtype", "bf16"], ours),
    ]
    if upstream:
        found.append(Contender("upstream", [*upstream, checkpoint, "--outfile", theirs, "--outtype", "bf16"], theirs))
    return found


def clear(path: Path) -> None:
    """Remove an earlier output and let the disk come to rest."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if path.name == "copy":
        path.mkdir()
    os.sync()


def upstream_command(tree: Path | None, python: Path) -> tuple[list[str | Path] | None, str]:
    """How to run upstream's converter, or None and why not."""
    if tree is None:
        return None, "no --upstream TREE given"
    script = tree / "convert_hf_to_gguf.py"
    if not script.exists():
        return None, f"{script} does not exist"
    probe = subprocess.run([python, "-c", "import torch, transformers"], capture_output=True, text=True, check=False)
    if probe.returncode:
        return None, f"{python}: {probe.stderr.strip().splitlines()[-1]} (see --upstream-python)"
    return [python, script], ""


def measure(competitors: list[Contender], rounds: int) -> dict[str, list[Run]]:
    """Run everybody in turn, `rounds` times, after one copy that does not count.

    In a virtual machine the first use of a page of memory is slow (measured: cp five times slower), whoever makes it.
    """
    runs: dict[str, list[Run]] = {c.name: [] for c in competitors}
    clear(competitors[0].output)
    run_observed(competitors[0].command)
    for competitor in progress(competitors * rounds, "measuring"):
        clear(competitor.output)
        runs[competitor.name].append(run_observed(competitor.command))
    for competitor in competitors:
        clear(competitor.output)
    return runs


def measure_ccq2(folder: Path, repeat: int) -> tuple[int, Run]:
    """Weights of one MoE layer's experts, and the median run of `--outtype ccq2` on a checkpoint of two layers."""
    checkpoint = make_checkpoint(folder / "ccq2", 2)
    output = folder / "ccq2.gguf"
    runs = []
    for _ in range(repeat):
        clear(output)
        runs.append(run_observed([our_command(), "convert", checkpoint, "--outfile", output, "--outtype", "ccq2"]))
    return EXPERTS * 3 * HIDDEN * EXPERT_FFN, median_run(runs)


def table_of(results: dict[str, Run], size: int) -> Table:
    """Throughput counts the bytes of the checkpoint; the ratios are of median times."""
    table = Table(title=f"to BF16 GGUF, {size / 1e9:.2f} GB of ERNIE-4.5-21B-A3B layers")
    for column in ("", "seconds", "CPU s", "MB/s", "of cp", "of upstream", "peak anonymous", "peak RSS"):
        table.add_column(column, justify="left" if not column else "right")
    for name, run in results.items():
        against = f"{results['upstream'].wall / run.wall:.2f}x" if "upstream" in results else "-"
        table.add_row(
            name,
            f"{run.wall:.2f}",
            f"{run.cpu:.2f}",
            f"{size / run.wall / 1e6:,.0f}",
            f"{results['cp'].wall / run.wall:.2f}x",
            against,
            f"{run.peak_anonymous / 1e6:,.0f} MB",
            f"{run.peak_rss / 1e6:,.0f} MB",
        )
    return table


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = benchmark_parser(__doc__ or "")
    parser.add_argument("--size", type=float, default=4, help="gigabytes of checkpoint (default: %(default)s)")
    add_rounds(parser, 3)
    add_folder(parser, "three times the size")
    parser.add_argument("--upstream", type=Path, metavar="TREE", help="llama.cpp source tree")
    parser.add_argument("--upstream-python", type=Path, default=Path(sys.executable), help="a Python with torch")
    parser.add_argument("--ccq2", action="store_true", help="also measure --outtype ccq2 on two layers (slow)")
    return parser.parse_args()


def main() -> None:
    """Make the checkpoint, measure, print."""
    options = parse_arguments()
    upstream, missing = upstream_command(options.upstream, options.upstream_python)
    if missing:
        print(f"upstream's converter is skipped: {missing}", file=sys.stderr)
    where = machine()
    with tempfile.TemporaryDirectory(prefix="convert-speed-", dir=options.folder) as temporary:
        folder = Path(temporary)
        layers = layers_that_fit(int(options.size * 1e9))
        checkpoint = make_checkpoint(folder / "checkpoint", layers)
        size = sum(shard.stat().st_size for shard in checkpoint.glob("*.safetensors"))
        runs = measure(contenders(checkpoint, folder, upstream), options.rounds)
        medians = {name: median_run(each) for name, each in runs.items()}
        results: dict[str, object] = {
            "machine": where,
            "checkpoint_bytes": size,
            "layers": layers,
            "median": {name: asdict(run) for name, run in medians.items()},
            "runs": {name: [asdict(run) for run in each] for name, each in runs.items()},
            "upstream_skipped": missing or None,
        }
        table = table_of(medians, size)
        if options.ccq2:
            weights, run = measure_ccq2(folder, 1)
            results["ccq2"] = {"expert_weights": weights, **asdict(run)}
            table.caption = (
                f"ccq2: {weights / 1e6:,.0f} million expert weights in {run.wall:.1f} s "
                f"({weights / run.wall / 1e6:,.1f} M/s), peak anonymous {run.peak_anonymous / 1e6:,.0f} MB"
            )
    report(results, table, options)


if __name__ == "__main__":
    main()
