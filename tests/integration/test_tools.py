"""llama.cpp's own programs on files with ccq2 tensors: they know the type, agree on the text, refuse damaged files."""

from __future__ import annotations

import json
import re
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from ernie_gguf.gguf_file.reader import read_gguf
from ernie_llama import Llama
from support.models import llama_completion
from support.servers import free_port, running

pytestmark = pytest.mark.build

PROMPTS = ("def read_", "import os\n", "class Node:\n    def __init__(self")
MAX_TOKENS = 32


def run(llama_bin: Path, tool: str, *args: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [str(llama_bin / tool), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, stdin=subprocess.DEVNULL, check=False)
    assert not check or done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done


def test_quantize_fns(llama_bin: Path) -> None:
    output = run(llama_bin, "test-quantize-fns", "-v").stdout
    assert re.search(r"ccq2 dot product error: +ok", output)
    assert output.endswith("0 tests failed\n")


def test_backend_ops(llama_bin: Path) -> None:
    """Every case of ccq2 that the CPU says it supports is right; it must say so of the ops that inference needs.

    Without the cases of a GPU's batches, 64 experts of 160 rows of 8192: the CPU encodes each for a minute.
    """
    output = run(llama_bin, "test-backend-ops", "-b", "CPU", "-p", "ccq2(?!.*,m=160,)").stdout
    plain = re.sub(r"\x1b\[[0-9;]*m", "", output)
    passed = re.findall(r"^  (\w+)\(.*ccq2.*\): OK$", plain, re.MULTILINE)
    assert {"MUL_MAT", "MUL_MAT_ID", "GET_ROWS", "CPY"} <= {*passed}
    assert "FAIL" not in plain
    assert not re.search(r"^  (MUL_MAT|MUL_MAT_ID|GET_ROWS)\(.*ccq2.*not supported", plain, re.MULTILINE)


def test_products_by_panels(llama_bin: Path) -> None:
    """They equal the dot products, whatever the shape, and are the same bits with 1, 2 and 3 threads."""
    output = run(llama_bin, "test-cpu-panels").stdout
    assert re.fullmatch(r"0 of [1-9]\d+ products differ\n", output)


def test_llama_bench_names_the_type(llama_bin: Path, tiny_ccq2_gguf: Path) -> None:
    options = ("-p", "16", "-n", "4", "-r", "1", "-t", "1", "-o", "json")
    rows = json.loads(run(llama_bin, "llama-bench", "-m", tiny_ccq2_gguf, *options).stdout)
    assert [row["model_type"] for row in rows] == ["ernie4_5-moe ?B CCQ2 experts - 2.1 bpw"] * 2
    assert all(row["avg_ts"] > 0 for row in rows)


def test_perplexity(llama_bin: Path, tiny_bf16_gguf: Path, tiny_ccq2_gguf: Path, tmp_path: Path) -> None:
    """Two bits cost something, but the model still knows its Python."""
    text = tmp_path / "text.py"
    text.write_text("".join(path.read_text() for path in sorted(Path(__file__).parent.glob("test_*.py")))[:12000])
    values = []
    for path in (tiny_bf16_gguf, tiny_ccq2_gguf):
        output = run(llama_bin, "llama-perplexity", "-m", path, "-f", text, "-c", "512", "-t", "1")
        found = re.search(r"Final estimate: PPL = ([0-9.]+)", output.stdout + output.stderr)
        assert found is not None
        values.append(float(found[1]))
    bf16, ccq2 = values
    assert bf16 < ccq2 < 1.5 * bf16


@pytest.fixture(scope="module", params=["tiny_bf16_gguf", "tiny_ccq2_gguf"])
def model(request: pytest.FixtureRequest) -> Path:
    path = request.getfixturevalue(request.param)
    assert isinstance(path, Path)
    return path


@pytest.fixture(scope="module")
def server(llama_bin: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A llama-server on loopback; yields its address."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"

    def healthy() -> bool:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return True
        except OSError:  # nobody listens yet, or 503 while it loads
            return False

    options = ("--port", str(port), "-c", "512", "-t", "1", "-np", "1")
    log = tmp_path_factory.mktemp("server") / "server.log"
    with running([llama_bin / "llama-server", "-m", model, *options], log, healthy):
        yield address


def complete(address: str, **fields: object) -> str:
    body = json.dumps({"temperature": 0, "cache_prompt": False, **fields}).encode()
    request = urllib.request.Request(f"{address}/completion", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        text = json.load(answer)["content"]
    assert isinstance(text, str)
    return text


@pytest.mark.usefixtures("built_library")
def test_server_tools_and_bindings_write_the_same(llama_bin: Path, model: Path, server: str) -> None:
    with Llama(str(model), n_ctx=512, n_threads=1) as llm:
        for prompt in PROMPTS:
            text = llm(prompt, max_tokens=MAX_TOKENS, temperature=0)["choices"][0]["text"]
            assert len(text) > 20
            assert complete(server, prompt=prompt, n_predict=MAX_TOKENS) == text
            output = llama_completion(llama_bin, model, prompt, MAX_TOKENS, "--temp", "0").stdout
            assert output.strip("\n") == text.strip("\n")


def test_chat_uses_the_template_of_the_file(server: str) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "def f"}], "max_tokens": 8, "temperature": 0}).encode()
    request = urllib.request.Request(f"{server}/v1/chat/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        chat = json.load(answer)
    assert chat["choices"][0]["message"]["role"] == "assistant"
    assert chat["usage"]["completion_tokens"] > 0
    templated = json.dumps({"messages": [{"role": "user", "content": "def f"}]}).encode()
    request = urllib.request.Request(f"{server}/apply-template", templated, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert json.load(answer)["prompt"] == "<|begin_of_sentence|>User: def f\nAssistant: "


def test_llama_cli_chats(llama_bin: Path, tiny_ccq2_gguf: Path) -> None:
    options = ("-p", "def read_", "-n", "8", "--temp", "0", "-c", "256", "-t", "1", "--single-turn")
    assert "def read_" in run(llama_bin, "llama-cli", "-m", tiny_ccq2_gguf, *options).stdout


def load_error(llama_bin: Path, path: Path) -> str:
    """What llama-completion says of a file that it must refuse without a crash."""
    done = run(llama_bin, "llama-completion", "-m", path, "-p", "x", "-n", "1", "-no-cnv", check=False)
    assert done.returncode == 1
    return done.stderr


def test_truncated_file_is_refused(llama_bin: Path, tiny_ccq2_gguf: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.gguf"
    short.write_bytes(tiny_ccq2_gguf.read_bytes()[:-4096])
    assert "data is not within the file bounds, model is corrupted or incomplete" in load_error(llama_bin, short)


KEY = b"ernie_gguf.ccq.layout"
U32, I32 = (4).to_bytes(4, "little"), (5).to_bytes(4, "little")  # types of a value in GGUF
ONE, TWO = (1).to_bytes(4, "little"), (2).to_bytes(4, "little")
ADVICE = "this build reads layout 1: convert the checkpoint again with the ernie-gguf that belongs to this build"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (KEY + U32 + TWO, "ernie_gguf.ccq.layout is 2"),
        (KEY + I32 + ONE, "ernie_gguf.ccq.layout has type i32, not u32"),
        (KEY.upper() + U32 + ONE, "ernie_gguf.ccq.layout is missing"),
    ],
    ids=["foreign", "wrong type", "missing"],
)
def test_layout_is_checked(llama_bin: Path, tiny_ccq2_gguf: Path, tmp_path: Path, change: bytes, message: str) -> None:
    data = tiny_ccq2_gguf.read_bytes()
    assert data.count(KEY + U32 + ONE) == 1
    foreign = tmp_path / "foreign.gguf"
    foreign.write_bytes(data.replace(KEY + U32 + ONE, change))
    assert f"has type ccq2, but the metadata key {message}; {ADVICE}" in load_error(llama_bin, foreign)


def test_llama_quantize_copies(llama_bin: Path, tiny_ccq2_gguf: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.gguf"
    run(llama_bin, "llama-quantize", tiny_ccq2_gguf, copy, "COPY")
    assert run(llama_bin, "llama-bench", "-m", copy, "-p", "0", "-n", "1", "-r", "1", "-t", "1").returncode == 0


def test_llama_quantize_shrinks_the_rest_and_keeps_the_experts(
    llama_bin: Path, tiny_ccq2_gguf: Path, tmp_path: Path
) -> None:
    """The command of docs/convert.md, on the example."""
    small = tmp_path / "small.gguf"
    keep = ("--tensor-type", "_exps=ccq2", "--tensor-type", "attn=q5_K")
    run(llama_bin, "llama-quantize", "--allow-requantize", *keep, tiny_ccq2_gguf, small, "q5_K")
    before, after = read_gguf(tiny_ccq2_gguf), read_gguf(small)
    tensors = {tensor.name: tensor for tensor in after.tensors}
    for tensor in before.tensors:
        if "_exps." in tensor.name:
            assert (tensors[tensor.name].type_name, tensor.type_name) == ("ccq2", "ccq2")
            np.testing.assert_array_equal(after.rows(tensors[tensor.name]), before.rows(tensor))
    assert {t.type_name for name, t in tensors.items() if ".attn_" in name and "norm" not in name} == {"q5_k"}
    assert small.stat().st_size < 0.85 * tiny_ccq2_gguf.stat().st_size
    assert run(llama_bin, "llama-bench", "-m", small, "-p", "0", "-n", "1", "-r", "1", "-t", "1").returncode == 0


def test_split_file_loads(llama_bin: Path, tiny_ccq2_gguf: Path, tmp_path: Path) -> None:
    run(llama_bin, "llama-gguf-split", "--split", "--split-max-tensors", "20", tiny_ccq2_gguf, tmp_path / "split")
    first = min(tmp_path.glob("split-*.gguf"))
    assert run(llama_bin, "llama-bench", "-m", first, "-p", "0", "-n", "1", "-r", "1", "-t", "1").returncode == 0


def test_check_tensors_finds_a_damaged_row(llama_bin: Path, tiny_ccq2_gguf: Path, tmp_path: Path) -> None:
    """The word after a row's super scale must be zero; --check-tensors looks at every row."""
    data = bytearray(tiny_ccq2_gguf.read_bytes())
    header = (15853988).to_bytes(4, "little") + (162772864).to_bytes(4, "little")
    row = data.index(header, len(data) // 2)
    data[row + 12] = 1
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(data)
    options = ("-p", "x", "-n", "1", "-no-cnv", "--check-tensors")
    done = run(llama_bin, "llama-completion", "-m", damaged, *options, check=False)
    assert done.returncode == 1
    assert "reserved word of the row header is 1, not 0" in done.stderr
    assert "has invalid data" in done.stderr
