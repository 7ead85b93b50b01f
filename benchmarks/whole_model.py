"""A whole ERNIE-4.5 on GPUs: load, generation, prompts, small batches, long contexts, experts in RAM, memory.

    python benchmarks/whole_model.py --llama-cpp build/cuda/bin --folder /dev/shm
    python benchmarks/whole_model.py --shape 21b --types ccq2 q4_0 --steps speed batch --folder /dev/shm
    python benchmarks/whole_model.py --steps memory --contexts 8192 16384 --splits 12,15,15,13 --folder /dev/shm

writes a synthetic GGUF of all layers (random weights) in the mix of types that `ernie-gguf convert` makes of Baidu's
2-bit checkpoint (ccq2 or another type for the 2-bit experts, q4_0 for the int4 layers, q8_0, embedding and head bf16)
and runs llama-bench on it: flash attention, q8_0 KV cache. The 300B takes 96 GB of the folder, best a memory file
system, for one type at a time. Every result goes to --log at once. Steps:

    load      seconds from the start of llama-bench to the end of one token
    speed     prompts of 512 and 4096 tokens, generation of 64
    depth     generation behind 16384 and 32768 tokens
    batch     1 to 4 tokens at once, 512 tokens deep: the time of the batch over that of one token
    ram       experts of half of the layers, then of all, in RAM; with and without sending prompts' experts to the GPU
    memory    what llama.cpp plans to allocate per card (llama-fit-params); nothing is loaded
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from common import add_folder, add_llama_cpp, benchmark_parser, llama_bench, machine, nvidia_smi, positive, report
from released import SHAPES
from rich.table import Table
from synthetic import TYPES, Mix, as_shipped, bytes_per_token, write_model

KV = ("-ctk", "q8_0", "-ctv", "q8_0")
STEPS = ("load", "speed", "depth", "batch", "ram", "memory")


@dataclass(frozen=True)
class Result:
    """One row of llama-bench: `test` as llama-bench would name it, samples in tokens per second."""

    step: str
    ggml_type: str
    test: str
    samples: list[float]
    memory: list[int]  # MiB, the largest seen on each card while llama-bench ran
    options: str


class Watch(threading.Thread):
    """The largest memory in use on each card, by nvidia-smi."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak: list[int] = []
        self.done = threading.Event()

    def run(self) -> None:
        """Until told to stop."""
        while not self.done.wait(0.5):
            try:
                now = [int(line) for line in nvidia_smi("memory.used")]
            except (OSError, subprocess.CalledProcessError):
                return
            self.peak = [max(pair) for pair in zip(now, self.peak or now, strict=True)]


