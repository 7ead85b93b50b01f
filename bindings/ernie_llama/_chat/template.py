"""Chat templates: render messages to a prompt with the Jinja template of the GGUF file, as llama-server does."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from ..llama_types import ChatCompletionRequestMessage, ChatCompletionTool
from .messages import Abilities, check, joined, normalized, normalized_tools
from .output import END_THINK, THINK

if TYPE_CHECKING:
    import jinja2


class Prompt(NamedTuple):
    """A rendered prompt.

    Attributes:
        text: all of it.
        answer: its last part, with which the answer begins: the last message, if that is the assistant's.
    """

    text: str
    answer: str

    @property
    def thinks(self) -> bool:
        """Whether what follows is reasoning."""
        if self.answer:
            return self.answer.rfind(THINK) > self.answer.rfind(END_THINK)
        return self.text.rstrip().endswith(THINK)


class ChatTemplate:
    """A compiled template, set up as in transformers: sandboxed, and blocks leave no blank lines."""

    def __init__(self, source: str, *, bos_token: str, eos_token: str) -> None:
        """Compile `source`.

        Raises:
            ValueError: it is not a valid Jinja template.
        """
        import jinja2.ext  # slow to import, and only chats need it
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        class Generation(jinja2.ext.Extension):
            """`{% generation %}` marks what the assistant wrote, for training."""

            tags = {"generation"}  # noqa: RUF012 - as its base class declares it

            def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
                next(parser.stream)
                return parser.parse_statements(("name:endgeneration",), drop_needle=True)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
        )
        environment.filters["tojson"] = _tojson
        environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
        self.source = source
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        try:
            self._template: jinja2.Template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template is not valid Jinja: {error}") from error

    def render(
        self,
        messages: Sequence[ChatCompletionRequestMessage],
        *,
        tools: Sequence[ChatCompletionTool] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """As `prompt`, without what tells where the answer begins."""
        return self.prompt(messages, tools=tools, add_generation_prompt=add_generation_prompt, variables=variables).text

    def prompt(
        self,
        messages: Sequence[ChatCompletionRequestMessage],
        *,
        tools: Sequence[ChatCompletionTool] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """The prompt that asks for an answer to `messages`, or to continue a last message of the assistant's.

        Args:
            messages: dictionaries with a role and a content, which is text or a list of text parts.
            tools: what the model may call.
            add_generation_prompt: end with the start of an answer; False renders all messages as they are.
            variables: more variables for the template, such as `enable_thinking`.

        Raises:
            TypeError: the messages are no list of dictionaries.
            ValueError: the template refuses the messages, or one is not what it should be.
        """
        check(messages)
        values = self._values(tools, variables)
        asking = {"add_generation_prompt": True}
        if not add_generation_prompt or messages[-1]["role"] != "assistant":
            plain = normalized(messages, self._abilities)
            return Prompt(self._render(plain, {"add_generation_prompt": add_generation_prompt} | values), "")
        if len(messages) > 1 and messages[-2]["role"] == "assistant":
            raise ValueError("the last two messages are the assistant's: only one can be the beginning of the answer")
        if messages[-1].get("tool_calls"):
            raise ValueError("the last message, of the assistant, holds tool calls: no answer continues them")
        plain = normalized(messages[:-1], self._abilities)
        before = self._render(plain, values)  # some templates take that for True; False would stop them
        after = self._render(plain, asking | values)
        begun = self._begun(after[_shared(before, after) :], messages[-1])
        return Prompt(before + begun[0] + begun[1], begun[1])

    def _begun(self, start: str, last: Mapping[str, Any]) -> tuple[str, str]:
        """How an answer starts that the message `last` begins: what the template writes, and what the answer has."""
        (plain,) = normalized([last], Abilities(parts=True))  # type: ignore[list-item]
        content = plain["content"] if isinstance(plain["content"], str) else joined(plain["content"], "\n\n")
        reasoning = plain.get("reasoning_content", "")
        if not content and not reasoning:
            return "", ""
        around = self._reasoning or ((THINK, END_THINK) if self._switches or THINK in start else None)
        if around is None:
            return start, content
        opening, closing = around
        start = start.partition(opening)[0]
        return start, opening + reasoning + (closing + content if content else "")

    def _values(
        self, tools: Sequence[ChatCompletionTool] | None, variables: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        now = datetime.now()
        values: dict[str, Any] = {
            **self._tokens,
            "enable_thinking": self._reasoning is not None or self._switches,
            "datetime": now.strftime("%b %d %Y"),
            "date_string": now.strftime("%d %b %Y"),
        }
        if tools:  # templates ask whether it is defined
            values["tools"] = normalized_tools(tools)
        return values | dict(variables or {})

    def _render(self, messages: list[dict[str, Any]], values: Mapping[str, Any]) -> str:
        import jinja2

        try:
            return self._template.render(messages=messages, **values)
        except (jinja2.TemplateError, TypeError, ValueError) as error:  # TypeError: None + text, and the like
            raise ValueError(f"the chat template refuses these messages: {error}") from error

    # --- what the template reads, by what it makes of examples; llama.cpp's common/jinja/caps.cpp does so too

    def _try(self, messages: list[dict[str, Any]], refused: str = "", **values: Any) -> str:  # noqa: ANN401
        """What the template makes of an example; `refused` if it refuses it."""
        try:
            return self._render(messages, self._tokens | {"add_generation_prompt": True} | values)
        except (ValueError, ArithmeticError, LookupError, AttributeError):
            return refused

    @functools.cached_property
    def _abilities(self) -> Abilities:
        text = self._try([_USER])
        part = self._try([{"role": "user", "content": [{"type": "text", "text": _TEXT}]}])
        if _TEXT in text and self._try([{"role": "user", "content": []}], "REFUSED") == "REFUSED":
            part = ""
        system = self._try([{"role": "system", "content": "SYSTEM"}, _USER])
        call = self._try(
            [_USER, {"role": "assistant", "content": "", "tool_calls": [_CALL]}, _RESULT, _ANSWER, _USER], tools=[_TOOL]
        )
        return Abilities(
            text=_TEXT in text,
            parts=_TEXT in part and not re.search(r"""['"]type['"]""", part),
            system="SYSTEM" in system,
            objects="ARGUMENT" in call,
            developer="<|channel|>" in self.source,
        )

    @functools.cached_property
    def _reasoning(self) -> tuple[str, str] | None:
        """What stands before and after the reasoning of a message; None if the template does not write it."""
        answer = {"role": "assistant", "content": "CONTENT", "reasoning_content": "REASONING"}
        for after in ([], [_USER]):
            text = self._try([_USER, answer, *after], add_generation_prompt=False)
            if found := re.search(r"(<[^<>]+>\s*)REASONING(\s*<[^<>]+>\s*).*?CONTENT", text, re.DOTALL):
                return found[1], found[2]
        return None

    @functools.cached_property
    def _switches(self) -> bool:
        """Whether `enable_thinking` changes a marker of reasoning in the prompt."""
        on, off = (self._try([_USER], enable_thinking=value).lower() for value in (True, False))
        return on.count("think") != off.count("think")


def _shared(a: str, b: str) -> int:
    """Length of the text that both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


_TEXT = "TEXT"
_USER: dict[str, Any] = {"role": "user", "content": _TEXT}
_ANSWER: dict[str, Any] = {"role": "assistant", "content": "answer"}
_RESULT: dict[str, Any] = {"role": "tool", "content": "result", "tool_call_id": "call00001"}
_CALL: dict[str, Any] = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "tool1", "arguments": {"argument": "ARGUMENT"}},
}
_PARAMETERS = {"type": "object", "properties": {"argument": {"type": "string", "description": ""}}, "required": []}
_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "tool1", "description": "tool", "parameters": _PARAMETERS},
}


def _tojson(
    value: Any,  # noqa: ANN401
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
