"""Chooses tokens: llama.cpp's sampler chains, grammars, and logits processors in Python."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypedDict

from . import _options, _structs
from ._handle import Handle
from ._model import Model
from ._processors import LogitsProcessor, StoppingCriteria
from .llama_grammar import LlamaGrammar

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


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
    except (AttributeError, TypeError, ValueError):
        raise TypeError(f"{name} is {value!r}, expected a dictionary from token ids to numbers") from None


def _functions(name: str, value: Any) -> Sequence[Any]:  # noqa: ANN401
    functions = list(value) if isinstance(value, Sequence) else [value]
    if not all(map(callable, functions)):
        raise TypeError(f"{name} is {value!r}, expected a function or a list of functions")
    return functions


# How the value of each option of a call is checked and converted.
CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "top_k": _options.integer,
    "top_p": _options.number,
    "min_p": _options.number,
    "typical_p": _options.number,
    "repeat_penalty": _options.number,
    "frequency_penalty": _options.number,
    "presence_penalty": _options.number,
    "mirostat_mode": _options.integer,
    "mirostat_tau": _options.number,
    "mirostat_eta": _options.number,
    "logit_bias": _logit_bias,
    "grammar": _grammar,
    "logits_processor": _functions,
    "stopping_criteria": _functions,
}

MIROSTAT_M = 100  # as in llama.cpp's own tools


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token. Names and defaults are llama-cpp-python's; `temp <= 0` is greedy."""

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
    logits_processor: Sequence[LogitsProcessor] = ()
    stopping_criteria: Sequence[StoppingCriteria] = ()

    @classmethod
    def from_options(cls, options: Mapping[str, Any], *, temp: float, penalty_last_n: int) -> Sampling:
        """The options of a call: None stands for the default, and token ids may be text, as in JSON."""
        given = {name: CHECKS[name](name, value) for name, value in options.items() if value is not None}
        return cls(**given, temp=_options.number("temperature", temp), penalty_last_n=penalty_last_n)

    def __post_init__(self) -> None:
        for name in ("repeat_penalty", "frequency_penalty", "presence_penalty"):
            if not math.isfinite(value := getattr(self, name)):
                raise ValueError(f"{name} is {value}, expected a finite number")
        if self.repeat_penalty <= 0:
            raise ValueError(f"repeat_penalty is {self.repeat_penalty}, expected more than 0; 1 disables it")
        if self.mirostat_mode not in {0, 1, 2}:
            raise ValueError(f"mirostat_mode is {self.mirostat_mode}, expected 0 (off), 1 or 2")

    @property
    def penalizes(self) -> bool:
        """Whether any penalty is enabled."""
        neutral = (self.repeat_penalty, self.frequency_penalty, self.presence_penalty) == (1.0, 0.0, 0.0)
        return not neutral and self.penalty_last_n != 0


class Sampler(Handle):
    """A `llama_sampler_chain` in the order of llama.cpp's own tools, ending in a greedy choice or a seeded draw.

    The grammar is not in the chain. It checks the chosen token only; if it refuses, the choice is repeated among the
    tokens that it allows. That is many times faster than checking the whole vocabulary for every token.
    """

    def __init__(self, library: ctypes.CDLL, model: Model, sampling: Sampling, seed: int) -> None:
        chain = library.llama_sampler_chain_init(library.llama_sampler_chain_default_params())
        super().__init__("sampler", chain, library.llama_sampler_free)
        self._library = library
        self._penalizes = sampling.penalizes
        self._processors = sampling.logits_processor
        self.stops = _any_of(sampling.stopping_criteria) if sampling.stopping_criteria else None
        self._grammar: Handle | None = None
        for stage in _stages(library, model, sampling, seed):
            library.llama_sampler_chain_add(chain, stage)
        if sampling.grammar is not None:
            self._grammar = sampling.grammar.sampler(library, model)

    def close(self) -> None:
        """Free the chain and the grammar."""
        super().close()
        if self._grammar is not None:
            self._grammar.close()

    def accept_prompt(self, tokens: Sequence[int]) -> None:
        """Show the prompt to the penalties, as llama.cpp's own tools do; the grammar starts after it."""
        if self._penalizes:
            for token in tokens:
                if token >= 0:  # pictures have negative ids
                    self._library.llama_sampler_accept(self.pointer, token)

    @property
    def needs_logits(self) -> bool:
        """Whether to call `choose` instead of `sample`."""
        return self._grammar is not None or bool(self._processors)

    def sample(self, context: ctypes.c_void_p, row: int) -> int:
        """Choose and accept a token, from a row of the last logits of `context`; -1 is the last row."""
        return int(self._library.llama_sampler_sample(self.pointer, context, row))

    def choose(self, logits: npt.NDArray[np.float32], evaluated: Sequence[int]) -> int:
        """Choose and accept a token, from `logits`, [n_vocab]; the logits processors see the `evaluated` tokens."""
        if self._processors:
            import numpy as np  # see Context.logits

            before = np.array(evaluated, np.intc)
            for process in self._processors:
                logits = process(before, logits)
        token = self._apply(_Candidates(logits))
        if self._grammar is not None:
            if not self._allows(self._grammar, token):
                candidates = _Candidates(logits)
                self._library.llama_sampler_apply(self._grammar.pointer, candidates.array)
                token = self._apply(candidates)
            self._library.llama_sampler_accept(self._grammar.pointer, token)
        self._library.llama_sampler_accept(self.pointer, token)
        return token

    def _apply(self, candidates: _Candidates) -> int:
        self._library.llama_sampler_apply(self.pointer, candidates.array)
        return candidates.selected()

    def _allows(self, grammar: Handle, token: int) -> bool:
        one = _structs.llama_token_data(token, 1.0, 0.0)
        array = _structs.llama_token_data_array(ctypes.pointer(one), 1, -1, False)
        self._library.llama_sampler_apply(grammar.pointer, array)
        return bool(one.logit != -math.inf)


