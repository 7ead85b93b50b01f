"""The names of llama-cpp-python's module of chat formats and picture handlers.

Prompts are rendered with the template of the file, or with `Llama(chat_template=...)`, so there are no formats to
choose from. The handlers' names exist for programs that import them; creating one says what to do instead.
"""

from __future__ import annotations

from typing import NoReturn


class _Unavailable:
    def __init__(self, *_args: object, **_kwargs: object) -> NoReturn:
        raise NotImplementedError(
            f"{type(self).__name__} is not available, because it is made for other models: Llama renders prompts with "
            "the chat template of the file, or with Llama(chat_template=...)"
        )


def __getattr__(name: str) -> type[_Unavailable]:
    if name.endswith(("ChatHandler", "ChatFormatter")):
        return type(name, (_Unavailable,), {"__doc__": "Not available: made for other models."})
    raise AttributeError(f"llama_chat_format has no {name}: the file's chat template takes the place of chat formats")
