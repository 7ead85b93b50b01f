"""JSON schemas: the values of their keywords, checked, and the rules of GBNF that need no other rules."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from .integer_range import integer_range

ANNOTATIONS = frozenset({
    "$schema", "$id", "$comment", "$defs", "definitions", "title", "description", "default", "examples", "deprecated",
    "readOnly", "writeOnly",
})  # fmt: skip
TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")

# Rules that are added to a grammar that refers to them.
RULES = {
    "ws": r'| " " | "\n" [ \t]{0,20}',
    # No surrogates: two of them would be one character.
    "char": r'[^"\\\x7F\x00-\x1F] | [\\] (["\\/bfnrt] | "u" ([0-9a-cefA-CEF] hex hex hex | [dD] [0-7] hex hex))',
    "hex": "[0-9a-fA-F]",
    "string": r'"\"" char* "\""',
    "integer": r'"-"? ("0" | [1-9] [0-9]{0,15})',
    "number": r'integer ("." [0-9]{1,16})? ([eE] [-+]? [0-9]{1,3})?',
    "boolean": r'"true" | "false"',
    "null": r'"null"',
    "value": "object | array | string | number | boolean | null",
    "member": r'string ws ":" ws value',
    "object": r'"{" ws (member ws ("," ws member ws)*)? "}"',
    "array": r'"[" ws (value ws ("," ws value ws)*)? "]"',
    "date": (
        r'[0-9]{4} "-" (("0" [1-9] | "1" [0-2]) "-" ("0" [1-9] | "1" [0-9] | "2" [0-8]) | '
        r'shortmonth "-" ("29" | "30") | longmonth "-31")'
    ),
    "shortmonth": r'"0" [13-9] | "1" [0-2]',
    "longmonth": r'"0" [13578] | "10" | "12"',
    "time": (
        r'([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9] ":" [0-5] [0-9] ("." [0-9]{1,6})? '
        r'("Z" | [-+] ([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9])'
    ),
    "uuid": "[0-9a-f]{8} " + '"-" [0-9a-f]{4} ' * 3 + '"-" [0-9a-f]{12}',
}
FORMATS = {"date": "date", "time": "time", "date-time": 'date "T" time', "uuid": "uuid"}


def refusal(place: str, what: str) -> ValueError:
    """The error of a schema that cannot be kept at `place`, a JSON pointer."""
    return ValueError(f"JSON schema, {place}: {what}")


def wrong(place: str, value: Any, expected: str) -> ValueError:  # noqa: ANN401 - parsed JSON
    """The error for a value that its keyword does not allow."""
    return refusal(place, f"found {json.dumps(value, default=str)[:80]}, expected {expected}")


def pointer(place: str, *keys: str | int) -> str:
    """The JSON pointer of a place below `place`."""
    return "/".join([place, *(str(key).replace("~", "~0").replace("/", "~1") for key in keys)])


MAX_REPETITIONS = 1000  # half of llama.cpp's MAX_REPETITION_THRESHOLD


def const(schema: Mapping[str, Any], place: str) -> str:
    return group(_literals(schema, [schema["const"]], pointer(place, "const")))


def enum(schema: Mapping[str, Any], place: str) -> str:
    values = schema["enum"]
    if not isinstance(values, list) or not values:
        raise wrong(pointer(place, "enum"), values, "a list of values")
    return group(_literals(schema, values, pointer(place, "enum")))


def _literals(schema: Mapping[str, Any], values: list[Any], place: str) -> str:
    """A rule body for those of the values that have the schema's type."""
    types = schema.get("type", list(TYPES))
    allowed = [value for value in values if _has_type(value, types if isinstance(types, list) else [types])]
    if not allowed:
        raise refusal(place, f"no value has the type {json.dumps(types)}")
    return alternatives(map(literal, allowed))


def _has_type(value: Any, types: list[str]) -> bool:  # noqa: ANN401
    if isinstance(value, bool):
        return "boolean" in types
    if isinstance(value, int | float):
        return "number" in types or ("integer" in types and value == int(value))
    names = {str: "string", dict: "object", list: "array", type(None): "null"}
    return names.get(type(value)) in types


def integer(schema: Mapping[str, Any], place: str) -> str:
    only(schema, {"type", *OF_TYPE["integer"]}, place)
    lows: list[int] = []
    highs: list[int] = []
    for key, bounds, beside in (
        ("minimum", lows, 0),
        ("exclusiveMinimum", lows, 1),
        ("maximum", highs, 0),
        ("exclusiveMaximum", highs, -1),
    ):
        if key in schema:
            if (value := _whole(schema[key])) is None:
                raise wrong(pointer(place, key), schema[key], "an integer")
            bounds.append(value + beside)
    if not lows and not highs:
        return "integer"
    try:
        return group(integer_range(max(lows, default=None), min(highs, default=None)))
    except ValueError as error:
        raise refusal(place, str(error)) from error


def _whole(value: Any) -> int | None:  # noqa: ANN401
    """The integer that a JSON number is; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
        return None
    return int(value)


def bounds(schema: Mapping[str, Any], low: str, high: str, place: str) -> tuple[int, int | None]:
    least, most = (_whole(schema[key]) if key in schema else None for key in (low, high))
    for key, value in ((low, least), (high, most)):
        if key in schema and (value is None or value < 0):
            raise wrong(pointer(place, key), schema[key], "a number from 0 on")
    if most is not None and most < (least or 0):
        raise refusal(place, f"{high} is {most}, less than {low}, which is {least}")
    return least or 0, most


def implied_type(schema: Mapping[str, Any]) -> str | None:
    """The type of a schema that does not name it."""
    if {"properties", "additionalProperties", "required"} & set(schema):
        return "object"
    if {"items", "prefixItems", "minItems", "maxItems"} & set(schema):
        return "array"
    return "string" if {"minLength", "maxLength", "format"} & set(schema) else None


OF_TYPE = {
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "string": {"minLength", "maxLength", "format"},
    "integer": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
}


def for_type(schema: Mapping[str, Any], json_type: str, types: list[str]) -> Mapping[str, Any]:
    """What a schema with several types says about one of them. What belongs to none stays, and will be refused."""
    others: set[str] = set().union(*(OF_TYPE.get(each, set()) for each in types if each != json_type))
    return {key: value for key, value in schema.items() if key not in others - OF_TYPE.get(json_type, set())}


def only(schema: Mapping[str, Any], keys: set[str], place: str, beside: str = "") -> None:
    if unknown := sorted(set(schema) - keys - ANNOTATIONS):
        raise refusal(
            pointer(place, unknown[0]),
            f"{', '.join(unknown)} cannot be expressed {beside}by the grammar; leave it out and check the answer "
            "yourself, or pass your own grammar",
        )


def literal(value: Any) -> str:  # noqa: ANN401
    """A GBNF literal for the compact JSON text of `value`."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def alternatives(bodies: Iterable[str]) -> str:
    return " | ".join(dict.fromkeys(bodies))


def group(body: str) -> str:
    return f"({body})"


def without_literals(body: str) -> str:
    return re.sub(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]', " ", body)
