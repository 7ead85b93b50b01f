"""Models that think first: what a request forces is in the answer, and reasoning stays apart or is absent."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from ernie_llama import Llama
from ernie_llama._chat.answer_grammar import AnswerGrammar
from ernie_llama.llama_types import ChatCompletionRequestMessage

from .test_chat import TOOLS, writes

pytestmark = pytest.mark.build

MESSAGES: list[ChatCompletionRequestMessage] = [{"role": "user", "content": "def f"}]
# The first template knows how reasoning ends, the second does not.
TEMPLATES = {
    "closes": (
        "{% for m in messages %}{% if m.role == 'assistant' %}<think>\n{{ m.reasoning_content }}\n</think>\n\n"
        "{{ m.content }}{% else %}{{ m.content }}{% endif %}\n{% endfor %}<think>\n"
    ),
    "open": "{{ messages[-1].content }}\n<think>\n",
    "none": "{{ messages[-1].content }}\nAnswer: ",
}
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 99}}, "required": ["n"]}
REQUESTS: dict[str, dict[str, Any]] = {
    "json_schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
    "json_object": {"response_format": {"type": "json_object", "schema": SCHEMA}},
    "grammar": {"grammar": 'root ::= "yes" | "no"'},
    "required": {"tools": TOOLS, "tool_choice": "required"},
    "named": {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "get_time"}}},
}


@pytest.fixture(scope="module", params=TEMPLATES)
def thinker(bf16: str, request: pytest.FixtureRequest) -> Iterator[Llama]:
    with Llama(bf16, n_threads=1, chat_template=TEMPLATES[request.param]) as llm:
        yield llm


def answer(llm: Llama, stream: bool, **options: Any) -> dict[str, Any]:  # noqa: ANN401
    """The message, or what the chunks of a stream add up to, and the finish reason."""
    result: Any = llm.create_chat_completion(MESSAGES, stream=stream, **options)  # type: ignore[call-overload]
    if not stream:
        choice = result["choices"][0]
        return {**choice["message"], "finish_reason": choice["finish_reason"]}
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    for chunk in result:
        choice = chunk["choices"][0]
        for key, value in choice["delta"].items():
            if key in message:
                message[key] += value
        message["finish_reason"] = choice["finish_reason"]
    return message


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize("seed", [1, 2])
def test_what_is_forced_is_the_answer(thinker: Llama, name: str, stream: bool, seed: int) -> None:
    message = answer(thinker, stream, seed=seed, temperature=1.0, max_tokens=300, **REQUESTS[name])
    if "tools" in REQUESTS[name]:
        (call,) = message["tool_calls"]
        assert set(json.loads(call["function"]["arguments"])) == {"city"}
        assert not message["content"]
        assert message["finish_reason"] == "tool_calls"
    elif name == "grammar":
        assert message["content"] in {"yes", "no"}
        assert not message.get("reasoning_content")
    else:
        assert json.loads(message["content"]).keys() == {"n"}
        assert message["finish_reason"] == "stop"
    assert "<" not in (message["content"] or "")


def test_reasoning_comes_first_and_gets_half_of_the_tokens(bf16: str) -> None:
    with Llama(bf16, n_threads=1, chat_template=TEMPLATES["closes"]) as llm:
        for max_tokens in (60, 120):
            message = answer(llm, False, seed=3, max_tokens=max_tokens, **REQUESTS["json_object"])
            n = len(llm.tokenize(message["reasoning_content"].encode(), add_bos=False))
            assert 0.25 * max_tokens < n <= 0.5 * max_tokens + 2
            assert json.loads(message["content"])


@pytest.mark.parametrize(
    "written", ['hm\n</think>\n\n{"n": 1}', 'hm</think>\n<response>{"n":1}</response>', '</think>\n\n{"n": 1}']
)
def test_reasoning_ends_where_the_model_ends_it(bf16: str, written: str) -> None:
    with Llama(bf16, n_threads=1, chat_template=TEMPLATES["closes"]) as llm:
        message = answer(llm, False, max_tokens=100, logits_processor=[writes(llm, written)], **REQUESTS["json_object"])
        assert (message.get("reasoning_content", ""), json.loads(message["content"])) == (
            "hm" if written.startswith("hm") else "",
            {"n": 1},
        )


def test_a_grammar_may_contain_the_end_of_reasoning(bf16: str) -> None:
    with Llama(bf16, n_threads=1, chat_template=TEMPLATES["closes"]) as llm:
        message = answer(llm, False, max_tokens=60, grammar=r'root ::= "hm\n</think>\n\n" ("yes" | "no")')
        assert message["reasoning_content"] == "hm"
        assert message["content"] in {"yes", "no"}


def test_a_request_without_a_grammar_thinks_as_the_prompt_says() -> None:
    nothing = AnswerGrammar.of(None, None, None, None)
    assert nothing.thinks(True, TEMPLATES["open"])
    assert not nothing.thinks(False, TEMPLATES["closes"])
