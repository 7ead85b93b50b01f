"""Chooses tokens: llama.cpp's sampler chains, grammars, and logits processors in Python.

llama.cpp ends the process if a chain is left without candidates or a grammar is told of a token that it does not allow.
What could lead there is checked before: logits that are not finite, and a choice that something forbids.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .._lib import structs
from .._lib.handle import Handle
from .grammar import grammar_sampler
from .model import Model
from .processors import LogitsProcessor, StoppingCriteria
from .sampling import LARGEST_BIAS, Sampling, Thinking

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

MIROSTAT_M = 100  # as in llama.cpp's own tools
BROKEN = (
    "the logits are not finite, so there is no token to choose: the model's weights or a LoRA adapter hold NaN or "
    "infinity, or an option of the context (rope_*, yarn_*, lora_scale) is out of range"
)


class Sampler(Handle):
    """A `llama_sampler_chain` in the order of llama.cpp's own tools, ending in a greedy choice or a seeded draw.

    The grammar is not in the chain. It checks the chosen token only; if it refuses, the choice is repeated among the
    tokens that it allows. That is many times faster than checking the whole vocabulary for every token.
    """

    def __init__(self, library: ctypes.CDLL, model: Model, sampling: Sampling, seed: int) -> None:
        self._library = library
        self._n_vocab = model.n_vocab()
        self._row_type = ctypes.c_float * self._n_vocab
        self._greedy = sampling.greedy
        self._penalizes = sampling.penalizes
        self._processors = sampling.logits_processor
        self.stops = _any_of(sampling.stopping_criteria) if sampling.stopping_criteria else None
        self._grammar = None if sampling.grammar is None else grammar_sampler(library, model, sampling.grammar.grammar)
        self._thought = None if sampling.thinking is None else _Thought(model, sampling.thinking)
        biases = _biases(sampling, self._n_vocab)
        chain = library.llama_sampler_chain_init(library.llama_sampler_chain_default_params())
        super().__init__("sampler", chain, library.llama_sampler_free)
        for stage in _stages(library, self._n_vocab, sampling, biases, seed):
            library.llama_sampler_chain_add(chain, stage)

    def close(self) -> None:
        """Free the chain and the grammar."""
        super().close()
        if self._grammar is not None:
            self._grammar.close()

    def accept_prompt(self, tokens: Sequence[int]) -> None:
        """Show the prompt to the penalties, as llama.cpp's own tools do; the grammar starts after it."""
        if self._penalizes:
            for token in tokens:
                if token >= 0:  # images have negative ids
                    self._library.llama_sampler_accept(self.pointer, token)

    @property
    def needs_logits(self) -> bool:
        """Whether to call `choose` instead of `sample`."""
        return self._grammar is not None or bool(self._processors)

    def sample(self, context: ctypes.c_void_p, row: int) -> int:
        """Choose and accept a token, from a row of the last logits of `context`; -1 is the last row.

        Raises:
            RuntimeError: the logits are not finite.
        """
        logits = self._library.llama_get_logits_ith(context, row)
        if not self._greedy:
            self._check_finite(logits)
        token = int(self._library.llama_sampler_sample(self.pointer, context, row))
        if not math.isfinite(logits[token]):
            raise RuntimeError(BROKEN)
        return token

    def _check_finite(self, logits: ctypes._Pointer[ctypes.c_float]) -> None:
        import numpy as np  # see Context.logits

        row = self._row_type.from_address(ctypes.addressof(logits.contents))
        if not math.isfinite(np.frombuffer(memoryview(row), np.float32).max()):  # a NaN is the maximum of any array
            raise RuntimeError(BROKEN)

    def choose(self, logits: npt.NDArray[np.float32], evaluated: Sequence[int]) -> int:
        """Choose and accept a token, from `logits`, [n_vocab]; the logits processors see the `evaluated` tokens.

        Raises:
            RuntimeError: the logits are not finite.
            ValueError: a processor returns no logits, or forbids every token that the grammar allows.
        """
        if not math.isfinite(logits.max()):
            raise RuntimeError(BROKEN)
        if self._processors:
            logits = self._processed(logits, evaluated)
        token = self._apply(_Candidates(logits))
        if self._thought is not None and self._thought.open:
            token = self._thought.next(token)
        elif self._grammar is not None:
            if token is None or not self._allows(self._grammar, token):
                candidates = _Candidates(logits)
                self._library.llama_sampler_apply(self._grammar.pointer, candidates.array)
                token = self._apply(candidates)
                if token is None or not self._allows(self._grammar, token):
                    raise ValueError(
                        "no token is left to choose: the grammar allows only tokens that logit_bias or a logits "
                        "processor forbids, or that the vocabulary does not have"
                    )
            self._library.llama_sampler_accept(self._grammar.pointer, token)
        if token is None:
            raise ValueError("no token is left to choose: logit_bias and the logits processors forbid all of them")
        self._library.llama_sampler_accept(self.pointer, token)
        return token

    def _processed(self, logits: npt.NDArray[np.float32], evaluated: Sequence[int]) -> npt.NDArray[np.float32]:
        """What the logits processors make of `logits`, [n_vocab]; an infinite one leaves no other choice."""
        import numpy as np  # see Context.logits

        before = np.array(evaluated, np.intc)
        for process in self._processors:
            returned = process(before, logits)
            try:
                logits = np.asarray(returned, np.float32)
            except (TypeError, ValueError):
                raise ValueError(f"{_name(process)} returned {returned!r}, expected {self._n_vocab} logits") from None
            if logits.shape != (self._n_vocab,):
                raise ValueError(
                    f"{_name(process)} returned logits of shape {list(logits.shape)}, expected [{self._n_vocab}]"
                )
            peak = logits.max()
            if np.isnan(peak):
                raise ValueError(f"{_name(process)} returned logits that are NaN; -inf forbids a token")
            if peak == np.inf:
                logits = np.where(logits == peak, np.float32(0), np.float32(-np.inf))
        return logits

    def _apply(self, candidates: _Candidates) -> int | None:
        """The token that the chain chooses; None if it is a forbidden one, so that no other was left."""
        self._library.llama_sampler_apply(self.pointer, candidates.array)
        return candidates.selected()

    def _allows(self, grammar: Handle, token: int) -> bool:
        one = structs.llama_token_data(token, 1.0, 0.0)
        array = structs.llama_token_data_array(ctypes.pointer(one), 1, -1, False)
        self._library.llama_sampler_apply(grammar.pointer, array)
        return bool(one.logit != -math.inf)


