"""GBNF rules for ranges of integers."""

from __future__ import annotations

# The bound of integers that have none; the rule "integer" has as many digits.
LARGEST = 10**16 - 1


def integer_range(low: int | None, high: int | None) -> str:
    """The body of a rule for the integers from `low` to `high`; None stands for -LARGEST or LARGEST.

    Raises:
        ValueError: the range is empty.
    """
    low = -LARGEST if low is None else low
    high = LARGEST if high is None else high
    if low > high:
        raise ValueError(f"there is no integer from {low} to {high}")
    ways = []
    if low < 0:
        ways.append(f'"-" ({" | ".join(_magnitudes(max(1, -high), -low))})')
    if high >= 0:
        ways += _magnitudes(max(0, low), high)
    return " | ".join(ways)


def _magnitudes(low: int, high: int) -> list[str]:
    """Rule bodies for `low` to `high`, which are not negative; one for each number of digits."""
    bodies = []
    for digits in range(len(str(low)), len(str(high)) + 1):
        first = max(low, 10 ** (digits - 1) if digits > 1 else 0)
        bodies.append(_between(str(first), str(min(high, 10**digits - 1))))
    return bodies


def _between(low: str, high: str) -> str:
    """A rule body for the numbers from `low` to `high`, which have the same number of digits."""
    if low == high:
        return f'"{low}"'
    first, last, more = int(low[0]), int(high[0]), len(low) - 1
    if not more:
        return _digit(first, last)
    if first == last:
        return f'"{first}" ({_between(low[1:], high[1:])})'
    zeros, nines = "0" * more, "9" * more
    ways = []
    if low[1:] != zeros:
        ways.append(f'"{first}" ({_between(low[1:], nines)})')
        first += 1
    rest = None
    if high[1:] != nines:
        rest = f'"{last}" ({_between(zeros, high[1:])})'
        last -= 1
    if first <= last:
        ways.append(f"{_digit(first, last)} [0-9]{{{more}}}")
    return " | ".join([*ways, *([rest] if rest else [])])


def _digit(first: int, last: int) -> str:
    return f'"{first}"' if first == last else f"[{first}-{last}]"
