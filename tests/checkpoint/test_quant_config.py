"""quantization_config: both spellings mean the same; what cannot be read is refused with what is not known."""

import re
from copy import deepcopy
from typing import Any

import pytest
from ernie_gguf.checkpoint.quant_config import UNREADABLE, QuantConfig, parse_quant_config
from ernie_gguf.errors import ConfigError
from support.checkpoints import Spec
from support.paddle import two_bits_config

FULL = two_bits_config(Spec(layers=54), 6)["quantization_config"]
MIXED = QuantConfig("wint8", "wint2", 6)


def changed(*path: str, value: object = None) -> dict[str, Any]:
    """The documented example with one value replaced, or removed."""
    out: dict[str, Any] = deepcopy(FULL)
    at = out
    for key in path[:-1]:
        at = at[key]
    if value is None:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return out


def parse(values: object) -> QuantConfig | None:
    return parse_quant_config(values, 54)


def test_layer_ranges() -> None:
    found = parse(FULL)
    assert found == MIXED
    assert [found.of(layer, expert=True) for layer in (3, 6, 7, 53)] == ["wint4", "wint4", "wint2", "wint2"]
    assert found.of(53, expert=False) == "wint8"


@pytest.mark.parametrize(
    "values",
    [
        changed("dense_quant_type"),
        changed("moe_quant_type"),
        changed("quantization"),
        changed("moe_quant_type", value="wint2"),
        {key: value for key, value in FULL.items() if key in ("quantization", "moe_quant_config")},
        changed("moe_quant_config", "quant_type", value="w4w2") | {"dense_quant_config": "wint8"},
        changed("moe_quant_type") | {"dense_quant_config": {"quant_type": "wint8"}},
        changed("moe_quant_config", "moe_w2_quant_config", "quant_start_layer"),
    ],
)
def test_spellings_of_two_bits(values: dict[str, Any]) -> None:
    assert parse(values) == MIXED


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (None, None),
        ({"is_quantized": False, "quantization": "wint4"}, None),
        ({"kv_cache_quant_type": "int8"}, None),
        ({"quantization": "wint8"}, QuantConfig("wint8", "wint8")),
        ({"quantization": "wint4"}, QuantConfig("wint4", "wint4")),
        ({"dense_quant_type": "wint8", "moe_quant_type": "wint4"}, QuantConfig("wint8", "wint4")),
        (
            {"quantization": "mix_quant", "dense_quant_type": "wint8", "moe_quant_type": "weight_only_int4"},
            QuantConfig("wint8", "wint4"),
        ),
        (
            {"quantization": "block_wise_fp8", "weight_block_size": [64, 128]},
            QuantConfig("block_wise_fp8", "block_wise_fp8", block=(64, 128)),
        ),
    ],
)
def test_relatives(values: object, expected: QuantConfig | None) -> None:
    assert parse(values) == expected


W4, W2 = ("moe_quant_config", "moe_w4_quant_config"), ("moe_quant_config", "moe_w2_quant_config")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("wint8", ": expected an object or null, found str"),
        ({}, ": expected quantization, or dense_quant_type and moe_quant_type, found []"),
        ({"quantization": 4}, ": quantization: expected a string, found 4"),
        (
            {"quant_method": "gptq"},
            ": quantized with GPTQ, which is not read: quantizing again would add to its errors; convert the BF16",
        ),
        ({"quantization": "int3"}, ": moe_quant_type: unknown type 'int3', expected one of bf16, wint8, "),
        ({"quantization": "wint8", "is_quantized": "yes"}, ": is_quantized: expected True or False, found 'yes'"),
        (
            changed("moe_quant_config", "quant_type", value="wint4"),
            ": moe_quant_type is 'wint2' but moe_quant_config.quant_type is 'wint4'",
        ),
        (changed("moe_quant_config"), ": expected moe_quant_config with moe_w4_quant_config and moe_w2_quant_config"),
        (changed(*W2), ": expected moe_quant_config with moe_w4_quant_config and moe_w2_quant_config"),
        (changed(*W2, value="x"), ".moe_quant_config: moe_w2_quant_config: expected an object, found 'x'"),
        (
            changed(*W2, "quant_group_size", value=128),
            ".moe_quant_config.moe_w2_quant_config: quant_group_size: expected 64, found 128",
        ),
        (
            changed(*W2, "quant_granularity", value="per_channel"),
            ".moe_quant_config.moe_w2_quant_config: quant_granularity: expected 'pp_acc', found 'per_channel'",
        ),
        (
            changed(*W4, "quant_end_layer", value=-1),
            ".moe_quant_config.moe_w4_quant_config: quant_end_layer: expected a layer number, found -1",
        ),
        (
            changed(*W4, "quant_end_layer", value=5),
            ".moe_quant_config: int4 in layers 0 to 5, 2-bit in 7 to 53: expected them to meet and to end at layer 53",
        ),
        (
            {"quantization": "block_wise_fp8", "weight_block_size": [0, 128]},
            ": weight_block_size: expected two positive integers, found [0, 128]",
        ),
    ],
)
def test_refusals(values: object, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^config.json: quantization_config{re.escape(message)}"):
        parse(values)


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_is_not_known_is_said(kind: str) -> None:
    with pytest.raises(ConfigError, match=rf"moe_quant_type '{kind}' cannot be read: .*use the -"):
        parse({"dense_quant_type": "wint8", "moe_quant_type": kind})