def tests(step: str, layers: int, options: argparse.Namespace) -> list[tuple[str, ...]]:
    """Options of the runs of llama-bench that make up a step."""
    batches = ",".join(map(str, range(1, 5)))
    depths = ",".join(map(str, options.depths))
    once = ("-p", "512", "-n", "32", "-r", "2")
    steps: dict[str, list[tuple[str, ...]]] = {
        "load": [("-p", "1", "-n", "0", "-r", "1")],
        "speed": [("-p", "512,4096", "-n", "64", "-r", "3")],
        "depth": [("-p", "0", "-n", "64", "-d", depths, "-r", "2")],
        "batch": [("-p", batches, "-n", "0", "-d", "512", "-r", "10")],
        "ram": [
            (*once, "-ncmoe", str(count), "-nopo", no_offload)
            for count in (layers // 2, layers)
            for no_offload in ("0", "1")
        ],
    }
    return steps[step]


def measure(step: str, ggml_type: str, model: Path, layers: int, options: argparse.Namespace) -> Iterable[Result]:
    """Run a step; results as they come."""
    for test in tests(step, layers, options):
        watch = Watch()
        watch.start()
        begin = time.perf_counter()
        rows = llama_bench(options.llama_cpp, model, "-ngl", "99", "-fa", "1", *KV, *options.extra, *test)
        seconds = time.perf_counter() - begin
        watch.done.set()
        watch.join()
        said = " ".join((*options.extra, *test))
        if step == "load":
            yield Result(step, ggml_type, "seconds", [seconds], watch.peak, said)
            continue
        for row in rows:
            name = f"pp{row['n_prompt']}" if row["n_prompt"] else f"tg{row['n_gen']}"
            name += f" @ {row['n_depth']}" if row["n_depth"] else ""
            if step == "ram":
                name += f", experts of {test[-3]} layers in RAM" + (", no offload" if test[-1] == "1" else "")
            yield Result(step, ggml_type, name, row["samples_ts"], watch.peak, said)


def planned(model: Path, options: argparse.Namespace) -> Iterable[dict[str, Any]]:
    """What llama.cpp plans to allocate: MiB of weights, context and work per device, for each context and KV type."""
    for context in options.contexts:
        for kv in ("f16", "q8_0"):
            for split in options.splits or [""]:
                command = [options.llama_cpp / "llama-fit-params", "-m", model, "--fit-print", "on", "-c", str(context)]
                command += ["-fa", "on", "-ctk", kv, "-ctv", kv, "-ngl", "99"]
                command += ["-ts", split] if split else []
                command += ["--rpc", options.rpc] if options.rpc else []
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    sys.exit(f"llama-fit-params ended with {done.returncode}:\n{done.stderr[-2000:]}")
                lines = [line.split() for line in done.stdout.splitlines() if len(line.split()) == 4]
                devices = {name: [int(number) for number in numbers] for name, *numbers in lines}
                yield {"context": context, "kv": kv, "split": split or "default", "devices": devices}


def speed_table(title: str, results: list[Result], per_token: dict[str, int]) -> Table:
    """Median tokens per second by test and type, and the ratio of the first type to the last."""
    types = list(dict.fromkeys(result.ggml_type for result in results))
    table = Table(title=title, title_justify="left")
    table.add_column("test")
    for name in types:
        table.add_column(f"{name}", justify="right")
    if len(types) > 1:
        table.add_column(f"{types[0]} / {types[-1]}", justify="right")
    table.caption = ", ".join(f"{name} reads {per_token[name] / 1e9:.2f} GB per token" for name in types)
    found = {(result.test, result.ggml_type): sorted(result.samples)[len(result.samples) // 2] for result in results}
    for test in dict.fromkeys(result.test for result in results):
        speeds = [found.get((test, name)) for name in types]
        row = [f"{speed:,.1f}" if speed else "" for speed in speeds]
        if len(types) > 1:
            row.append(f"{speeds[0] / speeds[-1]:.2f}" if speeds[0] and speeds[-1] else "")
        table.add_row(test, *row)
    return table


def memory_table(title: str, plans: list[dict[str, Any]]) -> Table:
    """GiB per device: weights, context and work together."""
    table = Table(title=title, title_justify="left")
    for header in ("context", "KV", "split", "GiB per device"):
        table.add_column(header, justify="right")
    for plan in plans:
        sizes = "  ".join(f"{sum(numbers) / 1024:.2f}" for name, numbers in plan["devices"].items() if name != "Host")
        table.add_row(str(plan["context"]), plan["kv"], plan["split"], sizes)
    return table


def parse() -> argparse.Namespace:
    """The command line."""
    parser = benchmark_parser(__doc__ or "")
    add_llama_cpp(parser)
    add_folder(parser, "96 GB for the 300B")
    parser.add_argument("--shape", choices=SHAPES, default="300b", help="default: %(default)s")
    parser.add_argument("--layers", type=positive, help="MoE layers (default: all)")
    choices = [name for name in TYPES if name != "f32"]
    parser.add_argument("--types", nargs="+", choices=choices, default=["ccq2", "iq2_xxs"], help="default: %(default)s")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=["load", "speed", "depth", "batch", "ram"])
    parser.add_argument("--depths", nargs="+", type=positive, default=[16384, 32768], help="default: %(default)s")
    parser.add_argument("--contexts", nargs="+", type=positive, default=[8192, 16384, 32768], help="for memory")
    parser.add_argument("--splits", nargs="+", help="for memory: values of --tensor-split (default: llama.cpp's own)")
    parser.add_argument("--rpc", help="for memory: servers whose devices stand for as many cards")
    parser.add_argument("--extra", nargs="+", default=[], help="further options of llama-bench")
    parser.add_argument(
        "--model", type=Path, help="a GGUF to measure instead of writing one; --types names its experts"
    )
    parser.add_argument("--log", type=Path, help="append every result as a line of JSON as soon as it is there")
    return parser.parse_args()


def main() -> None:
    """Write, measure and delete one model after the other, then print."""
    options = parse()
    shape = SHAPES[options.shape]
    if options.layers:
        shape = replace(shape, layers=shape.dense + options.layers)
    mixes = {name: as_shipped(TYPES[name]) if options.shape == "300b" else Mix(TYPES[name]) for name in options.types}
    results: list[Result] = []
    plans: list[dict[str, Any]] = []

    def log(record: dict[str, Any]) -> None:
        if options.log:
            with options.log.open("a") as file:
                file.write(json.dumps(record) + "\n")

    with tempfile.TemporaryDirectory(prefix="whole-model-", dir=options.folder) as folder:
        for name, mix in mixes.items():
            target = Path(folder) / f"{name}.gguf"
            model = options.model or write_model(target, shape, mix)
            for step in options.steps:
                if step == "memory":
                    for plan in planned(model, options):
                        plans.append(plan)
                        log(plan)
                    continue
                for result in measure(step, name, model, shape.layers, options):
                    results.append(result)
                    log(asdict(result))
            if not options.model:
                model.unlink()
    per_token = {name: bytes_per_token(shape, mix) for name, mix in mixes.items()}
    title = f"{shape.name}, {shape.layers} layers"
    found: dict[str, object] = {
        "machine": machine(),
        "bytes_per_token": per_token,
        "results": [asdict(result) for result in results],
        "memory": plans,
    }
    if plans:
        report(found, memory_table(title, plans), options)
    if results:
        report(found, speed_table(title, results, per_token), options)


if __name__ == "__main__":
    main()
