"""llama.cpp's samplers of grammars."""

from __future__ import annotations

import ctypes
import re

from .._lib.handle import Handle
from .._lib.log import LOG
from .model import Model

# llama.cpp reads grammars recursively: deeper ones would overflow the stack, which ends the process.
MAX_DEPTH = 256  # of parentheses
MAX_RULES = 20_000  # that may refer to each other in a chain
_NO_SYNTAX = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|#[^\n]*', re.DOTALL)


def grammar_sampler(library: ctypes.CDLL, model: Model, grammar: str) -> Handle:
    """A sampler that removes the tokens that would break a grammar, which is GBNF with a rule `root`.

    Raises:
        ValueError: llama.cpp cannot read the grammar.
    """
    _check_size(grammar)
    LOG.forget()
    pointer = library.llama_sampler_init_grammar(model.vocab, grammar.encode(), b"root")
    if not pointer:
        raise ValueError(f"llama.cpp cannot read the grammar, which begins {grammar[:80]!r}: {LOG.problems()[:200]}")
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
