"""Grammars in GBNF from JSON schemas: text only."""
