"""How to choose a token: the sampling options of a call, checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from ..llama_grammar import LlamaGrammar
from . import checks
from .processors import LogitsProcessor, StoppingCriteria


class SamplingOptions(TypedDict, total=False):
    """The sampling options that `Llama`'s methods share; `Sampling` has the defaults.

    Attributes:
        top_k: top-k sampling; 0 disables it.
        top_p: top-p (nucleus) sampling; 1 disables it.
        min_p: min-p sampling: the least probability, relative to that of the likeliest token; 0 disables it.
        typical_p: locally typical sampling; 1 disables it.
        repeat_penalty: penalty for tokens that occurred recently, in the prompt too; 1 disables it.
        frequency_penalty: subtracted from a token's logit for each recent occurrence; 0 disables it.
        presence_penalty: subtracted once from the logit of every recent token; 0 disables it.
        mirostat_mode: use Mirostat (1) or Mirostat 2.0 (2), which ignores top-k, top-p, min-p and typical_p; 0
            disables it.
        mirostat_tau: Mirostat's target entropy.
        mirostat_eta: Mirostat's learning rate.
        logit_bias: values to add to the logits of tokens, by token id.
        grammar: the grammar that the text must follow, as an object or as GBNF text.
        logits_processor: functions called in order with the evaluated tokens and the logits; each returns new logits.
        stopping_criteria: functions of the evaluated tokens and the next logits, any of which may end generation.
    """

    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    repeat_penalty: float
    frequency_penalty: float
    presence_penalty: float
    mirostat_mode: int
    mirostat_tau: float
    mirostat_eta: float
    logit_bias: Mapping[int, float] | Mapping[str, float] | None
    grammar: LlamaGrammar | str | None
    logits_processor: LogitsProcessor | Sequence[LogitsProcessor] | None
    stopping_criteria: StoppingCriteria | Sequence[StoppingCriteria] | None


def _grammar(name: str, value: Any) -> LlamaGrammar:  # noqa: ANN401 - that is what it checks
    if isinstance(value, str):
        return LlamaGrammar(value)
    if not isinstance(value, LlamaGrammar):
        raise TypeError(f"{name} is {value!r}, expected a LlamaGrammar or GBNF text")
    return value


def _logit_bias(name: str, value: Any) -> dict[int, float]:  # noqa: ANN401
    try:
        return {int(token): float(bias) for token, bias in value.items()}
    except (AttributeError, TypeError, ValueError, OverflowError):
        raise TypeError(f"{name} is {value!r}, expected a dictionary from token ids to numbers") from None


def _functions(name: str, value: Any) -> Sequence[Any]:  # noqa: ANN401
    functions = list(value) if isinstance(value, Sequence) else [value]
    if not all(map(callable, functions)):
        raise TypeError(f"{name} is {value!r}, expected a function or a list of functions")
    return functions


# The finite ranges of the numbers that llama.cpp computes with: beyond them its float32 becomes infinite or NaN, and
# what its sorts do with those is undefined. Probabilities outside 0..1 mean what 0 and 1 mean.
RANGES = {
    "temp": (-math.inf, 1e9),
    "top_p": (-1e9, 1e9),
    "min_p": (-1e9, 1e9),
    "typical_p": (-1e9, 1e9),
    "repeat_penalty": (1e-6, 1e6),
    "frequency_penalty": (-1e6, 1e6),
    "presence_penalty": (-1e6, 1e6),
    "mirostat_tau": (0, 1e6),
    "mirostat_eta": (0, 1e6),
}
LEAST_TEMPERATURE = 1e-6  # below it the choice is greedy: a quotient of logits could become infinite
LARGEST_BIAS = 1e9  # larger ones decide no more than it does

# How the value of each option of a call is checked and converted.
CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "top_k": checks.integer,
    "top_p": checks.number,
    "min_p": checks.number,
    "typical_p": checks.number,
    "repeat_penalty": checks.number,
    "frequency_penalty": checks.number,
    "presence_penalty": checks.number,
    "mirostat_mode": checks.integer,
    "mirostat_tau": checks.number,
    "mirostat_eta": checks.number,
    "logit_bias": _logit_bias,
    "grammar": _grammar,
    "logits_processor": _functions,
    "stopping_criteria": _functions,
}


@dataclass(frozen=True)
class Thinking:
    """Text that comes before the grammar's.

    Attributes:
        end: ends it, such as `</think>`.
        closing: the tokens that are written instead of further ones after `budget` tokens, or instead of an end token.
        budget: the number of tokens that it may have, so that some are left for the answer.
    """

    end: bytes
    closing: tuple[int, ...]
    budget: int


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token. Names and defaults are llama-cpp-python's; `temp <= 0` is greedy.

    Raises:
        ValueError: a number is out of the range that llama.cpp can compute with.
    """

    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    temp: float = 0.8
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    penalty_last_n: int = 64
    mirostat_mode: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    grammar: LlamaGrammar | None = None
    thinking: Thinking | None = None
    logits_processor: Sequence[LogitsProcessor] = ()
    stopping_criteria: Sequence[StoppingCriteria] = ()

    @classmethod
    def from_options(cls, options: Mapping[str, Any], *, temp: float, penalty_last_n: int) -> Sampling:
        """The options of a call: None stands for the default, and token ids may be text, as in JSON."""
        given = {name: CHECKS[name](name, value) for name, value in options.items() if value is not None}
        return cls(**given, temp=checks.number("temperature", temp), penalty_last_n=penalty_last_n)

    def __post_init__(self) -> None:
        for name, (least, most) in RANGES.items():
            if not least <= (value := getattr(self, name)) <= most:  # NaN is in no range
                name = "temperature" if name == "temp" else name  # noqa: PLW2901
                raise ValueError(f"{name} is {value}, expected a number from {least:g} to {most:g}")
        if self.mirostat_mode not in {0, 1, 2}:
            raise ValueError(f"mirostat_mode is {self.mirostat_mode}, expected 0 (off), 1 or 2")
        for token, bias in self.logit_bias.items():
            if math.isnan(bias) or bias == math.inf:
                raise ValueError(f"logit_bias of token {token} is {bias}, expected a number; -inf forbids the token")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is chosen."""
        return self.temp < LEAST_TEMPERATURE

    @property
    def penalizes(self) -> bool:
        """Whether any penalty is enabled."""
        neutral = (self.repeat_penalty, self.frequency_penalty, self.presence_penalty) == (1.0, 0.0, 0.0)
        return not neutral and self.penalty_last_n != 0
