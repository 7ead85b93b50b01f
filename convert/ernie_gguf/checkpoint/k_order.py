"""The two orders of K in which Baidu's 2-bit experts may have been quantized (docs/formats.md, the order of K)."""

from enum import Enum

GROUP = 64  # weights that share a scale; the order changes within them
NATURAL = tuple(range(GROUP))
# SHUFFLED[p] is the input channel that the engine multiplies stored position p = 16a + 2b + c of a group with.
SHUFFLED = tuple(8 * b + 2 * a + c for a in range(4) for b in range(8) for c in range(2))


class KOrder(str, Enum):
    """What `--ccq-k-order` takes."""

    AUTO = "auto"  # found from the weights (see `find_k_order`)
    NATURAL = "natural"
    SHUFFLED = "shuffled"
