"""Tokenizer files -> the vocabulary that GGUF stores."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import TokenizerError
from .config import ErnieConfig
from .json_object import read_object, shown
from .sentencepiece_model import PieceType, parse_model

TOKENIZER = "tokenizer.model"
TOKENIZER_CONFIG = "tokenizer_config.json"
END_OF_TURN = "<|end_of_sentence|>"  # closes a turn of ERNIE's chat template

ADDED_SCORE = -1000.0  # as upstream scores added tokens and padding
PAD_SCORE = -10000.0
SPACE = "\u2581"  # SentencePiece's visible space


@dataclass
class Vocab:
    """Tokens by id with their scores, types and settings. `chat_template` may be a list of {name, template}."""

    tokens: list[str]
    scores: list[float]
    types: list[PieceType]
    special: dict[str, int] = field(default_factory=dict)  # bos, eos, unk, sep, pad, mask, eot -> id
    add_bos: bool = False
    add_eos: bool = False
    add_space_prefix: bool = False
    chat_template: str | list[dict[str, str]] | None = None


def _looks_special(token: str) -> bool:
    """Control tokens that a tokenizer does not mark as such (the rule is upstream's)."""
    return token in ("<pad>", "<mask>") or (token.startswith("<|") and token.endswith("|>"))


def _set_added(vocab: Vocab, token_id: object, token: object, special: bool, where: str) -> None:
    if type(token_id) is not int or not 0 <= token_id < len(vocab.tokens) or not isinstance(token, str) or not token:
        raise TokenizerError(
            f"{where}: added token {shown(token)} has id {shown(token_id)}, expected a string and an id below "
            f"vocab_size {len(vocab.tokens)}"
        )
    vocab.types[token_id] = PieceType.CONTROL if special or _looks_special(token) else PieceType.USER_DEFINED
    # llama.cpp looks for user-defined tokens in the raw text, where a space is a space.
    vocab.tokens[token_id] = token if vocab.types[token_id] is PieceType.CONTROL else token.replace(SPACE, " ")
    vocab.scores[token_id] = ADDED_SCORE


def _base_vocab(folder: Path, size: int) -> Vocab:
    """The pieces of tokenizer.model, padded with unused tokens to `size`."""
    path = folder / TOKENIZER
    if not path.is_file():
        raise TokenizerError(f"{folder}: {TOKENIZER} is missing; ERNIE checkpoints ship it, copy it here")
    model = parse_model(path.read_bytes(), TOKENIZER)
    if len(model.pieces) > size:
        raise TokenizerError(f"{TOKENIZER}: {len(model.pieces)} pieces, but vocab_size in config.json is {size}")
    vocab = Vocab(
        tokens=[f"[PAD{i}]" for i in range(size)],
        scores=[PAD_SCORE] * size,
        types=[PieceType.UNUSED] * size,
        add_space_prefix=model.add_dummy_prefix,
    )
    for i, piece in enumerate(model.pieces):
        vocab.tokens[i], vocab.scores[i], vocab.types[i] = piece.text, piece.score, piece.kind
        if piece.kind is PieceType.USER_DEFINED:
            _set_added(vocab, i, piece.text, special=False, where=TOKENIZER)
            vocab.scores[i] = piece.score
    return vocab


def _add_tokens(vocab: Vocab, folder: Path, tokenizer_config: dict[str, Any]) -> None:
    """Added tokens from the three files that may list them; a later file wins."""
    if (path := folder / "added_tokens.json").is_file():
        for token, token_id in read_object(path, TokenizerError).items():
            _set_added(vocab, token_id, token, special=False, where=path.name)
    if (path := folder / "tokenizer.json").is_file():
        for entry in _list_of_objects(read_object(path, TokenizerError).get("added_tokens", []), path.name):
            _set_added(vocab, entry.get("id"), entry.get("content"), bool(entry.get("special")), path.name)
    decoder = tokenizer_config.get("added_tokens_decoder", {})
    if not isinstance(decoder, dict):
        raise TokenizerError(f"{TOKENIZER_CONFIG}: added_tokens_decoder: expected an object, found {shown(decoder)}")
    for key, entry in decoder.items():
        (values,) = _list_of_objects([entry], TOKENIZER_CONFIG)
        token_id = int(key) if key.isdecimal() and len(key) < 10 else key
        _set_added(vocab, token_id, values.get("content"), bool(values.get("special")), TOKENIZER_CONFIG)


def _list_of_objects(value: object, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise TokenizerError(f"{where}: added tokens: expected objects with id and content")
    return value


def _reject_repeats(vocab: Vocab) -> None:
    """Refuse a vocabulary that holds a text twice: llama.cpp aborts on it."""
    first: dict[str, int] = {}
    for i, token in enumerate(vocab.tokens):
        if first.setdefault(token, i) != i:
            raise TokenizerError(
                f"tokens {first[token]} and {i} are both {shown(token)}; llama.cpp needs them distinct"
            )


def _special_ids(vocab: Vocab, config: ErnieConfig, tokenizer_config: dict[str, Any]) -> dict[str, int]:
    """Ids by role: config.json's bos, eos and pad, then tokenizer_config.json's names of tokens for the rest."""
    by_text = {token: i for i, token in reversed(list(enumerate(vocab.tokens)))}
    given = {"bos": config.bos, "eos": config.eos, "pad": config.pad}
    out = {role: token_id for role, token_id in given.items() if token_id is not None}
    for role in ("bos", "eos", "unk", "sep", "pad", "mask"):
        token = tokenizer_config.get(f"{role}_token")
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str) and token in by_text:
            out.setdefault(role, by_text[token])
    if END_OF_TURN in by_text:
        # llama.cpp ends generation at eos and eot; it does not know ERNIE's end of turn by its text.
        out["eot"] = by_text[END_OF_TURN]
    return out


def _chat_template(folder: Path, tokenizer_config: dict[str, Any]) -> str | list[dict[str, str]] | None:
    """chat_template.jinja wins over tokenizer_config.json, as in transformers."""
    if (path := folder / "chat_template.jinja").is_file():
        try:
            return path.read_text(encoding="utf-8")
        except ValueError as exc:
            raise TokenizerError(f"{path.name}: not UTF-8: {exc}") from exc
    template = tokenizer_config.get("chat_template")
    named = isinstance(template, list) and all(
        isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str)
        for entry in template
    )
    if template is not None and not isinstance(template, str) and not named:
        raise TokenizerError(f"{TOKENIZER_CONFIG}: chat_template: expected a string or a list of name and template")
    return template


