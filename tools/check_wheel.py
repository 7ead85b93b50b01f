"""Install a wheel in a fresh environment, away from every checkout and compiler, and use all of it.

Needs nothing but Python, and the example checkpoint of this repository.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import venv
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "ernie-tiny"
VARIANTS = Path(__file__).resolve().parent / "check_variants.py"
PYTHON = """
from ernie_llama import Llama
with Llama("tiny.gguf", n_ctx=256) as llm:
    print(llm("def read_", max_tokens=8, temperature=0)["choices"][0]["text"])
"""


def main() -> None:
    """Install, use, uninstall."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    wheel = parser.parse_args().wheel.absolute()
    if not wheel.is_file():
        sys.exit(f"error: {wheel} does not exist; build it with `make wheel`")
    with tempfile.TemporaryDirectory(prefix="ernie-gguf-wheel-") as name:
        folder = Path(name)
        venv.create(folder / "venv", with_pip=True)
        binaries = folder / "venv" / "bin"
        shutil.copytree(EXAMPLE, folder / "ernie-tiny")
        # No compiler, no cmake, no variables that lead to a checkout or to a build of this user.
        environment = {"PATH": str(binaries), "HOME": str(folder), "LANG": "C.UTF-8"}

        def run(*command: str, stdin: str = "") -> str:
            done = subprocess.run(
                [str(binaries / command[0]), *command[1:]],
                cwd=folder,
                env=environment,
                input=stdin,
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode != 0:
                sys.exit(f"error: {' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
            return done.stdout

        # pip keeps the user's configuration, which may name mirrors. Of the extra `quantize` the plan needs no more.
        install = [str(binaries / "pip"), "install", "-q", str(wheel), "sentencepiece"]
        subprocess.run(install, check=True, env=os.environ)
        before = {path for path in (folder / "venv").rglob("*") if path.is_file()}
        run("ernie-gguf", "convert", "ernie-tiny", "--outfile", "tiny.gguf", "--outtype", "ccq2")
        library = json.loads(run("ernie-gguf", "info", "--json"))
        if not library["path"].startswith(str(folder)) or not library["ccq2"]:
            sys.exit(f"error: not the wheel's library: {library['path']}")
        print(f"{library['system_info']}\nllama.cpp {library['version']}, ccq2: yes")
        run("ernie-gguf", "info", "tiny.gguf", "--gpus", "1,1")
        (folder / "text.txt").write_text("def main():\n    return 1\n" * 20000)
        quantize = ("--calibration", "text.txt", "--outfile", "2bit.gguf", "--dry-run")
        run("ernie-gguf", "quantize", "ernie-tiny", *quantize)
        print("Python wrote:", repr(run("python", "-c", PYTHON)))
        run("ernie-gguf", "chat", "tiny.gguf", "-c", "256", stdin="hello\n")
        shutil.copy2(VARIANTS, folder)
        print("CPU variants:", run("python", VARIANTS.name, "tiny.gguf"), sep="\n", end="")
        ask_the_server(binaries, folder, environment)
        run("pip", "uninstall", "-y", "-q", "ernie-gguf")
        left = [path for path in before if path.exists() and "ernie" in str(path.relative_to(folder / "venv"))]
        if left:
            sys.exit(f"error: pip uninstall left {left[0]}")
    print(f"{wheel.name}: installed, used, uninstalled")


def ask_the_server(binaries: Path, folder: Path, environment: dict[str, str]) -> None:
    """Start `serve`; ask for its page and for a text."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [str(binaries / "ernie-gguf"), "serve", "tiny.gguf", "--", "--port", port]
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        # The page is stored compressed, and the server refuses who cannot read it so.
        page = urllib.request.Request(address, headers={"Accept-Encoding": "gzip"})
        with urllib.request.urlopen(page, timeout=30) as answer:
            if not answer.headers["Content-Type"].startswith("text/html"):
                sys.exit("error: the server shows no page")
        body = json.dumps({"prompt": "def read_", "max_tokens": 8}).encode()
        request = urllib.request.Request(f"{address}/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            print("The server wrote:", repr(json.load(answer)["choices"][0]["text"]))
    except OSError as error:
        sys.exit(f"error: the server did not answer: {error}\n{(folder / 'server.log').read_text()[-2000:]}")
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
