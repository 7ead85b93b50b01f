"""Whatever is wrong with a request to llama-server is a 400: never a 500, never a default in its place."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from support.doors import CHAT, MESSAGES, RESPONSES
from support.servers import connect, post

from .test_server import Server

pytestmark = pytest.mark.build

Json = Any


def user(content: Json) -> list[Json]:
    return [{"role": "user", "content": content}]


def called(function: Json) -> list[Json]:
    """A history in which the assistant has called a function."""
    call = {"id": "1", "type": "function", "function": function}
    return [
        *user("x"),
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": ""},
    ]


def picture(url: Json) -> list[Json]:
    return user([{"type": "image_url", "image_url": url}])


def tool(**function: Json) -> list[Json]:
    return [{"type": "function", "function": function}]


# Values that are wrong for each kind of field.
NUMBER = ["x", True, [], {}]
INTEGER = [*NUMBER, 2.5, 10**12]
BOOLEAN = ["x", 5, [], {}]
TEXT = [5, True, [], {}]
TEXTS = [5, True, {}, [5], [None]]
LIST = [5, "x", True]
OBJECT = [5, "x", True, []]
BIAS: list[Any] = [5, "x", True, [5], [["a"]], [[1, "x"]], [[None, 1]], {"5": "x"}, {"5": None}]
PROMPT: list[Any] = [None, {}, True, [{}], [-1], [10**9], [None]]
CONTENT: list[Any] = [5, {}, [5], ["x"], [{}], [{"type": 5}], [{"type": "text", "text": 5}], [{"type": "nope"}]]
NOT_CALLS: list[Any] = [5, [5], [{}]]
CHAT_MESSAGES: list[Any] = [
    *(None, 5, "x", {}, [5], ["x"], [{}]),
    *(
        [{"role": 5, "content": "x"}],
        [{"content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": "x", "name": 5}],
    ),
    *(user(content) for content in CONTENT),
    *(user([{"type": "text"}]), user([{"type": "input_audio", "input_audio": {"data": "xx"}}])),
    *(
        picture(url)
        for url in (None, 5, {"url": 5}, {"url": "http://127.0.0.1:9/x.png"}, {"url": "data:image/png;base64,xx"})
    ),
    *(called(call) for call in (5, {"name": "f"}, {"arguments": "{}"}, {"name": 5, "arguments": "{}"})),
    called({"name": "f", "arguments": "{broken"}),
    *([*user("x"), {"role": "assistant", "tool_calls": calls}] for calls in NOT_CALLS),
    [*user("x"), {"role": "assistant", "content": "x", "reasoning_content": 5}],
    [*user("x"), {"role": "tool", "content": "x", "tool_call_id": 5}],
]
MESSAGES_MESSAGES: list[Any] = [
    *(None, 5, "x", {}, [5], ["x"], [{}]),
    *([{"role": 5, "content": "x"}], [{"content": "x"}], [{"role": "user"}], [{"role": "assistant"}]),
    *(user(content) for content in CONTENT),
    *(user([block]) for block in ({"type": "image"}, {"type": "document"}, {"type": "tool_use", "input": "x"})),
    user([{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "xx"}}]),
    user([{"type": "tool_result", "content": 5}]),
]
INPUT: list[Any] = [
    *(None, 5, True, {}, [5], [{}], [{"role": 5, "content": "x"}], [{"role": "user", "content": 5}]),
    user([{"type": "input_image", "image_url": "http://127.0.0.1:9/x.png"}]),
    user([{"type": "input_text"}]),
    [{"type": "function_call", "call_id": "1", "name": "f", "arguments": "{broken"}],
    [{"type": "function_call_output", "call_id": "1", "output": 5}],
    [{"type": "item_reference", "id": "x"}],
]
TOOLS = [
    *(5, "x", {}, True, [5], ["x"], [{}], [{"type": "function"}], [{"type": "function", "function": 5}], tool()),
    *(
        tool(name=5),
        tool(name="f", description=5),
        tool(name="f", strict="x"),
        [{"type": "x", "function": {"name": "f"}}],
    ),
    *(tool(name="f", parameters=schema) for schema in (5, {"type": "nope"}, {"properties": 5})),
]
RESPONSES_TOOLS = [5, "x", {}, True, [5], [{}], [{"type": "function"}], [{"type": "function", "name": 5}]]
MESSAGES_TOOLS = [5, "x", {}, True, [5], [{}], [{"name": 5}], [{"name": "f", "input_schema": 5}]]
CHOICE = [5, [], True, "nope", {}, {"type": 5}, {"type": "function"}, {"type": "tool"}, {"type": "allowed_tools"}]
FORMAT = [
    *(5, "x", True, [], {"type": 5}, {"type": "nope"}, {"schema": {}}, {"type": "json_schema", "json_schema": 5}),
    *({"type": "json_schema", "json_schema": {"schema": schema}} for schema in (5, {"type": "nope"}, {"$ref": "nope"})),
]
RESPONSES_TEXT = [5, "x", [], {"format": 5}, {"format": {}}, {"format": {"type": 5}}, {"verbosity": 5}]

# The fields of every door: its own, and those of llama-server's sampling that go through most.
SAMPLING: dict[str, list[Json]] = {
    **dict.fromkeys(("temperature", "top_p", "min_p", "typical_p", "dynatemp_range", "xtc_probability"), NUMBER),
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "repeat_penalty", "dry_multiplier"), NUMBER),
    **dict.fromkeys(("top_k", "n", "n_probs", "n_keep", "n_indent", "min_keep", "mirostat", "repeat_last_n"), INTEGER),
    "id_slot": INTEGER,
    "seed": INTEGER[:-1],
    **dict.fromkeys(("stream", "cache_prompt", "ignore_eos", "timings_per_token", "return_tokens"), BOOLEAN),
    **dict.fromkeys(("stop", "samplers", "response_fields", "dry_sequence_breakers"), TEXTS),
    "grammar": TEXT,
    "stream_options": OBJECT,
    "json_schema": OBJECT,
    "lora": LIST,
    "logit_bias": BIAS,
}
DOORS: dict[str, tuple[dict[str, Json], dict[str, list[Json]]]] = {
    "/completion": ({"prompt": "x", "n_predict": 2}, {**SAMPLING, "prompt": PROMPT, "n_predict": INTEGER}),
    "/v1/completions": (
        {"prompt": "x", "max_tokens": 2},
        {**SAMPLING, "prompt": PROMPT, "max_tokens": [*INTEGER, 0], "logprobs": INTEGER, "echo": BOOLEAN},
    ),
    CHAT.path: (
        CHAT.request("x", max_tokens=2),
        {
            **SAMPLING,
            "messages": CHAT_MESSAGES,
            **{"max_tokens": [*INTEGER, 0], "max_completion_tokens": [*INTEGER, 0]},
            **{"tools": TOOLS, "tool_choice": CHOICE, "response_format": FORMAT},
            **dict.fromkeys(("parallel_tool_calls", "logprobs", "add_generation_prompt"), BOOLEAN),
            **{"top_logprobs": INTEGER, "chat_template_kwargs": OBJECT},
            **dict.fromkeys(("reasoning_effort", "reasoning_format"), TEXT),
        },
    ),
    RESPONSES.path: (
        RESPONSES.request("x", max_tokens=2),
        {
            **{"input": INPUT, "tools": RESPONSES_TOOLS, "tool_choice": CHOICE, "text": RESPONSES_TEXT},
            **dict.fromkeys(("instructions", "previous_response_id", "truncation"), TEXT),
            **dict.fromkeys(("temperature", "top_p"), NUMBER),
            **dict.fromkeys(("stream", "parallel_tool_calls", "background"), BOOLEAN),
            **{"max_output_tokens": [*INTEGER, 0], "top_logprobs": INTEGER, "reasoning": OBJECT, "include": LIST},
        },
    ),
    MESSAGES.path: (
        MESSAGES.request("x", max_tokens=2),
        {
            **{"messages": MESSAGES_MESSAGES, "tools": MESSAGES_TOOLS, "tool_choice": CHOICE},
            **{"system": [5, True, {}, [5], [{"type": "text", "text": 5}]], "stop_sequences": [*TEXTS, "x"]},
            **dict.fromkeys(("temperature", "top_p"), NUMBER),
            **{"top_k": INTEGER, "max_tokens": [*INTEGER, 0], "stream": BOOLEAN},
            **dict.fromkeys(("thinking", "metadata", "chat_template_kwargs"), OBJECT),
        },
    ),
    "/apply-template": (CHAT.messages("x"), {"messages": CHAT_MESSAGES}),
    "/v1/messages/count_tokens": (MESSAGES.messages("x"), {"messages": MESSAGES_MESSAGES}),
    "/v1/responses/input_tokens": (RESPONSES.messages("x"), {"input": INPUT}),
    "/tokenize": (
        {"content": "x"},
        {"content": [5, True, {}, [{}], [-1], [10**9], [None]], "add_special": BOOLEAN, "with_pieces": BOOLEAN},
    ),
    "/detokenize": ({"tokens": [5]}, {"tokens": [5, "x", {}, ["x"], [-1], [10**9], None]}),
}


def wrong_requests(path: str) -> Iterator[tuple[str, Json]]:
    base, fields = DOORS[path]
    for name, values in fields.items():
        for value in values:
            yield name, {**base, name: value}


@pytest.mark.parametrize("path", DOORS)
def test_a_wrong_value_of_any_field_is_a_400(tools_server: Server, path: str) -> None:
    connection = connect(tools_server.port)
    assert post(connection, path, DOORS[path][0])[0] == 200
    others = []
    for name, body in wrong_requests(path):
        status, answer = post(connection, path, body)
        if status != 400 or not json.loads(answer)["error"]["message"]:
            others.append((name, body[name], status, answer[:200]))
    assert others == []
    assert post(connection, path, DOORS[path][0])[0] == 200


@pytest.mark.parametrize("path", [path for path in DOORS if path not in {"/tokenize", "/detokenize"}])
def test_a_body_that_is_no_object_is_a_400(tools_server: Server, path: str) -> None:
    for body in ("{", "5", '"x"', "[]", "null", ""):
        assert post(connect(tools_server.port), path, body)[0] == 400, body


SAID: list[tuple[Json, str]] = [
    (picture({"url": "data:image/png;base64,xx"}), "image input is not supported"),
    ([{"role": 5, "content": "x"}], "'role'"),
    ([{"content": "x"}], "Missing 'role'"),
    (called({"name": "f", "arguments": "{broken"}), "Failed to parse"),
]


@pytest.mark.parametrize(("messages", "message"), SAID, ids=[message for _, message in SAID])
def test_the_400_says_what_is_wrong(tools_server: Server, messages: Json, message: str) -> None:
    assert message in CHAT.refusal(tools_server.port, {"messages": messages})


def test_empty_stop_strings_are_skipped(plain_server: Server) -> None:
    text = CHAT.ask(plain_server.port, CHAT.request("def f")).text
    assert CHAT.ask(plain_server.port, CHAT.request("def f", stop=[""])).text == text
