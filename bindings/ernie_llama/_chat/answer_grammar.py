"""Chats: the grammar that a request asks for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .._engine.sampling import Sampling, Thinking
from .._gbnf import json_schema
from ..llama_grammar import LlamaGrammar
from ..llama_types import (
    ChatCompletionRequestResponseFormat,
    ChatCompletionTool,
    ChatCompletionToolChoiceOption,
)
from .output import END_RESPONSE, END_THINK, END_TOOL_CALL, RESPONSE, TOOL_CALL


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
    try:
        rules = json_schema.grammar(calls).replace("root ::=", "call ::=", 1)
    except ValueError as error:
        place = re.compile(r"#/anyOf/(\d+)/properties/arguments")
        named = place.sub(lambda found: f"parameters of {allowed[int(found[1])]['function']['name']}, #", str(error))
        raise ValueError(named) from error
    return LlamaGrammar(f'{rules}root ::= "{TOOL_CALL}\\n" call "\\n{END_TOOL_CALL}"\n')


def _move_definitions(schema: dict[str, Any], document: dict[str, Any]) -> None:
    """Move the definitions of `schema` to `document`, which will contain it: that is where references look."""
    for key in ("$defs", "definitions"):
        definitions = document.setdefault(key, {})
        for name, definition in schema.pop(key, {}).items():
            if definitions.setdefault(name, definition) != definition:
                raise ValueError(f"two tools define {key}/{name} differently: rename one of them")


@dataclass(frozen=True)
class AnswerGrammar:
    """The grammar of an answer.

    Attributes:
        grammar: the grammar; None for any text.
        own: whether the caller wrote it: it is then the grammar of everything that the model writes, as in
            llama-server. Otherwise reasoning may come first.
    """

    grammar: LlamaGrammar | None
    own: bool

    @classmethod
    def of(
        cls,
        tools: Sequence[ChatCompletionTool] | None,
        choice: ChatCompletionToolChoiceOption | None,
        response_format: ChatCompletionRequestResponseFormat | None,
        own: LlamaGrammar | str | None,
    ) -> AnswerGrammar:
        """What a request asks for.

        Raises:
            ValueError: it asks for several things, or for one that has no grammar.
        """
        forced = tool_grammar(tools, choice)
        formatted = format_grammar(response_format) if response_format is not None else None
        given = [grammar for grammar in (forced, formatted, own) if grammar is not None]
        if len(given) > 1:
            raise ValueError("grammar, response_format and a tool_choice that forces a call exclude each other")
        grammar = given[0] if given else None
        return cls(LlamaGrammar(grammar) if isinstance(grammar, str) else grammar, own is not None)

    def thinks(self, prompt_thinks: bool, template: str) -> bool:
        """Whether the answer begins with reasoning, after a prompt that ends with `<think>` or does not.

        Where it could not end, because neither the grammar nor the template knows of an end, the answer is all content.
        """
        if self.grammar is None or not prompt_thinks:
            return prompt_thinks
        return END_THINK in (self.grammar.grammar if self.own else template)

    def sampling(self, sampling: Sampling, thinks: bool, closing: Sequence[int], limit: int) -> Sampling:
        """`sampling` with this grammar; reasoning gets half of the `limit` and ends with the tokens `closing`."""
        if self.own or self.grammar is None or not thinks:
            return replace(sampling, grammar=self.grammar)
        thinking = Thinking(END_THINK.encode(), tuple(closing), limit // 2)
        return replace(sampling, grammar=_after_thinking(self.grammar), thinking=thinking)


def _after_thinking(grammar: LlamaGrammar) -> LlamaGrammar:
    """`grammar` for what follows `</think>`: white space, and perhaps `<response>` around what is no call."""
    text = re.sub(r"^root ::=", "answer ::=", grammar.grammar, count=1, flags=re.MULTILINE)
    wrapped = "" if TOOL_CALL in text else f' | "{RESPONSE}" "\\n"? answer "\\n"? "{END_RESPONSE}"'
    return LlamaGrammar(f"{text}\nroot ::= [ \\n]{{0,4}} (answer{wrapped})\n")
