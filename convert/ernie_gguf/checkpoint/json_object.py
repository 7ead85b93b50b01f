"""Reading of the checkpoint's JSON files, with errors that name the file."""

import json
from pathlib import Path
from typing import Any

from ..errors import ErnieGgufError

# The largest index of the family (300B) is 2 MB; a tokenizer.json of 100,000 tokens is 8 MB.
MAX_JSON_BYTES = 100 << 20
_SHOWN = 120


def shown(value: object) -> str:
    """A value as an error message quotes it: its repr, cut if it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}… ({len(text)} characters)"


def reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`object_pairs_hook` that raises ValueError for a key given twice, where json would keep the last one silently."""
    out = dict(pairs)
    if len(out) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} is given twice")
    return out


def parse_object(text: bytes, where: str, error: type[ErnieGgufError]) -> dict[str, Any]:
    """Parse `text` as one JSON object; raises `error` naming `where`."""
    try:
        value = json.loads(text, object_pairs_hook=reject_duplicates)
    except (ValueError, RecursionError) as exc:
        raise error(f"{where}: not valid JSON: {exc}") from exc
    if b"\\ud" in text.lower():  # JSON can spell half of a surrogate pair, which is no character and fits no file
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as exc:
            raise error(
                f"{where}: a string holds half of a surrogate pair (\\u{ord(exc.object[exc.start]):x})"
            ) from exc
    if not isinstance(value, dict):
        raise error(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def read_object(path: Path, error: type[ErnieGgufError]) -> dict[str, Any]:
    """Read `path`, which must exist, as one JSON object; raises `error` naming the file."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise error(f"{path.name}: {path.stat().st_size} bytes, expected at most {MAX_JSON_BYTES}")
        text = path.read_bytes()
    except OSError as exc:
        raise error(f"{path}: {exc.strerror}") from exc
    return parse_object(text, path.name, error)
