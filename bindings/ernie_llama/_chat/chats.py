"""Chats: from messages to a prompt, and from a request to its answer."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .._engine.engine import Engine
from .._engine.media import Medium
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


@dataclass(frozen=True)
class ChatPrompt:
    """A rendered prompt, and what its answer has to be.

    Attributes:
        ids: token ids, negative ones for images.
        answer: the grammar of the answer.
        thinks: whether the answer begins with reasoning.
        begun: how the answer begins, if the prompt says that.
    """

    ids: Sequence[int]
    answer: AnswerGrammar
    thinks: bool
    begun: str


class Chats:
    """Answers messages with an engine, through the chat template of its model.

    Attributes:
        engine: the model and its context.
        model_path: its file, for messages.
    """

    def __init__(self, engine: Engine, model_path: str, chat_template: str | None, loaders: Loaders) -> None:
        """`chat_template` replaces the file's; `loaders` return the bytes of URLs that are not data: URLs."""
        self.engine = engine
        self.model_path = model_path
        self._chat_template = chat_template
        self._loaders = loaders

    @functools.cached_property
    def template(self) -> ChatTemplate:
        """The compiled template; ValueError if the file has none."""
        model = self.engine.model
        source = self._chat_template or model.chat_template()
        if not source:
            raise ValueError(
                f"{self.model_path} has no chat template: pass Llama(..., chat_template=...), or convert the "
                "checkpoint again with its tokenizer_config.json or chat_template.jinja"
            )
        bos, eos = model.token_text(model.token_bos()), model.token_text(model.token_eos())
        return ChatTemplate(source, bos_token=bos, eos_token=eos)

    def prompt(
        self,
        messages: Sequence[ChatCompletionRequestMessage],
        *,
        tools: Sequence[ChatCompletionTool] | None,
        tool_choice: ChatCompletionToolChoiceOption | None,
        response_format: ChatCompletionRequestResponseFormat | None,
        grammar: LlamaGrammar | str | None,
        variables: Mapping[str, Any] | None,
    ) -> ChatPrompt:
        """The prompt that asks for an answer to `messages`, see `Llama.create_chat_completion`.

        Raises:
            ValueError: the template refuses the messages, or there is no grammar for what the answer has to be.
        """
        media: list[Medium] = []
        seen = self._without_media(messages, media)
        rendered = self.template.prompt(seen, tools=None if tool_choice == "none" else tools, variables=variables)
        answer = AnswerGrammar.of(tools, tool_choice, response_format, grammar)
        thinks = answer.thinks(rendered.thinks, self.template.source)
        return ChatPrompt(self._tokens(rendered.text, media), answer, thinks, rendered.answer)

    def results(self, prompt: ChatPrompt, request: CompletionRequest, model_name: str) -> ChatResults:
        """The answer to a prompt, once it is generated as `request` says."""
        closing = self._special(f"{END_THINK}\n\n")
        sampling = prompt.answer.sampling(request.sampling, prompt.thinks, closing, request.limit)
        request = replace(request, sampling=sampling, visible=self._markers)
        completion = Completion(self.engine, request)
        return ChatResults(completion, model_name, thinking=prompt.thinks, begun=prompt.begun)

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
