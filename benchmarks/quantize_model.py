"""`ernie-gguf quantize` on layers of the 21B's true shapes: python benchmarks/quantize_model.py --device cuda.

Makes a checkpoint of the dense layer and some MoE layers of ERNIE-4.5-21B-A3B with random weights, quantizes it with a
text (by default this repository's sources, repeated to the length needed) and times its layers. The time for all 28
layers is that of everything before the first MoE layer plus 27 times the mean MoE layer: it includes reading weights,
attention, Hessians, encoding and writing. Random weights spread the tokens evenly over the experts.
"""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from common import REPOSITORY, add_folder, add_threads, benchmark_parser, machine, report
from ernie_gguf.ccq2.code_maps import CODE_MAPS
from ernie_gguf.checkpoint.shards import read_headers
from ernie_gguf.convert import prepare
from ernie_gguf.gguf_file.outtype import Outtype
from ernie_gguf.quantize.run import Step, run_quantize
from ernie_gguf.quantize.settings import Settings, kernels_for
from ernie_gguf.quantize.text import calibration_sequences
from random_checkpoint import make_checkpoint
from released import SHAPES, bf16_21b
from rich.table import Table

MODEL_LAYERS = SHAPES["21b"].layers


@dataclass(frozen=True)
class LayerTime:
    """Seconds from the end of what came before to the layer's last expert."""

    layer: int
    seconds: float
    weights: int
    metric_error: float


def balance(checkpoint: Path) -> None:
    """Set the routers' correction biases to zero: random ones would send all tokens to the same few experts."""
    for name, header in read_headers(checkpoint).items():
        if name.endswith("e_score_correction_bias"):
            with header.path.open("r+b") as file:
                file.seek(header.offset)
                file.write(bytes(header.nbytes))


def own_text(folder: Path, tokens: int) -> Path:
    """This repository's sources, repeated to some five characters per token."""
    files = sorted(path for suffix in ("py", "md", "cpp", "cu", "c", "h") for path in REPOSITORY.rglob(f"*.{suffix}"))
    text = "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in files if ".venv" not in path.parts)
    path = folder / "text.txt"
    path.write_text((text * (1 + 5 * tokens // len(text)))[: 5 * tokens], encoding="utf-8")
    return path


def measure(checkpoint: Path, text: Path, settings: Settings, tokens: int, out: Path) -> list[LayerTime]:
    """Quantize and time the layers; the first entry is all that comes before the first MoE layer's first expert."""
    job = prepare(checkpoint, Outtype.CCQ2)
    calibration = calibration_sequences([text], checkpoint, job.vocab, 512, tokens)
    ends: dict[int, tuple[float, list[Step]]] = {}
    begun = time.monotonic()

    def listen(step: Step) -> None:
        steps = ends[step.layer][1] if step.layer in ends else []
        ends[step.layer] = (time.monotonic(), [*steps, step])

    kernels, _ = kernels_for(settings.device)
    run_quantize(job, calibration, settings, kernels, out, overwrite=True, restart=True, listen=listen)
    times, before = [], begun
    for layer, (end, steps) in sorted(ends.items()):
        matrices = [stats for step in steps for stats in step.stats]
        error = float(np.mean([stats.metric_error for stats in matrices]))
        times.append(LayerTime(layer, end - before, sum(stats.weights for stats in matrices), error))
        before = end
    return times


def main() -> None:
    """Make, measure, report."""
    parser = benchmark_parser(__doc__ or "")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--layers", type=int, default=4, help="one dense, the others MoE; at least 3")
    parser.add_argument("--tokens", type=int, default=196608, help="to calibrate with")
    parser.add_argument("--text", type=Path, help="instead of this repository's sources")
    parser.add_argument("--maps", type=int, default=len(CODE_MAPS))
    add_threads(parser)
    add_folder(parser, "1.5 GB per layer")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="quantize-model-", dir=options.folder) as name:
        folder = Path(name)
        checkpoint = make_checkpoint(folder / "ernie-21b-random", bf16_21b(options.layers))
        balance(checkpoint)
        text = options.text or own_text(folder, options.tokens)
        settings = Settings(options.device, options.threads, options.maps)
        times = measure(checkpoint, text, settings, options.tokens, folder / "out.gguf")
    first, others = times[0], times[1:] or times  # the first has all that comes before it in its time
    layer = float(np.mean([each.seconds for each in others]))
    whole = first.seconds - layer + (MODEL_LAYERS - 1) * layer
    table = Table("layer", "seconds", "million weights/s", "error in the metric")
    for each in times:
        note = " with all before it" if each is first else ""
        rate = each.weights / each.seconds / 1e6
        table.add_row(f"{each.layer}{note}", f"{each.seconds:.1f}", f"{rate:.1f}", f"{each.metric_error:.4f}")
    table.add_row("the 21B, 28 layers", f"{whole:.0f}, that is {whole / 60:.1f} min", "", "")
    what = torch.cuda.get_device_name() if options.device == "cuda" else f"{options.threads} threads"
    peak = torch.cuda.max_memory_allocated() if options.device == "cuda" else 0
    results: dict[str, object] = {
        "machine": machine(),
        "device": what,
        "gpu_peak_bytes": peak,
        "maps": options.maps,
        "layers": times,
        "whole_seconds": whole,
    }
    report(results, table, options)
    if peak and not options.json:
        print(f"{what}: {peak / 1e9:.1f} GB at most; {options.maps} code maps per row")


if __name__ == "__main__":
    main()
