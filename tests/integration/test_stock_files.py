"""Files of `quantize --types stock` in a llama.cpp without our patches: xllamacpp's, as it comes from PyPI."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from ernie_llama import Llama
from support.checkpoints import EXAMPLE

pytestmark = pytest.mark.build

pytest.importorskip("torch", reason="torch is not installed (extra `quantize`)")
pytest.importorskip("xllamacpp", reason="xllamacpp is not installed (extra `stock`): it brings an unpatched llama.cpp")

PROMPT = "import os\n\n\ndef main("
# Each in a process of its own: two libraries named libllama must not meet.
STOCK = """
import json, sys
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.cpuparams.n_threads, params.warmup = sys.argv[1], 512, 1, False
server = xllamacpp.Server(params)
done = server.handle_completions({"prompt": sys.argv[2], "n_predict": 1, "temperature": 0.0, "n_probs": 5})
done = json.loads(done) if isinstance(done, str) else done
entries = done["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
print("RESULT", json.dumps({entry["token"]: entry["logprob"] for entry in entries}))
"""
QUICK = ("--threads", "1", "--max-tokens", "1024", "--ctx-size", "128", "--device", "cpu", "--overwrite")
# ernie-tiny's rows are short; these types hold them.
MIXES = {
    "stock": ("--types", "stock"),
    "many types": ("--tensor-type", "ffn_down_exps=iq4_xs", "--tensor-type", "ffn_up_exps=q3_k", "--types", "stock"),
    "fine": (
        "--tensor-type",
        "ffn_(gate|up)_exps=iq3_s",
        "--tensor-type",
        "exps=iq3_xxs",
        "--tensor-type",
        "attn=q6_k",
    ),
}


@pytest.mark.parametrize("name", MIXES)
def test_an_unpatched_llama_cpp_reads_the_file_and_agrees(tmp_path: Path, name: str) -> None:
    import json

    text, out = tmp_path / "text.txt", tmp_path / "out.gguf"
    text.write_bytes(Path(__file__).read_bytes() * 3)
    command = [sys.executable, "-c", "from ernie_gguf.cli import main; main()", "quantize", str(EXAMPLE)]
    command += ["--calibration", str(text), "--outfile", str(out), *QUICK, *MIXES[name]]
    subprocess.run(command, check=True, capture_output=True)
    done = subprocess.run([sys.executable, "-c", STOCK, str(out), PROMPT], check=True, capture_output=True, text=True)
    stock = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT")).split(" ", 1)[1])
    with Llama(out, n_ctx=512, n_threads=1, logits_all=True, verbose=False) as llm:
        found = llm.create_completion(PROMPT, max_tokens=1, temperature=0.0, logprobs=5)
    logprobs = found["choices"][0]["logprobs"]
    assert logprobs is not None
    ours = logprobs["top_logprobs"][0]
    assert ours is not None
    shared = sorted(set(ours) & set(stock))
    assert len(shared) >= 3
    assert max(ours.items(), key=lambda each: each[1])[0] == max(stock, key=lambda token: stock[token])
    assert [ours[token] for token in shared] == pytest.approx([stock[token] for token in shared], abs=0.05)
