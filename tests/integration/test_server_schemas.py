"""A rule of a JSON schema that llama-server's grammar cannot keep is a 400 that names it and its place."""

from __future__ import annotations

import json
from typing import Any

import pytest
from ernie_llama._gbnf import json_schema
from support.doors import CHAT, MESSAGES, RESPONSES
from support.servers import connect, post

from .test_server import Server

pytestmark = pytest.mark.build


def member(schema: Any) -> dict[str, Any]:  # noqa: ANN401
    """An object whose n is `schema`."""
    return {"type": "object", "properties": {"n": schema}, "required": ["n"]}


STRING, INTEGER, NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}
PLACE = "#/properties/n"
# Schema, place and rule; the bindings refuse all of them, by the same name.
DROPPED: list[tuple[Any, str, str]] = [
    (NUMBER | {"minimum": 5}, PLACE, "minimum"),
    (NUMBER | {"maximum": 5}, PLACE, "maximum"),
    (NUMBER | {"exclusiveMinimum": 5}, PLACE, "exclusiveMinimum"),
    (NUMBER | {"multipleOf": 0.5}, PLACE, "multipleOf"),
    (INTEGER | {"multipleOf": 5}, PLACE, "multipleOf"),
    (INTEGER | {"format": "int32"}, PLACE, "format"),
    (STRING | {"format": "email"}, PLACE, "format"),
    (STRING | {"format": "date", "maxLength": 4}, PLACE, "maxLength"),
    (STRING | {"contentEncoding": "base64"}, PLACE, "contentEncoding"),
    (STRING | {"pattern": "(((("}, PLACE, "pattern"),
    (STRING | {"pattern": "[a-z]+"}, PLACE, "pattern"),
    (STRING | {"pattern": r"^\d+$"}, PLACE, "pattern"),
    (STRING | {"pattern": "^(?=a)b$"}, PLACE, "pattern"),
    (STRING | {"pattern": "^a$", "maxLength": 4}, PLACE, "maxLength"),
    (STRING | {"nullable": True}, PLACE, "nullable"),
    ({"type": "boolean", "not": {"const": True}}, PLACE, "not"),
    ({"minimum": 5}, PLACE, "minimum"),
    ({"type": ["number", "null"], "minimum": 5}, PLACE + "/type/0", "minimum"),
    ({"type": "array", "items": INTEGER, "uniqueItems": True}, PLACE, "uniqueItems"),
    ({"type": "array", "contains": INTEGER}, PLACE, "contains"),
    ({"type": "array", "items": NUMBER | {"minimum": 5}}, PLACE + "/items", "minimum"),
    ({"type": "array", "prefixItems": [INTEGER], "maxItems": 0}, PLACE, "maxItems"),
    ({"type": "object", "minProperties": 1}, PLACE, "minProperties"),
    ({"type": "object", "patternProperties": {"^a": INTEGER}}, PLACE, "patternProperties"),
    ({"type": "object", "propertyNames": STRING}, PLACE, "propertyNames"),
    ({"type": "object", "properties": {"a": INTEGER}, "dependentRequired": {"a": ["b"]}}, PLACE, "dependentRequired"),
    ({"type": "object", "properties": {"a": INTEGER}, "required": ["b"]}, PLACE, "required"),
    ({"type": "object", "properties": {"a": INTEGER}, "allOf": [member(STRING)]}, PLACE, "allOf"),
    ({"anyOf": [INTEGER, STRING], "maxLength": 4}, PLACE, "maxLength"),
    ({"oneOf": [INTEGER, STRING], "type": "string"}, PLACE, "type"),
    ({"anyOf": [STRING, NUMBER | {"minimum": 5}]}, PLACE + "/anyOf/1", "minimum"),
    ({"allOf": [NUMBER | {"minimum": 5}]}, PLACE + "/allOf/0", "minimum"),
    ({"allOf": [STRING, {"maxLength": 4}]}, PLACE, "allOf"),
    ({"$ref": "#/$defs/a", "maxLength": 4}, PLACE, "maxLength"),
    ({"enum": [1, 2], "minimum": 2}, PLACE, "minimum"),
    ({"const": 1, "maximum": 0}, PLACE, "maximum"),
    ({"if": INTEGER, "then": {"minimum": 5}}, PLACE, "if"),
]
# What describes, and what the grammar keeps.
KEPT: list[Any] = [
    {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "x", "$comment": "x", "title": "N"} | INTEGER,
    {"description": "x", "default": 1, "examples": [1], "deprecated": False, "readOnly": False} | INTEGER,
    INTEGER | {"minimum": 5, "exclusiveMinimum": 6, "maximum": 9, "exclusiveMaximum": 9},
    STRING | {"minLength": 1, "maxLength": 4},
    STRING | {"format": "date"},
    {"type": ["string", "null"], "maxLength": 4},
    {"anyOf": [{"type": "string", "maxLength": 4}, {"type": "null"}], "title": "x", "default": None},
    {"enum": ["a", "b"], "type": "string"},
    {"const": "a"},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    {"type": "array", "prefixItems": [{"type": "boolean"}, INTEGER], "minItems": 2, "maxItems": 2},
    {"$ref": "#/$defs/a", "description": "x"},
]
DEFINITIONS = {"$defs": {"a": {"type": "string", "maxLength": 4}}}
IDS = [f"{rule}-{i}" for i, (_, _, rule) in enumerate(DROPPED)]


