"""How much memory and disk a run takes, known before it begins."""

from dataclasses import dataclass

import torch

from ..checkpoint.config import ErnieConfig, MoeConfig
from .settings import Settings

_BESIDE_SHARE = 0.25  # of a GPU's free memory for the activations of a layer
_FREE_SHARE = 0.8  # of a GPU's free memory; the rest is for what fragments it
# Copies of a matrix's weights in float32 that are alive at once, of its K x K moments (float64 counts as two), and of
# the scores for 5 scales and 256 codes of every row that the search in torch holds. Measured at the 21B's shapes with 4
# experts: 1.78 GB with 2 thousand tokens per expert and 1.96 GB with 16 in one thread, 3.47 GB in two.
_WEIGHT_COPIES, _MOMENT_COPIES, _SCORE_COPIES = 17, 14, 3 * 5 * 256


@dataclass(frozen=True)
class Needs:
    """Bytes: on the disk beside the checkpoint, of memory, and of a GPU's memory (0 without one)."""

    disk: int
    memory: int
    device: int


def _moe(config: ErnieConfig) -> MoeConfig:
    assert config.moe is not None  # noqa: S101 - check_source has seen to it
    return config.moe


def expert_bytes(config: ErnieConfig, tokens: int, compiled: bool) -> int:
    """Peak bytes of encoding one expert that sees `tokens` tokens."""
    moe, hidden = _moe(config), config.hidden
    rows, k = max((2 * moe.width, hidden), (hidden, moe.width))
    scores = 0 if compiled else _SCORE_COPIES * rows
    inputs = tokens * (hidden + 2 * moe.width)
    return 4 * (_WEIGHT_COPIES * rows * k + _MOMENT_COPIES * k * k + scores + inputs)


def experts_at_once(config: ErnieConfig, tokens: int) -> int:
    """How many experts a GPU's free memory holds, if each sees `tokens` tokens; at least one."""
    free, _ = torch.cuda.mem_get_info()
    return max(1, min(_moe(config).experts, int(free * _FREE_SHARE) // expert_bytes(config, tokens, False)))


def fits_device(nbytes: int, device: str) -> bool:
    """Whether a GPU has room for so much beside the experts; never on a CPU, whose memory may be short."""
    return device == "cuda" and nbytes < torch.cuda.mem_get_info()[0] * _BESIDE_SHARE


def layer_bytes(config: ErnieConfig) -> int:
    """Float32 weights of a decoder layer without its experts, the largest."""
    attention = config.hidden * config.head_dim * 2 * (config.heads + config.kv_heads)
    return 4 * (attention + 3 * config.hidden * max(config.ffn_width, _moe(config).shared_width))


def needs(config: ErnieConfig, tokens: int, file_bytes: int, settings: Settings) -> Needs:
    """For so many calibration tokens and a file of `file_bytes`."""
    moe, on_cpu = _moe(config), settings.device == "cpu"
    activations = 4 * tokens * config.hidden
    expert = expert_bytes(config, tokens * moe.used // moe.experts, settings.compiled)
    layer, program = layer_bytes(config), 3 << 28
    # Activations before and after the layer, and what its experts get; the file has its space from the start.
    return Needs(
        disk=file_bytes + 3 * activations,
        memory=program + layer + (settings.threads * expert if on_cpu else 2 * expert),
        device=0 if on_cpu else program + layer + expert,
    )
