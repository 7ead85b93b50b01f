"""Converts a JSON schema to a GBNF grammar of the texts that it allows.

Supported: `type` (also a list of types), `properties`, `required`, `additionalProperties`, `items`, `prefixItems`,
`minItems`, `maxItems`, `minLength`, `maxLength`, `minimum`, `maximum`, `exclusiveMinimum` and `exclusiveMaximum` of
integers, `enum`, `const`, `anyOf`, `oneOf`, `$ref` within the document (also recursive), `format` date, time, date-time
and uuid, and boolean schemas. `oneOf` is treated as `anyOf`: a grammar cannot express "exactly one". Annotations
(`title`, `description`, ...) are ignored. Everything else is refused by name, so that no rule is silently dropped.

Properties appear in the order of the schema, and only those: if a rule allowed others, a text could repeat a property
and break the schema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

ANNOTATIONS = frozenset({
    "$schema", "$id", "$comment", "$defs", "definitions", "title", "description", "default", "examples", "deprecated",
    "readOnly", "writeOnly",
})  # fmt: skip
TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")

# Rules that are added to a grammar that refers to them.
RULES = {
    "ws": r'| " " | "\n" [ \t]{0,20}',
    "char": r'[^"\\\x7F\x00-\x1F] | [\\] (["\\/bfnrt] | "u" [0-9a-fA-F]{4})',
    "string": r'"\"" char* "\""',
    "integer": r'"-"? ("0" | [1-9] [0-9]{0,15})',
    "number": r'integer ("." [0-9]{1,16})? ([eE] [-+]? [0-9]{1,3})?',
    "boolean": r'"true" | "false"',
    "null": r'"null"',
    "value": "object | array | string | number | boolean | null",
    "member": r'string ws ":" ws value',
    "object": r'"{" ws (member ws ("," ws member ws)*)? "}"',
    "array": r'"[" ws (value ws ("," ws value ws)*)? "]"',
    "date": r'[0-9]{4} "-" ("0" [1-9] | "1" [0-2]) "-" ("0" [1-9] | [12] [0-9] | "3" [01])',
    "time": (
        r'([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9] ":" [0-5] [0-9] ("." [0-9]{1,6})? '
        r'("Z" | [-+] ([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9])'
    ),
    "uuid": "[0-9a-f]{8} " + '"-" [0-9a-f]{4} ' * 3 + '"-" [0-9a-f]{12}',
}
FORMATS = {"date": "date", "time": "time", "date-time": 'date "T" time', "uuid": "uuid"}


def grammar(schema: Any) -> str:  # noqa: ANN401 - parsed JSON
    """A GBNF grammar whose root is `schema`.

    Raises:
        ValueError: the schema is not one, or contains something that a grammar cannot express; names the place.
    """
    converter = _Converter(schema)
    converter.define("root", converter.rule(schema, "#"))
    return converter.text()


class _Converter:
    """Collects the rules of a grammar."""

    def __init__(self, document: Any) -> None:  # noqa: ANN401
        self._document = document
        self._rules: dict[str, str] = {}
        self._refs: dict[str, str] = {}

    def define(self, name: str, body: str) -> None:
        self._rules[name] = body

    def text(self) -> str:
        rules = dict(self._rules)
        waiting = list(rules.values())
        while waiting:
            for name in re.findall(r"[a-z]+(?:-[a-z0-9]+)*", _without_literals(waiting.pop())):
                if name in RULES and name not in rules:
                    rules[name] = RULES[name]
                    waiting.append(rules[name])
        return "\n".join(f"{name} ::= {body}" for name, body in rules.items()) + "\n"

    def rule(self, schema: Any, place: str) -> str:  # noqa: ANN401
        """The body of a rule for `schema`, which is at `place` in the document."""
        if schema is True or schema == {}:
            return "value"
        if not isinstance(schema, Mapping):
            raise ValueError(f"JSON schema, {place}: found {json.dumps(schema)}, expected an object or true")
        known: dict[str, Callable[[Mapping[str, Any], str], str]] = {
            "$ref": self._ref,
            "const": lambda s, _: _literal(s["const"]),
            "enum": _enum,
            "anyOf": lambda s, p: self._union(s["anyOf"], f"{p}/anyOf"),
            "oneOf": lambda s, p: self._union(s["oneOf"], f"{p}/oneOf"),
        }
        for key, convert in known.items():
            if key in schema:
                _only(schema, {key, "type"} if key in {"const", "enum"} else {key}, place)
                return convert(schema, place)
        types = schema.get("type", _implied_type(schema))
        if isinstance(types, list):
            return _group(_alternatives(self._typed(_for_type(schema, each, types), each, place) for each in types))
        return self._typed(schema, types, place)

    def _typed(self, schema: Mapping[str, Any], json_type: object, place: str) -> str:
        if json_type == "object":
            return self._object(schema, place)
        if json_type == "array":
            return self._array(schema, place)
        if json_type == "string":
            return _string(schema, place)
        if json_type == "integer":
            return _integer(schema, place)
        if json_type in TYPES:
            _only(schema, {"type"}, place)
            return str(json_type)
        if json_type is None:
            _only(schema, set(), place)
            return "value"
        raise ValueError(
            f"JSON schema, {place}/type: found {json.dumps(json_type)}, expected one of {', '.join(TYPES)}"
        )

    def _object(self, schema: Mapping[str, Any], place: str) -> str:
        _only(schema, {"type", "properties", "required", "additionalProperties"}, place)
        properties: Mapping[str, Any] = schema.get("properties", {})
        required = set(schema.get("required", ()))
        if unknown := required - set(properties):
            raise ValueError(f"JSON schema, {place}/required: {sorted(unknown)} are not among the properties")
        members = [
            (self._named(f'{_literal(key)} ws ":" ws {self.rule(value, f"{place}/properties/{key}")}', place), key)
            for key, value in properties.items()
        ]
        others = schema.get("additionalProperties", True)
        if not members and others is not False:
            other = self._named(f'string ws ":" ws {self.rule(others, f"{place}/additionalProperties")} ws', place)
            return f'"{{" ws ({other} ("," ws {other})*)? "}}"'
        if not isinstance(others, bool):
            raise ValueError(
                f"JSON schema, {place}: additionalProperties with a schema is supported only without properties"
            )
        return _braced([(name, key in required) for name, key in members])

    def _array(self, schema: Mapping[str, Any], place: str) -> str:
        _only(schema, {"type", "items", "prefixItems", "minItems", "maxItems"}, place)
        first = schema.get("prefixItems", [])
        least, most = _bounds(schema, "minItems", "maxItems", place)
        if first:
            if (
                schema.get("items", False) is not False
                or least not in {0, len(first)}
                or most not in {None, len(first)}
            ):
                raise ValueError(f"JSON schema, {place}: prefixItems are supported only as all items of the array")
            items = [self.rule(item, f"{place}/prefixItems/{i}") for i, item in enumerate(first)]
            return '"[" ws ' + ' "," ws '.join(f"{item} ws" for item in items) + ' "]"'
        item = self._named(self.rule(schema.get("items", True), f"{place}/items") + " ws", place)
        if most == 0:
            return '"[" ws "]"'
        more = f'("," ws {item}){{{max(least - 1, 0)},{"" if most is None else most - 1}}}'
        return f'"[" ws {item} {more} "]"' if least else f'"[" ws ({item} {more})? "]"'

    def _union(self, schemas: Any, place: str) -> str:  # noqa: ANN401
        if not isinstance(schemas, list) or not schemas:
            raise ValueError(f"JSON schema, {place}: expected a list of schemas")
        return _group(_alternatives(self.rule(each, f"{place}/{i}") for i, each in enumerate(schemas)))

    def _ref(self, schema: Mapping[str, Any], place: str) -> str:
        ref = schema["$ref"]
        if ref not in self._refs:
            self._refs[ref] = f"ref-{len(self._refs)}"
            self.define(self._refs[ref], self.rule(self._resolve(ref, place), ref))
        return self._refs[ref]

    def _resolve(self, ref: object, place: str) -> Any:  # noqa: ANN401
        if not isinstance(ref, str) or not (ref == "#" or ref.startswith("#/")):
            raise ValueError(f"JSON schema, {place}/$ref: found {json.dumps(ref)}, expected a place in this document")
        found = self._document
        for escaped in ref.split("/")[1:]:
            key = escaped.replace("~1", "/").replace("~0", "~")
            try:
                found = found[int(key)] if isinstance(found, list) else found[key]
            except (KeyError, IndexError, ValueError, TypeError):
                raise ValueError(f"JSON schema, {place}/$ref: there is no {ref}") from None
        return found

    def _named(self, body: str, place: str) -> str:
        """The name of a rule for `body`: only a single symbol can be repeated."""
        for name, other in self._rules.items():
            if other == body:
                return name
        stem = re.sub(r"[^a-z0-9]+", "-", place.lower()).strip("-")
        name = f"part-{len(self._rules)}" + (f"-{stem}" if stem else "")
        self.define(name, body)
        return name


def _braced(members: list[tuple[str, bool]]) -> str:
    """A rule body for an object with `members` (rule, required) in this order."""

    def after(i: int) -> str:
        """The members from i on, after another member."""
        if i == len(members):
            return ""
        name, required = members[i]
        this = f'"," ws {name} ws'
        return f" {this if required else f'({this})?'}{after(i + 1)}"

    def ways(i: int) -> list[str]:
        """One body for each member from i on that may be the first."""
        if i == len(members):
            return [""]
        name, required = members[i]
        return [f"{name} ws{after(i + 1)}", *([] if required else ways(i + 1))]

    *full, last = ways(0)
    if last:
        return f'"{{" ws ({_alternatives([*full, last])}) "}}"'
    return f'"{{" ws ({_alternatives(full)})? "}}"' if full else '"{" ws "}"'


def _enum(schema: Mapping[str, Any], place: str) -> str:
    values = schema["enum"]
    if not isinstance(values, list) or not values:
        raise ValueError(f"JSON schema, {place}/enum: found {json.dumps(values)}, expected a list of values")
    return _group(_alternatives(map(_literal, values)))


def _string(schema: Mapping[str, Any], place: str) -> str:
    _only(schema, {"type", "minLength", "maxLength", "format"}, place)
    if "format" in schema:
        _only(schema, {"type", "format"}, place)
        if schema["format"] not in FORMATS:
            found, known = json.dumps(schema["format"]), ", ".join(FORMATS)
            raise ValueError(f"JSON schema, {place}/format: found {found}, supported are {known}")
        return f'"\\"" {FORMATS[schema["format"]]} "\\""'
    least, most = _bounds(schema, "minLength", "maxLength", place)
    if (least, most) == (0, None):
        return "string"
    return f'"\\"" char{{{least},{"" if most is None else most}}} "\\""'


def _integer(schema: Mapping[str, Any], place: str) -> str:
    _only(schema, {"type", *_OF_TYPE["integer"]}, place)
    lows: list[int] = []
    highs: list[int] = []
    for key, bounds, beside in (
        ("minimum", lows, 0),
        ("exclusiveMinimum", lows, 1),
        ("maximum", highs, 0),
        ("exclusiveMaximum", highs, -1),
    ):
        if key in schema:
            if not isinstance(value := schema[key], int) or isinstance(value, bool):
                raise ValueError(f"JSON schema, {place}/{key}: found {json.dumps(value)}, expected an integer")
            bounds.append(value + beside)
    if not lows and not highs:
        return "integer"
    try:
        return _group(integer_range(max(lows, default=None), min(highs, default=None)))
    except ValueError as error:
        raise ValueError(f"JSON schema, {place}: {error}") from error


def _bounds(schema: Mapping[str, Any], low: str, high: str, place: str) -> tuple[int, int | None]:
    least, most = schema.get(low, 0), schema.get(high)
    for key, value in ((low, least), (high, most)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise ValueError(f"JSON schema, {place}/{key}: found {json.dumps(value)}, expected a number from 0 on")
    if most is not None and most < least:
        raise ValueError(f"JSON schema, {place}: {high} is {most}, less than {low}, which is {least}")
    return least, most


def _implied_type(schema: Mapping[str, Any]) -> str | None:
    """The type of a schema that does not name it."""
    if {"properties", "additionalProperties", "required"} & set(schema):
        return "object"
    if {"items", "prefixItems", "minItems", "maxItems"} & set(schema):
        return "array"
    return "string" if {"minLength", "maxLength", "format"} & set(schema) else None


_OF_TYPE = {
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "string": {"minLength", "maxLength", "format"},
    "integer": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
}


def _for_type(schema: Mapping[str, Any], json_type: str, types: list[str]) -> Mapping[str, Any]:
    """What a schema with several types says about one of them. What belongs to none stays, and will be refused."""
    others: set[str] = set().union(*(_OF_TYPE.get(each, set()) for each in types if each != json_type))
    return {key: value for key, value in schema.items() if key not in others}


def _only(schema: Mapping[str, Any], keys: set[str], place: str) -> None:
    if unknown := sorted(set(schema) - keys - ANNOTATIONS):
        raise ValueError(
            f"JSON schema, {place}: {', '.join(unknown)} cannot be expressed by the grammar; leave it out and check "
            "the answer yourself, or pass your own grammar"
        )


def _literal(value: Any) -> str:  # noqa: ANN401
    """A GBNF literal for the compact JSON text of `value`."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _alternatives(bodies: Iterable[str]) -> str:
    return " | ".join(dict.fromkeys(bodies))


def _group(body: str) -> str:
    return f"({body})"


def _without_literals(body: str) -> str:
    return re.sub(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]', " ", body)


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
