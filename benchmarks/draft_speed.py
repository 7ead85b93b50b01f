"""What do guesses from earlier text gain: generation with and without `draft_model=LlamaPromptLookupDecoding()`.

    python benchmarks/draft_speed.py FILE.gguf ... --text TEXT [--threads N] [--rounds N]

Two prompts of --prompt tokens: `other` is a piece of the text, `repeats` a short piece of it again and again, which a
greedy model goes on repeating; it stands for answers that quote their prompt. Both ways run in turn; the table gives
tokens per second without the prompt's time, and how many tokens an evaluation yields.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from common import add_llama_cpp, add_rounds, add_threads, benchmark_parser, machine, positive, progress, report
from ernie_llama import Llama
from ernie_llama.llama_speculative import LlamaPromptLookupDecoding
from rich.table import Table

PIECE = 40  # tokens that `repeats` repeats


@dataclass
class Speed:
    """Tokens per second of one file and prompt."""

    file: str
    prompt: str
    plain: list[float] = field(default_factory=list)
    drafted: list[float] = field(default_factory=list)
    yielded: float = 0.0  # tokens per evaluation with drafts

    @property
    def gain(self) -> float:
        """With drafts over without, median of the rounds."""
        return statistics.median(d / p for d, p in zip(self.drafted, self.plain, strict=True))


def counted(llm: Llama) -> Callable[[], int]:
    """Count the evaluations from now on."""
    decode, n = llm._ctx.decode, [0]

    def counting(*arguments: object) -> None:
        n[0] += 1
        decode(*arguments)  # type: ignore[arg-type]  # passed on

    llm._ctx.decode = counting  # type: ignore[method-assign, assignment]
    return lambda: n[0]


def generate(llm: Llama, prompt: list[int], n: int) -> float:
    """Tokens per second after the first."""
    llm.reset()
    tokens = llm.generate(prompt, temp=0)
    next(tokens)
    begin = time.perf_counter()
    for _ in range(n):
        next(tokens)
    return n / (time.perf_counter() - begin)


def measure(path: Path, options: argparse.Namespace) -> list[Speed]:
    """Both prompts on one file."""
    same = {"n_ctx": options.prompt + options.generate + 64, "n_threads": options.threads, "cache_prompt": False}
    with (
        Llama(path, **same) as plain,
        Llama(path, draft_model=LlamaPromptLookupDecoding(num_pred_tokens=options.guess), **same) as drafted,
    ):
        tokens = plain.tokenize(options.text.read_bytes()[: 20 * options.prompt], special=True)
        repeated = (tokens[:PIECE] * options.prompt)[: options.prompt]
        prompts = {"other": tokens[: options.prompt], "repeats": repeated}
        speeds = [Speed(path.name, name) for name in prompts]
        evaluations = counted(drafted)
        for _ in progress(range(options.rounds), path.name):
            for speed in speeds:
                speed.plain.append(generate(plain, prompts[speed.prompt], options.generate))
                before = evaluations()
                speed.drafted.append(generate(drafted, prompts[speed.prompt], options.generate))
                speed.yielded = options.generate / max(evaluations() - before - 1, 1)  # without the prompt's
    return speeds


def main() -> None:
    """Measure and print."""
    parser = benchmark_parser(__doc__ or "")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--text", type=Path, required=True, help="where prompts are cut from")
    parser.add_argument("--prompt", type=positive, default=256, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--generate", type=positive, default=128, help="tokens to generate (default: %(default)s)")
    parser.add_argument("--guess", type=positive, default=10, help="tokens of a guess (default: %(default)s)")
    add_llama_cpp(parser)
    add_threads(parser, 1)
    add_rounds(parser, 5)
    options = parser.parse_args()
    os.environ["ERNIE_LLAMA_LIB_PATH"] = str(options.llama_cpp)
    speeds = [speed for path in options.files for speed in measure(path, options)]
    table = Table(
        "file",
        "prompt",
        "plain t/s",
        "drafts t/s",
        "gain",
        "tokens per evaluation",
        title=f"threads: {options.threads}, guesses of up to {options.guess}",
    )
    for each in speeds:
        table.add_row(
            each.file,
            each.prompt,
            f"{statistics.median(each.plain):,.0f}",
            f"{statistics.median(each.drafted):,.0f}",
            f"{each.gain:.2f}",
            f"{each.yielded:.1f}",
        )
    report({"machine": machine(), "speeds": speeds}, table, options)


if __name__ == "__main__":
    main()
