"""JSON schemas as grammars: llama.cpp itself decides which texts they allow."""

# ruff: noqa: E501 - tables

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from ernie_llama import Llama
from ernie_llama._engine.sampler import Sampler
from ernie_llama._engine.sampling import Sampling
from ernie_llama._gbnf.integer_range import integer_range
from ernie_llama._gbnf.json_schema import grammar
from ernie_llama.llama_grammar import JSON_GBNF, LlamaGrammar
from hypothesis import given
from hypothesis import strategies as st

POINT = {"type": "object", "properties": {"x": {"type": "integer"}, "y": {"type": "number"}}, "required": ["x"]}
TWO = {"type": "object", "properties": {"a": True, "b": True}}
TREE = {"$ref": "#/$defs/tree", "$defs": {"tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2}}}

MANY = {"properties": {f"p{i}": {"const": i} for i in range(200)}}

# schema, texts that it allows, texts that it does not
CASES: list[tuple[Any, list[str], list[str]]] = [
    (True, ["1", '{"a": [null, {"b": "c"}]}', "-1.5e3", '"\\u00e9é\\n"'], ["", "01", "{a: 1}", "nul", '"\n"']),
    ({}, ["[]"], ["]"]),
    ({"type": "boolean"}, ["true", "false"], ["True", "1"]),
    ({"type": "null"}, ["null"], ["nil"]),
    ({"type": "integer"}, ["0", "-12"], ["1.5", "1e3", "00", "+1"]),
    ({"type": "integer", "minimum": -3, "maximum": 120}, ["-3", "-1", "0", "99", "120"], ["-4", "121", "1000", "-0"]),
    ({"type": "integer", "exclusiveMinimum": 0}, ["1", "10", "123456"], ["0", "-1"]),
    ({"type": ["integer", "null"], "maximum": -1}, ["-1", "-10", "null"], ["0", "1"]),
    ({"type": "string", "minLength": 1, "maxLength": 2}, ['"a"', '"é\\n"'], ['""', '"abc"', "a"]),
    ({"minLength": 1}, ['"a"'], ["1"]),
    ({"type": "string", "format": "date"}, ['"2026-11-22"'], ['"2026-13-22"', '"x"']),
    ({"format": "date-time"}, ['"2026-11-22T03:04:05Z"', '"2026-11-22T03:04:05.123+01:00"'], ['"2026-11-22"']),
    ({"format": "uuid"}, ['"123e4567-e89b-12d3-a456-426614174000"'], ['"123e4567"']),
    ({"type": ["string", "null"], "maxLength": 1}, ['"a"', "null"], ['"ab"', "1"]),
    ({"enum": ["a", 'q"\\', 1, None, {"k": [1, 2]}]}, ['"a"', '"q\\"\\\\"', "1", "null", '{"k":[1,2]}'], ['"b"', "2"]),
    ({"const": "é\n"}, ['"é\\n"'], ['"e"']),
    (POINT, ['{"x":1}', '{ "x": 1, "y": 2.5 }', '{\n  "x": 1,\n  "y": 2\n}'], ["{}", '{"y": 1}']),
    (POINT, [], ['{"x":1,"x":1}', '{"x":1,"z":1}', '{"x":1.5}', '{"x":1,}']),
    (TWO, ["{}", '{"b": 1}', '{"a": 1, "b": 2}'], ['{"b": 1, "a": 2}', "{,}"]),
    ({"type": "object", "properties": {}, "additionalProperties": False}, ["{}"], ['{"a": 1}']),
    ({"additionalProperties": {"type": "integer"}}, ["{}", '{"a": 1, "b": 2}'], ['{"a": "x"}', '{"a": 1,}']),
    ({"items": {"type": "integer"}, "minItems": 2, "maxItems": 3}, ["[1, 2]", "[1,2,3]"], ["[1]", "[1,2,3,4]", "[]"]),
    ({"type": "array", "items": {"type": "null"}, "maxItems": 0}, ["[]"], ["[null]"]),
    ({"type": "array", "minItems": 1}, ['["x", 1]'], ["[]", "[1,]"]),
    ({"prefixItems": [{"type": "integer"}, {"type": "string"}]}, ['[1, "a"]'], ["[1]", '["a", 1]']),
    ({"anyOf": [{"type": "integer"}, {"type": "array"}]}, ["1", "[2]"], ['"x"']),
    ({"oneOf": [{"const": 1}, POINT], "title": "t", "description": "d"}, ["1", '{"x": 2}'], ["2"]),
    (TREE, ["[]", "[[], [[]]]"], ["[[], [], []]", "[1]"]),
    ({"type": "integer", "enum": ["a", 1, 2.0, True]}, ["1", "2.0"], ['"a"', "true"]),
    ({"type": ["string", "null"], "enum": ["a", 1, None]}, ['"a"', "null"], ["1"]),
    ({"type": "number", "const": 1.5}, ["1.5"], ["1"]),
    ({"minLength": 2, "maxLength": 2}, [r'"\u00e9\u20AC"'], [r'"\ud83d\ude00"', r'"\ud83d"']),
    ({"format": "date"}, ['"2026-02-28"', '"2026-04-30"'], ['"2026-02-30"', '"2026-04-31"', '"2026-01-32"']),
    ({"minLength": 1998, "maxLength": 2003}, [f'"{"a" * n}"' for n in (1998, 2000, 2003)], [f'"{"a" * 1997}"', f'"{"a" * 2004}"']),
    ({"minLength": 2500}, [f'"{"a" * 2500}"', f'"{"a" * 3100}"'], [f'"{"a" * 2499}"']),
    ({"items": {"const": 1}, "maxItems": 1500}, ["[]", f"[{','.join('1' * 1500)}]"], [f"[{','.join('1' * 1501)}]"]),
    ({"type": "integer", "minimum": 1.0, "maximum": 2e0}, ["1", "2"], ["3"]),
    ({"$ref": "#/$defs/a%20b", "$defs": {"a b": {"type": "null"}}}, ["null"], ["1"]),
    (MANY, ["{}", '{"p0":0}', '{"p199":199}', '{"p3":3, "p77":77, "p198":198}'], ['{"p1":1,"p0":0}', '{"p200":200}', '{"p0":0,"p0":0}']),
    ({**MANY, "required": ["p7"]}, ['{"p7":7}', '{"p2":2,"p7":7,"p9":9}'], ["{}", '{"p2":2}', '{"p8":8}']),
]  # fmt: skip


def allows(llm: Llama, grammar: LlamaGrammar, text: str) -> bool:
    """Whether llama.cpp's grammar sampler accepts the tokens of `text` and an end after them."""
    sampler = Sampler(llm._engine._library, llm._model, Sampling(grammar=grammar), seed=1)
    rules = sampler._grammar
    assert rules is not None
    try:
        for token in llm.tokenize(text.encode(), add_bos=False):
            if not sampler._allows(rules, token):
                return False
            llm._engine._library.llama_sampler_accept(rules.pointer, token)
        return sampler._allows(rules, llm.token_eos())
    finally:
        sampler.close()


@pytest.mark.build
@pytest.mark.parametrize(("schema", "valid", "invalid"), CASES, ids=[json.dumps(case[0])[:48] for case in CASES])
def test_the_grammar_allows_what_the_schema_does(
    llm: Llama, schema: dict[str, Any], valid: list[str], invalid: list[str]
) -> None:
    rules = LlamaGrammar.from_json_schema(schema)
    assert {text: allows(llm, rules, text) for text in [*valid, *invalid]} == {
        **dict.fromkeys(valid, True),
        **dict.fromkeys(invalid, False),
    }
    for text in valid:
        json.loads(text)


@pytest.mark.build
def test_the_grammar_of_any_json(llm: Llama) -> None:
    assert allows(llm, LlamaGrammar.from_string(JSON_GBNF), '{"a": [1, true]}')


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (False, "JSON schema, #: found false, expected an object or true"),
        ({"type": "float"}, '#/type: found "float", expected one of object, array, string, number, integer'),
        (
            {"type": "number", "minimum": 3},
            "#/minimum: minimum cannot be expressed by the grammar; leave it out and check",
        ),
        ({"type": "integer", "minimum": 3.5}, "#/minimum: found 3.5, expected an integer"),
        ({"type": "integer", "minimum": 3, "exclusiveMaximum": 3}, "#: there is no integer from 3 to 2"),
        ({"type": "string", "pattern": "^a$"}, "#/pattern: pattern cannot be expressed"),
        ({"properties": {"a": {"multipleOf": 2}}}, "#/properties/a/multipleOf: multipleOf cannot be expressed"),
        ({"type": ["integer", "string"], "minLength": 2, "minItems": 1}, "#/minItems: minItems cannot be expressed"),
        ({"properties": {"a": True}, "required": ["b"]}, r"#/required: \['b'\] are not among the properties"),
        (
            {"properties": {"a": True}, "additionalProperties": {"type": "null"}},
            "#/additionalProperties: a schema is supported only without properties",
        ),
        ({"minItems": 3, "maxItems": 2}, "#: maxItems is 2, less than minItems, which is 3"),
        ({"minLength": -1}, "#/minLength: found -1, expected a number from 0 on"),
        ({"prefixItems": [True], "minItems": 2}, "#/prefixItems: supported only as all items"),
        ({"enum": []}, r"#/enum: found \[\], expected a list of values"),
        ({"anyOf": []}, r"#/anyOf: found \[\], expected a list of schemas"),
        ({"format": "email"}, '#/format: found "email", expected one of date, time, date-time, uuid'),
        ({"$ref": "other.json"}, r'#/\$ref: found "other.json", expected a place in this document'),
        ({"items": {"$ref": "#/$defs/x"}}, r"#/items/\$ref: there is no #/\$defs/x"),
        ({"properties": []}, r"#/properties: found \[\], expected an object"),
        ({"properties": {"a": True}, "required": "a"}, '#/required: found "a", expected a list of names'),
        ({"type": []}, r"#/type: found \[\], expected a type or several"),
        ({"type": "integer", "enum": ["a"]}, '#/enum: no value has the type "integer"'),
        ({"type": ["number", "integer"], "minimum": 5}, "#/minimum: minimum cannot be expressed"),
        ({"prefixItems": {}}, "#/prefixItems: found {}, expected a list of schemas"),
        ({"properties": {"a/b~c": {"type": "x"}}}, "#/properties/a~1b~0c/type: found"),
        ({"$ref": "#"}, r"#/\$ref: # is defined by itself, with no object or array between"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [True, {"$ref": "#/$defs/a"}]}}}, "is defined by itself"),
        ({"maxLength": 10**7}, "#: a length of 10000000 is too large"),
        (nested(3000), "nested too deeply"),
        ({"anyOf": [True], "minLength": 1}, "#/minLength: minLength cannot be expressed beside anyOf"),
    ],
)
def test_what_a_grammar_cannot_express_is_refused_by_name(schema: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grammar(schema)


# Every keyword of JSON schema, from draft 4 to 2020-12, with a value that forbids something: kept (with what it forbids),
# or refused by name.
VOCABULARY: dict[str, tuple[Any, str | None]] = {
    "additionalItems": (False, None),
    "additionalProperties": (False, '{"a": 1}'),
    "allOf": ([{"type": "null"}], None),
    "anyOf": ([{"type": "null"}], "1"),
    "const": (1, "2"),
    "contains": ({"type": "null"}, None),
    "contentEncoding": ("base64", None),
    "contentMediaType": ("application/json", None),
    "contentSchema": ({"type": "null"}, None),
    "dependencies": ({"a": ["b"]}, None),
    "dependentRequired": ({"a": ["b"]}, None),
    "dependentSchemas": ({"a": {"type": "null"}}, None),
    "disallow": ("null", None),
    "divisibleBy": (2, None),
    "else": ({"type": "null"}, None),
    "enum": ([1], "2"),
    "exclusiveMaximum": (3, None),
    "exclusiveMinimum": (3, None),
    "extends": ({"type": "null"}, None),
    "format": ("date", '"x"'),
    "if": ({"type": "null"}, None),
    "items": ({"type": "null"}, "[1]"),
    "maxContains": (1, None),
    "maxItems": (1, "[1, 2]"),
    "maxLength": (1, '"ab"'),
    "maxProperties": (1, None),
    "maximum": (3, None),
    "minContains": (1, None),
    "minItems": (1, "[]"),
    "minLength": (1, '""'),
    "minProperties": (1, None),
    "minimum": (3, None),
    "multipleOf": (2, None),
    "not": ({"type": "null"}, None),
    "oneOf": ([{"type": "null"}], "1"),
    "pattern": ("^a$", None),
    "patternProperties": ({"^a": {"type": "null"}}, None),
    "prefixItems": ([{"type": "null"}], "[1]"),
    "properties": ({"a": {"type": "null"}}, '{"a": 1}'),
    "propertyNames": ({"maxLength": 1}, None),
    "then": ({"type": "null"}, None),
    "type": ("null", "1"),
    "unevaluatedItems": (False, None),
    "unevaluatedProperties": (False, None),
    "uniqueItems": (True, None),
    "$anchor": ("a", None),
    "$dynamicAnchor": ("a", None),
    "$dynamicRef": ("#a", None),
    "$recursiveAnchor": (True, None),
    "$recursiveRef": ("#", None),
    "$vocabulary": ({}, None),
    "nullable": (False, None),
    "discriminator": ({"propertyName": "a"}, None),
    "x-unknown": (1, None),
}


@pytest.mark.build
@pytest.mark.parametrize("keyword", VOCABULARY)
def test_every_keyword_is_kept_or_refused_by_name(llm: Llama, keyword: str) -> None:
    value, forbidden = VOCABULARY[keyword]
    schema = {"properties": {"a/b": {"items": {keyword: value}}}}
    if forbidden is None:
        with pytest.raises(ValueError, match=rf"#/properties/a~1b/items/{re.escape(keyword)}: {re.escape(keyword)} "):
            grammar(schema)
    else:
        assert not allows(llm, LlamaGrammar.from_json_schema({keyword: value}), forbidden)


@pytest.mark.parametrize(
    "keyword", ["title", "description", "default", "examples", "$comment", "deprecated", "$schema"]
)
def test_annotations_change_nothing(keyword: str) -> None:
    assert grammar({"type": "null", keyword: ["x"]}) == grammar({"type": "null"})


@pytest.mark.build
@pytest.mark.parametrize("n", [46, 200, 400])
def test_as_many_optional_properties_as_the_server_takes(llm: Llama, n: int) -> None:
    schema = {"properties": {f"name_{i}": {"type": "string", "maxLength": 3} for i in range(n)}}
    made = llm("x", grammar=LlamaGrammar.from_json_schema(schema), max_tokens=60, seed=1, temperature=1.0)
    assert made["choices"][0]["text"].lstrip().startswith("{")


@pytest.mark.build
def test_llama_cpp_writes_nothing_of_a_grammar(llm: Llama, capfd: pytest.CaptureFixture[str]) -> None:
    for text in ("root ::= (", "root ::= x", "root ::= root", 'root ::= "a"{1,99999999999999999999}', "x"):
        with pytest.raises(ValueError, match=r"llama.cpp cannot read the grammar, which begins"):
            llm("x", grammar=text)
    assert capfd.readouterr() == ("", "")


def test_a_schema_may_be_text() -> None:
    assert LlamaGrammar.from_json_schema('{"type": "null"}').grammar == 'root ::= null\nnull ::= "null"\n'
    with pytest.raises(ValueError, match="the JSON schema is not JSON: Expecting property name"):
        LlamaGrammar.from_json_schema("{")


INTEGERS = st.integers(-(10**12), 10**12) | st.integers(-1100, 1100)


@given(INTEGERS, INTEGERS, INTEGERS)
def test_a_range_holds_its_integers_and_no_others(one: int, other: int, value: int) -> None:
    low, high = sorted((one, other))
    pattern = re.compile(integer_range(low, high).replace('"', "").replace(" ", ""))  # so small a GBNF is a regex
    for each in (value, low, high, low - 1, high + 1, -value):
        assert bool(pattern.fullmatch(str(each))) == (low <= each <= high)


@given(INTEGERS, INTEGERS)
def test_a_range_may_be_open(bound: int, value: int) -> None:
    above, below = (
        re.compile(integer_range(*bounds).replace('"', "").replace(" ", ""))
        for bounds in ((bound, None), (None, bound))
    )
    assert bool(above.fullmatch(str(value))) == (value >= bound)
    assert bool(below.fullmatch(str(value))) == (value <= bound)
