"""config.json -> ErnieConfig, every value checked before anything uses it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ArchitectureError, ConfigError
from .json_object import JsonObject, read_object, shown
from .quant_config import QuantConfig, parse_quant_config
from .source import why_no_checkpoint
from .vision_config import VisionConfig, merged_values, parse_vision, text_values, vision_experts

# Hugging Face architecture -> GGUF architecture
ARCHITECTURES = {
    "Ernie4_5_MoeForCausalLM": "ernie4_5-moe",
    "Ernie4_5_ForCausalLM": "ernie4_5",
    "Ernie4_5ForCausalLM": "ernie4_5",
}
# Their language model is that of the MoE architecture; vision adds experts and a router of its own.
VL_ARCHITECTURES = ("Ernie4_5_VLMoeForConditionalGeneration", "Ernie4_5_VL_MoeForConditionalGeneration")

# Far above every member of the family (300B: 54 layers, hidden 8192); low enough that products stay harmless.
MAX_LAYERS = 512
MAX_EXPERTS = 512  # LLAMA_MAX_EXPERTS
MAX_SIZE = 1 << 20
MAX_VOCAB = 1 << 22
MAX_CONTEXT = 1 << 30


@dataclass(frozen=True)
class MoeConfig:
    """The expert part: layers `first_layer` and up are MoE layers."""

    experts: int
    used: int
    width: int
    shared: int  # number of shared experts, 0 for none
    first_layer: int
    has_bias: bool  # every router comes with a correction bias

    @property
    def shared_width(self) -> int:
        """Width of the one MLP that the shared experts are stored as."""
        return self.width * self.shared


@dataclass(frozen=True)
class ErnieConfig:
    """What conversion needs from config.json. `moe` is None for the dense architecture."""

    arch: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_width: int
    vocab: int
    context: int
    rope_theta: float
    rms_eps: float
    tied: bool
    moe: MoeConfig | None
    bos: int | None
    eos: tuple[int, ...]  # every token that ends a text
    pad: int | None
    quant: QuantConfig | None = None  # None: floats throughout
    vision_experts: int | None = None  # of a VL checkpoint read as text: experts per layer to leave out
    vision: VisionConfig | None = None  # of a VL checkpoint: its other half

    @property
    def is_vl(self) -> bool:
        """Whether the checkpoint is a vision-language model's, whatever is taken of it."""
        return self.vision_experts is not None or self.vision is not None

    def is_moe_layer(self, layer: int) -> bool:
        """Whether the layer has a router and experts instead of one MLP."""
        return self.moe is not None and layer >= self.moe.first_layer


def token_ids(config: JsonObject, key: str, vocab: int) -> tuple[int, ...]:
    """The ids that a key names: one, or a list of them. A negative id means none, as in older configurations."""
    value = config.values.get(key)
    found = [] if value is None else value if isinstance(value, list) else [value]
    if any(type(each) is not int or each >= vocab for each in found):
        raise config.error(key, f"an integer from 0 to {vocab - 1}, a list of such, or -1 for none")
    return tuple(dict.fromkeys(each for each in found if each >= 0))


def _first_id(config: JsonObject, key: str, vocab: int) -> int | None:
    return next(iter(token_ids(config, key, vocab)), None)


def _architecture(config: JsonObject) -> str:
    names = config.values.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise config.error("architectures", "a list of one name")
    if names[0] in VL_ARCHITECTURES:
        return ARCHITECTURES["Ernie4_5_MoeForCausalLM"]
    if names[0] not in ARCHITECTURES:
        raise ArchitectureError(
            f"{config.where}: unknown architecture {shown(names[0])}, expected one of {', '.join(ARCHITECTURES)}; "
            "llama.cpp's own convert_hf_to_gguf.py converts other models"
        )
    return ARCHITECTURES[names[0]]


def _rope_theta(config: JsonObject) -> float:
    """From rope_parameters (newer configs) or rope_theta; refuses every kind of scaled RoPE."""
    for key in ("rope_parameters", "rope_scaling"):
        value = config.get(key)
        if value is None:
            continue
        if not isinstance(value, dict):
            raise config.error(key, "an object or null")
        rope = JsonObject(value, f"{config.where}: {key}")
        kind = value.get("rope_type", value.get("type", "default"))
        if kind != "default":
            raise ConfigError(f"{rope.where}: rope_type {shown(kind)} is not supported, expected 'default'")
        if rope.get("rope_theta") is not None:
            return rope.number("rope_theta")
    return config.number("rope_theta")


