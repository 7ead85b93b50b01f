"""Completions: the dictionaries of a result."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Literal

from ..llama_types import CompletionLogprobs, CreateCompletionResponse
from .completion import Completion
from .logprobs import TokenLogprobs, as_lists, joined


class CompletionResults:
    """Makes the result dictionaries of a completion."""

    def __init__(self, completion: Completion, model_name: str, prompt: str) -> None:
        """`prompt` is the prompt's text, which an echoing completion puts first."""
        self._completion = completion
        self._request = completion.request
        self._prompt = prompt
        self._id = f"cmpl-{uuid.uuid4()}"
        self._created = int(time.time())
        self._model_name = model_name

    def response(self) -> CreateCompletionResponse:
        """The complete result."""
        pieces = list(self._completion.pieces())
        text = "".join(piece.text for piece in pieces)
        entries = [each for piece in pieces for each in piece.logprobs]
        result = self._response(text, self._lists(entries), pieces[-1].finish_reason)
        if self._request.echo:
            result["choices"][0]["text"] = self._prompt + text
            if logprobs := result["choices"][0]["logprobs"]:
                result["choices"][0]["logprobs"] = joined(as_lists(self._completion.prompt_logprobs, 0), logprobs)
        result["usage"] = self._completion.usage()
        return result

    def chunks(self) -> Iterator[CreateCompletionResponse]:
        """One chunk per piece; the last has text only if some was held back."""
        for i, piece in enumerate(self._completion.pieces()):
            if i == 0 and self._request.echo:
                entries = None if self._request.logprobs is None else as_lists(self._completion.prompt_logprobs, 0)
                yield self._response(self._prompt, entries, None)
            yield self._response(piece.text, self._lists(piece.logprobs), piece.finish_reason)

    def _lists(self, entries: Sequence[TokenLogprobs]) -> CompletionLogprobs | None:
        return None if self._request.logprobs is None else as_lists(entries, len(self._prompt))

    def _response(
        self, text: str, logprobs: CompletionLogprobs | None, finish_reason: Literal["stop", "length"] | None
    ) -> CreateCompletionResponse:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model_name,
            "choices": [{"text": text, "index": 0, "logprobs": logprobs, "finish_reason": finish_reason}],
        }
