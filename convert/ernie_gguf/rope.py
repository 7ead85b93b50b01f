"""ERNIE-4.5-VL's 3-D RoPE as llama.cpp's M-RoPE: an order of each head's rows, and factors of the frequencies.

ERNIE rotates adjacent rows 2j, 2j + 1 of a head by theta^(-2j/d) times row and column in turn, and the slowest pairs
by time. M-RoPE turns rows p, p + d/2 by base^(-2p/d), with one section of pairs p each for time, row and column. A
product of q and k does not change when both are permuted alike, so pair p becomes ERNIE's pair order[p]. Its frequency
comes from a factor alone: the file's base is BASE.
"""

# ggml multiplies a position by base^(-2/d) p times, rounding each time. For a fast pair with a high number p the angle
# would be wrong by 3e-7 of it, ten times what logits lose otherwise; with a base of 1 only the division rounds.
BASE = 1.0


def _pair_order(sections: tuple[int, int, int]) -> list[int]:
    """ERNIE's number of each of M-RoPE's pairs: time, rows (even numbers), columns (odd numbers)."""
    t, h, w = sections
    return [*range(h + w, h + w + t), *range(0, h + w, 2), *range(1, h + w, 2)]


def head_order(sections: tuple[int, int, int]) -> tuple[int, ...]:
    """Which row of ERNIE's head each row of the GGUF's is."""
    pairs = _pair_order(sections)
    return (*(2 * pair for pair in pairs), *(2 * pair + 1 for pair in pairs))


def factors(sections: tuple[int, int, int], theta: float) -> tuple[float, ...]:
    """What ggml divides a position by to get each pair's angle, given BASE."""
    pairs = _pair_order(sections)
    return tuple(theta ** (pair / len(pairs)) for pair in pairs)
