"""Splits ERNIE's answers into reasoning, content and tool calls.

What the models write (`-Thinking` models all of it, others only content):

    <think>\nreasoning\n</think>\n\n<response>\ncontent\n</response>\n
    <think>\nreasoning\n</think>\n\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>\n

The prompt often ends with `<think>`, and `<response>` may be missing. White space next to a marker belongs to it. A
model may forget `</think>`: a line that begins with `<response>` or `<tool_call>` ends its reasoning too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .text_stream import partial_suffix

THINK, END_THINK = "<think>", "</think>"
RESPONSE, END_RESPONSE = "<response>", "</response>"
TOOL_CALL, END_TOOL_CALL = "<tool_call>", "</tool_call>"
MARKERS = (THINK, END_THINK, RESPONSE, END_RESPONSE, TOOL_CALL, END_TOOL_CALL)


@dataclass(frozen=True)
class Reasoning:
    """Text of the model's reasoning."""

    text: str


@dataclass(frozen=True)
class Content:
    """Text of the answer."""

    text: str


@dataclass(frozen=True)
class ToolCall:
    """A call that the model asks for; `arguments` is JSON text."""

    name: str
    arguments: str


# What models call the arguments of a call; they are trained on one name and see others in descriptions of tools.
ARGUMENTS = ("arguments", "parameters", "args", "input")

# A call whose end is missing: its name as JSON text, and the beginning of its arguments.
_BEGUN_CALL = re.compile(
    r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters|args|input)"\s*:\s*(.*)', re.DOTALL
)

OutputPart = Reasoning | Content | ToolCall


class OutputParser:
    """Splits text while it is generated: yields text as soon as it is final, a tool call when it is complete."""

    def __init__(self, thinking: bool = False) -> None:
        """`thinking` says that the prompt ends with `<think>`."""
        self._section = THINK if thinking else ""
        self._held = ""
        self._begun = False  # whether this section has yielded text
        self._answering = not thinking  # whether the answer may start here, and with it <response>
        self._marked = thinking  # whether any marker has been seen

    def feed(self, text: str) -> Iterator[OutputPart]:
        """Add text; yields the parts that are now final."""
        self._held += text
        while found := self._next_marker():
            at, marker = found
            before, self._held = self._held[:at].rstrip(), self._held[at + len(marker) :]
            yield from self._emit(before, marker)
            self._enter(marker)
        if self._section == TOOL_CALL:
            return
        n_final = len(self._held) - partial_suffix(self._known(), self._held)
        n_final = len(self._held[:n_final].rstrip())  # a marker may follow the white space
        if n_final:
            text, self._held = self._held[:n_final], self._held[n_final:]
            yield from self._emit(text, None)

    def flush(self, cut: bool = False) -> Iterator[OutputPart]:
        """The rest, once the text has ended.

        Args:
            cut: the text was cut off by a limit. An incomplete call is then a call with the arguments so far; otherwise
                it is content, so that nothing is lost.
        """
        rest, self._held = self._held, ""
        if self._section == TOOL_CALL:
            begun = _BEGUN_CALL.match(rest) if cut else None
            yield ToolCall(json.loads(begun[1]), begun[2]) if begun else Content(TOOL_CALL + rest)
        elif text := rest.rstrip() if self._marked else rest:
            yield from self._emit(text, None)

    def _known(self) -> tuple[str, ...]:
        """The markers that this section may contain; others are plain text."""
        if self._section == THINK:
            return (END_THINK, RESPONSE, TOOL_CALL)
        if self._section == TOOL_CALL:
            return (END_TOOL_CALL,)
        if self._section == RESPONSE:
            return (END_RESPONSE, TOOL_CALL)
        if not self._begun and self._answering:
            return (TOOL_CALL, RESPONSE) if self._marked else (TOOL_CALL, RESPONSE, THINK)
        return (TOOL_CALL,)

    def _next_marker(self) -> tuple[int, str] | None:
        found = (
            (match.start(), marker) for marker in self._known() for match in re.finditer(re.escape(marker), self._held)
        )
        return min((each for each in found if self._is_marker(*each)), default=None)

    def _is_marker(self, at: int, marker: str) -> bool:
        """Whether `marker` has its meaning there; otherwise it is text that mentions it."""
        before = self._held[:at]
        if self._section == THINK and marker != END_THINK:
            return "\n" in before[len(before.rstrip()) :] or not (before.strip() or self._begun)
        return marker not in {THINK, RESPONSE} or not before.strip()

    def _enter(self, marker: str) -> None:
        self._section = {THINK: THINK, RESPONSE: RESPONSE, TOOL_CALL: TOOL_CALL}.get(marker, "")
        self._answering = self._answering or marker in {END_THINK, RESPONSE, TOOL_CALL}
        self._begun = False
        self._marked = True

    def _emit(self, text: str, marker: str | None) -> Iterator[OutputPart]:
        if marker == END_TOOL_CALL:
            yield from _tool_calls(text)
            return
        if not self._begun and self._marked:
            text = text.lstrip()
        if not text:
            return
        self._begun = True
        yield Reasoning(text) if self._section == THINK else Content(text)


def _tool_calls(text: str) -> list[OutputPart]:
    """The calls that the JSON between the markers describes; if it describes anything else, the text as content."""
    try:
        parsed = json.loads(text)
    except json.JSONDecodeError:
        parsed = None
    calls = [_tool_call(each) for each in (parsed if isinstance(parsed, list) else [parsed])]
    found = [call for call in calls if call is not None]
    if not found or len(found) < len(calls):
        return [Content(f"{TOOL_CALL}{text}{END_TOOL_CALL}")]
    return [*found]


def _tool_call(call: Any) -> ToolCall | None:  # noqa: ANN401 - parsed JSON
    """The call that an object describes, in any form that models write; None if it holds anything else."""
    if isinstance(call, Mapping) and isinstance(call.get("function"), Mapping):  # OpenAI's form
        call = call["function"]
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
        return None
    others = [key for key in call if key not in {"name", "id", "type"}]
    if others and (len(others) > 1 or others[0] not in ARGUMENTS):
        return None
    arguments = call[others[0]] if others else {}
    return ToolCall(
        call["name"], arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    )
