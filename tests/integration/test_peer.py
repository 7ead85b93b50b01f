"""llama-cpp-python on our libllama, found by LLAMA_CPP_LIB_PATH: it runs, and gives the same as `ernie_llama`.

Only its Python part is used: that of the folder that LLAMA_CPP_PYTHON names, or of the source distribution that
reference/llama-cpp-python.txt pins, which is downloaded once and kept beside the llama.cpp tree.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tree
from ernie_llama import Llama

pytestmark = pytest.mark.build

PIN = Path(__file__).parents[1] / "reference" / "llama-cpp-python.txt"

# Written for llama-cpp-python. Before each call it forgets the last one: what it would keep may change the last bits of
# the logits. No answer is cut inside a character: llama-cpp-python writes more than max_tokens then.
PROGRAM = """
import json, sys
from MODULE import Llama, LlamaGrammar

prompts = ["def main():", "import os\\n", "class Node:\\n    def __init__(self"]
results = {}
llm = Llama(
    model_path=sys.argv[1], n_ctx=512, n_threads=1, n_threads_batch=1, flash_attn=True, logits_all=True, verbose=False
)
results["sizes"] = [llm.n_ctx(), llm.n_vocab(), llm.n_embd(), llm.token_bos(), llm.token_eos()]
for prompt in prompts:
    tokens = llm.tokenize(prompt.encode("utf-8"), add_bos=True, special=True)
    llm.reset()
    results[prompt] = {
        "tokens": tokens,
        "detokenized": llm.detokenize(tokens).decode("utf-8", errors="ignore"),
        "greedy": llm(prompt, max_tokens=32, temperature=0.0),
    }
    llm.reset()
    results[prompt]["stop"] = llm.create_completion(prompt, max_tokens=32, temperature=0.0, stop=["\\n    "], echo=True)
    llm.reset()
    results[prompt]["stream"] = "".join(
        chunk["choices"][0]["text"] for chunk in llm(prompt, max_tokens=16, temperature=0.0, stream=True)
    )
    llm.reset()
    results[prompt]["logprobs"] = llm(prompt, max_tokens=4, temperature=0.0, logprobs=3)
    llm.reset()
    results[prompt]["bias"] = llm(prompt, max_tokens=16, temperature=0.0, logit_bias={"15": -100.0})
    llm.reset()
    results[prompt]["grammar"] = llm(
        prompt, max_tokens=16, temperature=0.0, grammar=LlamaGrammar.from_string('root ::= "yes" | "no"', verbose=False)
    )
