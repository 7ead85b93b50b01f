"""How much memory and disk a run takes, known before it begins. Needs no torch."""

from dataclasses import dataclass

from ..checkpoint.config import ErnieConfig, MoeConfig
from .settings import Settings

_ACTIVATION_SHARE = 0.25  # of a GPU's free memory, for the activations of a layer
_EXPERT_SHARE = 0.8  # of a GPU's free memory; the rest allows for fragmentation
# Float32 copies alive at once: of a matrix's weights, of its Hessian (float64 counts twice), and of the scores for 5
# scales and 256 codes per row that the search in torch holds. Measured at the 21B's shapes with 4 experts: 1.78 GB with
# 2,000 tokens per expert and 1.96 GB with 16,000 in one thread, 3.47 GB in two.
_WEIGHT_COPIES, _HESSIAN_COPIES, _SCORE_COPIES = 17, 14, 3 * 5 * 256


@dataclass(frozen=True)
class Needs:
    """Bytes: on disk besides the checkpoint, of memory, and of GPU memory (0 without a GPU)."""

    disk: int
    memory: int
    device: int


def _moe(config: ErnieConfig) -> MoeConfig:
    assert config.moe is not None  # noqa: S101 - check_source refuses dense models
    return config.moe


def expert_bytes(config: ErnieConfig, tokens: int, compiled: bool) -> int:
    """Peak bytes while one expert that gets `tokens` tokens is encoded."""
    moe, hidden = _moe(config), config.hidden
    rows, k = max((2 * moe.width, hidden), (hidden, moe.width))
    scores = 0 if compiled else _SCORE_COPIES * rows
    inputs = tokens * (hidden + 2 * moe.width)
    return 4 * (_WEIGHT_COPIES * rows * k + _HESSIAN_COPIES * k * k + scores + inputs)


def experts_at_once(config: ErnieConfig, tokens: int, free: int) -> int:
    """How many experts a GPU with `free` bytes encodes at once if each gets `tokens` tokens; at least one."""
    return max(1, min(_moe(config).experts, int(free * _EXPERT_SHARE) // expert_bytes(config, tokens, False)))


def fits_device(nbytes: int, free: int) -> bool:
    """Whether a GPU with `free` bytes has room for the activations besides the experts."""
    return nbytes < free * _ACTIVATION_SHARE


def layer_bytes(config: ErnieConfig) -> int:
    """Bytes of a decoder layer in float32 without its experts; of the largest one."""
    attention = config.hidden * config.head_dim * 2 * (config.heads + config.kv_heads)
    return 4 * (attention + 3 * config.hidden * max(config.ffn_width, _moe(config).shared_width))


def needs(config: ErnieConfig, tokens: int, file_bytes: int, settings: Settings) -> Needs:
    """What a run needs for `tokens` calibration tokens and an output file of `file_bytes`."""
    moe, on_cpu = _moe(config), settings.device == "cpu"
    activations = 4 * tokens * config.hidden
    expert = expert_bytes(config, tokens * moe.used // moe.experts, settings.compiled)
    layer, program = layer_bytes(config), 3 << 28
    # The layer's input and output and its experts' input; the file's space is taken at the start.
    return Needs(
        disk=file_bytes + 3 * activations,
        memory=program + layer + (settings.threads * expert if on_cpu else 2 * expert),
        device=0 if on_cpu else program + layer + expert,
    )
