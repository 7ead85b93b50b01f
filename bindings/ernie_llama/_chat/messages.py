"""Messages of a chat in the one form that templates get, as llama-server makes it.

Text parts are joined by line feeds unless the template reads parts; the arguments of calls are objects unless it wants
text; what a message holds beside OpenAI's keys is dropped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .._engine.media import Medium
from ..llama_types import ChatCompletionRequestMessage, ChatCompletionTool
from .media_parts import MEDIA, Loaders, medium

ROLES = ("system", "developer", "user", "assistant", "tool", "function")


@dataclass(frozen=True)
class Abilities:
    """What a template reads.

    Attributes:
        text: content that is a text.
        parts: content that is a list of parts.
        system: system messages.
        objects: arguments of calls that are objects.
        developer: the role `developer`.
    """

    text: bool = True
    parts: bool = False
    system: bool = True
    objects: bool = True
    developer: bool = False


def check(messages: Any) -> None:  # noqa: ANN401 - what a program passes
    """Check what a template would not: many write nothing for a role or a content that they do not know.

    Raises:
        TypeError: the messages are not a list of dictionaries.
        ValueError: there is no message, or one has a wrong role or content.
    """
    if (
        isinstance(messages, str | bytes | Mapping)
        or not isinstance(messages, Sequence)
        or not all(isinstance(each, Mapping) for each in messages)
    ):
        raise TypeError(
            f'messages is {messages!r}, expected a list of dictionaries such as {{"role": "user", "content": "Hello"}}'
        )
    if not messages:
        raise ValueError("there are no messages to answer")
    for i, message in enumerate(messages):
        if (role := message.get("role")) not in ROLES:
            raise ValueError(f"message {i} has the role {role!r}, expected one of {', '.join(ROLES)}")
        if "content" not in message and (role != "assistant" or "tool_calls" not in message):
            raise ValueError(f"message {i}, of the {role}, has no content")
        content = message.get("content")
        if not (content is None or isinstance(content, str | list | tuple)):
            raise ValueError(f"message {i} has the content {content!r}, expected a text or a list of parts")


def normalized(messages: Sequence[ChatCompletionRequestMessage], abilities: Abilities) -> list[dict[str, Any]]:
    """Checked messages in the form that a template with these abilities reads.

    Raises:
        ValueError: a part or a call of a message has the wrong form.
    """
    found = [_normalized(i, message, abilities) for i, message in enumerate(messages)]
    if found and found[0]["role"] == "system" and not abilities.system:
        if len(found) == 1:
            raise ValueError("the chat template knows no system messages, and there is no other to answer")
        found[1]["content"] = _merged(found[0]["content"], found[1]["content"])
        del found[0]
    return found


def _normalized(i: int, message: Mapping[str, Any], abilities: Abilities) -> dict[str, Any]:
    role = message["role"]
    plain: dict[str, Any] = {
        "role": "system" if role == "developer" and not abilities.developer else role,
        "content": _content(i, message.get("content"), abilities),
    }
    for key in ("reasoning_content", "name", "tool_call_id"):
        if value := message.get(key):
            if not isinstance(value, str):
                raise ValueError(f"message {i} has the {key} {value!r}, expected a text")
            plain[key] = value
    if calls := message.get("tool_calls"):
        plain["tool_calls"] = [_call(i, call, abilities) for call in calls]
    return plain


def _content(i: int, content: Any, abilities: Abilities) -> str | list[dict[str, str]]:  # noqa: ANN401
    if not content:
        return ""
    if isinstance(content, str):
        return content if abilities.text or not abilities.parts else [{"type": "text", "text": content}]
    parts = [_part(i, part) for part in content]
    media = any(part["type"] == MARKER for part in parts)
    return parts if abilities.parts and not media else joined(parts)


def _merged(first: str | list[Any], second: str | list[Any]) -> str | list[Any]:
    """Two contents as one, with a line feed between."""
    if isinstance(first, str) and isinstance(second, str):
        return f"{first}\n{second}"
    parts = [[{"type": "text", "text": each}] if isinstance(each, str) else each for each in (first, second)]
    return [*parts[0], {"type": "text", "text": "\n"}, *parts[1]]


MARKER = "media_marker"  # the type of a part that stands for an image or a video


def _part(i: int, part: Any) -> dict[str, str]:  # noqa: ANN401
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in {"text", MARKER}:
        hint = ", without Llama(mmproj_path=...)" if kind in MEDIA else ""
        raise ValueError(f"message {i} holds a part of type {kind!r}; this model reads text only{hint}")
    if not isinstance(part.get("text"), str):
        raise ValueError(f"message {i} holds a part with the text {part.get('text')!r}, expected a text")
    return {"type": kind, "text": part["text"]}


def joined(parts: Sequence[Mapping[str, str]], delimiter: str = "\n") -> str:
    """Parts as one text; nothing stands between an image or a video and its neighbours."""
    text, after_medium = "", False
    for part in parts:
        shown = part["type"] == MARKER
        text += (delimiter if text and not shown and not after_medium else "") + part["text"]
        after_medium = shown
    return text


def _call(i: int, call: Any, abilities: Abilities) -> dict[str, Any]:  # noqa: ANN401
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(
            f"message {i} holds the tool call {call!r}, expected "
            '{"type": "function", "function": {"name": ..., "arguments": ...}}'
        )
    arguments = function.get("arguments", "{}")
    if abilities.objects and isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError as error:
            raise ValueError(f"message {i} holds a tool call whose arguments are not JSON: {error}") from error
    elif not abilities.objects and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False, separators=(",", ":"))
    identity = {"id": call["id"]} if call.get("id") else {}
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}, **identity}


def normalized_tools(tools: Sequence[ChatCompletionTool] | None) -> list[dict[str, Any]]:
    """Tools in the form that templates read.

    Raises:
        ValueError: one is not a function.
    """
    found = []
    for i, tool in enumerate(tools or ()):
        function: Any = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(f'tool {i} is {tool!r}, expected {{"type": "function", "function": {{"name": ...}}}}')
        members = {
            "name": function["name"],
            "description": function.get("description") or "",
            "parameters": function.get("parameters") or {},
        }
        found.append({"type": "function", "function": members})
    return found


def without_media(
    message: ChatCompletionRequestMessage, marker: str, loaders: Loaders, found: list[Medium]
) -> ChatCompletionRequestMessage:
    """The message with parts of `marker` in place of those that show something, which is added to `found`.

    Raises:
        ValueError: an image or a video cannot be loaded.
    """
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, list):
        return message
    parts: list[Any] = []
    for part in content:
        if isinstance(part, Mapping) and part.get("type") in MEDIA:
            found.append(medium(part, loaders))
            parts.append({"type": MARKER, "text": marker})
        else:
            parts.append(part)
    return {**message, "content": parts}
