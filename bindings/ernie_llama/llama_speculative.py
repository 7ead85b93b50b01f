"""Draft models for `Llama(draft_model=...)`, as in llama-cpp-python.

A draft model guesses the next tokens. The model evaluates all of them in one batch and keeps those that it would have
chosen itself, so a good guess saves time and a bad one does not change the text.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class LlamaDraftModel(ABC):
    """Guesses the tokens that follow a text."""

    @abstractmethod
    def __call__(self, input_ids: npt.NDArray[np.intc], /, **kwargs: Any) -> npt.NDArray[np.intc]:  # noqa: ANN401
        """Guess any number of tokens to follow `input_ids`, [n_tokens]; none if there is no good guess."""


class LlamaPromptLookupDecoding(LlamaDraftModel):
    """Guesses that the last tokens are followed by what followed them before.

    Good for answers that repeat their prompt: edits, summaries, code. The method is prompt lookup decoding,
    https://github.com/apoorvumang/prompt-lookup-decoding.
    """

    def __init__(self, max_ngram_size: int = 2, num_pred_tokens: int = 10) -> None:
        """Set the size of the guesses.

        Args:
            max_ngram_size: number of last tokens to look for; fewer if they do not occur before.
            num_pred_tokens: maximum number of tokens to guess.
        """
        self.max_ngram_size = max_ngram_size
        self.num_pred_tokens = num_pred_tokens

    def __call__(self, input_ids: npt.NDArray[np.intc], /, **kwargs: Any) -> npt.NDArray[np.intc]:  # noqa: ANN401
        """The tokens that followed the first earlier occurrence of the last tokens."""
        import numpy as np

        n = len(input_ids)
        for size in range(min(self.max_ngram_size, n - 1), 0, -1):
            windows = np.lib.stride_tricks.sliding_window_view(input_ids[:-1], size)
            found = np.flatnonzero((windows == input_ids[n - size :]).all(axis=1))
            if len(found):
                start = int(found[0]) + size
                return input_ids[start : start + self.num_pred_tokens]
        return np.array([], np.intc)
