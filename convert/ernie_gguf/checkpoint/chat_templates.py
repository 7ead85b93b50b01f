"""The chat template: five places may hold one, in three forms, and they need not agree.

transformers' tokenizers read chat_template.jinja with additional_chat_templates/, which win over tokenizer_config.json.
Its processors, which VL models have, read processor_config.json, then chat_template.json, then the same files.
llama.cpp's converter reads tokenizer_config.json first, then chat_template.jinja, then chat_template.json.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import TokenizerError
from .json_object import read_object, shown
from .special_tokens import TOKENIZER_CONFIG

TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_JSON = "chat_template.json"
TEMPLATE_FOLDER = "additional_chat_templates"
PROCESSOR_CONFIGS = ("processor_config.json", "preprocessor_config.json")
DEFAULT = "default"

Templates = dict[str, str]  # name -> Jinja text


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except ValueError as exc:
        raise TokenizerError(f"{path.name}: not UTF-8: {exc}") from exc
    except OSError as exc:
        raise TokenizerError(f"{path}: {exc.strerror}") from exc


def parse_templates(value: object, where: str) -> Templates:
    """What a JSON file's `chat_template` holds: a text, an object of texts by name, or a list of {name, template}."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {DEFAULT: value}
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        value = {entry.get("name"): entry.get("template") for entry in value}
    if not isinstance(value, dict) or not all(isinstance(each, str) for pair in value.items() for each in pair):
        raise TokenizerError(
            f"{where}: chat_template: expected a string, an object of named strings or a list of name and template, "
            f"found {shown(value)}"
        )
    return dict(value)


def _of_files(folder: Path) -> Templates:
    found = {
        path.name.removesuffix(".jinja"): _text(path) for path in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))
    }
    return found | ({DEFAULT: _text(path)} if (path := folder / TEMPLATE_FILE).is_file() else {})


def _of_json(folder: Path, name: str) -> Templates:
    path = folder / name
    return parse_templates(read_object(path, TokenizerError).get("chat_template"), name) if path.is_file() else {}


def read_templates(folder: Path, tokenizer_config: Mapping[str, Any], *, is_vl: bool) -> tuple[Templates, list[str]]:
    """The templates to use by name, and what a user should know of the others.

    The one without a name of its own is `default`. Raises TokenizerError for files that cannot be read.
    """
    places: list[tuple[str, Callable[[], Templates]]] = [
        (TEMPLATE_FILE, partial(_of_files, folder)),
        (TOKENIZER_CONFIG, partial(parse_templates, tokenizer_config.get("chat_template"), TOKENIZER_CONFIG)),
        (TEMPLATE_JSON, partial(_of_json, folder, TEMPLATE_JSON)),
        *((name, partial(_of_json, folder, name)) for name in PROCESSOR_CONFIGS),
    ]
    if is_vl:
        places = [*places[3:], places[2], *places[:2]]
    used: Templates = {}
    origin: dict[str, str] = {}
    notes = []
    for place, read in places:
        for name, text in read().items():
            where = f"{TEMPLATE_FOLDER}/{name}.jinja" if place == TEMPLATE_FILE and name != DEFAULT else place
            if not text.strip():
                notes.append(f"{where}: the chat template {name} is empty, so it is left out")
            elif (key := _key(name)) not in used:
                used[key], origin[key] = text, where
            elif used[key].strip() != text.strip():
                notes.append(f"{where}: its chat template {name} is not used: that of {origin[key]} is, and differs")
    return _with_default(used, notes), notes + _unread(folder)


def _key(name: str) -> str:
    """A name as a GGUF's key can hold it; llama.cpp's converter filters alike."""
    return "".join(char if char.isascii() and char.isalnum() else "_" for char in name) or "_"


def _with_default(used: Templates, notes: list[str]) -> Templates:
    if DEFAULT in used:
        return used
    if len(used) == 1:
        (name,) = used
        notes.append(f"the only chat template is called {name}: it is the default")
        return {DEFAULT: used[name]}
    notes.append(
        f"no chat template is called {DEFAULT}, only {', '.join(used)}: llama-server uses tool_use, else ChatML; "
        "--chat-template-file names another"
        if used
        else "the checkpoint has no chat template: llama-server uses ChatML unless --chat-template-file names another"
    )
    return used


def _unread(folder: Path) -> list[str]:
    """Notes about files that look like templates where nobody reads them."""
    others = [path for path in sorted(folder.glob("*.jinja")) if path.name != TEMPLATE_FILE]
    others += sorted((folder / "chat_templates").glob("*.jinja"))
    return [
        f"{path.relative_to(folder)}: not used: transformers reads {TEMPLATE_FILE} and {TEMPLATE_FOLDER}/*.jinja"
        for path in others
    ]
