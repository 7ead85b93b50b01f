"""Each example runs, and says what it promises."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ernie_gguf.convert import prepare, write_gguf
from ernie_gguf.gguf_file.outtype import Outtype
from ernie_llama import Llama
from reference.specimens import VL_TINY
from support import png
from support.checkpoints import Spec
from support.servers import accepts, free_port, running
from support.videos import drawn, encoded, needs_ffmpeg
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
        "batch.py",
        "completion.py",
        "demo.py",
        "embeddings.py",
        "evaluation.py",
        "json_schema.py",
        "langchain_form.py",
        "pictures.py",
        "rpc.py",
        "streaming_chat.py",
        "tools.py",
        "two_threads.py",
        "video.py",
    }


def test_pictures(tmp_path: Path) -> None:
    (tmp_path / "noise.png").write_bytes(png.noise(84, 56, 0))
    job = prepare(make_vl(tmp_path / "checkpoint", Spec()), Outtype.BF16)
    write_gguf(job, tmp_path / "vl.gguf", 1, False, lambda _: None, mmproj=tmp_path / "eyes.gguf")
    done = example("pictures.py", tmp_path / "vl.gguf", tmp_path / "eyes.gguf", tmp_path / "noise.png")
    assert done.stdout.startswith(f"{tmp_path / 'noise.png'}  What is written here?  ")


@needs_ffmpeg
def test_video(tmp_path: Path) -> None:
    path = tmp_path / "noise.mov"
    encoded(path, drawn(4, 56, 84))
    write_gguf(
        prepare(VL_TINY, Outtype.BF16), tmp_path / "vl.gguf", 1, False, lambda _: None, mmproj=tmp_path / "mmproj"
    )
    done = example("video.py", tmp_path / "vl.gguf", tmp_path / "mmproj", path)
    assert done.stdout.startswith(f"{path}  What happens here?  ")


def test_demo(tmp_path: Path) -> None:
    """What `make demo` shows, in one type."""
    model, image = tmp_path / "ccq2.gguf", VL_TINY / "pictures" / "17-AOIDO-yellow.png"
    write_gguf(prepare(VL_TINY, Outtype.CCQ2), model, 1, False, lambda _: None, mmproj=tmp_path / "ccq2.mmproj")
    lines = example("demo.py", model, image).stdout.splitlines()
    assert [line.split() for line in lines] == [
        ["What", "is", "written", "here?", "ccq2.gguf"],
        [f"{model.stat().st_size / 1e6:.1f}", "MB"],
        [image.name, "AOIDO"],
    ]


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


def test_tools(tiny_ccq2_gguf: Path) -> None:
    done = example("tools.py", tiny_ccq2_gguf, "How late is it in Tokyo?", "2")
    assert re.match(r'get_time\(\{"zone": ?"[A-Za-z/_]+"\}\) = \d\d:\d\d\n', done.stderr)


def test_embeddings(tiny_ccq2_gguf: Path) -> None:
    lines = "open a file\nclass Node:\nimport os\n"
    printed = example("embeddings.py", tiny_ccq2_gguf, "open a file", "2", lines=lines).stdout.splitlines()
    assert printed[0] == "1.000 open a file"
    assert len(printed) == 2


def test_langchain_form(tiny_ccq2_gguf: Path) -> None:
    pytest.importorskip("langchain_community", reason="it is not installed: pip install -e '.[clients]'")
    printed = example("langchain_form.py", tiny_ccq2_gguf, "Ada Lovelace, born in 1815").stdout
    assert re.search(r"name='.*' born=\d+", printed)


def test_evaluation(tiny_ccq2_gguf: Path, tiny_bf16_gguf: Path) -> None:
    pairs = [
        {"context": "import os\nfrom pathlib import", "good": " Path", "bad": " self"},
        {"context": "def main():\n    return", "good": " 0", "bad": ": 0"},
    ]
    lines = "".join(json.dumps(pair) + "\n" for pair in pairs)
    printed = example("evaluation.py", tiny_bf16_gguf, tiny_ccq2_gguf, lines=lines).stdout.splitlines()
    assert [line.split("%")[0] for line in printed] == ["100.0", "100.0"]
    assert printed[1].endswith(str(tiny_ccq2_gguf))


def test_two_threads(tiny_ccq2_gguf: Path) -> None:
    printed = example("two_threads.py", tiny_ccq2_gguf, PROMPT, "import os").stdout
    assert printed.index(PROMPT) < printed.index("import os")
