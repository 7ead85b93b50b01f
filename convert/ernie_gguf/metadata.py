"""ERNIE's metadata in GGUF: the keys that llama.cpp's loader reads, in the values of upstream's converter.

One difference: upstream writes `intermediate_size // num_key_value_heads` as the width of the shared experts, which is
right for the 21B by luck; the width is `moe_intermediate_size * moe_num_shared_experts`.
"""

import struct
from collections.abc import Mapping
from pathlib import Path

from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_VERSION, GGUFType, Keys, LlamaFileType
from gguf.utility import size_label

from . import rope
from .checkpoint.chat_templates import DEFAULT
from .checkpoint.config import ErnieConfig, MoeConfig
from .checkpoint.k_order import KOrder
from .checkpoint.paddle_ccq import CCQ2
from .checkpoint.vision_config import Preprocessor
from .checkpoint.vocab import Vocab
from .expected import Role
from .gguf_file.outtype import Outtype, VisionTokens
from .gguf_file.reader import value_offset
from .gguf_file.types import K_ORDER_KEY, LAYOUT_KEY, LAYOUT_VERSION, MIX_KEY, GgmlType
from .plan import Plan, TensorPlan

VISION_WIDTH_KEY = "{arch}.expert_vision_feed_forward_length"
VISION_TOKENS_KEY = "{arch}.vision_token_range"  # first and last id
TOWER_EPS = 1e-6  # of the tower's layer norms, in no config.json
INEXACT_KEY = "ernie_gguf.ccq.inexact_rows"  # of a repacked 2-bit checkpoint

# general.file_type is what llama.cpp prints as the model's type; ccq2 takes the number of its tensor type.
FILE_TYPES: dict[Outtype, int] = {
    Outtype.F32: LlamaFileType.ALL_F32,
    Outtype.BF16: LlamaFileType.MOSTLY_BF16,
    Outtype.F16: LlamaFileType.MOSTLY_F16,
    Outtype.Q8_0: LlamaFileType.MOSTLY_Q8_0,
    Outtype.Q4_0: LlamaFileType.MOSTLY_Q4_0,
    Outtype.CCQ2: GgmlType.CCQ2,
}


# The same for types that only mixes have.
MIX_FILE_TYPES: dict[GgmlType, int] = {
    GgmlType.F32: LlamaFileType.ALL_F32,
    GgmlType.F16: LlamaFileType.MOSTLY_F16,
    GgmlType.BF16: LlamaFileType.MOSTLY_BF16,
    GgmlType.Q4_0: LlamaFileType.MOSTLY_Q4_0,
    GgmlType.Q8_0: LlamaFileType.MOSTLY_Q8_0,
    GgmlType.Q2_0: 41,  # gguf-py 0.19 does not know it
    GgmlType.Q2_K: LlamaFileType.MOSTLY_Q2_K,
    GgmlType.Q3_K: LlamaFileType.MOSTLY_Q3_K_M,
    GgmlType.Q4_K: LlamaFileType.MOSTLY_Q4_K_M,
    GgmlType.Q5_K: LlamaFileType.MOSTLY_Q5_K_M,
    GgmlType.Q6_K: LlamaFileType.MOSTLY_Q6_K,
    GgmlType.IQ2_XXS: LlamaFileType.MOSTLY_IQ2_XXS,
    GgmlType.IQ2_XS: LlamaFileType.MOSTLY_IQ2_XS,
    GgmlType.IQ2_S: LlamaFileType.MOSTLY_IQ2_S,
    GgmlType.IQ3_XXS: LlamaFileType.MOSTLY_IQ3_XXS,
    GgmlType.IQ3_S: LlamaFileType.MOSTLY_IQ3_S,
    GgmlType.IQ4_XS: LlamaFileType.MOSTLY_IQ4_XS,
}


