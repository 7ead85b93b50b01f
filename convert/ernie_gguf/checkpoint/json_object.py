"""The checkpoint's JSON files: read whole, and read key by key, with errors that name file and key."""

import json
from pathlib import Path
from typing import Any

from ..errors import ConfigError, ErnieGgufError
from ..recognise import refuse_other_files

# The largest index of the family (300B) is 2 MB; a tokenizer.json of 100,000 tokens is 8 MB.
MAX_JSON_BYTES = 100 << 20
_SHOWN = 120
F32_MAX = 3.4028234e38


def shown(value: object) -> str:
    """A value as error messages quote it: its repr, shortened if long."""
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
    if b"\\ud" in text.lower():  # JSON can spell half of a surrogate pair, which UTF-8 cannot
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
    try:
        return parse_object(text, path.name, error)
    except ErnieGgufError:
        refuse_other_files(path, text, error, "JSON")
        raise


class JsonObject:
    """Typed access to the keys of one object of config.json; null counts as absent, as in transformers.

    Every method raises ConfigError, naming the key, what was found and what was expected.
    """

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def error(self, key: str, expected: str) -> ConfigError:
        """The error for a value that is not as expected."""
        found = shown(self.values[key]) if key in self.values else "nothing"
        return ConfigError(f"{self.where}: {key}: expected {expected}, found {found}")

    def get(self, key: str) -> Any:  # noqa: ANN401 - JSON
        """A value of any type but a list: VL checkpoints have lists where others have one value."""
        value = self.values.get(key)
        if isinstance(value, list):
            hint = (
                "; --text-only takes the first in a vision-language (VL) checkpoint" if key.startswith("moe_") else ""
            )
            raise ConfigError(f"{self.where}: {key} is a list ({shown(value)}): expected one value{hint}")
        return value

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """An integer from `low` to `high`; required unless there is a default."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or not low <= value <= high:
            raise self.error(key, f"an integer from {low} to {high}")
        return value

    def number(self, key: str) -> float:
        """A finite number above 0, in float32 too: GGUF's metadata hold no other."""
        value = self.get(key)
        if type(value) not in (int, float) or not 0 < value <= F32_MAX:
            raise self.error(key, "a finite number above 0")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def text(self, key: str) -> str | None:
        """A string, or None where the key is absent."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, str):
            raise self.error(key, "a string")
        return value

    def child(self, key: str) -> "JsonObject | None":
        """A nested object, or None where the key is absent."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.error(key, "an object")
        return None if value is None else JsonObject(value, f"{self.where}.{key}")

    def only(self, key: str, expected: tuple[object, ...]) -> None:
        """Check that the key is absent or has one of these values."""
        if key in self and self.values[key] not in expected:
            raise self.error(key, " or ".join(map(repr, expected)))
