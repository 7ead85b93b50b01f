"""Lists of functions that steer generation, as in llama-cpp-python."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

LogitsProcessor: TypeAlias = "Callable[[npt.NDArray[np.intc], npt.NDArray[np.float32]], npt.NDArray[np.float32]]"
StoppingCriteria: TypeAlias = "Callable[[npt.NDArray[np.intc], npt.NDArray[np.float32]], bool]"


class LogitsProcessorList(list[LogitsProcessor]):
    """Logits processors to call in order."""

    def __call__(self, input_ids: npt.NDArray[np.intc], scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The logits, [n_vocab], that all processors make from `scores` after the tokens `input_ids`."""
        for process in self:
            scores = process(input_ids, scores)
        return scores


class StoppingCriteriaList(list[StoppingCriteria]):
    """Stopping criteria, of which any may end generation."""

    def __call__(self, input_ids: npt.NDArray[np.intc], logits: npt.NDArray[np.float32]) -> bool:
        """Whether to stop after the tokens `input_ids`, with the `logits`, [n_vocab], of the next."""
        return any(stop(input_ids, logits) for stop in self)


class MinTokensLogitsProcessor:
    """A logits processor that forbids the end-of-sequence token until `min_tokens` tokens are generated."""

    def __init__(self, min_tokens: int, token_eos: int) -> None:
        self.min_tokens = min_tokens
        self.token_eos = token_eos
        self.prompt_tokens: int | None = None

    def __call__(self, input_ids: npt.NDArray[np.intc], scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """`scores`, [n_vocab], without the end-of-sequence token as long as the text is too short."""
        if self.prompt_tokens is None:
            self.prompt_tokens = len(input_ids)
        if len(input_ids) - self.prompt_tokens < self.min_tokens:
            scores[self.token_eos] = -float("inf")
        return scores
