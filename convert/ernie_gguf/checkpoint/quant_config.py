"""`quantization_config` of a Paddle checkpoint -> how its dense linears and each layer's experts are stored.

Two spellings occur: `dense_quant_type` and `moe_quant_type` beside each other, and types nested under
`moe_quant_config`. Where a file has both they must agree.
"""

from dataclasses import dataclass

from ..errors import ConfigError
from .json_object import JsonObject, shown
from .quantized import STORAGES

# What experts may be stored as, "bf16" standing for every float; only they come in two bits.
EXPERT_TYPES = ("bf16", *STORAGES)
DENSE_TYPES = tuple(name for name in EXPERT_TYPES if name != "wint2")
_SPELLINGS = {"weight_only_int8": "wint8", "weight_only_int4": "wint4", "w4w2": "wint2"}

# quant_method -> how people call it
_OTHERS = {"gptq": "GPTQ", "awq": "AWQ", "bitsandbytes": "bitsandbytes", "fp8": "FP8 of transformers", "hqq": "HQQ"}

# Why the others cannot be read: what the engine does to them on the way is not done here.
UNREADABLE = {
    "tensor_wise_fp8": "its activations pass a Hadamard transform over blocks of 32 in the engine, so the stored "
    "weights are rotated; use the -Paddle or -PT repository",
    "wfp8afp8": "the layout of its per-channel FP8 weights is not supported; use the -Paddle or -PT repository",
    "w4a8": "its int4 weights are ordered for the engine's W4A8 kernels, and down_proj is rotated by a Hadamard "
    "transform; neither is supported; use the -2Bits-Paddle, -Paddle or -PT repository",
    "w4afp8": "its int4 weights are ordered for the engine's W4AFP8 kernels, which is not supported; "
    "use the -Paddle or -PT repository",
    "w8a8": "its smoothing of activations is not supported; use the -Paddle or -PT repository",
}


@dataclass(frozen=True)
class QuantConfig:
    """`dense` for attention, dense and shared-expert MLPs; `experts` for MoE layers, up to `int4_end` int4 if given."""

    dense: str
    experts: str
    int4_end: int = -1  # last layer whose experts are int4 where `experts` is wint2
    block: tuple[int, int] = (128, 128)  # of block_wise_fp8

    def of(self, layer: int, expert: bool) -> str:
        """The storage of a quantized module of a layer."""
        if not expert:
            return self.dense
        return "wint4" if self.experts == "wint2" and layer <= self.int4_end else self.experts


def _layer(config: JsonObject, key: str, default: int) -> int:
    value = config.values.get(key, default)
    if type(value) is not int or value < 0:
        raise config.error(key, "a layer number")
    return value


def _type(config: JsonObject, key: str) -> str | None:
    """The name of a quantization type in its usual spelling."""
    value = config.text(key)
    return None if value is None else _SPELLINGS.get(value, value)


def _agree(config: JsonObject, *found: tuple[str, str | None]) -> str | None:
    """The one value that several keys give."""
    given = [(key, value) for key, value in found if value is not None]
    if len({value for _, value in given}) > 1:
        raise ConfigError(f"{config.where}: " + " but ".join(f"{key} is {shown(value)}" for key, value in given))
    return given[0][1] if given else None


def _check_type(config: JsonObject, key: str, value: str, known: tuple[str, ...]) -> None:
    if value in UNREADABLE:
        raise ConfigError(f"{config.where}: {key} {shown(value)} cannot be read: {UNREADABLE[value]}")
    if value not in known:
        raise ConfigError(f"{config.where}: {key}: unknown type {shown(value)}, expected one of {', '.join(known)}")


def _dense_type(config: JsonObject) -> str | None:
    """The nested spelling: a type, or an object with one."""
    if isinstance(config.values.get("dense_quant_config"), dict):
        nested = config.child("dense_quant_config")
        return _type(nested, "quant_type") if nested else None
    return _type(config, "dense_quant_config")


