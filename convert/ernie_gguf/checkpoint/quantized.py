"""The ways in which Paddle checkpoints store quantized matrices."""

from .paddle_ccq import CCQ2
from .paddle_fp8 import BLOCK_FP8
from .paddle_int import INT4, INT8
from .storage import Storage

# type in config.json's quantization_config -> storage
STORAGES: dict[str, Storage] = {"wint8": INT8, "wint4": INT4, "block_wise_fp8": BLOCK_FP8, "wint2": CCQ2}
