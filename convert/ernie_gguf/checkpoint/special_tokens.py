"""Which tokens begin, end and pad a text: up to four files say so, and they need not agree.

transformers takes the tokens of a text from the tokenizer's files, and those that end generation from
generation_config.json and config.json. A token that any of them names as an end has to end generation in llama.cpp.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import TokenizerError
from .config import ErnieConfig, token_ids
from .json_object import JsonObject, read_object, shown

TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
GENERATION_CONFIG = "generation_config.json"
END_OF_TURN = "<|end_of_sentence|>"  # closes a turn of ERNIE's chat template

ROLES = ("bos", "eos", "pad", "unk", "sep", "mask", "eot", "eom")
_ENDS = ("eos", "eot", "eom")
# llama.cpp ends generation at the tokens with these keys. The last one is its padding of code to fill in, which nothing
# else reads.
SLOTS = ("eos", "eot", "eom", "fim_pad")
# Texts at which llama.cpp ends generation whatever the keys say (llama-vocab.cpp): they can do without one.
ENDS_BY_TEXT = frozenset(
    ("</s>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|end_of_text|>", "<eos>")
)


@dataclass
class _Named:
    """Ids by role and by the file that names them, in the order in which a role's first one counts."""

    ids: dict[str, dict[str, tuple[int, ...]]] = field(default_factory=lambda: {role: {} for role in ROLES})
    notes: list[str] = field(default_factory=list)

    def add(self, role: str, file: str, found: Iterable[int]) -> None:
        if found := tuple(found):
            self.ids[role][file] = (*self.ids[role].get(file, ()), *found)


def _texts(value: object, where: str) -> list[str]:
    """The tokens that a tokenizer's file names: a text, an AddedToken's object, or a list of such."""
    if value is None:
        return []
    out: list[str] = []
    for each in value if isinstance(value, list) else [value]:
        text = each.get("content") if isinstance(each, dict) else each
        if not isinstance(text, str):
            raise TokenizerError(f"{where}: expected a token or an object with its content, found {shown(value)}")
        out.append(text)
    return out


def _add_texts(named: _Named, file: str, values: Mapping[str, Any], by_text: Mapping[str, int]) -> None:
    extra = values.get("extra_special_tokens")  # where transformers 5 keeps roles of the model's own
    values = {**extra, **values} if isinstance(extra, dict) else values
    for role in ROLES:
        texts = _texts(values.get(f"{role}_token"), f"{file}: {role}_token")
        named.add(role, file, (by_text[text] for text in texts if text in by_text))
        named.notes += [
            f"{file}: {role}_token {shown(text)} is not in the vocabulary, so it is left out"
            for text in texts
            if text not in by_text
        ]


def _add_generation(named: _Named, values: dict[str, Any], vocab: int) -> None:
    generation = JsonObject(values, GENERATION_CONFIG)
    for role in ROLES:
        named.add(role, GENERATION_CONFIG, token_ids(generation, f"{role}_token_id", vocab))


def _spelled(ids: Iterable[int], tokens: list[str]) -> str:
    return " and ".join(f"{shown(tokens[token_id])} ({token_id})" for token_id in ids)


def _conflicts(named: _Named, tokens: list[str]) -> list[str]:
    """A line for each role on which two files differ."""
    out = []
    for role, files in named.ids.items():
        if len({frozenset(ids) for ids in files.values()}) > 1:
            said = ", ".join(f"{file} {_spelled(ids, tokens)}" for file, ids in files.items())
            first = next(iter(files.values()))[0]
            verdict = "each of them ends generation" if role in _ENDS else f"{_spelled([first], tokens)} counts"
            out.append(f"{role} token: {said}: {verdict}")
    return out


def _into_slots(special: dict[str, int], ends: list[int], tokens: list[str]) -> list[str]:
    """Give each end that has no key one of the free keys; notes about those that get none."""
    left = [token_id for token_id in ends if token_id not in special.values()]
    left.sort(key=lambda token_id: tokens[token_id] in ENDS_BY_TEXT)  # stable: of equals the first named
    for slot in SLOTS:
        if slot not in special and left:
            special[slot] = left.pop(0)
    lost = [token_id for token_id in left if tokens[token_id] not in ENDS_BY_TEXT]
    if not lost:
        return []
    return [
        f"a file can name {len(SLOTS)} end tokens, and the checkpoint names more: {_spelled(lost, tokens)} will not "
        "end generation; give it as a stop word"
    ]


def special_ids(
    folder: Path, config: ErnieConfig, tokens: list[str], tokenizer_config: Mapping[str, Any]
) -> tuple[dict[str, int], list[str]]:
    """Ids by role, each end of generation under one of `SLOTS`; and what a user should know about it.

    A role's first name counts, of tokenizer_config.json, special_tokens_map.json, config.json, generation_config.json.
    Raises TokenizerError or ConfigError for a value that names no token.
    """
    by_text = {token: i for i, token in reversed(list(enumerate(tokens)))}
    named = _Named()
    _add_texts(named, TOKENIZER_CONFIG, tokenizer_config, by_text)
    if (path := folder / SPECIAL_TOKENS_MAP).is_file():
        _add_texts(named, SPECIAL_TOKENS_MAP, read_object(path, TokenizerError), by_text)
    for role, ids in (("bos", config.bos), ("eos", config.eos), ("pad", config.pad)):
        named.add(role, "config.json", ids if isinstance(ids, tuple) else () if ids is None else (ids,))
    if (path := folder / GENERATION_CONFIG).is_file():
        _add_generation(named, read_object(path, TokenizerError), len(tokens))
    special = {role: next(iter(files.values()))[0] for role, files in named.ids.items() if files}
    if END_OF_TURN in by_text:  # ERNIE's template ends a turn with it, and no file says so
        special["eot"] = by_text[END_OF_TURN]
    ends = dict.fromkeys(token_id for role in _ENDS for ids in named.ids[role].values() for token_id in ids)
    notes = [*named.notes, *_conflicts(named, tokens), *_into_slots(special, list(ends), tokens)]
    return special, notes