llm.reset()
messages = [{"role": "system", "content": "You write Python."}, {"role": "user", "content": "def f"}]
schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
answer = llm.create_chat_completion(
    messages=messages, temperature=0.0, max_tokens=64, response_format={"type": "json_object", "schema": schema}
)
# Not the blanks, which the grammars leave free; nor the tokens of the prompt: llama-cpp-python leaves out the BOS that
# the example's metadata asks for, and that llama-server writes.
results["json"] = [json.loads(answer["choices"][0]["message"]["content"]), answer["choices"][0]["finish_reason"]]
llm.reset()
llm(prompt, max_tokens=1, temperature=0.0)  # llama-cpp-python's sample() goes on with the sampler of the last call
llm.reset()
llm.eval(tokens)
state = llm.save_state()
first = llm.sample(temp=0.0)
llm.eval([first])
second = llm.sample(temp=0.0)
llm.reset()
llm.load_state(state)
llm.eval([first])
results["state"] = [state.n_tokens, first, second, llm.sample(temp=0.0)]
text = "# naïve 日本語 🎉\\n".encode("utf-8")
results["unicode"] = [llm.tokenize(text), llm.detokenize(llm.tokenize(text)).decode("utf-8")]
llm.close()
llm = Llama(model_path=sys.argv[1], embedding=True, flash_attn=True, n_threads=1, verbose=False)
results["embedding"] = llm.create_embedding(["import os"])
print(json.dumps(results, default=float))  # its log probabilities are numpy numbers
"""

# What docs/python-api.md says of stock llama-cpp-python: nothing but LLAMA_CPP_LIB_PATH tells it where the library is.
STOCK = """
import json, sys
import llama_cpp
llm = llama_cpp.Llama(sys.argv[1], n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False)
prompt, messages = "def main():", [{"role": "user", "content": "def f"}]
greedy = {"max_tokens": 16, "temperature": 0.0}
results = {"version": llama_cpp.__version__, "completion": llm(prompt, **greedy)["choices"][0]["text"]}
llm.reset()
results["stream"] = "".join(chunk["choices"][0]["text"] for chunk in llm(prompt, stream=True, **greedy))
llm.reset()
results["chat"] = llm.create_chat_completion(messages, **greedy)["choices"][0]["message"]["content"]
llm.reset()
chunks = llm.create_chat_completion(messages, stream=True, **greedy)
results["chat stream"] = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
llm = llama_cpp.Llama(sys.argv[1], embedding=True, pooling_type=1, n_threads=1, verbose=False)
results["embeddings"] = [each["embedding"] for each in llm.create_embedding(["import os", "x"])["data"]]
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def peer(llama_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the package llama_cpp."""
    for module in ("diskcache", "jinja2", "numpy", "typing_extensions"):
        pytest.importorskip(module, reason=f"llama-cpp-python needs {module}: pip install -e '.[dev]'")
    if named := os.environ.get("LLAMA_CPP_PYTHON"):
        return Path(named)
    try:
        sdist = tree.fetch(llama_tree.parent, PIN)
    except SystemExit as error:
        if (llama_tree.parent / tree.pinned(PIN)[0]).exists():
            raise
        pytest.skip(f"llama-cpp-python is not there: {error}")
    folder = tmp_path_factory.mktemp("peer")
    with tarfile.open(sdist) as archive:
        package = f"{sdist.name.removesuffix('.tar.gz')}/llama_cpp/"
        members = [each for each in archive.getmembers() if each.name.startswith(package) and each.isfile()]
        for member in members:
            extracted = archive.extractfile(member)
            assert extracted is not None
            path = folder / member.name.split("/", 1)[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(extracted.read())
    return folder


def results(program: str, model: Path, llama_bin: Path, *paths: Path) -> dict[str, Any]:
    """What the program prints, without what differs from run to run."""
    environment = {
        **os.environ,
        "LLAMA_CPP_LIB_PATH": str(llama_bin),
        "ERNIE_LLAMA_LIB_PATH": str(llama_bin),
        "PYTHONPATH": os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-W", "ignore", "-c", program, str(model)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    return without_times(json.loads(done.stdout))  # type: ignore[no-any-return]  # a dictionary gives one


def without_times(value: Any) -> Any:  # noqa: ANN401 - any JSON
    if isinstance(value, dict):
        return {key: without_times(each) for key, each in value.items() if key not in {"id", "created"}}
    return [without_times(each) for each in value] if isinstance(value, list) else value


def test_the_same_program_gives_the_same(llama_bin: Path, tiny_ccq2_gguf: Path, peer: Path) -> None:
    theirs = results(PROGRAM.replace("MODULE", "llama_cpp"), tiny_ccq2_gguf, llama_bin, peer)
    ours = results(PROGRAM.replace("MODULE", "ernie_llama"), tiny_ccq2_gguf, llama_bin)
    assert len(theirs["def main():"]["greedy"]["choices"][0]["text"]) > 20
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        assert rounded(ours[key]) == rounded(value), key


def test_stock_llama_cpp_python_runs_over_this_library(
    llama_bin: Path, built_library: None, tiny_ccq2_gguf: Path, peer: Path
) -> None:
    out = results(STOCK, tiny_ccq2_gguf, llama_bin, peer)
    assert f"llama_cpp_python-{out['version']}" == tree.pinned(PIN)[0].removesuffix(".tar.gz")
    assert out["completion"] == out["stream"]
    assert out["chat"] == out["chat stream"]
    with Llama(str(tiny_ccq2_gguf), n_threads=1, flash_attn=False) as llm:  # its default
        expected = llm("def main():", max_tokens=16, temperature=0)["choices"][0]["text"]
        assert out["completion"] == expected
    assert len(out["chat"]) > 10
    first, second = np.array(out["embeddings"])
    assert first.shape == second.shape == (256,)
    assert abs(first @ second) < 0.999 * np.linalg.norm(first) * np.linalg.norm(second)


def rounded(value: Any) -> Any:  # noqa: ANN401 - any JSON
    """Numbers to three digits: log probabilities are computed in other orders."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return pytest.approx(value, abs=1e-3) if isinstance(value, float) else value
