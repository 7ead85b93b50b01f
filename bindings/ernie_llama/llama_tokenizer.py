"""The tokenizer of a `Llama` as an object of its own, as in llama-cpp-python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class _Tokenizes(Protocol):
    """What `LlamaTokenizer` needs of a `Llama`."""

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]: ...

    def detokenize(
        self, tokens: Sequence[int], prev_tokens: Sequence[int] | None = None, special: bool = False
    ) -> bytes: ...


class LlamaTokenizer:
    """The tokenizer of the model's file."""

    def __init__(self, llama: _Tokenizes) -> None:
        self._llama = llama

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = True) -> list[int]:
        """As `Llama.tokenize`, but reads special tokens by default."""
        return self._llama.tokenize(text, add_bos, special)

    def detokenize(
        self, tokens: Sequence[int], prev_tokens: Sequence[int] | None = None, special: bool = False
    ) -> bytes:
        """As `Llama.detokenize`; the text does not depend on `prev_tokens`."""
        return self._llama.detokenize(tokens, prev_tokens, special)

    def encode(self, text: str, add_bos: bool = True, special: bool = True) -> list[int]:
        """Token ids of `text`."""
        return self.tokenize(text.encode(errors="ignore"), add_bos, special)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, without incomplete characters."""
        return self.detokenize(tokens).decode(errors="ignore")


BaseLlamaTokenizer = LlamaTokenizer


class LlamaHFTokenizer:
    """Not available: the file has the tokenizer that the model was trained with."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str) -> LlamaHFTokenizer:
        """Raises NotImplementedError."""
        return cls(pretrained_model_name_or_path)

    def __init__(self, *_args: object, **_kwargs: object) -> None:
        raise NotImplementedError("LlamaHFTokenizer is not available: Llama uses the tokenizer of the GGUF file")
