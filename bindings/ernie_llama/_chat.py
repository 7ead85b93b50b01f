"""Chats: the grammar that a request asks for, and the dictionaries of its answer."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from . import _json_schema
from ._completion import Completion, TextPiece, TokenLogprobs
from ._output import END_TOOL_CALL, TOOL_CALL, Content, OutputParser, OutputPart, Reasoning, ToolCall
from .llama_grammar import LlamaGrammar
from .llama_types import (
    ChatCompletionLogprobs,
    ChatCompletionLogprobToken,
    ChatCompletionMessageToolCall,
    ChatCompletionRequestResponseFormat,
    ChatCompletionResponseMessage,
    ChatCompletionStreamResponseDelta,
    ChatCompletionTool,
    ChatCompletionToolChoiceOption,
    CreateChatCompletionResponse,
    CreateChatCompletionStreamResponse,
    FinishReason,
)


def format_grammar(response_format: ChatCompletionRequestResponseFormat) -> LlamaGrammar | None:
    """The grammar that a response format asks for; None for plain text.

    Raises:
        ValueError: the format is unknown, or its schema has no grammar.
    """
    format_type = response_format.get("type")
    if format_type == "text":
        return None
    if format_type == "json_object":
        return LlamaGrammar.from_json_schema(response_format.get("schema", {"type": "object"}))
    if format_type == "json_schema" and isinstance(response_format.get("json_schema"), dict):
        return LlamaGrammar.from_json_schema(response_format["json_schema"].get("schema", {}))
    raise ValueError(
        f"response_format is {response_format!r}, expected the type text, json_object (with or without a schema) or "
        "json_schema with json_schema.schema"
    )


def tool_grammar(
    tools: Sequence[ChatCompletionTool] | None, choice: ChatCompletionToolChoiceOption | None
) -> LlamaGrammar | None:
    """The grammar of the calls that `choice` forces; None if it forces none.

    Raises:
        ValueError: the choice is not among the tools, or a tool's parameters have no grammar.
    """
    if choice is None or choice in ("auto", "none"):
        return None
    if choice == "required":
        allowed = list(tools or ())
    elif isinstance(choice, dict):
        allowed = [tool for tool in tools or () if tool["function"]["name"] == choice["function"]["name"]]
    else:
        raise ValueError(f"tool_choice is {choice!r}, expected none, auto, required or a function of the tools")
    if not allowed:
        names = ", ".join(tool["function"]["name"] for tool in tools or ()) or "none"
        raise ValueError(f"tool_choice is {choice!r}, and the tools are: {names}")
    calls: dict[str, Any] = {"anyOf": []}
    for tool in allowed:
        parameters = dict(tool["function"].get("parameters", {"type": "object"}))
        _move_definitions(parameters, calls)
        members = {"name": {"const": tool["function"]["name"]}, "arguments": parameters}
        calls["anyOf"].append({"properties": members, "required": list(members), "additionalProperties": False})
    rules = _json_schema.grammar(calls).replace("root ::=", "call ::=", 1)
    return LlamaGrammar(f'{rules}root ::= "{TOOL_CALL}\\n" call "\\n{END_TOOL_CALL}"\n')


def _move_definitions(schema: dict[str, Any], document: dict[str, Any]) -> None:
    """Move the definitions of `schema` to `document`, which will contain it: that is where references look."""
    for key in ("$defs", "definitions"):
        definitions = document.setdefault(key, {})
        for name, definition in schema.pop(key, {}).items():
            if definitions.setdefault(name, definition) != definition:
                raise ValueError(f"two tools define {key}/{name} differently: rename one of them")


class ChatResults:
    """Makes the result dictionaries of a chat completion."""

    def __init__(self, completion: Completion, model_name: str, *, thinking: bool) -> None:
        self._completion = completion
        self._id = f"chatcmpl-{uuid.uuid4()}"
        self._created = int(time.time())
        self._model_name = model_name
        self._parser = OutputParser(thinking)
        self._n_calls = 0

    def response(self) -> CreateChatCompletionResponse:
        """The complete result."""
        parts: list[OutputPart] = []
        logprobs: list[TokenLogprobs] = []
        finish: FinishReason = "stop"
        for piece in self._completion.pieces():
            parts += self._parts(piece)
            logprobs += piece.logprobs
            finish = self._finish_reason(piece) or finish
        return {
            "id": self._id,
            "object": "chat.completion",
            "created": self._created,
            "model": self._model_name,
            "choices": [
                {
                    "index": 0,
                    "message": _message(parts),
                    "logprobs": self._logprobs(logprobs),
                    "finish_reason": finish,
                }
            ],
            "usage": self._completion.usage(),
        }

    def chunks(self) -> Iterator[CreateChatCompletionStreamResponse]:
        """The role, then each part as it becomes final, then the finish reason."""
        yield self._chunk({"role": "assistant"}, [], None)
        for piece in self._completion.pieces():
            logprobs = piece.logprobs
            for part in self._parts(piece):
                yield self._chunk(self._delta(part), logprobs, None)
                logprobs = []
            if finish := self._finish_reason(piece):
                yield self._chunk({}, logprobs, finish)
            elif logprobs:
                yield self._chunk({}, logprobs, None)

    def _parts(self, piece: TextPiece) -> Iterator[OutputPart]:
        for part in self._parser.feed(piece.text):
            self._n_calls += isinstance(part, ToolCall)
            yield part
        if piece.finish_reason:
            for part in self._parser.flush(cut=piece.finish_reason == "length"):
                self._n_calls += isinstance(part, ToolCall)
                yield part

    def _finish_reason(self, piece: TextPiece) -> FinishReason | None:
        return "tool_calls" if piece.finish_reason == "stop" and self._n_calls else piece.finish_reason

    def _delta(self, part: OutputPart) -> ChatCompletionStreamResponseDelta:
        if isinstance(part, ToolCall):
            return {"tool_calls": [{"index": self._n_calls - 1, **_call(part)}]}
        return {"reasoning_content": part.text} if isinstance(part, Reasoning) else {"content": part.text}

    def _chunk(
        self, delta: ChatCompletionStreamResponseDelta, logprobs: list[TokenLogprobs], finish: FinishReason | None
    ) -> CreateChatCompletionStreamResponse:
        return {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._model_name,
            "choices": [
                {
                    "index": 0,
                    "delta": delta,
                    "logprobs": self._logprobs(logprobs) if logprobs else None,
                    "finish_reason": finish,
                }
            ],
        }

    def _logprobs(self, entries: list[TokenLogprobs]) -> ChatCompletionLogprobs | None:
        if self._completion.logprobs is None:
            return None
        return {"content": [_token_entry(each) for each in entries], "refusal": None}


def _message(parts: Sequence[OutputPart]) -> ChatCompletionResponseMessage:
    content = "".join(part.text for part in parts if isinstance(part, Content))
    calls = [_call(part) for part in parts if isinstance(part, ToolCall)]
    message: ChatCompletionResponseMessage = {
        "role": "assistant",
        "content": None if calls and not content else content,
    }
    if reasoning := "".join(part.text for part in parts if isinstance(part, Reasoning)):
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    return message


def _call(part: ToolCall) -> ChatCompletionMessageToolCall:
    function: Any = {"name": part.name, "arguments": part.arguments}
    return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}


def _token_entry(each: TokenLogprobs) -> ChatCompletionLogprobToken:
    return {
        "token": each.token.decode(errors="replace"),
        "bytes": list(each.token),
        "logprob": each.logprob or 0.0,
        "top_logprobs": [
            {"token": token.decode(errors="replace"), "bytes": list(token), "logprob": logprob}
            for token, logprob in each.top
        ],
    }
