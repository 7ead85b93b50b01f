"""Vision-language checkpoints around the language model of checkpoints.Spec, for tests, in the three forms they have.

Per MoE layer: `gate.weight` is [hidden, experts] in the -PT files too, `gate.weight_1` the same for vision, the
correction bias has a row for each, and vision experts (of a smaller width) are numbered after the text experts.
"""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from support.checkpoints import Spec, Stored, _random, config, store, stored, write_checkpoint
from support.paddle import paddle_name, plain

VISION_WIDTH = 64
TOWER, DEPTH = 32, 2  # width, blocks
PLACEHOLDER = 4000  # tokens from this one on are an image's


@dataclass(frozen=True)
class Eyes:
    """Sizes of the vision half."""

    width: int = TOWER
    heads: int = 2
    expert_width: int = VISION_WIDTH


SMALL = Eyes()
# What the oracle runs: heads of 80 and of 128 as the 28B's, whose axes are 22, 22 and 20 pairs, and rows that fit ccq2.
ORACLE = Spec(
    hidden=256, heads=2, kv_heads=1, head_dim=128, experts=8, expert_width=512, shared=2, rope_parameters=True
)
ORACLE_EYES = Eyes(width=160, expert_width=256)


class Form(Enum):
    """Who wrote the checkpoint."""

    PT = "Baidu's -PT: flat config"
    PADDLE = "Baidu's -Paddle: flat config, Linear weights [in, out], fused"
    TRANSFORMERS = "transformers 5: text_config and vision_config, the tower below `model.`"


