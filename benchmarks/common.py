"""What the benchmarks share: options, running a command under observation, the machine's name, tables and results."""

import argparse
import io
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

REPOSITORY = Path(__file__).parents[1]
BUILT = REPOSITORY / "bindings" / "ernie_llama" / "lib"  # what `make build` links: libraries and programs
RESULTS = REPOSITORY / "benchmarks" / "results"
POLL_SECONDS = 0.01

T = TypeVar("T")


def benchmark_parser(description: str) -> argparse.ArgumentParser:
    """A command line with the options of every benchmark."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON with every sample")
    parser.add_argument("--save", action="store_true", help="append the table to benchmarks/results/MACHINE.md")
    return parser


def add_llama_cpp(parser: argparse.ArgumentParser) -> None:
    """--llama-cpp: the build to measure."""
    parser.add_argument(
        "--llama-cpp", type=Path, default=BUILT, metavar="BIN", help="folder of llama.cpp's programs (default: built)"
    )


def add_rounds(parser: argparse.ArgumentParser, default: int | None) -> None:
    """--rounds: how often everything is measured, in turn, so that a slow minute of the machine affects all alike."""
    text = "times that everything runs, in turn"
    parser.add_argument("--rounds", type=positive, default=default, help=f"{text} (default: {default or 'by device'})")


def add_threads(parser: argparse.ArgumentParser, default: int | None = None) -> None:
    """--threads: one number."""
    parser.add_argument("--threads", type=positive, default=default or os.cpu_count(), help="default: %(default)s")


def add_folder(parser: argparse.ArgumentParser, room: str) -> None:
    """--folder: where the script keeps large files while it runs."""
    parser.add_argument("--folder", type=Path, help=f"work in a new folder in here (default: TMPDIR); needs {room}")


def positive(text: str) -> int:
    """An option's value. Raises ValueError, which argparse reports."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def our_command() -> Path:
    """`ernie-gguf` of the Python that runs this script; exits if it is not installed."""
    command = Path(sys.executable).parent / "ernie-gguf"
    if not command.exists():
        sys.exit(f"{command} not found: install the project into the Python that runs this (pip install -e .)")
    return command


def progress(items: Sequence[T], description: str) -> Iterable[T]:
    """A progress bar on the error output, so that --json stays clean."""
    return track(items, description, console=Console(stderr=True), transient=True)


@dataclass(frozen=True)
class Run:
    """One run of a command: seconds, and peak bytes of memory summed over its processes.

    `peak_rss` counts the pages of mapped files too, which the kernel can drop at any time; `peak_anonymous` (RssAnon)
    is what the program itself holds.
    """

    wall: float
    cpu: float
    peak_rss: int
    peak_anonymous: int


class _MemoryWatch(threading.Thread):
    """Samples the memory of a process and its descendants until told to stop."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid = pid
        self.peak_rss = 0
        self.peak_anonymous = 0
        self.done = threading.Event()

    def run(self) -> None:
        # Not from wait4: ru_maxrss begins with the memory of the process that forked, this one.
        while not self.done.wait(POLL_SECONDS):
            rss, anonymous = 0, 0
            for pid in _descendants(self.pid):
                status = process_memory(pid)
                rss += status.get("VmRSS", 0)
                anonymous += status.get("RssAnon", 0)
            self.peak_rss = max(self.peak_rss, rss)
            self.peak_anonymous = max(self.peak_anonymous, anonymous)


def _descendants(pid: int) -> list[int]:
    found = [pid]
    for parent in found:  # grows while it is walked
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += [int(child) for child in children.read_text().split()]
            except OSError:  # a thread that has just ended
                continue
    return found


def process_memory(pid: int) -> dict[str, int]:
    """The fields of /proc/PID/status that are given in kB, in bytes; nothing for a process that has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}


