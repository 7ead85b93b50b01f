"""Chat templates: every place, every form, which one counts, and that none is dropped silently."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from ernie_gguf.checkpoint.chat_templates import Templates, read_templates
from ernie_gguf.errors import TokenizerError

FORMS: dict[str, tuple[object, Templates]] = {
    "a string": ("a", {"default": "a"}),
    "a list": (
        [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}],
        {"default": "a", "tool_use": "b"},
    ),
    "an object": ({"default": "a", "tool_use": "b"}, {"default": "a", "tool_use": "b"}),
}
JSON_PLACES = ("tokenizer_config.json", "chat_template.json", "processor_config.json", "preprocessor_config.json")


def write(folder: Path, files: dict[str, object]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(str(content) if name.endswith(".jinja") else json.dumps({"chat_template": content}))


def read(folder: Path, files: dict[str, object] | None = None, *, is_vl: bool = False) -> tuple[Templates, list[str]]:
    write(folder, files or {})
    path = folder / "tokenizer_config.json"
    return read_templates(folder, json.loads(path.read_text()) if path.exists() else {}, is_vl=is_vl)


@pytest.mark.parametrize("is_vl", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("place", JSON_PLACES)
def test_every_form_in_every_place(tmp_path: Path, place: str, form: str, is_vl: bool) -> None:
    value, expected = FORMS[form]
    assert read(tmp_path, {place: value}, is_vl=is_vl) == (expected, [])


def test_files_of_their_own(tmp_path: Path) -> None:
    files: dict[str, object] = {"chat_template.jinja": "a: \u00e9", "additional_chat_templates/tool_use.jinja": "b"}
    assert read(tmp_path, files) == ({"default": "a: \u00e9", "tool_use": "b"}, [])


# The place that counts comes first.
TEXT_ORDER = ("chat_template.jinja", *JSON_PLACES)
VL_ORDER = (*JSON_PLACES[2:], "chat_template.json", "chat_template.jinja", "tokenizer_config.json")


@pytest.mark.parametrize(("is_vl", "order"), [(False, TEXT_ORDER), (True, VL_ORDER)])
def test_which_counts_and_that_the_others_are_said(tmp_path: Path, is_vl: bool, order: tuple[str, ...]) -> None:
    found, notes = read(tmp_path, {place: f"of {place}" for place in order}, is_vl=is_vl)
    assert found == {"default": f"of {order[0]}"}
    assert notes == [
        f"{place}: its chat template default is not used: that of {order[0]} is, and differs" for place in order[1:]
    ]


@pytest.mark.parametrize("is_vl", [False, True])
def test_the_same_template_twice_is_no_news(tmp_path: Path, is_vl: bool) -> None:
    assert read(tmp_path, dict.fromkeys(TEXT_ORDER, "same\n"), is_vl=is_vl) == ({"default": "same\n"}, [])


def test_a_name_from_a_place_of_lower_rank_is_kept(tmp_path: Path) -> None:
    files: dict[str, object] = {
        "additional_chat_templates/rag.jinja": "r",
        "tokenizer_config.json": {"default": "a", "rag": "x"},
    }
    found, notes = read(tmp_path, files)
    assert found == {"rag": "r", "default": "a"}
    assert notes == [
        "tokenizer_config.json: its chat template rag is not used: that of additional_chat_templates/rag.jinja is, and "
        "differs"
    ]


def test_no_template_and_an_empty_one_are_said(tmp_path: Path) -> None:
    found, notes = read(tmp_path)
    assert found == {}
    assert notes == [
        "the checkpoint has no chat template: llama-server uses ChatML unless --chat-template-file names another"
    ]
    found, notes = read(tmp_path, {"chat_template.jinja": " \n", "tokenizer_config.json": "a"})
    assert found == {"default": "a"}
    assert notes == ["chat_template.jinja: the chat template default is empty, so it is left out"]


def test_no_default(tmp_path: Path) -> None:
    assert read(tmp_path, {"tokenizer_config.json": {"chat": "a"}}) == (
        {"default": "a"},
        ["the only chat template is called chat: it is the default"],
    )
    found, notes = read(tmp_path, {"tokenizer_config.json": {"chat": "a", "rag": "b"}})
    assert found == {"chat": "a", "rag": "b"}
    assert notes[0].startswith("no chat template is called default, only chat, rag: llama-server uses")


def test_names_that_a_key_cannot_hold(tmp_path: Path) -> None:
    found, notes = read(
        tmp_path, {"tokenizer_config.json": {"default": "a", "tool-use": "b", "tool use": "c", "": "d"}}
    )
    assert found == {"default": "a", "tool_use": "b", "_": "d"}
    assert notes == [
        "tokenizer_config.json: its chat template tool use is not used: that of tokenizer_config.json is, and differs"
    ]


@pytest.mark.parametrize("name", ["template.jinja", "chat_templates/default.jinja", "chat_template_tool.jinja"])
def test_files_where_nobody_reads_them(tmp_path: Path, name: str) -> None:
    _, notes = read(tmp_path, {"tokenizer_config.json": "a", name: "b"})
    assert notes == [f"{name}: not used: transformers reads chat_template.jinja and additional_chat_templates/*.jinja"]


@pytest.mark.parametrize("value", [5, [5], [{"name": "x"}], {"default": 5}, [{"template": "x"}], True])
@pytest.mark.parametrize("place", JSON_PLACES)
def test_other_forms_are_refused(tmp_path: Path, place: str, value: Any) -> None:  # noqa: ANN401
    with pytest.raises(TokenizerError, match=rf"^{re.escape(place)}: chat_template: expected a string, an object of"):
        read(tmp_path, {place: value})


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(TokenizerError, match=r"^chat_template.jinja: not UTF-8: "):
        read(tmp_path)