def vl_config(spec: Spec, form: Form = Form.PT, eyes: Eyes = SMALL) -> dict[str, Any]:
    """config.json: what differs between text and vision is a list."""
    architecture = {"architectures": ["Ernie4_5_VLMoeForConditionalGeneration"]}
    tower: dict[str, Any] = {"depth": DEPTH, "hidden_size": eyes.width, "num_heads": eyes.heads, "patch_size": 14}
    tower["hidden_act"] = "quick_gelu"
    text, t = config(spec), (spec.head_dim // 2 - 22) if spec.head_dim == 64 else 20
    side = (spec.head_dim // 2 - t) // 2
    widths = {"moe_intermediate_size": [spec.expert_width, eyes.expert_width]}
    if form is not Form.TRANSFORMERS:
        pairs = {
            "moe_num_experts": [spec.experts, spec.experts],
            "moe_layer_start_index": [spec.first_moe, spec.first_moe],
            "moe_layer_end_index": [spec.layers + 1, spec.layers],
        }
        model = {"model_type": "ernie4_5_moe_vl", "rope_3d": True, "freq_allocation": t, "im_patch_id": PLACEHOLDER}
        return {**text, **architecture, **model, **widths, **pairs, "vision_config": {**tower, "mlp_ratio": 4}}
    for key in ("architectures", "moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval", "rope_theta"):
        text.pop(key, None)
    rope = {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": [side, side, t]}
    kinds = ["dense"] * spec.first_moe + ["sparse"] * (spec.layers - spec.first_moe)
    return {
        **architecture,
        "model_type": "ernie4_5_vl_moe",
        "image_token_id": PLACEHOLDER,
        "tie_word_embeddings": spec.tied,
        "text_config": {
            **text,
            "model_type": "ernie4_5_vl_moe_text",
            **widths,
            "mlp_layer_types": kinds,
            "rope_parameters": rope,
        },
        "vision_config": {**tower, "intermediate_size": 4 * eyes.width},
    }


def _vision_of_layer(spec: Spec, name: str, paddle: bool, width: int) -> dict[str, Stored]:
    """The vision half of a MoE layer, under -PT names."""
    out = {f"{name}.mlp.gate.weight_1": store(_random(spec, f"{name}.gate1", (spec.hidden, spec.experts)), "F32")}
    for e in range(spec.experts, 2 * spec.experts):
        expert = f"{name}.mlp.experts.{e}"
        gate, up = (_random(spec, f"{expert}.{part}", (width, spec.hidden)) for part in ("gate", "up"))
        down = _random(spec, f"{expert}.down", (spec.hidden, width))
        if paddle:
            fused = np.ascontiguousarray(np.concatenate([gate, up]).T)
            out[f"{expert}.up_gate_proj.weight"] = store(fused, spec.dtype)
            out[f"{expert}.down_proj.weight"] = store(np.ascontiguousarray(down.T), spec.dtype)
            continue
        for part, values in (("gate", gate), ("up", up), ("down", down)):
            out[f"{expert}.{part}_proj.weight"] = store(values, spec.dtype)
    return out


def _eyes(spec: Spec, paddle: bool, width: int) -> dict[str, Stored]:
    """Tower and resampler, under -PT names."""
    shapes: dict[str, tuple[int, ...]] = {"vision_model.patch_embed.proj.weight": (width, 588)}

    def linear(name: str, n: int, k: int) -> None:
        shapes.update({f"{name}.weight": (n, k), f"{name}.bias": (n,)})

    def norm(name: str, k: int) -> None:
        shapes.update({f"{name}.weight": (k,), f"{name}.bias": (k,)})

    for i in range(DEPTH):
        block = f"vision_model.blocks.{i}"
        norm(f"{block}.norm1", width)
        norm(f"{block}.norm2", width)
        linear(f"{block}.attn.qkv", 3 * width, width)
        linear(f"{block}.attn.proj", width, width)
        linear(f"{block}.mlp.fc1", 4 * width, width)
        linear(f"{block}.mlp.fc2", width, 4 * width)
    norm("vision_model.ln", width)
    for stage, k in (("spatial", 4 * width), ("temporal", 8 * width)):
        name = f"model.resampler_model.{stage}_linear"
        linear(f"{name}.0", 4 * width, k)
        linear(f"{name}.2", 4 * width, 4 * width)
        norm(f"{name}.3", 4 * width)
    linear("model.resampler_model.mlp", spec.hidden, 4 * width)
    shapes["model.resampler_model.after_norm.weight"] = (spec.hidden,)
    out = {}
    for name, shape in shapes.items():
        values = _random(spec, name, shape)
        if name.endswith(".bias"):
            values -= 1  # a vector is made as a norm is, around 1
        out[name] = store(np.ascontiguousarray(values.T) if paddle and len(shape) == 2 else values, spec.dtype)
    return out


def with_vision(spec: Spec, text: dict[str, Stored], form: Form, eyes: Eyes = SMALL) -> dict[str, Stored]:
    """A text checkpoint's tensors and what a VL checkpoint has besides."""
    paddle = form is Form.PADDLE
    out = dict(text)
    for name, tensor in text.items():
        if name.endswith("e_score_correction_bias"):
            bias = np.frombuffer(tensor.data, np.float32).reshape(1, -1)
            out[name] = store(np.concatenate([bias, bias - 7]), "F32")
        elif name.endswith("mlp.gate.weight") and not paddle:
            gate = np.frombuffer(tensor.data, np.float32).reshape(tensor.shape)
            out[name] = store(np.ascontiguousarray(gate.T), "F32")
    vision = _eyes(spec, paddle, eyes.width)
    for layer in range(spec.first_moe, spec.layers):
        vision |= _vision_of_layer(spec, f"model.layers.{layer}", paddle, eyes.expert_width)
    for name, tensor in vision.items():
        tower = f"model.{name}" if form is Form.TRANSFORMERS and name.startswith("vision_model.") else name
        out[paddle_name(name) if paddle else tower] = tensor
    return out


def make_vl(folder: Path, spec: Spec, form: Form = Form.PT, eyes: Eyes = SMALL) -> Path:
    """Write a VL checkpoint whose language model is the checkpoint that `spec` makes."""
    text = plain(spec) if form is Form.PADDLE else stored(spec)
    return write_checkpoint(folder, vl_config(spec, form, eyes), with_vision(spec, text, form, eyes), spec.shards)
