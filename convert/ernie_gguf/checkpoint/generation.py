"""generation_config.json: the sampling that a model's makers recommend."""

from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .json_object import JsonObject, read_object
from .special_tokens import GENERATION_CONFIG

# Name in llama.cpp, under `general.sampling.` -> the keys that say it, of which the first counts; and whether it is a
# whole number. As gguf-py's metadata.py has them.
_SETTINGS: dict[str, tuple[tuple[str, ...], bool]] = {
    "top_k": (("top_k",), True),
    "top_p": (("top_p",), False),
    "min_p": (("min_p",), False),
    "xtc_probability": (("xtc_probability",), False),
    "xtc_threshold": (("xtc_threshold",), False),
    "temp": (("temperature",), False),
    "penalty_last_n": (("penalty_last_n",), True),
    "penalty_repeat": (("penalty_repeat", "repetition_penalty"), False),
    "mirostat": (("mirostat",), True),
    "mirostat_tau": (("mirostat_tau",), False),
    "mirostat_eta": (("mirostat_eta",), False),
}
# Settings for which a GGUF has no key -> the value at which they do nothing.
_NO_KEY = {"frequency_penalty": 0, "presence_penalty": 0, "typical_p": 1, "no_repeat_ngram_size": 0}


@dataclass(frozen=True)
class Sampling:
    """Settings by llama.cpp's names, ints and floats as it stores them; and what a user should know about them."""

    settings: dict[str, int | float]
    notes: tuple[str, ...] = ()


NO_SAMPLING = Sampling({})


def read_sampling(folder: Path) -> Sampling:
    """The sampling settings of a checkpoint, which may have none. Raises ConfigError for what is not a number."""
    path = folder / GENERATION_CONFIG
    return parse_sampling(read_object(path, ConfigError)) if path.is_file() else NO_SAMPLING


def parse_sampling(values: dict[str, Any]) -> Sampling:
    """The settings among the values of generation_config.json."""
    config = JsonObject(values, GENERATION_CONFIG)
    settings = {}
    for name, (keys, whole) in _SETTINGS.items():
        if key := next((key for key in keys if key in config), None):
            settings[name] = _number(config, key, whole)
    notes = [
        f"{GENERATION_CONFIG}: {key} {values[key]} has no place in a GGUF and is left out"
        for key, neutral in _NO_KEY.items()
        if key in config and values[key] != neutral
    ]
    if values.get("do_sample") is False and settings.get("temp"):
        notes.append(
            f"{GENERATION_CONFIG}: do_sample is false, but llama.cpp samples at the temperature {settings['temp']} "
            "that stands beside it; ask for temperature 0 to take the likeliest token"
        )
    return Sampling(settings, tuple(notes))


def _number(config: JsonObject, key: str, whole: bool) -> int | float:
    value = config.values[key]
    if type(value) not in (int, float) or not isfinite(value) or (whole and value != int(value)):
        raise config.error(key, "a whole number" if whole else "a finite number")
    if whole:
        if not -(2**31) <= value < 2**31:
            raise config.error(key, "a whole number of 32 bits")
        return int(value)
    if abs(value) > 3e38:
        raise config.error(key, "a number that float32 can hold")
    return float(value)
