"""ERNIE-4.5-VL's 3-D RoPE as llama.cpp's M-RoPE: an order of each head's rows, and factors of the frequencies.

ERNIE turns neighbouring rows 2j, 2j + 1 of a head by theta^(-2j/d) times row and column in turn, and the slowest pairs
by time. M-RoPE turns rows p, p + d/2 by theta^(-2p/d), with one section of pairs p each for time, row and column. A
product of q and k does not change when both are permuted alike, so pair p becomes ERNIE's pair order[p], and a factor
gives it that pair's frequency.
"""

import numpy as np


def _pair_order(sections: tuple[int, int, int]) -> list[int]:
    """ERNIE's number of each of M-RoPE's pairs: time, rows (even numbers), columns (odd numbers)."""
    t, h, w = sections
    return [*range(h + w, h + w + t), *range(0, h + w, 2), *range(1, h + w, 2)]


def head_order(sections: tuple[int, int, int]) -> tuple[int, ...]:
    """Which row of ERNIE's head each row of the GGUF's is."""
    pairs = _pair_order(sections)
    return (*(2 * pair for pair in pairs), *(2 * pair + 1 for pair in pairs))


def factors(sections: tuple[int, int, int], theta: float) -> tuple[float, ...]:
    """What ggml divides the frequency of each pair by.

    ggml multiplies a float32 base p times to get pair p's frequency. The base is rounded as there, so that its error
    does not grow into a wrong frequency where a fast pair has a high number: the error is 1.5e-7 instead of 1.4e-6.
    """
    pairs = _pair_order(sections)
    base = float(np.float32(theta ** (-1 / len(pairs))))
    return tuple(base**p / theta ** (-pair / len(pairs)) for p, pair in enumerate(pairs))
