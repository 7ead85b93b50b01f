"""Splitting ERNIE's answers, fed in one piece and in any pieces."""

from __future__ import annotations

import pytest
from ernie_llama._chat.output import Content, OutputParser, OutputPart, Reasoning, ToolCall
from hypothesis import given
from hypothesis import strategies as st

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "北京"}}\n</tool_call>'
WEATHER = ToolCall("get_weather", '{"city": "北京"}')


def parse(text: str, thinking: bool = False) -> list[OutputPart]:
    parser = OutputParser(thinking)
    return merged([*parser.feed(text), *parser.flush()])


def merged(parts: list[OutputPart]) -> list[OutputPart]:
    """Join neighbours of the same class."""
    result: list[OutputPart] = []
    for part in parts:
        last = result[-1] if result else None
        if isinstance(part, Content) and isinstance(last, Content):
            result[-1] = Content(last.text + part.text)
        elif isinstance(part, Reasoning) and isinstance(last, Reasoning):
            result[-1] = Reasoning(last.text + part.text)
        else:
            result.append(part)
    return result


CASES: list[tuple[str, bool, list[OutputPart]]] = [
    ("plain text\n", False, [Content("plain text\n")]),
    ("", False, []),
    (" \n", False, [Content(" \n")]),
    # what ERNIE-4.5-21B-A3B-Thinking writes after a prompt that ends with <think>
    ("abc\n</think>\n\n\n<response>\ndef\n</response>\n", True, [Reasoning("abc"), Content("def")]),
    ("\nabc\n</think>\ndef", True, [Reasoning("abc"), Content("def")]),
    (f"abc\n</think>\n\n\n{CALL}\n", True, [Reasoning("abc"), WEATHER]),
    (f"{CALL}\n{CALL}\n", False, [WEATHER, WEATHER]),
    (f"I look.\n{CALL}", False, [Content("I look."), WEATHER]),
    ("<think>\nabc\n</think>\n\n<response>\ndef\n</response>", False, [Reasoning("abc"), Content("def")]),
    ("thought without an end\n", True, [Reasoning("thought without an end")]),
    ("</think>only an answer", True, [Content("only an answer")]),
    ("<response>a <b> </response>", False, [Content("a <b>")]),
    # </think> is forgotten
    ("abc\n<response>\ndef\n</response>", True, [Reasoning("abc"), Content("def")]),
    ("<response>def</response>", True, [Content("def")]),
    (f"abc\n\n{CALL}", True, [Reasoning("abc"), WEATHER]),
    ("a <response> is due</think>x", True, [Reasoning("a <response> is due"), Content("x")]),
    # other forms of a call
    *(
        (f"<tool_call>\n{form}\n</tool_call>", False, list[OutputPart]([WEATHER]))
        for form in (
            '{"name": "get_weather", "parameters": {"city": "北京"}}',
            '{"name": "get_weather", "args": {"city": "北京"}}',
            '{"id": "1", "type": "tool", "name": "get_weather", "input": {"city": "北京"}}',
            '{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "北京"}}}',
            r'{"name": "get_weather", "arguments": "{\"city\": \"北京\"}"}',
            '[{"name": "get_weather", "arguments": {"city": "北京"}}]',
        )
    ),
    ('<tool_call>[{"name": "f"}, {"name": "g"}]</tool_call>', False, [ToolCall("f", "{}"), ToolCall("g", "{}")]),
    ('<tool_call>{"name": "f", "x": 1}</tool_call>', False, [Content('<tool_call>{"name": "f", "x": 1}</tool_call>')]),
    # markers elsewhere are text
    ("in XML, <response>x</response> and <think>", False, [Content("in XML, <response>x</response> and <think>")]),
    ("a </think> b", False, [Content("a </think> b")]),
    ("<think>so <response> it is</think>x", False, [Reasoning("so <response> it is"), Content("x")]),
    ("1 < 2 and <tool", False, [Content("1 < 2 and <tool")]),
    # calls that are none are not lost
    ('<tool_call>\n{"name": "f"', False, [Content('<tool_call>\n{"name": "f"')]),
    ("<tool_call>f(x)</tool_call>", False, [Content("<tool_call>f(x)</tool_call>")]),
    ('<tool_call>["f"]</tool_call>', False, [Content('<tool_call>["f"]</tool_call>')]),
    ('<tool_call>{"name": "f"}</tool_call>', False, [ToolCall("f", "{}")]),
    ('<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>', False, [ToolCall("f", '{"x": 1}')]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "thinking", "parts"), CASES, ids=[repr(case[0][:32]) for case in CASES])
def test_in_one_piece(text: str, thinking: bool, parts: list[OutputPart]) -> None:
    assert parse(text, thinking) == parts


@given(st.sampled_from(CASES), st.data())
def test_in_any_pieces(case: tuple[str, bool, list[OutputPart]], data: st.DataObject) -> None:
    text, thinking, parts = case
    parser = OutputParser(thinking)
    found: list[OutputPart] = []
    while text:
        n = data.draw(st.integers(1, len(text)))
        found += parser.feed(text[:n])
        text = text[n:]
    assert merged([*found, *parser.flush()]) == parts


def test_text_is_emitted_as_soon_as_it_is_final() -> None:
    parser = OutputParser()
    assert list(parser.feed("one ")) == [Content("one")]
    assert list(parser.feed("two<too")) == [Content(" two")]
    assert list(parser.feed("th>")) == [Content("<tooth>")]
    assert list(parser.feed("\n")) == []
    assert list(parser.flush()) == [Content("\n")]
