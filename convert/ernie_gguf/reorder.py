"""Absorbing the shuffled order of K (docs/formats.md): which rows and columns of which tensors change places.

A shuffled 2-bit matrix holds at stored position p of a group the weight of input channel SHUFFLED[p]. Its weights
cannot change places, as four share a code; what they are multiplied with can. So the file keeps the residual stream in
stored order, and every matrix that reads or writes it follows. The inputs of `down` are neurons: there the rows of gate
and up follow. Every value stays what it was.
"""

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from .checkpoint.k_order import GROUP, SHUFFLED, KOrder
from .checkpoint.paddle_ccq import CCQ2
from .gguf_file.types import GgmlType
from .mapping import MappedTensor

if TYPE_CHECKING:
    from .plan import TensorPlan

RESTORED = tuple(SHUFFLED.index(channel) for channel in range(GROUP))  # the stored position of each channel

# What reads the residual stream: columns are its channels. A norm is its own columns.
READS = re.compile(
    r"(token_embd|output|output_norm|blk\.\d+\.(attn_norm|attn_[qkv]|ffn_norm|ffn_gate_inp(_vl)?"
    r"|ffn_(gate|up)(_exps|_shexp|_exps_vl)?)|mm\.post_norm)\.weight|mm\.model\.fc\.bias"
)
# What writes it: rows are its channels.
WRITES = re.compile(r"(blk\.\d+\.(attn_output|ffn_down(_exps|_shexp|_exps_vl)?)|mm\.model\.fc)\.weight")
# What does neither.
NEITHER = re.compile(r"rope_freqs\.weight|blk\.\d+\.exp_probs_b(_vl)?\.bias|v\..*|mm\.(spatial|temporal)\..*")


def two_bits(tensor: MappedTensor) -> bool:
    """Whether a tensor comes from Baidu's 2-bit code."""
    return any(part.source.storage is CCQ2 for part in tensor.parts)


def mixed(tensor: MappedTensor) -> bool:
    """Whether only some of its parts do: their columns would need two orders."""
    return len({part.source.storage is CCQ2 for part in tensor.parts}) > 1


def is_absorbed(tensors: tuple["TensorPlan", ...], order: KOrder) -> bool:
    """Whether a file of these tensors has its residual stream in stored order: where shuffled codes are kept."""
    return order is KOrder.SHUFFLED and any(t.ggml_type is GgmlType.CCQ2 and two_bits(t.mapped) for t in tensors)


def absorb(tensor: "TensorPlan") -> "TensorPlan":
    """The tensor as a file holds it whose residual stream is in stored order."""
    name = tensor.name
    if not (READS.fullmatch(name) or WRITES.fullmatch(name) or NEITHER.fullmatch(name)):
        raise ValueError(f"{name} is in no table of reorder.py")
    if two_bits(tensor.mapped):
        return replace(tensor, row_order=SHUFFLED)  # down's channels, or the neurons of gate and up
    if WRITES.fullmatch(name):
        return replace(tensor, row_order=SHUFFLED)
    return replace(tensor, column_order=SHUFFLED) if READS.fullmatch(name) else tensor


def restore(tensor: "TensorPlan") -> "TensorPlan":
    """The tensor with its channels in their own order: what is shuffled is decoded and its columns put back."""
    return replace(tensor, column_order=RESTORED) if two_bits(tensor.mapped) else tensor
