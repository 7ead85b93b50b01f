"""The file that serve, chat and eval are given: a model, not an mmproj."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import ErnieGgufError, GgufError, one_line
from ..gguf_file.reader import read_metadata


def check_model(file: Path, error: type[ErnieGgufError]) -> dict[str, Any]:
    """The metadata of a model's file. Raises `error` if it is not there, no GGUF, damaged, or an mmproj."""
    metadata = _metadata(file, error)
    if metadata.get("general.architecture") == "clip":
        raise error(
            f"{file} is an mmproj, the vision encoder of a vision-language model: give the model's own file, and "
            f"this one as --mmproj {file} to `ernie-gguf serve`"
        )
    return metadata


def check_mmproj(file: Path, error: type[ErnieGgufError]) -> None:
    """Raises `error` unless a file is an mmproj."""
    if (architecture := _metadata(file, error).get("general.architecture")) != "clip":
        raise error(f"{file} is a model ({architecture}), expected the mmproj that was made with the model")


def _metadata(file: Path, error: type[ErnieGgufError]) -> dict[str, Any]:
    from ernie_llama import check_gguf

    try:
        check_gguf(file)
        return read_metadata(file)
    except (ValueError, GgufError) as problem:
        raise error(one_line(problem)) from problem
