"""Chats: from messages to the request of an answer."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from .._engine.engine import Engine
from .._engine.media import Medium
from .._engine.sampling import Sampling
from .._engine.seeds import Seeds
from ..llama_grammar import LlamaGrammar
from ..llama_types import (
    ChatCompletionRequestMessage,
    ChatCompletionRequestResponseFormat,
    ChatCompletionTool,
    ChatCompletionToolChoiceOption,
)
from .answer_grammar import AnswerGrammar
from .chat_results import ChatResults
from .completion import Completion, CompletionRequest
from .media_parts import Loaders
from .messages import without_media
from .output import END_THINK, MARKERS
from .template import ChatTemplate


class Chats:
    """Answers messages with an engine, through the chat template of its model.

    Attributes:
        engine: the model and its context.
        model_path: its file, which names the model in results and messages.
    """

    def __init__(self, engine: Engine, model_path: str, chat_template: str | None, loaders: Loaders) -> None:
        """`chat_template` replaces the file's; `loaders` return the bytes of URLs that are not data: URLs."""
        self.engine = engine
        self.model_path = model_path
        self._chat_template = chat_template
        self._loaders = loaders

    @functools.cached_property
    def template(self) -> ChatTemplate:
        """The compiled template; ValueError if there is none."""
        model = self.engine.model
        source = self._chat_template or model.chat_template()
        if not source:
            raise ValueError(
                f"{self.model_path} has no chat template: pass Llama(..., chat_template=...), or convert the "
                "checkpoint again with its tokenizer_config.json or chat_template.jinja"
            )
        bos, eos = model.token_text(model.token_bos()), model.token_text(model.token_eos())
        return ChatTemplate(source, bos_token=bos, eos_token=eos)

    def answer(
        self,
        messages: Sequence[ChatCompletionRequestMessage],
        *,
        tools: Sequence[ChatCompletionTool] | None,
        tool_choice: ChatCompletionToolChoiceOption | None,
        response_format: ChatCompletionRequestResponseFormat | None,
        grammar: LlamaGrammar | str | None,
        variables: Mapping[str, Any] | None,
        sampling: Sampling,
        max_tokens: int | None,
        stop: str | Sequence[str] | None,
        seeds: Seeds,
        seed: int | None,
        logprobs: int | None,
        model: str | None,
    ) -> ChatResults:
        """As `Llama.create_chat_completion`; `logprobs` is the number of likeliest tokens to report, or None.

        Raises:
            ValueError: the template, the schema or the context refuses the request, or an option is out of range.
        """
        media: list[Medium] = []
        seen = self._without_media(messages, media)
        prompt = self.template.prompt(seen, tools=None if tool_choice == "none" else tools, variables=variables)
        answer = AnswerGrammar.of(tools, tool_choice, response_format, grammar)
        thinks = answer.thinks(prompt.thinks, self.template.source)
        request = CompletionRequest.checked(
            self.engine,
            self._tokens(prompt.text, media),
            sampling,
            max_tokens=max_tokens,
            stop=stop,
            seeds=seeds,
            seed=seed,
            logprobs=logprobs,
            visible=self._markers,
        )
        closing = self._special(f"{END_THINK}\n\n")
        request = replace(request, sampling=answer.sampling(sampling, thinks, closing, request.limit))
        name = model if model is not None else self.model_path
        return ChatResults(Completion(self.engine, request), name, thinking=thinks, begun=prompt.answer)

    def _without_media(
        self, messages: Sequence[ChatCompletionRequestMessage], media: list[Medium]
    ) -> Sequence[ChatCompletionRequestMessage]:
        """The messages with a marker for each image and video, which is added to `media`."""
        if (encoder := self.engine.images.encoder) is None:
            return messages
        return [without_media(each, encoder.marker, self._loaders, media) for each in messages]

    def _tokens(self, prompt: str, media: Sequence[Medium]) -> list[int]:
        """Ids of a rendered prompt; like llama-server, without a second BOS if the template has written one."""
        model = self.engine.model
        bos = model.token_text(model.token_bos())
        add_special = not (bos and prompt.startswith(bos))
        if media and (encoder := self.engine.images.encoder) is not None:
            return self.engine.images.ids(encoder.tokenize(prompt, media, add_special=add_special))
        return model.tokenize(prompt.encode(), add_special, parse_special=True)

    def _special(self, text: str) -> list[int]:
        return self.engine.model.tokenize(text.encode(), add_special=False, parse_special=True)

    @functools.cached_property
    def _markers(self) -> frozenset[int]:
        """The tokens of ERNIE's markers: they may be control tokens, which have no text unless asked for."""
        spelled = [self._special(marker) for marker in MARKERS]
        return frozenset(tokens[0] for tokens in spelled if len(tokens) == 1)
