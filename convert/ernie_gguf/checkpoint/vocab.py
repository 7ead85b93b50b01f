"""Tokenizer files -> the vocabulary that GGUF stores."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import TokenizerError
from ..recognise import refuse_other_files
from .chat_templates import read_templates
from .config import ErnieConfig
from .json_object import read_object, shown
from .sentencepiece_model import PieceType, parse_model
from .special_tokens import TOKENIZER_CONFIG, special_ids

TOKENIZER = "tokenizer.model"

ADDED_SCORE = -1000.0  # as upstream scores added tokens and padding
PAD_SCORE = -10000.0
SPACE = "\u2581"  # SentencePiece's visible space


@dataclass
class Vocab:
    """Tokens by id with their scores, types and settings.

    `special` are ids by role: bos, eos, unk, sep, pad, mask, eot, eom, fim_pad. `templates` are chat templates by name,
    mostly just `default`. `notes` say what a user should know about the files that all this comes from.
    """

    tokens: list[str]
    scores: list[float]
    types: list[PieceType]
    special: dict[str, int] = field(default_factory=dict)
    add_bos: bool = False
    add_eos: bool = False
    add_space_prefix: bool = False
    templates: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


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
        beside = "; tokenizer.json alone does not do" if (folder / "tokenizer.json").is_file() else ""
        raise TokenizerError(f"{folder}: {TOKENIZER} is missing; ERNIE checkpoints ship it, copy it here{beside}")
    data = path.read_bytes()
    try:
        model = parse_model(data, TOKENIZER)
    except TokenizerError:
        refuse_other_files(path, data, TokenizerError, "a SentencePiece model")
        raise
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
    vocab.special, vocab.notes = special_ids(folder, config, vocab.tokens, tokenizer_config)
    # llama.cpp's default for SentencePiece is true; ERNIE's tokenizer adds none unless it says so.
    vocab.add_bos = _flag(tokenizer_config, "add_bos_token", default=False)
    vocab.add_eos = _flag(tokenizer_config, "add_eos_token", default=False)
    vocab.add_space_prefix = _flag(tokenizer_config, "add_prefix_space", default=vocab.add_space_prefix)
    vocab.templates, notes = read_templates(folder, tokenizer_config, is_vl=config.vision is not None)
    vocab.notes += notes
    return vocab
