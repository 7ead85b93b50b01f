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

import re
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Any

from .schema_rules import (
    FORMATS,
    MAX_REPETITIONS,
    OF_TYPE,
    RULES,
    TYPES,
    alternatives,
    bounds,
    const,
    enum,
    for_type,
    group,
    implied_type,
    integer,
    literal,
    only,
    pointer,
    refusal,
    without_literals,
    wrong,
)


def grammar(schema: Any) -> str:  # noqa: ANN401 - parsed JSON
    """A GBNF grammar whose root is `schema`.

    Raises:
        ValueError: the schema is not one, or contains something that a grammar cannot express; names the place.
    """
    converter = _Converter(schema)
    try:
        converter.define("root", converter.rule(schema, "#"))
    except RecursionError:
        raise ValueError("JSON schema: it is nested too deeply") from None
    return converter.text()


class _Converter:
    """Collects the rules of a grammar."""

    def __init__(self, document: Any) -> None:  # noqa: ANN401
        self._document = document
        self._rules: dict[str, str] = {}
        self._names: dict[str, str] = {}  # of the rules, by their bodies
        self._refs: dict[str, str] = {}
        self._open: list[str] = []  # references whose rules are being made, since the last bracket

    def define(self, name: str, body: str) -> None:
        self._rules[name] = body
        self._names.setdefault(body, name)

    def text(self) -> str:
        rules = dict(self._rules)
        waiting = list(rules.values())
        while waiting:
            for name in re.findall(r"[a-z]+(?:-[a-z0-9]+)*", without_literals(waiting.pop())):
                if name in RULES and name not in rules:
                    rules[name] = RULES[name]
                    waiting.append(rules[name])
        return "\n".join(f"{name} ::= {body}" for name, body in rules.items()) + "\n"

    def rule(self, schema: Any, place: str) -> str:  # noqa: ANN401
        """The body of a rule for `schema`, which is at `place` in the document."""
        if schema is True or schema == {}:
            return "value"
        if not isinstance(schema, Mapping):
            raise wrong(place, schema, "an object or true")
        known: dict[str, Callable[[Mapping[str, Any], str], str]] = {
            "$ref": self._ref,
            "const": const,
            "enum": enum,
            "anyOf": lambda s, p: self._union(s["anyOf"], pointer(p, "anyOf")),
            "oneOf": lambda s, p: self._union(s["oneOf"], pointer(p, "oneOf")),
        }
        for key, convert in known.items():
            if key in schema:
                only(schema, {key, "type"} if key in {"const", "enum"} else {key}, place, f"beside {key} ")
                return convert(schema, place)
        types = schema.get("type", implied_type(schema))
        if isinstance(types, list):
            if not types:
                raise wrong(pointer(place, "type"), types, "a type or several")
            return group(alternatives(self._typed(for_type(schema, each, types), each, place) for each in types))
        return self._typed(schema, types, place)

    def _typed(self, schema: Mapping[str, Any], json_type: object, place: str) -> str:
        if json_type == "object":
            return self._object(schema, place)
        if json_type == "array":
            return self._array(schema, place)
        if json_type == "string":
            return self._string(schema, place)
        if json_type == "integer":
            return integer(schema, place)
        if json_type in TYPES:
            only(schema, {"type"}, place)
            return str(json_type)
        if json_type is None:
            only(schema, set(), place)
            return "value"
        raise wrong(pointer(place, "type"), json_type, f"one of {', '.join(TYPES)}")

    def _below(self, schema: Any, place: str) -> str:  # noqa: ANN401
        """As `rule`, of what stands inside brackets: there a schema may refer to itself."""
        opened, self._open = self._open, []
        try:
            return self.rule(schema, place)
        finally:
            self._open = opened

    def _object(self, schema: Mapping[str, Any], place: str) -> str:
        only(schema, {"type", *OF_TYPE["object"]}, place)
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(properties, Mapping):
            raise wrong(pointer(place, "properties"), properties, "an object")
        if not isinstance(required, list) or not all(isinstance(each, str) for each in required):
            raise wrong(pointer(place, "required"), required, "a list of names")
        if unknown := sorted(set(required) - set(properties)):
            raise refusal(pointer(place, "required"), f"{unknown} are not among the properties")
        others = schema.get("additionalProperties", True)
        if not properties and others is not False:
            value = self._below(others, pointer(place, "additionalProperties"))
            other = self._named(f'string ws ":" ws {value} ws', place)
            return f'"{{" ws ({other} ("," ws {other})*)? "}}"'
        if not isinstance(others, bool):
            raise refusal(pointer(place, "additionalProperties"), "a schema is supported only without properties")
        members = []
        for key, value in properties.items():
            at = pointer(place, "properties", key)
            members.append((self._named(f'{literal(key)} ws ":" ws {self._below(value, at)} ws', at), key in required))
        return self._braced(members, place)

    def _braced(self, members: list[tuple[str, bool]], place: str) -> str:
        """A rule body for an object with `members` (rule, required) in this order."""
        after = ""  # the rule of the members that may follow another one
        ways: list[str] = []  # one for each member that may be the first
        for name, required in reversed(members):
            if required:
                ways = []
            ways.insert(0, f"{name} {after}".rstrip())
            this = f'"," ws {name}'
            after = self._named(f"{this if required else f'({this})?'} {after}".rstrip(), place)
        if not ways:
            return '"{" ws "}"'
        return f'"{{" ws ({alternatives(ways)}){"" if any(required for _, required in members) else "?"} "}}"'

    def _array(self, schema: Mapping[str, Any], place: str) -> str:
        only(schema, {"type", *OF_TYPE["array"]}, place)
        first = schema.get("prefixItems", [])
        least, most = bounds(schema, "minItems", "maxItems", place)
        if not isinstance(first, list):
            raise wrong(pointer(place, "prefixItems"), first, "a list of schemas")
        if first:
            if (
                schema.get("items", False) is not False
                or least not in {0, len(first)}
                or most not in {None, len(first)}
            ):
                raise refusal(pointer(place, "prefixItems"), "supported only as all items of the array")
            items = [self._below(item, pointer(place, "prefixItems", i)) for i, item in enumerate(first)]
            return '"[" ws ' + ' "," ws '.join(f"{item} ws" for item in items) + ' "]"'
        if most == 0:
            return '"[" ws "]"'
        item = self._named(self._below(schema.get("items", True), pointer(place, "items")) + " ws", place)
        another = self._named(f'"," ws {item}', place)
        more = self._repeated(another, max(least - 1, 0), None if most is None else most - 1, place)
        return f'"[" ws {item} {more} "]"' if least else f'"[" ws ({item} {more})? "]"'

    def _repeated(self, name: str, least: int, most: int | None, place: str) -> str:
        """The rule `name` from `least` to `most` times; beyond its limit, llama.cpp drops the upper bound silently."""
        if max(least, most or 0) <= MAX_REPETITIONS:
            return f"{name}{{{least},{'' if most is None else most}}}"
        if max(least, most or 0) > MAX_REPETITIONS**2:
            raise refusal(place, f"a length of {max(least, most or 0)} is too large for a grammar")
        many = self._named(f"{name}{{{MAX_REPETITIONS}}}", place)
        n, rest = divmod(least, MAX_REPETITIONS)
        exactly = f"{many}{{{n}}} {name}{{{rest}}}"
        if most is None:
            return f"{exactly} {name}*"
        n, rest = divmod(most - least, MAX_REPETITIONS)
        if n == 0:
            return f"{exactly} {name}{{0,{rest}}}"
        fewer = f"{many}{{0,{n - 1}}} {name}{{0,{MAX_REPETITIONS - 1}}}"
        return f"{exactly} ({fewer} | {many}{{{n}}} {name}{{0,{rest}}})"

    def _string(self, schema: Mapping[str, Any], place: str) -> str:
        only(schema, {"type", *OF_TYPE["string"]}, place)
        if "format" in schema:
            only(schema, {"type", "format"}, place, "beside format ")
            if schema["format"] not in FORMATS:
                raise wrong(pointer(place, "format"), schema["format"], f"one of {', '.join(FORMATS)}")
            return f'"\\"" {FORMATS[schema["format"]]} "\\""'
        least, most = bounds(schema, "minLength", "maxLength", place)
        if (least, most) == (0, None):
            return "string"
        return f'"\\"" {self._repeated("char", least, most, place)} "\\""'

    def _union(self, schemas: Any, place: str) -> str:  # noqa: ANN401
        if not isinstance(schemas, list) or not schemas:
            raise wrong(place, schemas, "a list of schemas")
        return group(alternatives(self.rule(each, pointer(place, i)) for i, each in enumerate(schemas)))

    def _ref(self, schema: Mapping[str, Any], place: str) -> str:
        ref, place = schema["$ref"], pointer(place, "$ref")
        if not isinstance(ref, str) or not (ref == "#" or ref.startswith("#/")):
            raise wrong(place, ref, "a place in this document")
        if ref in self._open:
            raise refusal(place, f"{ref} is defined by itself, with no object or array between")
        if ref not in self._refs:
            self._refs[ref] = f"ref-{len(self._refs)}"
            self._open.append(ref)
            self.define(self._refs[ref], self.rule(self._resolve(ref, place), ref))
            self._open.remove(ref)
        return self._refs[ref]

    def _resolve(self, ref: str, place: str) -> Any:  # noqa: ANN401
        found = self._document
        for escaped in urllib.parse.unquote(ref).split("/")[1:]:
            key = escaped.replace("~1", "/").replace("~0", "~")
            try:
                found = found[int(key)] if isinstance(found, list) else found[key]
            except (KeyError, IndexError, ValueError, TypeError):
                raise refusal(place, f"there is no {ref}") from None
        return found

    def _named(self, body: str, place: str) -> str:
        """The name of a rule for `body`: only a single symbol can be repeated."""
        if body in self._names:
            return self._names[body]
        stem = re.sub(r"[^a-z0-9]+", "-", place.lower()).strip("-")[-40:].strip("-")
        name = f"part-{len(self._rules)}" + (f"-{stem}" if stem else "")
        self.define(name, body)
        return name
