"""Special tokens from every file that may name them, in every form; disagreement is said and no end is lost."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from ernie_gguf.checkpoint.config import parse_config
from ernie_gguf.checkpoint.special_tokens import ENDS_BY_TEXT, SLOTS, special_ids
from ernie_gguf.errors import ErnieGgufError
from support.checkpoints import Spec, config

TOKENS = ["<unk>", "<s>", "</s>", "<|end_of_sentence|>", "<|im_end|>", "<end>", "<stop>", "<last>", "<more>"]
NAMES = {token: i for i, token in enumerate(TOKENS)}
PLAIN: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def read(folder: Path, tokenizer: dict[str, Any] | None = None, **files: Any) -> tuple[dict[str, int], list[str]]:  # noqa: ANN401
    """Special ids of a checkpoint with these files; `config` changes PLAIN."""
    for name in ("generation_config", "special_tokens_map"):
        if name in files:
            (folder / f"{name}.json").write_text(json.dumps(files[name]))
    values = config(Spec()) | {"vocab_size": len(TOKENS)} | PLAIN | files.get("config", {})
    return special_ids(folder, parse_config(values), TOKENS, tokenizer or {})


def ends(special: dict[str, int]) -> set[str]:
    """The tokens at which llama.cpp ends generation."""
    return {TOKENS[special[slot]] for slot in SLOTS if slot in special} | ENDS_BY_TEXT & set(TOKENS)


def test_files_that_agree(tmp_path: Path) -> None:
    names = {"eos_token": "</s>", "bos_token": "<s>", "pad_token": "<unk>", "unk_token": {"content": "<unk>"}}
    special, notes = read(tmp_path, names, generation_config=PLAIN, special_tokens_map=names)
    assert special == {"bos": 1, "eos": 2, "pad": 0, "unk": 0, "eot": 3}
    assert notes == []


# Each names "<end>", in a place and in a form of its own.
PLACES: dict[str, dict[str, Any]] = {
    "config": {"config": {"eos_token_id": 5}},
    "config, a list": {"config": {"eos_token_id": [2, 5]}},
    "generation_config": {"generation_config": {"eos_token_id": 5}},
    "generation_config, a list": {"generation_config": {"eos_token_id": [2, 5]}},
    "generation_config, eot": {"generation_config": {"eot_token_id": 5}},
    "tokenizer_config": {"tokenizer": {"eos_token": "<end>"}},
    "tokenizer_config, AddedToken": {"tokenizer": {"eos_token": {"__type": "AddedToken", "content": "<end>"}}},
    "tokenizer_config, a list": {"tokenizer": {"eos_token": ["</s>", "<end>"]}},
    "tokenizer_config, eot": {"tokenizer": {"eot_token": "<end>"}},
    "tokenizer_config, eom": {"tokenizer": {"eom_token": "<end>"}},
    "tokenizer_config, a role of the model's own": {"tokenizer": {"extra_special_tokens": {"eot_token": "<end>"}}},
    "special_tokens_map": {"special_tokens_map": {"eos_token": "<end>"}},
    "special_tokens_map, AddedToken": {"special_tokens_map": {"eos_token": {"content": "<end>", "lstrip": False}}},
}


@pytest.mark.parametrize("place", PLACES)
def test_an_end_that_any_file_names_ends_generation(tmp_path: Path, place: str) -> None:
    special, _ = read(tmp_path, **PLACES[place])
    assert ends(special) >= {"</s>", "<|end_of_sentence|>", "<end>"}


@pytest.mark.parametrize(
    "place", [place for place in PLACES if not any(role in repr(PLACES[place]) for role in ("eot", "eom"))]
)
@pytest.mark.parametrize("other", [{"eos_token": "</s>"}, {"eos_token": "<stop>"}])
def test_a_conflict_is_said(tmp_path: Path, place: str, other: dict[str, str]) -> None:
    files = dict(PLACES[place])
    files["tokenizer"] = other | files.get("tokenizer", {})
    special, notes = read(tmp_path, **files)
    assert "<end>" in ends(special)
    (note,) = notes
    assert note.startswith("eos token: ")
    assert "'<end>' (5)" in note
    assert note.endswith(": each of them ends generation")


def test_the_tokenizers_own_name_is_the_eos(tmp_path: Path) -> None:
    """It is what `eos_token` stands for in the chat template, and what the tokenizer appends."""
    special, notes = read(tmp_path, {"eos_token": "<|im_end|>", "bos_token": "<unk>"})
    assert special == {"bos": 0, "eos": 4, "pad": 0, "eot": 3, "eom": 2}
    assert notes == [
        "bos token: tokenizer_config.json '<unk>' (0), config.json '<s>' (1): '<unk>' (0) counts",
        "eos token: tokenizer_config.json '<|im_end|>' (4), config.json '</s>' (2): each of them ends generation",
    ]


@pytest.mark.parametrize("none", [None, -1, []])
@pytest.mark.parametrize("role", ["bos", "eos", "pad"])
def test_none(tmp_path: Path, role: str, none: object) -> None:
    key = f"{role}_token_id"
    special, notes = read(tmp_path, {f"{role}_token": None}, config={key: none}, generation_config={key: none})
    assert role not in special
    assert notes == []


def test_more_ends_than_keys(tmp_path: Path) -> None:
    """Those that llama.cpp knows by their text need none; of the others the one that is left out is said."""
    special, notes = read(tmp_path, {"eos_token": "<end>"}, generation_config={"eos_token_id": [2, 4, 6, 7]})
    assert ends(special) == {"<|end_of_sentence|>", "<end>", "<stop>", "<last>", "</s>", "<|im_end|>"}
    assert len(notes) == 1
    special, notes = read(tmp_path, {"eos_token": "<end>"}, generation_config={"eos_token_id": [2, 4, 6, 7, 8]})
    assert ends(special) == {"<|end_of_sentence|>", "<end>", "<stop>", "<last>", "</s>", "<|im_end|>"}
    assert notes[1] == (
        "a file can name 4 end tokens, and the checkpoint names more: '<more>' (8) will not end generation; "
        "give it as a stop word"
    )


def test_a_token_that_is_not_in_the_vocabulary(tmp_path: Path) -> None:
    special, notes = read(tmp_path, {"eos_token": "<absent>"})
    assert special["eos"] == 2
    assert notes == ["tokenizer_config.json: eos_token '<absent>' is not in the vocabulary, so it is left out"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer": {"eos_token": 5}}, "tokenizer_config.json: eos_token: expected a token or an object with its"),
        ({"tokenizer": {"eos_token": {}}}, "tokenizer_config.json: eos_token: expected a token or an object with its"),
        ({"special_tokens_map": {"pad_token": [0]}}, "special_tokens_map.json: pad_token: expected a token or an"),
        ({"special_tokens_map": []}, "special_tokens_map.json: expected a JSON object, found list"),
        ({"generation_config": {"eos_token_id": "2"}}, "generation_config.json: eos_token_id: expected an integer"),
        (
            {"generation_config": {"eos_token_id": 9}},
            "generation_config.json: eos_token_id: expected an integer from 0",
        ),
        ({"generation_config": {"eos_token_id": [2.0]}}, "generation_config.json: eos_token_id: expected an integer"),
    ],
)
def test_refusals(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    with pytest.raises(ErnieGgufError, match=f"^{re.escape(message)}"):
        read(tmp_path, **files)


def test_llama_cpp_knows_these_texts(llama_tree: Path) -> None:
    source = (llama_tree / "src" / "llama-vocab.cpp").read_text()
    block = source[source.index("special_eog_ids.clear();") : source.index("special_eog_ids.insert(t.second);")]
    assert set(re.findall(r't\.first == "([^"]*)"', block)) >= ENDS_BY_TEXT