def _flag(tokenizer_config: dict[str, Any], key: str, default: bool) -> bool:
    value = tokenizer_config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise TokenizerError(f"{TOKENIZER_CONFIG}: {key}: expected true or false, found {shown(value)}")
    return value


def read_vocab(folder: Path, config: ErnieConfig) -> Vocab:
    """Read tokenizer.model and the JSON files beside it; raises TokenizerError."""
    path = folder / TOKENIZER_CONFIG
    tokenizer_config = read_object(path, TokenizerError) if path.is_file() else {}
    try:
        vocab = _base_vocab(folder, config.vocab)
    except OSError as exc:
        raise TokenizerError(f"{folder / TOKENIZER}: {exc.strerror}") from exc
    _add_tokens(vocab, folder, tokenizer_config)
    _reject_repeats(vocab)
    vocab.special = _special_ids(vocab, config, tokenizer_config)
    # llama.cpp's default for SentencePiece is true; ERNIE's tokenizer adds none unless it says so.
    vocab.add_bos = _flag(tokenizer_config, "add_bos_token", default=False)
    vocab.add_eos = _flag(tokenizer_config, "add_eos_token", default=False)
    vocab.add_space_prefix = _flag(tokenizer_config, "add_prefix_space", default=vocab.add_space_prefix)
    vocab.chat_template = _chat_template(folder, tokenizer_config)
    return vocab