def _any_of(criteria: Sequence[StoppingCriteria]) -> Callable[[Sequence[int], npt.NDArray[np.float32]], bool]:
    """Whether any of the criteria stops after these tokens, with these logits of the next."""
    import numpy as np  # see Context.logits

    return lambda tokens, logits: any(stop(np.array(tokens, np.intc), logits) for stop in criteria)


class _Candidates:
    """All tokens with their logits, in the struct that samplers work on."""

    def __init__(self, logits: npt.NDArray[np.float32]) -> None:
        import numpy as np  # see Context.logits

        self._data = np.zeros(len(logits), np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)]))
        self._data["id"] = np.arange(len(logits))
        self._data["logit"] = logits
        pointer = self._data.ctypes.data_as(ctypes.POINTER(_structs.llama_token_data))
        self.array = _structs.llama_token_data_array(pointer, len(logits), -1, False)

    def selected(self) -> int:
        """The token that the chain has chosen."""
        if not 0 <= self.array.selected < self.array.size:
            raise RuntimeError("the samplers left no token to choose")
        return int(self.array.data[self.array.selected].id)


def _stages(library: ctypes.CDLL, model: Model, sampling: Sampling, seed: int) -> list[ctypes.c_void_p]:
    stages = []
    n_vocab = model.n_vocab()
    if sampling.logit_bias:
        for token in sampling.logit_bias:
            if not 0 <= token < n_vocab:
                raise ValueError(f"logit_bias names token {token}, which is not in the vocabulary of {n_vocab} tokens")
        biases = [_structs.llama_logit_bias(token, bias) for token, bias in sampling.logit_bias.items()]
        array = (_structs.llama_logit_bias * len(biases))(*biases)
        stages.append(library.llama_sampler_init_logit_bias(n_vocab, len(biases), array))
    if sampling.penalizes:
        stages.append(
            library.llama_sampler_init_penalties(
                n_vocab,
                sampling.penalty_last_n,
                sampling.repeat_penalty,
                sampling.frequency_penalty,
                sampling.presence_penalty,
            )
        )
    if sampling.temp <= 0:
        return [*stages, library.llama_sampler_init_greedy()]
    tau, eta = sampling.mirostat_tau, sampling.mirostat_eta
    if sampling.mirostat_mode == 1:
        mirostat = library.llama_sampler_init_mirostat(n_vocab, seed, tau, eta, MIROSTAT_M)
        return [*stages, library.llama_sampler_init_temp(sampling.temp), mirostat]
    if sampling.mirostat_mode == 2:
        mirostat = library.llama_sampler_init_mirostat_v2(seed, tau, eta)
        return [*stages, library.llama_sampler_init_temp(sampling.temp), mirostat]
    return [
        *stages,
        library.llama_sampler_init_top_k(sampling.top_k),
        library.llama_sampler_init_typical(sampling.typical_p, 1),
        library.llama_sampler_init_top_p(sampling.top_p, 1),
        library.llama_sampler_init_min_p(sampling.min_p, 1),
        library.llama_sampler_init_temp(sampling.temp),
        library.llama_sampler_init_dist(seed),
    ]
