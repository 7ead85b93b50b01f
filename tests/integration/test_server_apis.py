"""/v1/responses and /v1/messages: the format of the text, why it ended, and what is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.doors import CHAT, MESSAGES, RESPONSES
from support.servers import connect, post

from .test_server import Server

pytestmark = pytest.mark.build

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 99}}, "required": ["n"]}
by_stream = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


@by_stream
def test_the_format_of_a_response_is_obeyed(plain_server: Server, stream: bool) -> None:
    for form in ({"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True}, {"type": "json_object"}):
        request = RESPONSES.request("def f", max_tokens=200, temperature=0.8, seed=3, text={"format": form})
        answer = RESPONSES.ask(plain_server.port, {**request, "stream": stream})
        assert answer.text.lstrip().startswith("{")
        if form["type"] == "json_schema":
            assert answer.end == "completed"
            assert set(json.loads(answer.text)) == {"n"}
    plain = RESPONSES.request("def f", text={"format": {"type": "text"}})
    assert RESPONSES.ask(plain_server.port, plain) == RESPONSES.ask(plain_server.port, RESPONSES.request("def f"))


@by_stream
def test_a_response_that_is_cut_off_is_incomplete(plain_server: Server, stream: bool) -> None:
    request = {**RESPONSES.request("def f", max_tokens=3), "stream": stream}
    _, answer = post(connect(plain_server.port), RESPONSES.path, request)
    if stream:
        *_, last = [line for line in answer.decode().splitlines() if line.startswith("data: ")]
        event = json.loads(last.removeprefix("data: "))
        assert event["type"] == "response.incomplete"
        response = event["response"]
    else:
        response = json.loads(answer)
    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert [item["status"] for item in response["output"]] == ["incomplete"]


def test_a_whole_response_is_completed(plain_server: Server) -> None:
    form = {"type": "json_schema", "name": "x", "schema": {"const": "yes"}}
    _, answer = post(connect(plain_server.port), RESPONSES.path, RESPONSES.request("x", text={"format": form}))
    response = json.loads(answer)
    assert (response["status"], response["incomplete_details"]) == ("completed", None)
    assert [item["status"] for item in response["output"]] == ["completed"]


@by_stream
def test_a_message_names_the_stop_sequence(plain_server: Server, stream: bool) -> None:
    whole = MESSAGES.ask(plain_server.port, MESSAGES.request("def f"))
    assert whole.end == "max_tokens"
    stop = whole.text[8:11]
    request = {**MESSAGES.request("def f", stop_sequences=["never", stop]), "stream": stream}
    answer = MESSAGES.ask(plain_server.port, request)
    assert answer.end == "stop_sequence"
    assert answer.text == whole.text[: whole.text.index(stop)]
    _, raw = post(connect(plain_server.port), MESSAGES.path, request)
    assert f'"stop_sequence":{json.dumps(stop, ensure_ascii=False)}' in raw.decode()


def test_other_ends_of_a_message_name_no_sequence(plain_server: Server) -> None:
    either: tuple[dict[str, Any], ...] = ({}, {"stop_sequences": ["never"]})
    for options in either:
        _, raw = post(connect(plain_server.port), MESSAGES.path, MESSAGES.request("def f", **options))
        answer = json.loads(raw)
        assert (answer["stop_reason"], answer["stop_sequence"]) == ("max_tokens", None)


REFUSED: list[tuple[str, Any]] = [
    ("text", {"format": {"type": "xml"}}),
    ("text", {"format": {"type": "json_schema"}}),
    ("text", {"verbosity": "low"}),
    ("background", True),
    ("truncation", "auto"),
    ("conversation", "conv_1"),
    ("prompt", {"id": "pmpt_1"}),
    ("previous_response_id", "resp_1"),
]


@pytest.mark.parametrize(("key", "value"), REFUSED, ids=str)
def test_what_the_server_does_not_have_is_refused_by_name(plain_server: Server, key: str, value: Any) -> None:  # noqa: ANN401 - JSON
    assert f"'{key}" in RESPONSES.refusal(plain_server.port, RESPONSES.request("x", **{key: value}))


def test_logprobs_of_responses_are_refused(plain_server: Server) -> None:
    request = RESPONSES.request("x", include=["message.output_text.logprobs"])
    assert "logprobs" in RESPONSES.refusal(plain_server.port, request)


@by_stream
def test_logprobs_have_one_element_per_token(plain_server: Server, stream: bool) -> None:
    """Also for tokens that are a part of a character, which ernie-tiny writes if all others are forbidden."""
    request = CHAT.request("def f", max_tokens=12, logprobs=True, top_logprobs=2, stream=stream, cache_prompt=False)
    request |= {"grammar": "root ::= [\\U0001F300-\\U0001F320]+"}
    _, raw = post(connect(plain_server.port), CHAT.path, request)
    if stream:
        lines = [line.removeprefix("data: ") for line in raw.decode().splitlines() if line.startswith("data: {")]
        choices = [choice for line in lines for choice in json.loads(line)["choices"]]
        text = "".join(choice["delta"].get("content") or "" for choice in choices)
        tokens = [each for choice in choices for each in (choice.get("logprobs") or {"content": []})["content"]]
    else:
        (choice,) = json.loads(raw)["choices"]
        text, tokens = choice["message"]["content"], choice["logprobs"]["content"]
    assert len(tokens) == 12
    assert b"".join(bytes(each["bytes"]) for each in tokens) == text.encode()
    assert any(each["token"] == "\ufffd" for each in tokens)
    assert all(len(each["top_logprobs"]) == 2 for each in tokens)