def _moe(config: JsonObject, layers: int) -> MoeConfig:
    experts = config.integer("moe_num_experts", 1, MAX_EXPERTS)
    # llama.cpp's loader knows only "dense up to here, MoE from here on".
    if config.integer("moe_layer_interval", 1, MAX_LAYERS, default=1) != 1:
        raise config.error("moe_layer_interval", "1 (llama.cpp loads every layer after the first MoE layer as MoE)")
    last = config.integer("moe_layer_end_index", -1, MAX_LAYERS, default=-1)
    if last != -1 and last < layers - 1:
        raise config.error(
            "moe_layer_end_index", f"-1 or at least {layers - 1}: llama.cpp has no dense layers after MoE layers"
        )
    return MoeConfig(
        experts=experts,
        used=config.integer("moe_k", 1, experts),
        width=config.integer("moe_intermediate_size", 1, MAX_SIZE),
        shared=config.integer("moe_num_shared_experts", 0, MAX_EXPERTS, default=0),
        first_layer=config.integer("moe_layer_start_index", 0, layers - 1),
        has_bias=config.boolean("moe_use_aux_free", default=True),
    )


def _quantization(config: JsonObject) -> object:
    """`quantization_config`, or what MLX writes in its place."""
    mlx = config.values.get("quantization")
    return config.values.get("quantization_config") or (mlx if isinstance(mlx, dict) else None)


def parse_config(values: dict[str, Any], where: str = "config.json", text_only: bool = False) -> ErnieConfig:
    """Check the keys of config.json; raises ConfigError naming the key, what was found and what was expected.

    With `text_only` a VL checkpoint is read as its language model.
    """
    config = JsonObject(values, where)
    arch = _architecture(config)
    is_vl = values["architectures"][0] in VL_ARCHITECTURES
    whole = merged_values(values, where) if is_vl else values
    if is_vl:
        values = text_values(whole, where)
        config = JsonObject(values, where)
    # llama.cpp's ERNIE graphs ignore the bias of attention output and FFN: such a model would run and be wrong.
    if config.boolean("use_bias", default=False):
        raise config.error("use_bias", "false: llama.cpp's ERNIE graphs have no biases")
    if config.get("hidden_act") not in (None, "silu"):
        raise config.error("hidden_act", "'silu'")
    layers = config.integer("num_hidden_layers", 1, MAX_LAYERS)
    hidden = config.integer("hidden_size", 1, MAX_SIZE)
    heads = config.integer("num_attention_heads", 1, MAX_SIZE)
    kv_heads = config.integer("num_key_value_heads", 1, heads, default=heads)
    if heads % kv_heads:
        raise config.error("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
    if config.get("head_dim") is None and hidden % heads:
        raise config.error("head_dim", f"an integer: hidden_size {hidden} is not a multiple of {heads} heads")
    vocab = config.integer("vocab_size", 1, MAX_VOCAB)
    head_dim = config.integer("head_dim", 1, MAX_SIZE, default=hidden // heads)
    if head_dim % 2:
        raise config.error("head_dim", "an even number: RoPE turns pairs")
    return ErnieConfig(
        arch=arch,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_width=config.integer("intermediate_size", 1, MAX_SIZE),
        vocab=vocab,
        context=config.integer("max_position_embeddings", 1, MAX_CONTEXT),
        rope_theta=_rope_theta(config),
        rms_eps=config.number("rms_norm_eps"),
        tied=config.boolean("tie_word_embeddings", default=True),
        moe=_moe(config, layers) if arch == ARCHITECTURES["Ernie4_5_MoeForCausalLM"] else None,
        bos=_first_id(config, "bos_token_id", vocab),
        eos=token_ids(config, "eos_token_id", vocab),
        pad=_first_id(config, "pad_token_id", vocab),
        quant=parse_quant_config(_quantization(config), layers, where),
        vision_experts=vision_experts(whole, where, MAX_EXPERTS) if is_vl and text_only else None,
        vision=parse_vision(whole, where, head_dim, vocab) if is_vl and not text_only else None,
    )


def read_config(folder: Path, text_only: bool = False) -> ErnieConfig:
    """Read and check config.json of a checkpoint folder."""
    path = folder / "config.json"
    if not path.is_file():
        why = why_no_checkpoint(folder) or "expected a Hugging Face checkpoint folder"
        raise ConfigError(f"{folder}: config.json is missing; {why}")
    return parse_config(read_object(path, ConfigError), text_only=text_only)
