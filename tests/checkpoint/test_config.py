"""config.json: what is taken from it, and one error per value that cannot be honoured."""

import re
from pathlib import Path
from typing import Any

import pytest
from ernie_gguf.checkpoint.config import MoeConfig, parse_config, read_config
from ernie_gguf.errors import ConfigError
from support.checkpoints import EXAMPLE, Spec, config

MOE = config(Spec())
DENSE = config(Spec(architecture="Ernie4_5_ForCausalLM"))


def test_the_example() -> None:
    found = read_config(EXAMPLE)
    assert (found.arch, found.layers, found.hidden, found.vocab, found.context) == ("ernie4_5-moe", 3, 256, 4096, 4096)
    assert (found.heads, found.kv_heads, found.head_dim, found.ffn_width) == (4, 2, 64, 768)
    assert (found.rope_theta, found.rms_eps, found.tied) == (500000.0, 1e-05, True)
    assert (found.bos, found.eos, found.pad) == (1, (2,), 0)
    assert found.moe == MoeConfig(experts=8, used=2, width=256, shared=1, first_layer=1, has_bias=True)
    assert [found.is_moe_layer(i) for i in range(3)] == [False, True, True]


@pytest.mark.parametrize("name", ["Ernie4_5_ForCausalLM", "Ernie4_5ForCausalLM"])
def test_dense(name: str) -> None:
    found = parse_config(DENSE | {"architectures": [name]})
    assert found.arch == "ernie4_5"
    assert found.moe is None
    assert not found.is_moe_layer(2)


def test_defaults() -> None:
    values = dict(MOE)
    for key in ("head_dim", "moe_layer_interval", "moe_layer_end_index", "moe_num_shared_experts", "use_bias"):
        del values[key]
    found = parse_config(values | {"tie_word_embeddings": None, "bos_token_id": None})
    assert found.head_dim == 64
    assert found.tied
    assert found.bos is None
    assert found.moe is not None
    assert found.moe.shared == 0


def test_width_of_shared_experts() -> None:
    found = parse_config(MOE | {"moe_num_shared_experts": 2, "moe_intermediate_size": 1536})
    assert found.moe is not None
    assert found.moe.shared_width == 3072


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 10000},
        {"rope_theta": 10000.0, "rope_scaling": None},
        {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 10000.0}, "rope_theta": 5.0},
        {"rope_theta": 10000.0, "rope_scaling": {"type": "default"}},
    ],
)
def test_rope(rope: dict[str, Any]) -> None:
    values = dict(MOE)
    del values["rope_theta"]
    assert parse_config(values | rope).rope_theta == 10000.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architectures": ["LlamaForCausalLM"]},
            "unknown architecture 'LlamaForCausalLM', expected one of Ernie4_5_Moe",
        ),
        ({"architectures": None}, "architectures: expected a list of one name, found None"),
        ({"architectures": ["Ernie4_5_MoeForCausalLM", "x"]}, "architectures: expected a list of one name, found"),
        ({"hidden_size": 0}, "hidden_size: expected an integer from 1 to 1048576, found 0"),
        ({"hidden_size": 1 << 40}, "hidden_size: expected an integer from 1 to 1048576, found 1099511627776"),
        ({"hidden_size": "256"}, "hidden_size: expected an integer from 1 to 1048576, found '256'"),
        ({"hidden_size": True}, "hidden_size: expected an integer from 1 to 1048576, found True"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: expected an integer from 1 to 512"),
        ({"vocab_size": None}, "vocab_size: expected an integer from 1 to 4194304, found None"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: expected a divisor of num_attention_heads (4), found 3"),
        ({"num_key_value_heads": 8}, "num_key_value_heads: expected an integer from 1 to 4, found 8"),
        ({"head_dim": 63}, "head_dim: expected an even number: RoPE turns pairs, found 63"),
        ({"head_dim": None, "hidden_size": 255}, "head_dim: expected an integer: hidden_size 255 is not a multiple"),
        ({"rms_norm_eps": 0}, "rms_norm_eps: expected a finite number above 0, found 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: expected a finite number above 0, found nan"),
        ({"rope_theta": 1e39}, "rope_theta: expected a finite number above 0, found 1e+39"),
        ({"rope_theta": 10**400}, "rope_theta: expected a finite number above 0, found 1000"),
        ({"rope_theta": None}, "rope_theta: expected a finite number above 0, found None"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4}},
            "rope_scaling: rope_type 'yarn' is not supported, expected 'default'",
        ),
        ({"rope_parameters": "x"}, "rope_parameters: expected an object or null, found 'x'"),
        ({"use_bias": True}, "use_bias: expected false: llama.cpp's ERNIE graphs have no biases, found True"),
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu', found 'gelu'"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings: expected true or false, found 1"),
        (
            {"bos_token_id": 4096},
            "bos_token_id: expected an integer from 0 to 4095, a list of such, or -1 for none, found",
        ),
        (
            {"eos_token_id": [2, "4"]},
            "eos_token_id: expected an integer from 0 to 4095, a list of such, or -1 for none",
        ),
        ({"eos_token_id": True}, "eos_token_id: expected an integer from 0 to 4095, a list of such, or -1 for none"),
        (
            {"moe_num_experts": [64, 64]},
            "moe_num_experts is a list ([64, 64]): expected one value; --text-only takes",
        ),
        ({"moe_num_experts": 513}, "moe_num_experts: expected an integer from 1 to 512, found 513"),
        ({"moe_k": 5}, "moe_k: expected an integer from 1 to 4, found 5"),
        ({"moe_layer_start_index": 3}, "moe_layer_start_index: expected an integer from 0 to 2, found 3"),
        (
            {"moe_layer_end_index": 1},
            "moe_layer_end_index: expected -1 or at least 2: llama.cpp has no dense layers after MoE",
        ),
        ({"moe_layer_interval": 2}, "moe_layer_interval: expected 1 (llama.cpp loads every layer after the first"),
        ({"moe_num_shared_experts": -1}, "moe_num_shared_experts: expected an integer from 0 to 512, found -1"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^config.json: {re.escape(message)}"):
        parse_config(MOE | change)


def test_absent_key() -> None:
    values = dict(MOE)
    del values["intermediate_size"]
    with pytest.raises(ConfigError, match=r"^config.json: intermediate_size: expected an integer .*, found nothing$"):
        parse_config(values)


def test_file_errors(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ConfigError, match=r"config.json is missing; expected a Hugging Face checkpoint folder$"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"^config.json: not valid JSON: "):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"a": 1, "a": 2}')
    with pytest.raises(ConfigError, match=r"key 'a' is given twice$"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ConfigError, match=r"^config.json: not valid JSON: "):
        read_config(tmp_path)
