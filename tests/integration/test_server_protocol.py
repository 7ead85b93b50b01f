"""What clients of llama-server rely on: connections that stay, OpenAI's forms, and errors with the right code."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .test_server import MESSAGES, TOOL, TOOLS_TEMPLATE, Server, serving

pytestmark = pytest.mark.build


@pytest.fixture(scope="module")
def tools_server(
    built_library: None, tiny_ccq2_gguf: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server with a chat template that knows tools."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "template.jinja").write_text(TOOLS_TEMPLATE)
    with serving(tiny_ccq2_gguf, folder / "log", "--chat-template-file", folder / "template.jinja") as server:
        yield server


@pytest.fixture(scope="module")
def plain_server(
    built_library: None, tiny_ccq2_gguf: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    with serving(tiny_ccq2_gguf, tmp_path_factory.mktemp("server") / "log") as server:
        yield server


def connect(server: Server) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)


def post(connection: http.client.HTTPConnection, path: str, body: Any) -> tuple[int, bytes]:  # noqa: ANN401
    text = body if isinstance(body, str) else json.dumps(body)
    connection.request("POST", path, text, {"Content-Type": "application/json"})
    response = connection.getresponse()
    return response.status, response.read()


def test_one_connection_serves_streams_and_plain_requests(plain_server: Server) -> None:
    connection = connect(plain_server)
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
    status, body = post(connect(plain_server), "/v1/completions", request)
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
    status, answer = post(connect(tools_server), path, body)
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
    called: set[str] = set()
    for i in range(40):  # the example's model may write text before a call until max_tokens ends it
        status, answer = post(connect(tools_server), "/v1/chat/completions", {**request, "seed": i})
        assert status == 200
        message = json.loads(answer)["choices"][0]["message"]
        called |= {call["function"]["name"] for call in message.get("tool_calls", [])}
        if called:
            break
    assert called == {TOOL["function"]["name"]}


def test_a_call_is_refused_if_the_template_knows_no_tools(plain_server: Server) -> None:
    for choice in ("required", {"type": "function", "function": {"name": TOOL["function"]["name"]}}):
        request = {"messages": MESSAGES, "tools": [TOOL], "tool_choice": choice, "max_tokens": 8}
        status, answer = post(connect(plain_server), "/v1/chat/completions", request)
        assert status == 400
        assert "the chat template of this model knows no tools" in json.loads(answer)["error"]["message"]
