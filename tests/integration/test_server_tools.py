"""Tools at every API of llama-server: plain text stays, and every published form of a choice is obeyed or refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.doors import CHAT, DOORS, MESSAGES, RESPONSES, Door
from support.servers import connect, post

from .test_server import Server

pytestmark = pytest.mark.build

PROMPTS = ("def main():", "import os\n\n\nclass ", "# naïve 日本語 🎉\n", 'x = {"a": 1}')
by_door = pytest.mark.parametrize("door", DOORS, ids=lambda door: door.path)


def chat_function(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def function(name: str) -> dict[str, Any]:
    return {"type": "function", "name": name}


@by_door
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_text_without_a_call_is_the_content(tools_server: Server, door: Door, stream: bool) -> None:
    """The text is what /completion gives for the same prompt: nothing of it is lost."""
    for prompt in PROMPTS:
        body = door.request(prompt, "v", "w", cache_prompt=False)
        text = completion(tools_server, CHAT.request(prompt, "v", "w"))
        answer = door.ask(tools_server.port, {**body, "stream": stream})
        assert answer.calls == []
        assert (answer.text, answer.end) == (text, door.cut)


def completion(server: Server, chat: dict[str, Any]) -> str:
    """What the model writes in answer to a chat, unparsed."""
    _, rendered = post(connect(server.port), "/apply-template", chat)
    request = {"n_predict": 24, "temperature": 0, "cache_prompt": False, **json.loads(rendered)}
    _, answer = post(connect(server.port), "/completion", request)
    text: str = json.loads(answer)["content"]
    return text


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_text_that_no_format_matches_is_the_content(tools_server: Server, stream: bool) -> None:
    """The beginning that the model goes on from holds text after the tags of an answer, which the parser rejects."""
    begun = {"role": "assistant", "content": "<response>\nyes\n</response>\nand "}
    body = CHAT.request("def main():", "v")
    body["messages"].append(begun)
    body |= {"continue_final_message": True, "add_generation_prompt": False, "cache_prompt": False}
    answer = CHAT.ask(tools_server.port, {**body, "stream": stream})
    assert len(answer.text) > 20
    assert (answer.calls, answer.end) == ([], "length")


# How each API asks for a call with v and w on offer: of any of them, of w, of any of a list. The model prefers v.
ANY = {CHAT: "required", RESPONSES: "required", MESSAGES: {"type": "any"}}
NAMED = {CHAT: chat_function("w"), RESPONSES: function("w"), MESSAGES: {"type": "tool", "name": "w"}}
ALLOWED = {
    CHAT: {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [chat_function("w")]}},
    RESPONSES: {"type": "allowed_tools", "mode": "required", "tools": [function("w")]},
}
NONE = {CHAT: "none", RESPONSES: "none", MESSAGES: {"type": "none"}}
AUTO = {CHAT: "auto", RESPONSES: "auto", MESSAGES: {"type": "auto"}}
NOT_PARALLEL: dict[Door, dict[str, Any]] = {
    CHAT: {"tool_choice": ANY[CHAT], "parallel_tool_calls": False},
    RESPONSES: {"tool_choice": ANY[RESPONSES], "parallel_tool_calls": False},
    MESSAGES: {"tool_choice": {"type": "any", "disable_parallel_tool_use": True}},
}


def names(server: Server, door: Door, seed: int, **options: Any) -> list[str]:  # noqa: ANN401
    """The functions that an answer calls."""
    body = door.request("def f", "v", "w", max_tokens=120, temperature=0.8, seed=seed, **options)
    if door is MESSAGES:  # which has no seed
        body["temperature"] = 0
    return [name for name, _ in door.ask(server.port, body).calls]


@by_door
def test_a_named_choice_is_one_call(tools_server: Server, door: Door) -> None:
    for seed in range(6):
        assert names(tools_server, door, seed, tool_choice=NAMED[door]) == ["w"]


@by_door
def test_parallel_calls_can_be_refused(tools_server: Server, door: Door) -> None:
    several = [names(tools_server, door, seed, tool_choice=ANY[door]) for seed in range(6)]
    assert max(map(len, several)) > 1
    for seed in range(6):
        assert len(names(tools_server, door, seed, **NOT_PARALLEL[door])) == 1


@pytest.mark.parametrize("door", [CHAT, RESPONSES], ids=lambda door: door.path)
def test_only_allowed_tools_are_called(tools_server: Server, door: Door) -> None:
    called = [name for seed in range(6) for name in names(tools_server, door, seed, tool_choice=ALLOWED[door])]
    assert set(called) == {"w"}
    everything = [name for seed in range(6) for name in names(tools_server, door, seed, tool_choice=ANY[door])]
    assert "v" in everything


@by_door
def test_none_and_auto_are_text(tools_server: Server, door: Door) -> None:
    for choice in (NONE[door], AUTO[door], None):
        answer = door.ask(tools_server.port, door.request("def f", "v", "w", tool_choice=choice))
        assert answer.calls == []
        assert answer.text


REFUSED: list[tuple[Door, Any, str]] = [
    (CHAT, "sometimes", "Invalid tool_choice: sometimes"),
    (CHAT, 5, "must be a string or an object"),
    (CHAT, chat_function("x"), "'x', which is not among the tools"),
    (CHAT, {"type": "function"}, "'', which is not among the tools"),
    (CHAT, {"type": "custom", "custom": {"name": "v"}}, "type 'custom' is not supported"),
    (CHAT, {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [chat_function("x")]}}, "'x', which"),
    (CHAT, {"type": "allowed_tools", "allowed_tools": {"mode": "none", "tools": [chat_function("v")]}}, "mode of"),
    (CHAT, {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}, "needs a list of tools"),
    (RESPONSES, function("x"), "'x', which is not among the tools"),
    (RESPONSES, {"type": "web_search_preview"}, "type 'web_search_preview' is not supported"),
    (RESPONSES, {"type": "mcp", "server_label": "x", "name": "v"}, "type 'mcp' is not supported"),
    (RESPONSES, {"type": "custom", "name": "v"}, "type 'custom' is not supported"),
    (RESPONSES, {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "mcp", "name": "v"}]}, "only functions"),
    (MESSAGES, {"type": "tool", "name": "x"}, "'x', which is not among the tools"),
    (MESSAGES, {"type": "tool"}, "'', which is not among the tools"),
    (MESSAGES, {"type": "required"}, "type must be auto, any, tool or none"),
    (MESSAGES, "any", "type must be auto, any, tool or none"),
    (MESSAGES, {"type": "any", "disable_parallel_tool_use": "yes"}, "disable_parallel_tool_use"),
]


@pytest.mark.parametrize(("door", "choice", "message"), REFUSED, ids=lambda each: getattr(each, "path", str(each)))
def test_other_choices_are_refused_by_name(tools_server: Server, door: Door, choice: object, message: str) -> None:
    assert message in door.refusal(tools_server.port, door.request("def f", "v", "w", tool_choice=choice))


@by_door
def test_a_call_needs_tools(tools_server: Server, door: Door) -> None:
    request = door.request("def f", tool_choice=ANY[door])
    assert "there are no tools" in door.refusal(tools_server.port, request)