class _Thought:
    """Follows the text before the grammar's, and closes it when its budget is spent.

    Attributes:
        open: whether it has not ended yet.
    """

    def __init__(self, model: Model, thinking: Thinking) -> None:
        self.open = True
        self._model = model
        self._end = thinking.end
        self._left = thinking.budget
        self._closing = list(thinking.closing)
        self._text = b""

    def next(self, token: int | None) -> int | None:
        """The token that the model has chosen, or one that closes the thought."""
        if self._left <= 0 or token is None or self._model.is_eog(token) or not self._ends_cleanly(token):
            self._left = 0
            token = self._closing.pop(0)
        self._left -= 1
        self._text = self._with(token)
        self.open = bool(self._closing) and self._end not in self._text
        return token

    def _with(self, token: int) -> bytes:
        return self._text[-256:] + self._model.token_to_piece(token, special=True)

    def _ends_cleanly(self, token: int) -> bool:
        """Whether `token` does not begin the answer too, which the grammar would not see."""
        return not self._with(token).partition(self._end)[2].strip()


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
        pointer = self._data.ctypes.data_as(ctypes.POINTER(structs.llama_token_data))
        self.array = structs.llama_token_data_array(pointer, len(logits), -1, False)

    def selected(self) -> int | None:
        """The token that the chain has chosen; None if its logit is -inf."""
        if not 0 <= self.array.selected < self.array.size:
            return None
        chosen = self.array.data[self.array.selected]
        return int(chosen.id) if math.isfinite(chosen.logit) else None


def _name(process: LogitsProcessor) -> str:
    return f"the logits processor {getattr(process, '__name__', type(process).__name__)}"


def _biases(sampling: Sampling, n_vocab: int) -> ctypes.Array[structs.llama_logit_bias]:
    for token in sampling.logit_bias:
        if not 0 <= token < n_vocab:
            raise ValueError(f"logit_bias names token {token}, which is not in the vocabulary of {n_vocab} tokens")
    if sum(bias == -math.inf for bias in sampling.logit_bias.values()) == n_vocab:
        raise ValueError(f"logit_bias forbids all {n_vocab} tokens of the vocabulary")
    found = [
        structs.llama_logit_bias(token, bias if bias == -math.inf else max(-LARGEST_BIAS, min(bias, LARGEST_BIAS)))
        for token, bias in sampling.logit_bias.items()
    ]
    return (structs.llama_logit_bias * len(found))(*found)


def _stages(
    library: ctypes.CDLL,
    n_vocab: int,
    sampling: Sampling,
    biases: ctypes.Array[structs.llama_logit_bias],
    seed: int,
) -> list[ctypes.c_void_p]:
    stages = []
    if len(biases):
        stages.append(library.llama_sampler_init_logit_bias(n_vocab, len(biases), biases))
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
    if sampling.greedy:
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
        library.llama_sampler_init_top_k(min(max(sampling.top_k, 0), n_vocab)),
        library.llama_sampler_init_typical(sampling.typical_p, 1),
        library.llama_sampler_init_top_p(sampling.top_p, 1),
        library.llama_sampler_init_min_p(sampling.min_p, 1),
        library.llama_sampler_init_temp(sampling.temp),
        library.llama_sampler_init_dist(seed),
    ]