def chat_format(schema: Any, **options: Any) -> dict[str, Any]:  # noqa: ANN401
    wrapped = {"name": "x", "schema": schema, **options}
    return CHAT.request("x", response_format={"type": "json_schema", "json_schema": wrapped})


@pytest.mark.parametrize(("schema", "place", "rule"), DROPPED, ids=IDS)
def test_a_rule_that_is_lost_is_named_at_every_api(plain_server: Server, schema: Any, place: str, rule: str) -> None:  # noqa: ANN401
    whole = {**member(schema), **DEFINITIONS}
    requests = {
        CHAT: [
            chat_format(whole, strict=True),
            chat_format(whole),
            CHAT.request("x", response_format={"type": "json_object", "schema": whole}),
            CHAT.request("x", json_schema=whole),
        ],
        RESPONSES: [RESPONSES.request("x", text={"format": {"type": "json_schema", "name": "x", "schema": whole}})],
    }
    for door, bodies in requests.items():
        for body in bodies:
            assert f"{place}: {rule}" in door.refusal(plain_server.port, body)
    status, answer = post(connect(plain_server.port), "/completion", {"prompt": "x", "json_schema": whole})
    assert (status, f"{place}: {rule}" in json.loads(answer)["error"]["message"]) == (400, True)
    status, _ = post(connect(plain_server.port), CHAT.path, chat_format(whole, strict=False))
    assert status == 200


@pytest.mark.parametrize(("schema", "place", "rule"), DROPPED, ids=IDS)
def test_the_bindings_refuse_the_same(schema: Any, place: str, rule: str) -> None:  # noqa: ANN401
    with pytest.raises(ValueError, match=r"^JSON schema, #/"):
        json_schema.grammar({**member(schema), **DEFINITIONS})


@pytest.mark.parametrize("schema", KEPT, ids=str)
def test_what_describes_or_is_kept_stays_free(plain_server: Server, schema: Any) -> None:  # noqa: ANN401
    whole = {**member(schema), **DEFINITIONS}
    json_schema.grammar(whole)
    body = {**chat_format(whole, strict=True), "max_tokens": 200, "temperature": 0.8, "seed": 2}
    answer = CHAT.ask(plain_server.port, body)
    if answer.end == "stop":
        assert set(json.loads(answer.text)) == {"n"}


@pytest.mark.parametrize(("schema", "place", "rule"), DROPPED[:4], ids=IDS[:4])
def test_a_strict_tool_is_held_to_its_schema(tools_server: Server, schema: Any, place: str, rule: str) -> None:  # noqa: ANN401
    for door in (CHAT, RESPONSES, MESSAGES):
        body = door.request("def f")
        tool = door.tool("f", member(schema))
        body["tools"] = [tool]
        assert door.ask(tools_server.port, body).text
        (tool["function"] if door is CHAT else tool)["strict"] = True
        message = door.refusal(tools_server.port, body)
        assert "tool 'f'" in message
        assert f"{place}: {rule}" in message


WRONG: list[tuple[Any, str]] = [
    ({"type": "nope"}, "unrecognized type nope"),
    ({"type": "integer", "minimum": 5, "maximum": 4}, "no integer is within the bounds"),
    ({"type": "string", "minLength": 5, "maxLength": 4}, "maxLength is less than minLength"),
    ({"type": "array", "minItems": 5, "maxItems": 4}, "maxItems is less than minItems"),
    ({"type": "string", "pattern": "^(((($"}, "unbalanced parentheses"),
    ({"$ref": "#/$defs/b"}, "cannot resolve $ref"),
    ({"anyOf": []}, "must not be empty"),
    (5, "schema must be an object"),
]


@pytest.mark.parametrize(("schema", "message"), WRONG, ids=str)
def test_a_schema_that_is_none_is_refused(plain_server: Server, schema: object, message: str) -> None:
    refusal = CHAT.refusal(plain_server.port, chat_format({**member(schema), **DEFINITIONS}, strict=False))
    assert message in refusal
    assert PLACE in refusal


def test_a_grammar_that_is_none_is_refused(plain_server: Server) -> None:
    for grammar in ("((((", 'root ::= "a" missing', "other ::= [a-"):
        assert "grammar" in CHAT.refusal(plain_server.port, CHAT.request("x", grammar=grammar))
