"""Cross-compile the patched llama.cpp for ARM and test ccq2 in an emulator (qemu), which tells nothing about speed.

The kernels are compiled for three levels of the architecture, the rest once. Tests run side by side, as many as --jobs.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ggml_patch"))

import tree

# Without the byte dot product, with it, and with the product of byte matrices (i8mm) besides.
LEVELS = ("armv8-a", "armv8.2-a+dotprod", "armv8.6-a")
PANELS = LEVELS[1:]  # have the kernels of prompts
MAIN = LEVELS[1]
PROGRAMS = {
    "test-ccq-dot": "tests",
    "test-quantize-fns": "tests",
    "test-cpu-panels": "tests",
    "test-backend-ops": "tests",
    "simple": "examples/simple",
}
# Each kind of case, at a size that takes an emulator seconds.
OPERATIONS = r"ccq2.*(m=19,n=(1|2|9|33),k=(256|512)|n=256,m=5)"
# No rounding decides a token of what follows: the likeliest is ahead of the next by e^0.2.
PROMPT = "def read_lines(path: Path) -> list[str]:"
TOKENS = "24"
CROSS = "aarch64-linux-gnu-g++"
SYSROOT = "/usr/aarch64-linux-gnu"


@dataclass(frozen=True)
class Test:
    """A program, run with the kernels of a level; `passed` tells from what it prints."""

    level: str
    program: str
    arguments: tuple[str, ...]
    passed: Callable[[str], bool]


def check_tools() -> None:
    """Exit if one is missing."""
    tools = (CROSS, "qemu-aarch64", "cmake")
    if missing := [tool for tool in tools if shutil.which(tool) is None]:
        tree.fail(
            f"{', '.join(missing)} not found; "
            "on Debian and Ubuntu: apt-get install g++-aarch64-linux-gnu qemu-user cmake"
        )


def output_of(command: list[str], log: Path) -> str:
    """Run `command`, and return what it prints, which `log` keeps; exit with the log if it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    log.write_text(done.stdout)
    if done.returncode != 0:
        tree.fail(f"{' '.join(command)}\n{done.stdout[-4000:]}")
    return done.stdout


def build_libraries(source: Path, folder: Path, level: str, jobs: int) -> None:
    """ggml for a level in `folder`/`level`; llama.cpp too for `MAIN`."""
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "CMAKE_C_COMPILER": "aarch64-linux-gnu-gcc",
        "CMAKE_CXX_COMPILER": CROSS,
        "CMAKE_SKIP_BUILD_RPATH": "ON",  # LD_LIBRARY_PATH tells the level
        "GGML_NATIVE": "OFF",
        "GGML_CPU_ARM_ARCH": level,
        "GGML_OPENMP": "OFF",
        "LLAMA_OPENSSL": "OFF",
        "LLAMA_BUILD_UI": "OFF",
        "LLAMA_USE_PREBUILT_UI": "OFF",
    }
    settings = [f"-D{name}={value}" for name, value in options.items()]
    build = folder / level
    output_of(["cmake", "-S", str(source), "-B", str(build), *settings], folder / f"cmake-{level}.log")
    target = "llama" if level == MAIN else "ggml"
    output_of(["cmake", "--build", str(build), "-j", str(jobs), "--target", target], folder / f"build-{level}.log")
    if level in PANELS and b"multiply_panels" not in (build / "bin/libggml-cpu.so").read_bytes():
        tree.fail(f"the build for {level} has no panels")


def compile_program(compiler: str, source: Path, libraries: Path, name: str, out: Path) -> None:
    """A test or an example of llama.cpp that needs nothing but its libraries."""
    includes = [f"-I{source / part}" for part in ("include", "ggml/include", "ggml/src", "ggml/src/ggml-cpu")]
    linked = ["-lllama", "-lggml", "-lggml-cpu", "-lggml-base"]
    code = str(source / PROGRAMS[name] / f"{name}.cpp")
    command = [compiler, "-std=c++17", "-O1", *includes, code, "-o", str(out), f"-L{libraries}", *linked]
    output_of([*command, "-Wl,--as-needed"], out.with_suffix(".log"))


