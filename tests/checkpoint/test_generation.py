"""The sampling settings of generation_config.json: those of upstream's converter, and what is said of others."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from ernie_gguf.checkpoint.generation import parse_sampling, read_sampling
from ernie_gguf.errors import ConfigError
from gguf import GGUFWriter
from gguf.metadata import Metadata

PUBLISHED = {
    "do_sample": True,
    "top_p": 0.8,
    "temperature": 0.8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "repetition_penalty": 1.05,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
}
EVERY = {
    "top_k": 20,
    "top_p": 0.8,
    "min_p": 0.05,
    "xtc_probability": 0.1,
    "xtc_threshold": 0.2,
    "temperature": 1,
    "penalty_last_n": 64,
    "penalty_repeat": 1.1,
    "mirostat": 2,
    "mirostat_tau": 5.0,
    "mirostat_eta": 0.1,
}


def test_what_baidu_publishes() -> None:
    found = parse_sampling(PUBLISHED)
    assert found.settings == {"top_p": 0.8, "temp": 0.8, "penalty_repeat": 1.05}
    assert found.notes == ()


def test_upstream_writes_the_same_keys(tmp_path: Path) -> None:
    """Its own gguf-py reads the same file; every setting has a key of the same type."""
    (tmp_path / "generation_config.json").write_text(json.dumps(EVERY))
    theirs = GGUFWriter(None, "ernie4_5")
    Metadata.load(None, tmp_path).set_gguf_meta_model(theirs)
    ours = GGUFWriter(None, "ernie4_5")
    for name, value in read_sampling(tmp_path).settings.items():
        getattr(ours, f"add_sampling_{name}")(value)

    def sampling(writer: GGUFWriter) -> dict[str, Any]:
        return {key: value for key, value in writer.kv_data[0].items() if key.startswith("general.sampling.")}

    assert len(sampling(theirs)) == len(EVERY)
    assert sampling(ours) == sampling(theirs)


def test_no_file_and_no_setting(tmp_path: Path) -> None:
    assert read_sampling(tmp_path).settings == {}
    assert parse_sampling({"temperature": None, "top_k": None, "_from_model_config": True}).settings == {}


def test_whole_numbers_may_be_written_with_a_point() -> None:
    assert repr(parse_sampling({"top_k": 50.0, "temperature": 1}).settings) == "{'top_k': 50, 'temp': 1.0}"


def test_what_has_no_key_is_said() -> None:
    found = parse_sampling({"frequency_penalty": 0.5, "typical_p": 1.0, "do_sample": False, "temperature": 0.7})
    assert found.notes == (
        "generation_config.json: frequency_penalty 0.5 has no place in a GGUF and is left out",
        "generation_config.json: do_sample is false, but llama.cpp samples at the temperature 0.7 that stands beside "
        "it; ask for temperature 0 to take the likeliest token",
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": "0.8"}, "temperature: expected a finite number, found '0.8'"),
        ({"temperature": True}, "temperature: expected a finite number, found True"),
        ({"top_p": float("nan")}, "top_p: expected a finite number, found nan"),
        ({"top_p": 1e300}, "top_p: expected a number that float32 can hold, found 1e+300"),
        ({"top_k": 1.5}, "top_k: expected a whole number, found 1.5"),
        ({"top_k": 1 << 40}, "top_k: expected a whole number of 32 bits, found 1099511627776"),
        ({"top_k": [1]}, "top_k: expected a whole number, found [1]"),
    ],
)
def test_refusals(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^generation_config.json: {re.escape(message)}$"):
        parse_sampling(values)