def _size_label(config: ErnieConfig, plan: Plan) -> str:
    """As upstream labels models: "21B", or "64x300M" with the experts counted once."""
    roles = (Role.EXPERT, Role.VISION_EXPERT)
    experts = sum(tensor.elements for tensor in plan.tensors if tensor.expected.role in roles)
    total = sum(tensor.elements for tensor in plan.tensors)
    count = config.moe.experts if config.moe else 0
    label: str = size_label(total, total - experts, experts // count if count else 0, count)
    return label


def _write_model(writer: GGUFWriter, config: ErnieConfig) -> None:
    writer.add_block_count(config.layers)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.hidden)
    writer.add_feed_forward_length(config.ffn_width)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta if config.vision is None else rope.BASE)
    writer.add_layer_norm_rms_eps(config.rms_eps)


def _write_moe(writer: GGUFWriter, moe: MoeConfig) -> None:
    writer.add_expert_count(moe.experts)
    writer.add_expert_used_count(moe.used)
    writer.add_expert_feed_forward_length(moe.width)
    writer.add_leading_dense_block_count(moe.first_layer)
    writer.add_interleave_moe_layer_step(1)
    writer.add_expert_shared_count(moe.shared)
    if moe.shared:
        writer.add_expert_shared_feed_forward_length(moe.shared_width)


def _write_vision(writer: GGUFWriter, config: ErnieConfig, tokens: VisionTokens) -> None:
    """What tells llama.cpp that the model has eyes; their own keys are in the mmproj."""
    if (vision := config.vision) is None:
        return
    writer.add_rope_dimension_sections([*vision.sections, 0])
    writer.add_uint32(VISION_WIDTH_KEY.format(arch=config.arch), vision.expert_width)
    found = vision.marks if tokens is VisionTokens.MARKS else (vision.placeholder, config.vocab - 1)
    writer.add_array(VISION_TOKENS_KEY.format(arch=config.arch), list(found))


def write_projector(writer: GGUFWriter, name: str, config: ErnieConfig, eyes: Preprocessor, plan: Plan) -> None:
    """Add every key of the mmproj, as llama.cpp's `clip.cpp` reads them; without those of video it takes ERNIE's."""
    if (vision := config.vision) is None:
        raise ValueError(f"{name} has no eyes")
    writer.add_type(GGUFType.MMPROJ)
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[plan.outtype])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    write_k_order(writer, plan)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("ernie4_5vl")
    writer.add_vision_projection_dim(config.hidden)
    writer.add_vision_image_size(37 * 2 * vision.patch)  # of the warm-up; images have any size
    writer.add_vision_patch_size(vision.patch)
    writer.add_vision_spatial_merge_size(2)
    writer.add_vision_embedding_length(vision.width)
    writer.add_vision_feed_forward_length(vision.mlp_width)
    writer.add_vision_block_count(vision.depth)
    writer.add_vision_head_count(vision.heads)
    writer.add_vision_attention_layernorm_eps(TOWER_EPS)
    writer.add_float32("clip.vision.projector.norm_epsilon", config.rms_eps)
    writer.add_vision_min_pixels(eyes.min_pixels)
    writer.add_vision_max_pixels(eyes.max_pixels)
    writer.add_vision_image_mean(list(eyes.mean))
    writer.add_vision_image_std(list(eyes.std))
    if (video := eyes.video) is not None:
        writer.add_uint32("clip.vision.video_min_pixels", video.min_pixels)
        writer.add_uint32("clip.vision.video_max_pixels", video.max_pixels)
        writer.add_uint32("clip.vision.video_min_frames", video.min_frames)
        writer.add_uint32("clip.vision.video_max_frames", video.max_frames)
        writer.add_float32("clip.vision.video_fps", video.fps)
        writer.add_bool("clip.vision.video_draw_time", video.draw_time)


