"""What clients of llama-server rely on: connections that stay, OpenAI's forms, and errors with the right code."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.servers import connect, post

from .test_server import MESSAGES, TOOL, Server

pytestmark = pytest.mark.build


def test_one_connection_serves_streams_and_plain_requests(plain_server: Server) -> None:
    connection = connect(plain_server.port)
    connection.connect()
    socket = connection.sock
    for _ in range(30):
        status, stream = post(connection, "/v1/completions", {"prompt": "x", "max_tokens": 4, "stream": True})
        assert status == 200
        assert stream.rstrip().endswith(b"data: [DONE]")
        assert connection.sock is socket  # http.client drops it if the server will close
        status, _ = post(connection, "/v1/completions", {"prompt": "x", "max_tokens": 1})
        assert status == 200
        assert connection.sock is socket


def test_logprobs_of_completions_have_openais_form(plain_server: Server) -> None:
    request = {"prompt": "def main():", "max_tokens": 8, "temperature": 0, "logprobs": 3}
    status, body = post(connect(plain_server.port), "/v1/completions", request)
    assert status == 200
    choice = json.loads(body)["choices"][0]
    logprobs = choice["logprobs"]
    n = len(logprobs["tokens"])
    assert "".join(logprobs["tokens"]) == choice["text"]
    assert [len(logprobs[key]) for key in ("token_logprobs", "top_logprobs", "text_offset", "content")] == [n] * 4
    for token, offset, logprob, top in zip(
        logprobs["tokens"], logprobs["text_offset"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert choice["text"][offset:].startswith(token)
        assert top[token] == logprob == max(top.values())
        assert 1 <= len(top) <= 3


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/v1/completions", "{", "parse error"),
        ("/v1/chat/completions", "not JSON", "parse error"),
        ("/v1/completions", {"prompt": "x", "echo": True}, "echo is not supported"),
        (
            "/v1/chat/completions",
            {"messages": MESSAGES, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}},
            "which is not among the tools",
        ),
    ],
    ids=str,
)
def test_wrong_requests_are_400s_that_say_why(tools_server: Server, path: str, body: Any, message: str) -> None:  # noqa: ANN401
    status, answer = post(connect(tools_server.port), path, body)
    assert status == 400
    assert message in json.loads(answer)["error"]["message"]


def test_a_named_tool_choice_is_obeyed(tools_server: Server) -> None:
    other = {"type": "function", "function": {"name": "other", "parameters": {"type": "object", "properties": {}}}}
    request = {
        "messages": MESSAGES,
        "tools": [other, TOOL],
        "tool_choice": {"type": "function", "function": {"name": TOOL["function"]["name"]}},
        "max_tokens": 200,
        "seed": 1,
    }
    for seed in range(8):
        status, answer = post(connect(tools_server.port), "/v1/chat/completions", {**request, "seed": seed})
        assert status == 200
        (choice,) = json.loads(answer)["choices"]
        assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == [TOOL["function"]["name"]]


def test_a_call_is_refused_if_the_template_knows_no_tools(plain_server: Server) -> None:
    for choice in ("required", {"type": "function", "function": {"name": TOOL["function"]["name"]}}):
        request = {"messages": MESSAGES, "tools": [TOOL], "tool_choice": choice, "max_tokens": 8}
        status, answer = post(connect(plain_server.port), "/v1/chat/completions", request)
        assert status == 400
        assert "the chat template of this model knows no tools" in json.loads(answer)["error"]["message"]
