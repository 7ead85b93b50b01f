"""What a fine-tune's small files say reaches llama.cpp: ends of generation, sampling, chat template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from ernie_llama import Llama
from reference.specimens import TINY
from support.models import convert

from .test_server import serving

pytestmark = pytest.mark.build

PROMPT = "import os\n"


def fine_tune(folder: Path, **files: dict[str, Any]) -> Path:
    """The example with some keys of its JSON files changed, None removing one."""
    shutil.copytree(TINY, folder)
    for name, changes in files.items():
        path = folder / f"{name}.json"
        values = (json.loads(path.read_text()) if path.exists() else {}) | changes
        path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return folder


def test_generation_ends_at_every_end_that_a_file_names(built_library: None, tmp_path: Path) -> None:
    with Llama(convert(TINY, tmp_path / "before.gguf", "q8_0").path, n_ctx=256, n_threads=1) as llm:
        tokens = llm.tokenize(PROMPT.encode())
        text = [token for token, _ in zip(llm.generate(tokens, temp=0.0), range(30), strict=False)]
    first = next(token for token in text[5:] if token not in text[:5])
    others = [token for token in range(300, 310) if token not in text][:1]
    source = fine_tune(
        tmp_path / "source",
        tokenizer_config={"eos_token": "<|begin_of_sentence|>"},
        generation_config={"eos_token_id": [2, first, *others]},
    )
    with Llama(convert(source, tmp_path / "after.gguf", "q8_0").path, n_ctx=256, n_threads=1) as llm:
        done = llm(PROMPT, max_tokens=30, temperature=0)
        end_of_turn = llm.tokenize(b"<|end_of_sentence|>", add_bos=False, special=True)
        begin = llm.tokenize(b"<|begin_of_sentence|>", add_bos=False, special=True)
        ends = [2, first, *others, *end_of_turn, *begin]
        assert all(llm._model.is_eog(token) for token in ends)
        assert not any(llm._model.is_eog(token) for token in set(range(4096)) - set(ends))
    assert done["choices"][0]["finish_reason"] == "stop"
    assert done["usage"]["completion_tokens"] == text.index(first)


def test_llama_server_samples_and_renders_as_the_checkpoint_says(built_library: None, tmp_path: Path) -> None:
    source = fine_tune(
        tmp_path / "source",
        tokenizer_config={"chat_template": None},
        chat_template={"chat_template": "{% for m in messages %}<{{ m.content }}>{% endfor %}"},
        generation_config={"temperature": 0.25, "top_p": 0.5, "top_k": 7, "repetition_penalty": 1.5, "min_p": 0.125},
    )
    path = convert(source, tmp_path / "model.gguf", "q8_0").path
    with serving(path, tmp_path / "log") as server:
        props = json.loads(server.get("/props"))
    settings = props["default_generation_settings"]["params"]
    wanted = {"temperature": 0.25, "top_p": 0.5, "top_k": 7, "repeat_penalty": 1.5, "min_p": 0.125}
    assert {key: settings[key] for key in wanted} == wanted
    assert props["chat_template"].startswith("{% for m in messages %}<{{")
