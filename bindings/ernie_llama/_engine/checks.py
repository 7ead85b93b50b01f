"""Checks of what a program passes: the value in the type that llama.cpp takes, or an error that names the option."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any


def integer(name: str, value: Any, least: int | None = None) -> int:  # noqa: ANN401 - that is what it checks
    """`value` as an int.

    Raises:
        TypeError: it is not an integer.
        ValueError: it is smaller than `least`; llama.cpp would abort the process for some options.
    """
    try:
        result = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}, expected an integer") from None
    if least is not None and result < least:
        raise ValueError(f"{name} is {value}, expected at least {least}")
    return result


def int32(name: str, value: Any, least: int = -(2**31), most: int = 2**31 - 1) -> int:  # noqa: ANN401
    """`value` as an int that a field of llama.cpp holds; ctypes would cut off what is too large.

    Raises:
        TypeError: it is not an integer.
        ValueError: it is out of range.
    """
    if (result := integer(name, value, least)) > most:
        raise ValueError(f"{name} is {value}, expected at most {most}")
    return result


def number(name: str, value: Any) -> float:  # noqa: ANN401
    """`value` as a float; TypeError if it is not a number."""
    if isinstance(value, str) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} is {value!r}, expected a number")
    return float(value)


def flag(name: str, value: Any) -> bool:  # noqa: ANN401
    """`value` as a bool; TypeError if it is neither a bool nor 0 or 1."""
    if not isinstance(value, int) or value not in {0, 1}:
        raise TypeError(f"{name} is {value!r}, expected True or False")
    return bool(value)


def texts(name: str, value: Any) -> tuple[list[str | list[int]], bool]:  # noqa: ANN401
    """Texts or lists of token ids, and whether `value` is a single one of either.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(value, str):
        return [value], True
    if isinstance(value, bytes) or not isinstance(value, Iterable):
        raise TypeError(f"{name} is {value!r}, expected a text, token ids, or a list of either")
    entries = list(value)
    if entries and all(hasattr(each, "__index__") for each in entries):
        return [[integer("a token", each) for each in entries]], True
    found: list[str | list[int]] = [
        each if isinstance(each, str) else [integer("a token", token) for token in _tokens(name, each)]
        for each in entries
    ]
    return found, False


def _tokens(name: str, value: Any) -> Iterable[Any]:  # noqa: ANN401
    if isinstance(value, bytes) or not isinstance(value, Iterable):
        raise TypeError(f"{name} holds {value!r}, expected a text or token ids")
    return value


def enum_value(name: str, value: int | str, values: Mapping[str, int]) -> int:
    """The number of an enum's value, which may be given by name or by number.

    Raises:
        ValueError: the enum has no such value.
    """
    if isinstance(value, str) and value.lower() in values:
        return values[value.lower()]
    if isinstance(value, int) and value in values.values():
        return int(value)
    known = ", ".join(f"{each} ({n})" for each, n in values.items())
    raise ValueError(f"{name} is {value!r}, expected one of {known}")
