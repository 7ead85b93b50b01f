"""Each example runs, and says what it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from ernie_gguf.convert import prepare, write_gguf
from ernie_gguf.gguf_file.outtype import Outtype
from ernie_llama import Llama
from support import png
from support.checkpoints import Spec
from support.servers import accepts, free_port, running
from support.vl import make_vl

pytestmark = [pytest.mark.build, pytest.mark.usefixtures("built_library")]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PROMPT = "def main():"


# The examples take a thread for each core; where other work needs the cores too, those wait for each other.
ON_ONE_CORE = """
import os, runpy, sys
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def example(name: str, *args: str | Path, lines: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", ON_ONE_CORE, str(EXAMPLES / name), *map(str, args)]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def test_every_example_has_a_test() -> None:
    names = {path.name for path in EXAMPLES.glob("*.py")}
    assert names == {
        *("demo.py", "completion.py", "streaming_chat.py", "json_schema.py", "batch.py", "rpc.py", "pictures.py"),
    }


def test_pictures(tmp_path: Path) -> None:
    (tmp_path / "noise.png").write_bytes(png.noise(84, 56, 0))
    job = prepare(make_vl(tmp_path / "checkpoint", Spec()), Outtype.BF16)
    write_gguf(job, tmp_path / "vl.gguf", 1, False, lambda _: None, mmproj=tmp_path / "eyes.gguf")
    done = example("pictures.py", tmp_path / "vl.gguf", tmp_path / "eyes.gguf", tmp_path / "noise.png")
    assert done.stdout.startswith(f"{tmp_path / 'noise.png'}  What is written here?  ")


def test_demo(tiny_ccq2_gguf: Path) -> None:
    assert tiny_ccq2_gguf.name in example("demo.py", tiny_ccq2_gguf).stdout


def test_completion(tiny_ccq2_gguf: Path) -> None:
    printed = example("completion.py", tiny_ccq2_gguf, PROMPT).stdout
    assert printed.startswith(PROMPT)
    assert printed.rstrip().endswith(("tokens, length)", "tokens, stop)"))


def test_streaming_chat(tiny_ccq2_gguf: Path) -> None:
    done = example("streaming_chat.py", tiny_ccq2_gguf, "def f")
    assert len(done.stdout) > 20
    assert done.stderr == ""


def test_json_schema(tiny_ccq2_gguf: Path) -> None:
    form = json.loads(example("json_schema.py", tiny_ccq2_gguf, "Ada Lovelace, born in 1815").stdout)
    assert list(form) == ["name", "born", "topics"]
    assert isinstance(form["name"], str)
    assert form["born"] is None or isinstance(form["born"], int)
    assert set(form["topics"]) <= {"art", "science", "politics"}


def test_batch(tiny_ccq2_gguf: Path) -> None:
    prompts = ["def read(", "import ", "class 日本語:"]
    printed = example("batch.py", tiny_ccq2_gguf, "# Python\n", lines="\n".join(prompts) + "\n").stdout
    answers = [json.loads(line) for line in printed.splitlines()]
    assert [answer["prompt"] for answer in answers] == prompts
    with Llama(tiny_ccq2_gguf, n_threads=1) as llm:
        for answer in answers:
            own = llm("# Python\n" + answer["prompt"], max_tokens=32, temperature=0, stop=["\n\n"])
            assert answer["text"] == own["choices"][0]["text"]
            assert answer["tokens"] == own["usage"]["completion_tokens"]


def test_rpc(llama_bin: Path, tiny_ccq2_gguf: Path, tmp_path: Path) -> None:
    program = llama_bin / "ggml-rpc-server"
    if not program.exists():
        pytest.skip(f"{program} is not built: configure llama.cpp with -DGGML_RPC=ON")
    port = free_port()
    command: list[str | Path] = [program, "-H", "127.0.0.1", "-p", str(port), "-t", "1"]
    with running(command, tmp_path / "log", lambda: accepts(port)):
        printed = example("rpc.py", tiny_ccq2_gguf, f"127.0.0.1:{port}", PROMPT).stdout
    assert f"RPC0: 127.0.0.1:{port}\n" in printed
    assert PROMPT in printed
