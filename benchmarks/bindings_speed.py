"""What the bindings cost: tokens per second against llama-bench, time to first token, import, memory after load.

    python benchmarks/bindings_speed.py FILE.gguf ... [--threads N] [--rounds N]

llama-bench only evaluates tokens. The bindings also sample them and stream the text, as a user's program does. Both run
in turn, so that other work on the machine affects both.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from common import add_llama_cpp, add_rounds, add_threads, benchmark_parser, llama_bench, machine, progress, report
from ernie_llama import Llama
from rich.table import Table

IMPORT = "import time; t = time.perf_counter(); import ernie_llama; print(time.perf_counter() - t)"
# Resident memory before and after a load, and after a token, in pages.
LOAD = """
import sys
from pathlib import Path
from ernie_llama import Llama, info

def pages():
    return int(Path("/proc/self/statm").read_text().split()[1])

info()
before = pages()
llm = Llama(sys.argv[1], n_ctx=512, n_threads=1)
loaded = pages()
llm.eval([5])
print(before, loaded, pages())
"""


@dataclass(frozen=True)
class Speed:
    """What one file gave: medians over the rounds; sizes in bytes.

    `share` is the median of bindings / llama-bench of the same round. `overhead` is seconds per token more than
    llama-bench's. `loaded` and `used` are resident memory more than before the load, after it and after one token;
    pages of the mapped file count.
    """

    file: str
    size: int
    llama_bench: float
    bindings: float
    share: float
    overhead: float
    first_token: float
    loaded: int
    used: int


def bench(path: Path, options: argparse.Namespace) -> float:
    """Tokens per second of llama-bench."""
    arguments = ("-p", "0", "-n", str(options.generate), "-t", str(options.threads), "-r", "1")
    return float(llama_bench(options.llama_cpp, path, *arguments)[0]["avg_ts"])


def stream(llm: Llama, prompt: list[int], n_tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and tokens per second after it; end-of-generation tokens do not end it."""
    begin = time.perf_counter()
    tokens = llm.generate(prompt, temp=0)
    pieces = [llm.detokenize([next(tokens)])]
    first = time.perf_counter()
    pieces += [llm.detokenize([next(tokens)]) for _ in range(n_tokens)]
    return first - begin, n_tokens / (time.perf_counter() - first)


def memory(path: Path) -> tuple[int, int]:
    """Bytes of resident memory more than before: loaded, and after a token."""
    done = subprocess.run([sys.executable, "-c", LOAD, path], capture_output=True, text=True, check=True)
    before, loaded, used = (int(each) * os.sysconf("SC_PAGE_SIZE") for each in done.stdout.split())
    return loaded - before, used - before


def import_seconds(rounds: int) -> float:
    """Median of fresh interpreters."""
    command = [sys.executable, "-c", IMPORT]
    times = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(rounds)]
    return statistics.median(float(each) for each in times)


def measure(path: Path, options: argparse.Namespace) -> Speed:
    """Everything about one file."""
    first_tokens, theirs, ours = [], [], []
    with Llama(path, n_ctx=options.prompt + options.generate + 8, n_threads=options.threads, cache_prompt=False) as llm:
        prompt = [5 + i % 1000 for i in range(options.prompt)]
        stream(llm, prompt, 8)
        for _ in progress(range(options.rounds), path.name):
            theirs.append(bench(path, options))
            ours.append(stream(llm, [5], options.generate)[1])
            first_tokens.append(stream(llm, prompt, 1)[0])
    pairs = list(zip(theirs, ours, strict=True))
    return Speed(
        path.name,
        path.stat().st_size,
        statistics.median(theirs),
        statistics.median(ours),
        statistics.median(our / their for their, our in pairs),
        statistics.median(1 / our - 1 / their for their, our in pairs),
        statistics.median(first_tokens),
        *memory(path),
    )


def main() -> None:
    """Measure and print."""
    parser = benchmark_parser(__doc__ or "")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    add_llama_cpp(parser)
    add_threads(parser, 1)
    parser.add_argument("--generate", type=int, default=128, help="tokens in each round (default: %(default)s)")
    parser.add_argument(
        "--prompt", type=int, default=128, help="tokens of the prompt whose first token is timed (default: %(default)s)"
    )
    add_rounds(parser, 7)
    options = parser.parse_args()
    if not (options.llama_cpp / "llama-bench").exists():
        parser.error(f"{options.llama_cpp} holds no llama-bench (make build)")
    os.environ["ERNIE_LLAMA_LIB_PATH"] = str(options.llama_cpp)  # the bindings and llama-bench use one build

    importing = import_seconds(options.rounds)
    speeds = [measure(path, options) for path in options.files]
    table = Table(
        "file",
        "MB",
        "llama-bench t/s",
        "bindings t/s",
        "share",
        "µs/token more",
        f"first token of {options.prompt}, ms",
        "loaded MB",
        "after a token MB",
        title=f"threads: {options.threads}, tokens: {options.generate}; import: {importing * 1e3:.0f} ms",
    )
    for each in speeds:
        table.add_row(
            each.file,
            f"{each.size / 1e6:.1f}",
            f"{each.llama_bench:.1f}",
            f"{each.bindings:.1f}",
            f"{each.share:.3f}",
            f"{each.overhead * 1e6:.0f}",
            f"{each.first_token * 1e3:.1f}",
            f"{each.loaded / 1e6:.1f}",
            f"{each.used / 1e6:.1f}",
        )
    results: dict[str, object] = {"machine": machine(), "import_seconds": importing, "files": speeds}
    report(results, table, options)


if __name__ == "__main__":
    main()
