"""The names of llama-cpp-python's module of chat formats and image handlers.

Prompts are rendered with the template of the file, or with `Llama(chat_template=...)`, so there are no formats to
choose from. A handler is an object that holds the path of an mmproj: `Llama(chat_handler=...)` is
`Llama(mmproj_path=...)`, whatever the handler's name.
"""

from __future__ import annotations

import os
from typing import NoReturn


class ChatHandler:
    """The path of an mmproj; its options of llama-cpp-python are accepted and have no effect."""

    def __init__(self, clip_model_path: str | os.PathLike[str], verbose: bool = True, **_options: object) -> None:
        self.clip_model_path = os.fspath(clip_model_path)
        self.verbose = verbose


class _Unavailable:
    def __init__(self, *_args: object, **_kwargs: object) -> NoReturn:
        raise NotImplementedError(
            f"{type(self).__name__} is not available, because it is made for other models: Llama renders prompts with "
            "the chat template of the file, or with Llama(chat_template=...)"
        )


def __getattr__(name: str) -> type[ChatHandler] | type[_Unavailable]:
    if name.endswith(("ChatHandler", "ChatCompletionHandler")):
        return type(name, (ChatHandler,), {"__doc__": ChatHandler.__doc__})
    if name.endswith("ChatFormatter"):
        return type(name, (_Unavailable,), {"__doc__": "Not available: made for other models."})
    raise AttributeError(f"llama_chat_format has no {name}: the file's chat template takes the place of chat formats")