def _mixed_experts(config: JsonObject, moe: JsonObject | None, layers: int) -> int:
    """The last layer with int4 experts; checks the entries of int4 and of two bits."""
    w4 = moe and moe.child("moe_w4_quant_config")
    w2 = moe and moe.child("moe_w2_quant_config")
    if w4 is None or w2 is None:
        raise ConfigError(
            f"{config.where}: expected moe_quant_config with moe_w4_quant_config and moe_w2_quant_config: "
            "they say which layers are int4 and which 2-bit"
        )
    w4.only("quant_type", ("wint4", "weight_only_int4"))
    w4.only("quant_granularity", ("per_channel",))
    w2.only("quant_type", ("wint2",))
    w2.only("quant_granularity", ("pp_acc",))
    w2.only("quant_group_size", (64,))
    start, end = _layer(w4, "quant_start_layer", 0), _layer(w4, "quant_end_layer", 6)
    first, last = _layer(w2, "quant_start_layer", end + 1), _layer(w2, "quant_end_layer", layers - 1)
    if start > end or first != end + 1 or last != layers - 1:
        raise ConfigError(
            f"{config.where}.moe_quant_config: int4 in layers {start} to {end}, 2-bit in {first} to {last}: expected "
            f"them to meet and to end at layer {layers - 1}"
        )
    return end


def _other_method(config: JsonObject) -> str | None:
    """The name of a quantization that is not Paddle's."""
    if (method := config.values.get("quant_method")) is not None:
        return str(_OTHERS.get(method, method) if isinstance(method, str) else shown(method))
    return "MLX" if {"bits", "group_size"} <= config.values.keys() else None


def parse_quant_config(values: object, layers: int, where: str = "config.json") -> QuantConfig | None:
    """The quantization, or None where nothing is quantized. Raises ConfigError that says why it cannot be read."""
    if values is None:
        return None
    where = f"{where}: quantization_config"
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected an object or null, found {type(values).__name__}")
    config = JsonObject(values, where)
    for key in ("is_quantized", "is_moe_quantized"):
        config.only(key, (True, False))
    weights_too = any(key in values for key in ("quantization", "dense_quant_type", "moe_quant_type"))
    if values.get("is_quantized") is False or (values.get("kv_cache_quant_type") is not None and not weights_too):
        return None  # weights as they were trained, to be quantized by the engine when it loads them
    method = _type(config, "quantization")
    if method is None and (other := _other_method(config)) is not None:
        raise ConfigError(
            f"{where}: quantized with {other}, which is not read: quantizing again would add to its errors; convert "
            "the BF16 repository that it was made of (-PT or -Paddle)"
        )
    moe = config.child("moe_quant_config")
    dense = _agree(
        config,
        ("dense_quant_type", _type(config, "dense_quant_type")),
        ("dense_quant_config", _dense_type(config)),
    )
    experts = _agree(
        config,
        ("moe_quant_type", _type(config, "moe_quant_type")),
        ("moe_quant_config.quant_type", _type(moe, "quant_type") if moe else None),
    )
    if method == "wint2":
        dense, experts = dense or "wint8", experts or "wint2"
    elif method not in (None, "mix_quant"):
        dense, experts = dense or method, experts or method
    if dense is None or experts is None:
        raise ConfigError(
            f"{where}: expected quantization, or dense_quant_type and moe_quant_type, found {sorted(values)}"
        )
    _check_type(config, "moe_quant_type", experts, EXPERT_TYPES)
    _check_type(config, "dense_quant_type", dense, DENSE_TYPES)
    block = values.get("weight_block_size", [128, 128])
    if not (isinstance(block, list) and len(block) == 2 and all(type(b) is int and 0 < b <= 1 << 16 for b in block)):
        raise config.error("weight_block_size", "two positive integers")
    int4_end = _mixed_experts(config, moe, layers) if experts == "wint2" else -1
    return QuantConfig(dense, experts, int4_end, (block[0], block[1]))