def nvidia_smi(field: str) -> list[str]:
    """A field of each GPU, without its unit. Raises OSError or CalledProcessError where nvidia-smi does not run."""
    command = ("nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def leave(command: Sequence[str | Path], code: int, output: str) -> NoReturn:
    """Exit with the end of the output of a command that failed."""
    sys.exit(f"{shlex.join(map(str, command))}\nended with {code}:\n{output[-3000:]}")


def run_observed(command: Sequence[str | Path]) -> Run:
    """Run a command to its end; if it fails, exit with its output."""
    with tempfile.TemporaryFile() as output:
        begin = time.perf_counter()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        watch = _MemoryWatch(process.pid)
        watch.start()
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
        watch.done.set()
        watch.join()
        if process.returncode:
            output.seek(0)
            leave(command, process.returncode, output.read().decode(errors="replace"))
    return Run(wall, usage.ru_utime + usage.ru_stime, watch.peak_rss, watch.peak_anonymous)


def median_run(runs: Sequence[Run]) -> Run:
    """Median times; memory is the largest seen."""
    return Run(
        statistics.median(r.wall for r in runs),
        statistics.median(r.cpu for r in runs),
        max(r.peak_rss for r in runs),
        max(r.peak_anonymous for r in runs),
    )


def llama_bench(folder: Path, model: Path, *options: str) -> list[dict[str, Any]]:
    """The rows that llama-bench of this build prints as JSON; if it fails, exit with its error output."""
    command: list[str | Path] = [folder / "llama-bench", "-m", model, "-o", "json", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        leave(command, done.returncode, done.stderr)
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def cpu_model() -> str:
    """The processor as the kernel names it, with the vector extensions that matter to ggml (names are often masked)."""
    fields = [line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line]
    info = {key.strip(): value.strip() for key, value in fields}
    name = info.get("model name", platform.machine())
    known = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm", "sve")
    flags = info.get("flags", info.get("Features", "")).split()
    vectors = " ".join(flag for flag in known if flag in flags)
    return f"{name} (family {info.get('cpu family', '?')} model {info.get('model', '?')}; {vectors})"


def machine(gpu: str = "") -> dict[str, object]:
    """Where and when a benchmark ran. `load` is the one-minute load average: above 1, other work shared the machine."""
    return {
        "cpu": cpu_model(),
        **({"gpu": gpu} if gpu else {}),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        "numpy": version("numpy"),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def describe(where: dict[str, Any]) -> str:
    """A machine in one line, without date and load."""
    gpu = f"{where['gpu']}, " if "gpu" in where else ""
    return f"{gpu}{where['cpu']}, {where['cores']} cores, {where['memory_bytes'] / 2**30:.0f} GiB"


def report(results: dict[str, object], table: Table, options: argparse.Namespace, page: str | None = None) -> None:
    """Print the results as JSON, or the table and the machine; with --save, also append the table to a page.

    The page is the machine's, or the one named, where other things than the machine decide the figures.
    """
    where = results["machine"]
    assert isinstance(where, dict)  # noqa: S101 - narrows the type
    if options.save:
        print(f"appended to {save(table, where, page=page)}", file=sys.stderr)
    if options.json:
        print(json.dumps(results, indent=2, default=asdict))
        return
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    console.print(f"{describe(where)}, load {where['load']}, {where['date']}")


def save(table: Table, where: dict[str, Any], folder: Path = RESULTS, page: str | None = None) -> Path:
    """Append a table, its command and its date to the page named, or to the machine's; begin it if need be."""
    folder.mkdir(exist_ok=True)
    name = page or where.get("gpu") or f"{where['cpu'].split(';')[0]} {where['cores']} cores"
    path = folder / (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".md")
    heading = f"# {page}" if page else f"# {describe(where)}"
    text = "" if path.exists() else f"{heading}\n"
    run = f"{where['date']}, commit {commit()}, load {where['load']}: `{command_line()}`"
    text += f"\n## {table.title or 'results'}\n\n{run}\n\n"
    if page:
        text += f"{describe(where)}\n\n"
    with path.open("a") as file:
        file.write(text + markdown(table))
    return path


def commit() -> str:
    """The checkout's commit, marked if files differ from it."""
    command = ("git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--exclude=*")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def command_line() -> str:
    """This script's own, with no more than the names of absolute paths."""
    arguments = [re.sub(r"(^|=)/(\S*/)?(?=[^/])", r"\1…/", each) for each in sys.argv[1:]]
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *arguments]).replace("'", "")


def markdown(table: Table) -> str:
    """A table without its title as a Markdown table, its caption below."""
    caption, title, framed = table.caption, table.title, table.box
    table.caption, table.title, table.box = None, None, box.MARKDOWN
    out = io.StringIO()
    Console(file=out, width=1000).print(table)
    table.caption, table.title, table.box = caption, title, framed
    lines = [line.rstrip() for line in out.getvalue().splitlines() if line.strip()]
    return "\n".join([*lines, *(["", str(caption)] if caption else [])]) + "\n"
