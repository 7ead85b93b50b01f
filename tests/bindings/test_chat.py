"""Chats: the file's template, ERNIE's markers, tools and formats, with and without streaming."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from ernie_llama import Llama
from ernie_llama.llama_types import (
    ChatCompletionRequestMessage,
    ChatCompletionRequestResponseFormat,
    ChatCompletionTool,
    ChatCompletionToolChoiceOption,
)

pytestmark = pytest.mark.build

MESSAGES: list[ChatCompletionRequestMessage] = [
    {"role": "system", "content": "You write Python."},
    {"role": "user", "content": "def f"},
]
PROMPT = "<|begin_of_sentence|>You write Python.\nUser: def f\nAssistant: "
TOOLS: list[ChatCompletionTool] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"city": {"$ref": "#/$defs/city"}},
                "required": ["city"],
                "$defs": {"city": {"type": "string", "maxLength": 8}},
            },
        },
    }
    for name in ("get_weather", "get_time")
]


def writes(llm: Llama, text: str) -> Callable[[Any, Any], Any]:
    """A logits processor that makes the model write `text` and stop."""
    tokens = [*llm.tokenize(text.encode(), add_bos=False, special=True), llm.token_eos()]
    begin: list[int] = []

    def process(ids: Any, logits: Any) -> Any:  # noqa: ANN401
        begin.append(len(ids))
        logits[:] = -np.inf
        logits[tokens[len(ids) - begin[0]]] = 0
        return logits

    return process


def test_the_prompt_is_rendered_with_the_template(llm: Llama) -> None:
    assert llm.apply_chat_template(MESSAGES) == PROMPT
    chat = llm.create_chat_completion(MESSAGES, max_tokens=8, temperature=0)
    tokens = llm.tokenize(PROMPT.encode(), special=True)
    completion = llm(tokens, max_tokens=8, temperature=0)
    assert chat["choices"][0]["message"] == {"role": "assistant", "content": completion["choices"][0]["text"]}
    assert chat["usage"] == completion["usage"]
    assert chat["choices"][0]["finish_reason"] == "length"
    assert (chat["object"], chat["model"], chat["id"][:9]) == ("chat.completion", llm.model_path, "chatcmpl-")


ANSWER = (
    "<think>\nthis is hard\n</think>\n\n<response>\nprint(x)\n</response>\n"
    '<tool_call>\n{"name": "get_time", "arguments": {"city": "Paris"}}\n</tool_call>\n'
)


def test_reasoning_content_and_tool_calls_are_split(llm: Llama) -> None:
    chat = llm.create_chat_completion(MESSAGES, tools=TOOLS, logits_processor=[writes(llm, ANSWER)], max_tokens=200)
    choice = chat["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"]["tool_calls"]
    assert call["id"].startswith("call_")
    assert choice["message"] == {
        "role": "assistant",
        "content": "print(x)",
        "reasoning_content": "this is hard",
        "tool_calls": [
            {"id": call["id"], "type": "function", "function": {"name": "get_time", "arguments": '{"city": "Paris"}'}}
        ],
    }


def test_a_stream_gives_the_same_message(llm: Llama) -> None:
    chunks = list(
        llm.create_chat_completion(
            MESSAGES, tools=TOOLS, logits_processor=[writes(llm, ANSWER)], max_tokens=200, stream=True
        )
    )
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant"}
    assert choices[-1]["delta"] == {}
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["tool_calls"]
    deltas = [choice["delta"] for choice in choices]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "this is hard"
    assert "".join(delta.get("content", "") for delta in deltas) == "print(x)"
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert [(call["index"], call["function"]) for call in calls] == [
        (0, {"name": "get_time", "arguments": '{"city": "Paris"}'})
    ]


def test_after_a_prompt_that_ends_with_think_the_answer_starts_with_reasoning(bf16: str) -> None:
    template = "{{ messages[-1].content }}\n<think>\n"
    with Llama(bf16, n_threads=1, chat_template=template) as llm:
        chat = llm.create_chat_completion(
            MESSAGES, logits_processor=[writes(llm, "hm\n</think>\n\nyes")], max_tokens=100
        )
        assert chat["choices"][0]["message"] == {"role": "assistant", "content": "yes", "reasoning_content": "hm"}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_time"}}])
def test_a_call_can_be_forced(llm: Llama, choice: ChatCompletionToolChoiceOption) -> None:
    for seed in range(2):
        chat = llm.create_chat_completion(
            MESSAGES, tools=TOOLS, tool_choice=choice, seed=seed, temperature=1.0, max_tokens=200
        )
        (call,) = chat["choices"][0]["message"]["tool_calls"]
        assert call["function"]["name"] in ({"get_time"} if isinstance(choice, dict) else {"get_time", "get_weather"})
        assert set(json.loads(call["function"]["arguments"])) == {"city"}
        assert chat["choices"][0]["message"]["content"] is None
        assert chat["choices"][0]["finish_reason"] == "tool_calls"


def test_tools_reach_the_template_unless_tool_choice_is_none(bf16: str) -> None:
    with Llama(bf16, n_threads=1, chat_template="{{ tools | map(attribute='function.name') | join }}.") as llm:
        assert llm.apply_chat_template(MESSAGES, TOOLS) == "get_weatherget_time."
        usage = llm.create_chat_completion(MESSAGES, tools=TOOLS, tool_choice="none", max_tokens=1)["usage"]
        assert usage["prompt_tokens"] == len(llm.tokenize(b"."))


def test_a_template_that_writes_bos_gets_only_one(bf16: str) -> None:
    with Llama(bf16, n_threads=1, chat_template="{{ bos_token }}x") as llm:
        assert llm.apply_chat_template(MESSAGES) == "<s>x"
        assert llm.create_chat_completion(MESSAGES, max_tokens=1)["usage"]["prompt_tokens"] == 2


@pytest.mark.parametrize(
    "response_format",
    [
        {"type": "json_object", "schema": {"properties": {"n": {"type": "integer"}}, "required": ["n"]}},
        {
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": {"properties": {"n": {"type": "integer"}}, "required": ["n"]}},
        },
    ],
)
def test_the_content_can_be_json(llm: Llama, response_format: ChatCompletionRequestResponseFormat) -> None:
    chat = llm.create_chat_completion(MESSAGES, response_format=response_format, seed=1, max_tokens=100)
    content = json.loads(chat["choices"][0]["message"]["content"] or "")
    assert list(content) == ["n"]
    assert isinstance(content["n"], int)


def test_logprobs_of_a_chat(llm: Llama) -> None:
    chat = llm.create_chat_completion(MESSAGES, max_tokens=4, temperature=0, logprobs=True, top_logprobs=2)
    logprobs = chat["choices"][0]["logprobs"]
    assert logprobs is not None
    assert logprobs["content"] is not None
    assert (
        b"".join(bytes(each["bytes"] or ()) for each in logprobs["content"]).decode()
        == (chat["choices"][0]["message"]["content"])
    )
    for each in logprobs["content"]:
        assert len(each["top_logprobs"]) == 2
        assert each["logprob"] == max(top["logprob"] for top in each["top_logprobs"])
    plain = llm.create_chat_completion(MESSAGES, max_tokens=4, temperature=0, top_logprobs=2)
    assert plain["choices"][0]["logprobs"] is None
    streamed = llm.create_chat_completion(MESSAGES, max_tokens=4, temperature=0, logprobs=True, stream=True)
    parts = [chunk["choices"][0]["logprobs"] for chunk in streamed]
    assert [each["token"] for part in parts if part for each in part["content"] or ()] == [
        each["token"] for each in logprobs["content"]
    ]


def test_requests_without_a_grammar_are_refused(llm: Llama) -> None:
    with pytest.raises(ValueError, match="tool_choice is 'required', and the tools are: none"):
        llm.create_chat_completion(MESSAGES, tool_choice="required")
    with pytest.raises(ValueError, match="and the tools are: get_weather, get_time"):
        llm.create_chat_completion(MESSAGES, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "f"}})
    with pytest.raises(ValueError, match="tool_choice is 'always', expected none, auto, required or a function"):
        llm.create_chat_completion(MESSAGES, tools=TOOLS, tool_choice="always")  # type: ignore[call-overload]  # the mistake
    with pytest.raises(ValueError, match=r"response_format is .*, expected the type text, json_object"):
        llm.create_chat_completion(MESSAGES, response_format={"type": "json_schema"})
    with pytest.raises(ValueError, match=r"grammar, response_format and a tool_choice .* exclude each other"):
        llm.create_chat_completion(
            MESSAGES, tools=TOOLS, tool_choice="required", response_format={"type": "json_object"}
        )
    with pytest.raises(ValueError, match="message 0 has the content 1, expected a text or a list of parts"):
        llm.create_chat_completion([{"role": "user", "content": 1}])  # type: ignore[typeddict-item]  # the mistake


def test_a_schema_that_cannot_be_kept_is_named_by_its_tool_and_place(llm: Llama) -> None:
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"pattern": "x"}}}}}
    with pytest.raises(ValueError, match="JSON schema, parameters of f, #/properties/a/pattern: pattern cannot be"):
        llm.create_chat_completion(MESSAGES, tools=[TOOLS[0], tool], tool_choice="required")


def test_tools_with_conflicting_definitions_are_refused(llm: Llama) -> None:
    other = json.loads(json.dumps(TOOLS[0]))
    other["function"]["parameters"]["$defs"]["city"] = {"type": "integer"}
    with pytest.raises(ValueError, match=r"two tools define \$defs/city differently: rename one of them"):
        llm.create_chat_completion(MESSAGES, tools=[TOOLS[1], other], tool_choice="required")


def test_a_forced_call_that_is_cut_is_a_call_with_the_arguments_so_far(llm: Llama) -> None:
    for max_tokens, arguments in ((48, None), (400, dict)):
        chat = llm.create_chat_completion(
            MESSAGES, tools=TOOLS, tool_choice="required", max_tokens=max_tokens, temperature=0
        )
        choice = chat["choices"][0]
        call = choice["message"]["tool_calls"][0]["function"]
        assert call["name"] in {tool["function"]["name"] for tool in TOOLS}
        if arguments is None:
            assert choice["finish_reason"] == "length"
        else:
            assert isinstance(json.loads(call["arguments"]), arguments)


def test_an_unforced_call_that_the_model_leaves_open_is_content(llm: Llama) -> None:
    written = '<tool_call>\n{"name": "f", "arguments": {"x"'
    chat = llm.create_chat_completion(MESSAGES, logits_processor=[writes(llm, written)], max_tokens=100)
    assert chat["choices"][0]["message"]["content"] == written
