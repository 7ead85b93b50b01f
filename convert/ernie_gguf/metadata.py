"""ERNIE's metadata in GGUF: the keys that llama.cpp's loader reads, in the values of upstream's converter.

One difference: upstream writes `intermediate_size // num_key_value_heads` as the width of the shared experts, which is
right for the 21B by luck; the width is `moe_intermediate_size * moe_num_shared_experts`.
"""

import struct
from pathlib import Path

from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_VERSION, GGUFType, LlamaFileType
from gguf.utility import size_label

from .checkpoint.config import ErnieConfig, MoeConfig
from .checkpoint.paddle_ccq import CCQ2
from .checkpoint.vocab import Vocab
from .gguf_file.outtype import Outtype
from .gguf_file.reader import value_offset
from .gguf_file.types import LAYOUT_KEY, LAYOUT_VERSION, GgmlType
from .plan import Plan

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


def _size_label(config: ErnieConfig, plan: Plan) -> str:
    """As upstream labels models: "21B", or "64x300M" with the experts counted once."""
    experts = sum(tensor.elements for tensor in plan.tensors if tensor.is_expert)
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
    writer.add_rope_freq_base(config.rope_theta)
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


def _write_vocab(writer: GGUFWriter, vocab: Vocab) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocab.tokens)
    writer.add_token_scores(vocab.scores)
    writer.add_token_types([int(token_type) for token_type in vocab.types])
    for role, token_id in vocab.special.items():
        getattr(writer, f"add_{role}_token_id")(token_id)
    writer.add_add_bos_token(vocab.add_bos)
    writer.add_add_eos_token(vocab.add_eos)
    writer.add_add_space_prefix(vocab.add_space_prefix)
    if vocab.chat_template is not None:
        writer.add_chat_template(vocab.chat_template)


def write_layout(writer: GGUFWriter, plan: Plan) -> None:
    """The key without which no loader takes a file with ccq2 tensors."""
    if any(tensor.ggml_type is GgmlType.CCQ2 for tensor in plan.tensors):
        writer.add_uint32(LAYOUT_KEY, LAYOUT_VERSION)


def repacks_two_bits(plan: Plan) -> bool:
    """Whether experts of Baidu's 2-bit checkpoint are among the sources."""
    return any(part.source.storage is CCQ2 for tensor in plan.tensors for part in tensor.parts)


def set_inexact_rows(path: Path, rows: int) -> None:
    """Say in a written file how many rows of Baidu's 2-bit experts have no exact integer code map."""
    with path.open("r+b") as file:
        file.seek(value_offset(path, INEXACT_KEY))
        file.write(struct.pack("<I", rows))


def write_metadata(writer: GGUFWriter, name: str, config: ErnieConfig, vocab: Vocab, plan: Plan) -> None:
    """Add every key of the file to the writer; `name` becomes general.name."""
    writer.add_type(GGUFType.MODEL)
    writer.add_name(name)
    writer.add_size_label(_size_label(config, plan))
    writer.add_file_type(FILE_TYPES[plan.outtype])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    write_layout(writer, plan)
    if repacks_two_bits(plan):
        writer.add_uint32(INEXACT_KEY, 0)  # set when all rows are written
    _write_model(writer, config)
    if config.moe is not None:
        _write_moe(writer, config.moe)
    _write_vocab(writer, vocab)