def write_vocab(writer: GGUFWriter, vocab: Vocab) -> None:
    """Add the tokenizer's keys."""
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocab.tokens)
    writer.add_token_scores(vocab.scores)
    writer.add_token_types([int(token_type) for token_type in vocab.types])
    for role, token_id in vocab.special.items():
        writer.add_uint32(getattr(Keys.Tokenizer, f"{role.upper()}_ID"), token_id)
    writer.add_add_bos_token(vocab.add_bos)
    writer.add_add_eos_token(vocab.add_eos)
    writer.add_add_space_prefix(vocab.add_space_prefix)
    # Not by gguf-py's add_chat_template: it lists the names in an order that differs from run to run.
    named = [name for name in vocab.templates if name != DEFAULT]
    for name in named:
        writer.add_string(Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name), vocab.templates[name])
    if named:
        writer.add_array(Keys.Tokenizer.CHAT_TEMPLATES, named)
    if DEFAULT in vocab.templates:
        writer.add_string(Keys.Tokenizer.CHAT_TEMPLATE, vocab.templates[DEFAULT])


def write_layout(writer: GGUFWriter, plan: Plan) -> None:
    """The key without which no loader takes a file with ccq2 tensors."""
    if any(tensor.ggml_type is GgmlType.CCQ2 for tensor in plan.tensors):
        writer.add_uint32(LAYOUT_KEY, LAYOUT_VERSION)


def mixed(plan: Plan) -> list[TensorPlan]:
    """The tensors whose types a mix chooses: all matrices but the router."""
    return [tensor for tensor in plan.tensors if tensor.expected.role is not Role.EXACT]


def _file_type(plan: Plan) -> int:
    """Of a mix, the type that most of the experts' weights have, as llama.cpp names it."""
    if not plan.label or any(tensor.ggml_type is GgmlType.CCQ2 for tensor in plan.tensors):
        return FILE_TYPES[plan.outtype]
    weights: dict[GgmlType, int] = {}
    for tensor in plan.tensors:
        if tensor.is_expert:
            weights[tensor.ggml_type] = weights.get(tensor.ggml_type, 0) + tensor.elements
    return MIX_FILE_TYPES[max(weights, key=lambda each: weights[each])]


def write_k_order(writer: GGUFWriter, plan: Plan) -> None:
    """Name the order of the residual stream where it is not the model's own."""
    if plan.absorbed:
        writer.add_string(K_ORDER_KEY, KOrder.SHUFFLED.value)


def repacks_two_bits(plan: Plan) -> bool:
    """Whether experts of Baidu's 2-bit checkpoint are among the sources."""
    return any(part.source.storage is CCQ2 for tensor in plan.tensors for part in tensor.parts)


def set_inexact_rows(path: Path, rows: int) -> None:
    """Say in a written file how many rows of Baidu's 2-bit experts have no exact integer code map."""
    with path.open("r+b") as file:
        file.seek(value_offset(path, INEXACT_KEY))
        file.write(struct.pack("<I", rows))


def write_metadata(
    writer: GGUFWriter,
    name: str,
    config: ErnieConfig,
    vocab: Vocab,
    plan: Plan,
    *,
    tokens: VisionTokens = VisionTokens.ALL,
    sampling: Mapping[str, int | float] | None = None,
) -> None:
    """Add every key of the model's file to the writer; `name` becomes general.name."""
    writer.add_type(GGUFType.MODEL)
    writer.add_name(name)
    for setting, value in (sampling or {}).items():
        getattr(writer, f"add_sampling_{setting}")(value)
    writer.add_size_label(_size_label(config, plan))
    writer.add_file_type(_file_type(plan))
    writer.add_quantization_version(GGML_QUANT_VERSION)
    write_layout(writer, plan)
    if plan.label:
        writer.add_array(MIX_KEY, [f"{tensor.name}={tensor.ggml_type.name.lower()}" for tensor in mixed(plan)])
    if repacks_two_bits(plan):
        writer.add_uint32(INEXACT_KEY, 0)  # set when all rows are written
    write_k_order(writer, plan)
    _write_model(writer, config)
    if config.moe is not None:
        _write_moe(writer, config.moe)
    _write_vision(writer, config, tokens)
    write_vocab(writer, vocab)
