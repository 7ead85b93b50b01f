"""Grammars that generated text must follow."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ._gbnf import json_schema as _json_schema

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
