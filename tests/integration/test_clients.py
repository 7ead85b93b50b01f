"""Third-party programs for llama-cpp-python, unmodified, on `ernie_llama`: completion, chat, stream, schema.

They come with the extra `clients`; llm-gguf needs `pip install httpx; pip install --no-deps llm-gguf`, as it depends on
llama-cpp-python.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.build

HEAD = """
import json, sys
from typing import Literal
from pydantic import BaseModel, ConfigDict
class Form(BaseModel):
    "A form"
    model_config = ConfigDict(extra="forbid")
    good: bool
    colour: Literal["red", "green"]
model, prompt, out = sys.argv[1], "def main():", {}
"""
LANGCHAIN = """
from langchain_community.chat_models import ChatLlamaCpp
from langchain_community.embeddings import LlamaCppEmbeddings
from langchain_community.llms import LlamaCpp
llm = LlamaCpp(model_path=model, n_ctx=512, n_threads=1, temperature=0, max_tokens=8, verbose=False)
out["completion"], out["stream"] = llm.invoke(prompt), "".join(llm.stream(prompt))
out["tokens"] = llm.get_num_tokens(prompt)
chat = ChatLlamaCpp(model_path=model, n_ctx=512, n_threads=1, temperature=0, max_tokens=300, verbose=False)
out["chat"] = chat.invoke("def f").content
out["chat stream"] = "".join(chunk.content for chunk in chat.stream("def f"))
out["schema"] = chat.with_structured_output(Form).invoke("x").model_dump()
embeddings = LlamaCppEmbeddings(model_path=model, n_ctx=512, n_threads=1, verbose=False)
out["embedding"] = len(embeddings.embed_documents(["a"])[0])
"""
GUIDANCE = """
import guidance
from guidance import gen, models, select
lm = models.LlamaCpp(model, n_ctx=512, n_threads=1, echo=False)
out["completion"] = (lm + prompt + gen("x", max_tokens=8, temperature=0))["x"]
out["choice"] = (lm + prompt + select(["yes", "no"], name="x"))["x"]
out["schema"] = json.loads((lm + "JSON: " + guidance.json("x", schema=Form, max_tokens=200))["x"])
"""
OUTLINES = """
import outlines
from llama_cpp import Llama
llm = Llama(model, n_ctx=512, n_threads=1, verbose=False)
lm = outlines.from_llamacpp(llm, chat_mode=False)
out["completion"] = lm(prompt, max_tokens=8, temperature=0.0)
out["stream"] = "".join(lm.stream(prompt, max_tokens=8, temperature=0.0))
out["choice"] = lm(prompt, Literal["yes", "no"], max_tokens=8)
out["schema"] = json.loads(lm("JSON: ", Form, max_tokens=300, temperature=0.0))
chat = outlines.from_llamacpp(llm)
out["chat"] = chat("def f", max_tokens=8, temperature=0.0)
"""
LLM_GGUF = """
import llm
from pathlib import Path
folder = llm.user_dir() / "gguf"
folder.mkdir(parents=True)
(folder / "models.json").write_text(json.dumps({"ernie": {"path": model, "n_ctx": 512}}))
(folder / "embed-models.json").write_text(json.dumps({"ernie": {"path": model}}))
chat = llm.get_model("gguf/ernie").prompt("def f")
chunks = [chunk for chunk, _ in zip(chat, range(8))]
out["chat stream"] = "".join(chunks)
out["embedding"] = len(llm.get_embedding_model("gguf/ernie").embed("a"))
"""


def run(module: str, program: str, llama_bin: Path, model: Path, folder: Path) -> dict[str, Any]:
    """What `program` has put into `out`; skips if the third-party `module` is not installed."""
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed: pip install -e '.[clients]'")
    path = folder / "program.py"
    path.write_text(HEAD + program + "\nprint(json.dumps(out))\n")
    environment = {**os.environ, "ERNIE_LLAMA_LIB_PATH": str(llama_bin), "LLM_USER_PATH": str(folder / "llm")}
    command = [sys.executable, "-W", "ignore", "-m", "ernie_llama.as_llama_cpp", str(path), str(model)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def check_form(form: dict[str, Any]) -> None:
    assert isinstance(form["good"], bool)
    assert form["colour"] in {"red", "green"}


def test_langchain(llama_bin: Path, tiny_ccq2_gguf: Path, tmp_path: Path) -> None:
    out = run("langchain_community", LANGCHAIN, llama_bin, tiny_ccq2_gguf, tmp_path)
    assert out["completion"] == out["stream"] != ""
    assert out["chat"] == out["chat stream"] != ""
    assert out["tokens"] > 1
    assert out["embedding"]
    check_form(out["schema"])


def test_guidance(llama_bin: Path, tiny_ccq2_gguf: Path, tmp_path: Path) -> None:
    out = run("guidance", GUIDANCE, llama_bin, tiny_ccq2_gguf, tmp_path)
    assert out["completion"]
    assert out["choice"] in {"yes", "no"}
    check_form(out["schema"])


def test_outlines(llama_bin: Path, tiny_ccq2_gguf: Path, tmp_path: Path) -> None:
    out = run("outlines", OUTLINES, llama_bin, tiny_ccq2_gguf, tmp_path)
    assert out["completion"] == out["stream"] != ""
    assert out["chat"]
    assert out["choice"] in {"yes", "no"}
    check_form(out["schema"])


def test_llm_gguf(llama_bin: Path, tiny_ccq2_gguf: Path, tmp_path: Path) -> None:
    out = run("llm_gguf", LLM_GGUF, llama_bin, tiny_ccq2_gguf, tmp_path)
    assert out["chat stream"]
    assert out["embedding"]
