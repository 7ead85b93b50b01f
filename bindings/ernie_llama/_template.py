"""Chat templates: render messages to a prompt with the Jinja template of the GGUF file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

from ._pictures import ImageLoader, picture_bytes
from .llama_types import ChatCompletionRequestMessage, ChatCompletionTool

if TYPE_CHECKING:
    import jinja2


ROLES = ("system", "user", "assistant", "tool")


class ChatTemplate:
    """A compiled template, set up as in transformers: sandboxed, and blocks leave no blank lines."""

    def __init__(self, source: str, *, bos_token: str, eos_token: str) -> None:
        """Compile `source`.

        Raises:
            ValueError: it is not a valid Jinja template.
        """
        import jinja2  # slow to import, and only chats need it
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
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
        """The prompt that asks for an answer to `messages`.

        Args:
            messages: dictionaries with a role and a content, which is text or a list of text parts.
            tools: what the model may call.
            add_generation_prompt: end with the start of an answer.
            variables: more variables for the template, such as `enable_thinking`.

        Raises:
            ValueError: the template refuses the messages, or the content of a message is not text.
        """
        import jinja2

        _check(messages)
        values = {**self._tokens, "tools": list(tools) if tools else None, **(variables or {})}
        try:
            return self._template.render(
                messages=[_plain(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                **values,
            )
        except (jinja2.TemplateError, TypeError) as error:  # TypeError: None + text, and the like
            raise ValueError(f"the chat template refuses these messages: {error}") from error


def _check(messages: Sequence[ChatCompletionRequestMessage]) -> None:
    """Check what a template would not: many write nothing for a role or a content that they do not know."""
    if isinstance(messages, str | bytes | Mapping) or not all(isinstance(each, Mapping) for each in messages):
        raise TypeError(
            f'messages is {messages!r}, expected a list of dictionaries such as {{"role": "user", "content": "Hello"}}'
        )
    if not messages:
        raise ValueError("there are no messages to answer")
    for i, message in enumerate(messages):
        if (role := message.get("role")) not in ROLES:
            raise ValueError(f"message {i} has the role {role!r}, expected one of {', '.join(ROLES)}")
        if message.get("content") is None and role != "assistant":
            raise ValueError(f"message {i}, of the {role}, has no content")


def without_pictures(
    message: ChatCompletionRequestMessage, marker: str, loader: ImageLoader | None, found: list[bytes]
) -> ChatCompletionRequestMessage:
    """The message with text parts of `marker` in place of `image_url` parts, whose files are added to `found`.

    Raises:
        ValueError: a picture cannot be had, or a text contains the marker.
    """
    content = message.get("content")
    if not isinstance(content, list):
        return message
    parts: list[dict[str, Any]] = []
    for part in content:
        if part.get("type") == "image_url":
            found.append(picture_bytes(part.get("image_url"), loader))
            parts.append({"type": "text", "text": marker})
        else:
            parts.append(part)
    return {**message, "content": parts}


def _plain(message: ChatCompletionRequestMessage) -> dict[str, Any]:
    """The message with its content as one text: templates of text models know no parts."""
    plain: dict[str, Any] = dict(message)
    content = plain.get("content")
    if content is None:
        plain["content"] = ""
    elif isinstance(content, list):
        for part in content:
            if part.get("type") != "text":
                hint = ", without Llama(mmproj_path=...)" if part.get("type") == "image_url" else ""
                raise ValueError(
                    f"a message holds a part of type {part.get('type')!r}; this model reads text only{hint}"
                )
        plain["content"] = "".join(part["text"] for part in content)
    return plain


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
