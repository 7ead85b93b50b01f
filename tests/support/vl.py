"""Vision-language checkpoints around the language model of checkpoints.Spec, for tests.

Per MoE layer: `gate.weight` is [hidden, experts] in the -PT files too, `gate.weight_1` the same for vision, the
correction bias has a row for each, and vision experts (of a smaller width) are numbered after the text experts.
"""

from pathlib import Path
from typing import Any

import numpy as np

from support.checkpoints import Spec, Stored, _random, config, store, stored, write_checkpoint
from support.paddle import paddle_name, plain

VISION_WIDTH = 64


def vl_config(spec: Spec) -> dict[str, Any]:
    """config.json: what differs between text and vision is a list."""
    values = config(spec) | {
        "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"],
        "model_type": "ernie4_5_moe_vl",
        "vision_config": {"depth": 2, "hidden_size": 32},
        "rope_3d": True,
        "freq_allocation": 20,
    }
    values["moe_num_experts"] = [spec.experts, spec.experts]
    values["moe_intermediate_size"] = [spec.expert_width, VISION_WIDTH]
    values["moe_layer_start_index"] = [spec.first_moe, spec.first_moe]
    values["moe_layer_end_index"] = [spec.layers + 1, spec.layers]
    return values


def _vision_of_layer(spec: Spec, name: str) -> dict[str, Stored]:
    """The vision half of a MoE layer, under -PT names."""
    out = {f"{name}.mlp.gate.weight_1": store(_random(spec, f"{name}.gate1", (spec.hidden, spec.experts)), "F32")}
    for e in range(spec.experts, 2 * spec.experts):
        expert = f"{name}.mlp.experts.{e}"
        for part, shape in (("gate", (VISION_WIDTH, spec.hidden)), ("down", (spec.hidden, VISION_WIDTH))):
            out[f"{expert}.{part}_proj.weight"] = store(_random(spec, f"{expert}.{part}", shape), "BF16")
    return out


def with_vision(spec: Spec, text: dict[str, Stored], paddle: bool) -> dict[str, Stored]:
    """A text checkpoint's tensors and what a VL checkpoint has besides."""
    out = dict(text)
    for name, tensor in text.items():
        if name.endswith("e_score_correction_bias"):
            bias = np.frombuffer(tensor.data, np.float32).reshape(1, -1)
            out[name] = store(np.concatenate([bias, bias - 7]), "F32")
        elif name.endswith("mlp.gate.weight") and not paddle:
            gate = np.frombuffer(tensor.data, np.float32).reshape(tensor.shape)
            out[name] = store(np.ascontiguousarray(gate.T), "F32")
    for layer in range(spec.first_moe, spec.layers):
        vision = _vision_of_layer(spec, f"model.layers.{layer}")
        out |= {paddle_name(name) if paddle else name: tensor for name, tensor in vision.items()}
    prefix = "ernie" if paddle else "model"
    out["vision_model.blocks.0.attn.qkv.weight"] = store(_random(spec, "qkv", (96, 32)), "BF16")
    out[f"{prefix}.resampler_model.spatial_linear.0.weight"] = store(_random(spec, "resampler", (32, 32)), "BF16")
    return out


def make_vl(folder: Path, spec: Spec, paddle: bool = False) -> Path:
    """Write a VL checkpoint whose language model is the checkpoint that `spec` makes."""
    tensors = with_vision(spec, plain(spec) if paddle else stored(spec), paddle)
    return write_checkpoint(folder, vl_config(spec), tensors, spec.shards)
