"""The three APIs of llama-server that chats come through, in one form: requests, answers and streams."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .servers import connect, post

Json = Any
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 10}},
    "required": ["city"],
}


@dataclass(frozen=True)
class Answer:
    """What an answer says, whichever API gave it."""

    text: str
    calls: list[tuple[str, Json]]  # name and arguments; None for arguments that were cut off
    end: str  # finish_reason, status or stop_reason


@dataclass(frozen=True)
class Door:
    """One API: its path, and how it spells what all of them know."""

    path: str
    limit: str
    messages: Callable[[str], dict[str, Json]]
    tool: Callable[[str, Json], Json]
    read: Callable[[Json], Answer]
    read_stream: Callable[[list[Json]], Answer]
    cut: str  # the end of an answer that the limit cut off

    def request(self, question: str, *tools: str, max_tokens: int = 24, **options: Json) -> dict[str, Json]:
        """The body of a request with these tools on offer."""
        offer = {"tools": [self.tool(name, PARAMETERS) for name in tools]} if tools else {}
        return {"temperature": 0, **self.messages(question), **offer, self.limit: max_tokens, **options}

    def ask(self, port: int, body: Mapping[str, Json]) -> Answer:
        """The answer, streamed if the body says so.

        Raises:
            AssertionError: the status is not 200.
        """
        status, answer = post(connect(port), self.path, body)
        assert status == 200, answer
        if not body.get("stream"):
            return self.read(json.loads(answer))
        lines = [line.removeprefix("data: ") for line in answer.decode().splitlines() if line.startswith("data: ")]
        return self.read_stream([json.loads(line) for line in lines if line != "[DONE]"])

    def refusal(self, port: int, body: Mapping[str, Json]) -> str:
        """The message of the 400 that the body gets."""
        status, answer = post(connect(port), self.path, body)
        assert status == 400, (status, answer)
        message: str = json.loads(answer)["error"]["message"]
        return message


def _json(text: str) -> Json:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


def _chat(answer: Json) -> Answer:
    (choice,) = answer["choices"]
    message = choice["message"]
    functions = [call["function"] for call in message.get("tool_calls") or []]
    calls = [(function["name"], _json(function["arguments"])) for function in functions]
    return Answer(message["content"] or "", calls, choice["finish_reason"])


def _chat_stream(chunks: list[Json]) -> Answer:
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    calls: dict[int, list[str]] = {}
    for choice in choices:
        for part in choice["delta"].get("tool_calls") or []:
            call = calls.setdefault(part["index"], ["", ""])
            call[0] += part["function"].get("name") or ""
            call[1] += part["function"].get("arguments") or ""
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    return Answer(text, [(name, _json(arguments)) for name, arguments in calls.values()], choices[-1]["finish_reason"])


def _response(answer: Json) -> Answer:
    output = answer["output"]
    text = "".join(part["text"] for item in output if item["type"] == "message" for part in item["content"])
    calls = [(item["name"], _json(item["arguments"])) for item in output if item["type"] == "function_call"]
    return Answer(text, calls, answer["status"])


def _response_stream(events: list[Json]) -> Answer:
    answer = _response(events[-1]["response"])
    assert events[-1]["type"] == f"response.{answer.end}"
    deltas = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
    assert "".join(deltas) == answer.text
    return answer


def _message(answer: Json) -> Answer:
    blocks = answer["content"]
    text = "".join(block["text"] for block in blocks if block["type"] == "text")
    calls = [(block["name"], block["input"]) for block in blocks if block["type"] == "tool_use"]
    return Answer(text, calls, answer["stop_reason"])


def _message_stream(events: list[Json]) -> Answer:
    starts = [event["content_block"] for event in events if event["type"] == "content_block_start"]
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    (end,) = [event["delta"]["stop_reason"] for event in events if event["type"] == "message_delta"]
    text = "".join(delta["text"] for delta in deltas if delta["type"] == "text_delta")
    return Answer(text, [(start["name"], None) for start in starts if start["type"] == "tool_use"], end)


CHAT = Door(
    "/v1/chat/completions",
    "max_tokens",
    lambda question: {"messages": [{"role": "user", "content": question}]},
    lambda name, schema: {"type": "function", "function": {"name": name, "parameters": schema}},
    _chat,
    _chat_stream,
    "length",
)
RESPONSES = Door(
    "/v1/responses",
    "max_output_tokens",
    lambda question: {"input": question},
    lambda name, schema: {"type": "function", "name": name, "parameters": schema},
    _response,
    _response_stream,
    "incomplete",
)
MESSAGES = Door(
    "/v1/messages",
    "max_tokens",
    lambda question: {"messages": [{"role": "user", "content": question}]},
    lambda name, schema: {"name": name, "input_schema": schema},
    _message,
    _message_stream,
    "max_tokens",
)
DOORS = (CHAT, RESPONSES, MESSAGES)
