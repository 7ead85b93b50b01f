"""Chats: the dictionaries of an answer."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from ..llama_types import (
    ChatCompletionLogprobs,
    ChatCompletionLogprobToken,
    ChatCompletionMessageToolCall,
    ChatCompletionResponseMessage,
    ChatCompletionStreamResponseDelta,
    CreateChatCompletionResponse,
    CreateChatCompletionStreamResponse,
    FinishReason,
)
from .completion import Completion, TextPiece
from .logprobs import TokenLogprobs
from .output import Content, OutputParser, OutputPart, Reasoning, ToolCall


class ChatResults:
    """Makes the result dictionaries of a chat completion."""

    def __init__(self, completion: Completion, model_name: str, *, thinking: bool, begun: str = "") -> None:
        """`thinking` says that the answer begins with reasoning, `begun` how it begins, if the prompt says that."""
        self._completion = completion
        self._id = f"chatcmpl-{uuid.uuid4()}"
        self._created = int(time.time())
        self._model_name = model_name
        self._parser = OutputParser(thinking and not begun)
        self._begun = [*self._parser.feed(begun)]
        self._n_calls = 0

    def response(self) -> CreateChatCompletionResponse:
        """The complete result."""
        parts = [*self._begun]
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
        for part in self._begun:
            yield self._chunk(self._delta(part), [], None)
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
        if self._completion.request.logprobs is None:
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