def greedy(program: Path, model: Path) -> list[str]:
    """The command that prints what the model writes."""
    return [str(program), "-m", str(model), "-n", TOKENS, PROMPT]


def text_on_x86(source: Path, folder: Path, libraries: Path, model: Path) -> str:
    """What a model writes here."""
    program = folder / "simple-x86"
    compile_program("c++", source, libraries, "simple", program)
    command = ["env", f"LD_LIBRARY_PATH={libraries}", *greedy(program, model)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 or PROMPT not in done.stdout:
        tree.fail(f"{' '.join(command)}\n{done.stderr[-4000:]}")
    return done.stdout


def tests(model: Path, text: str) -> list[Test]:
    """All tests, those that take long first."""

    def operations_passed(output: str) -> bool:
        plain = re.sub(r"\x1b\[[0-9;]*m", "", output)
        passed = re.findall(r"^  (\w+)\(.*ccq2.*\): OK$", plain, re.MULTILINE)
        return {"MUL_MAT", "MUL_MAT_ID", "GET_ROWS"} <= {*passed} and "FAIL" not in plain

    def none_differ(output: str) -> bool:
        return re.fullmatch(r"0 of [1-9]\d+ (products|dot products) differ\n", output) is not None

    def quantized(output: str) -> bool:
        return re.search(r"ccq2 dot product error: +ok", output) is not None and output.endswith("0 tests failed\n")

    backend = ("-b", "CPU", "-p", OPERATIONS)
    return [
        *(Test(level, "test-backend-ops", backend, operations_passed) for level in PANELS),
        Test(MAIN, "test-quantize-fns", ("-v",), quantized),
        *(Test(level, "simple", tuple(greedy(Path(), model)[1:]), text.__eq__) for level in LEVELS),
        *(Test(level, "test-cpu-panels", (), none_differ) for level in PANELS),
        *(Test(level, "test-ccq-dot", (), none_differ) for level in LEVELS),
    ]


def run(test: Test, folder: Path) -> bool:
    """Run a test in the emulator; print a line, and what the program printed if it fails."""
    path = ":".join(str(folder / level / "bin") for level in (test.level, MAIN))
    emulator = ["qemu-aarch64", "-L", SYSROOT, "-E", f"LD_LIBRARY_PATH={path}"]
    start = time.monotonic()
    done = subprocess.run(
        [*emulator, str(folder / test.program), *test.arguments], capture_output=True, text=True, check=False
    )
    passed = done.returncode == 0 and test.passed(done.stdout)
    print(
        f"{test.program:18} {test.level:18} {'ok' if passed else 'FAILED':6} {time.monotonic() - start:4.0f} s",
        flush=True,
    )
    if not passed:
        print(done.stdout[-4000:], done.stderr[-4000:], flush=True)
    return passed


def main() -> None:
    """Build, then test."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tree", type=Path, required=True, help="the patched llama.cpp")
    parser.add_argument("--folder", type=Path, required=True, help="for the builds")
    parser.add_argument("--peer", type=Path, required=True, help="the libraries for this machine")
    parser.add_argument("--model", type=Path, required=True, help="GGUF whose text is compared with this machine's")
    parser.add_argument("--jobs", type=int, required=True)
    args = parser.parse_args()
    check_tools()
    folder = args.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    for level in LEVELS:
        build_libraries(args.tree, folder, level, args.jobs)
    with ThreadPoolExecutor(args.jobs) as pool:
        libraries = folder / MAIN / "bin"
        list(pool.map(lambda name: compile_program(CROSS, args.tree, libraries, name, folder / name), PROGRAMS))
    text = text_on_x86(args.tree, folder, args.peer.absolute(), args.model)
    with ThreadPoolExecutor(args.jobs) as pool:
        verdicts = list(pool.map(lambda test: run(test, folder), tests(args.model, text)))
    if not all(verdicts):
        tree.fail(f"{verdicts.count(False)} of {len(verdicts)} tests failed")


if __name__ == "__main__":
    main()
