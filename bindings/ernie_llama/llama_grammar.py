"""Grammars that generated text must follow."""

from __future__ import annotations

import ctypes
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import _json_schema
from ._handle import Handle
from ._log import LOG
from ._model import Model

# llama.cpp reads grammars recursively: deeper ones would overflow the stack, which ends the process.
MAX_DEPTH = 256  # of parentheses
MAX_RULES = 20_000  # that may refer to each other in a chain
_NO_SYNTAX = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|#[^\n]*', re.DOTALL)

JSON_GBNF = _json_schema.grammar(True)


class LlamaGrammar:
    """A grammar in GBNF, with a rule `root`; llama.cpp's `grammars/README.md` describes the format.

    `verbose` exists for compatibility with llama-cpp-python and has no effect.
    """

    def __init__(self, grammar: str) -> None:
        self.grammar = grammar

    @classmethod
    def from_string(cls, grammar: str, verbose: bool = False) -> LlamaGrammar:
        """A grammar from GBNF text. llama.cpp checks it when it is first used."""
        return cls(grammar)

    @classmethod
    def from_file(cls, file: str | os.PathLike[str], verbose: bool = False) -> LlamaGrammar:
        """A grammar from a GBNF file."""
        return cls(Path(file).read_text(encoding="utf-8"))

    @classmethod
    def from_json_schema(cls, json_schema: str | Mapping[str, Any] | bool, verbose: bool = False) -> LlamaGrammar:
        """A grammar for the JSON texts that a schema allows; `docs/python-api.md` lists what schemas may contain.

        Args:
            json_schema: the schema, as JSON text or as a dictionary.

        Raises:
            ValueError: the text is not JSON, or the schema contains something that a grammar cannot express; names
                the place.
        """
        if isinstance(json_schema, str):
            try:
                json_schema = json.loads(json_schema)
            except json.JSONDecodeError as error:
                raise ValueError(f"the JSON schema is not JSON: {error}") from error
        return cls(_json_schema.grammar(json_schema))

    def sampler(self, library: ctypes.CDLL, model: Model) -> Handle:
        """A sampler that removes the tokens that would break the grammar.

        Raises:
            ValueError: llama.cpp cannot read the grammar.
        """
        _check_size(self.grammar)
        LOG.forget()
        pointer = library.llama_sampler_init_grammar(model.vocab, self.grammar.encode(), b"root")
        if not pointer:
            raise ValueError(
                f"llama.cpp cannot read the grammar, which begins {self.grammar[:80]!r}: {LOG.problems()[:200]}"
            )
        return Handle("grammar", pointer, library.llama_sampler_free, model)


def _check_size(grammar: str) -> None:
    """ValueError if a grammar is larger than llama.cpp can read, or holds a NUL, where C would end it."""
    if "\0" in grammar:
        raise ValueError("the grammar holds a NUL character; write it as \\x00")
    syntax = _NO_SYNTAX.sub(" ", grammar)
    if (n := syntax.count("::=")) > MAX_RULES:
        raise ValueError(f"the grammar has {n} rules, expected at most {MAX_RULES}")
    depth = 0
    for parenthesis in re.findall(r"[()]", syntax):
        depth += 1 if parenthesis == "(" else -1
        if depth > MAX_DEPTH:
            raise ValueError(f"the grammar's parentheses are nested more than {MAX_DEPTH} deep")
