"""Generates tokens: evaluates a prompt, then chooses and evaluates one token after the other."""

from __future__ import annotations

import contextlib
import itertools
from collections import abc
from collections.abc import Generator

from .engine import Engine
from .lock import Lease
from .sampler import Sampler
from .sampling import Sampling
from .sequence import Sequence, longest_token_prefix

# A shorter shared prefix is evaluated again. Together with the rest of the prompt that costs next to nothing, and the
# text stays exactly that of a fresh start (llama.cpp uses other kernels for other batch sizes).
MIN_KEPT_PREFIX = 32


def generate(
    engine: Engine, prompt: abc.Sequence[int], sampling: Sampling, seed: int, reset: bool
) -> Generator[int, None, None]:
    """As `Llama.generate`; acquires the lock when the first token is asked for.

    A draft model's tokens are evaluated together with the chosen one; those that the sampler would choose, too, are
    chosen in the same step.
    """
    lease = engine.lock.acquire()
    sampler = None
    try:
        with lease:
            _restore_from_cache(engine, prompt)
            engine.eval(_begin(engine, prompt, reset))
            sampler = engine.sampler(sampling, seed)
            drafted: list[int] = []
            chosen = _choose(engine.sequence, sampler, drafted)
        while chosen:
            for i, token in enumerate(chosen):
                if drafted and engine.lock.holds(lease):
                    engine.sequence.row = i - 1 - len(drafted)  # for whoever asks for this token's logits
                yield token
            with lease:
                drafted = _draft(engine, chosen[-1])
                engine.sequence.extend([chosen[-1], *drafted], 1 + len(drafted))
                chosen = _choose(engine.sequence, sampler, drafted)
    finally:
        if sampler is not None:
            sampler.close()
            _save_to_cache(engine, lease)
        lease.release()


def _begin(engine: Engine, prompt: abc.Sequence[int], reset: bool) -> abc.Sequence[int]:
    """Keep what the sequence shares with `prompt`, and return the ids that are still to be evaluated."""
    sequence = engine.sequence
    if not prompt and (reset or not sequence.ids):
        raise ValueError("the prompt holds no tokens, and the model's metadata asks for no BOS token")
    if reset:
        n_kept = _shared_prefix(sequence.ids, prompt) if engine.cache_prompt else 0
        sequence.keep(n_kept)
        return prompt[n_kept:]
    if not prompt and sequence.row is None:  # after load_state
        prompt = sequence.ids[-1:]
        sequence.keep(len(sequence) - 1)
    return prompt


def _shared_prefix(ids: abc.Sequence[int], prompt: abc.Sequence[int]) -> int:
    """Length of the prefix of `prompt` to keep in the cache; 0 if it is short, or if the cache holds all of it.

    A repeated prompt is evaluated afresh, so that the same seed gives the same text.
    """
    n = longest_token_prefix(ids, prompt)
    return n if MIN_KEPT_PREFIX <= n < len(prompt) else 0


def _draft(engine: Engine, token: int) -> list[int]:
    """The draft model's guess what follows the sequence and `token`."""
    if engine.draft_model is None:
        return []
    import numpy as np  # see Context.logits

    room = min(engine.context.n_batch, engine.context.n_ctx - len(engine.sequence)) - 1
    guess = engine.draft_model(np.array([*engine.sequence.ids, token], np.intc))
    drafted = [int(each) for each in guess[: max(room, 0)]]
    n_vocab = engine.model.n_vocab()
    return list(itertools.takewhile(lambda each: 0 <= each < n_vocab, drafted))  # an image is no guess


def _choose(sequence: Sequence, sampler: Sampler, drafted: abc.Sequence[int]) -> list[int]:
    """Choose the tokens that follow the sequence before `drafted`, up to the first that was not drafted.

    All but the last of the result are evaluated then; rejected drafts are forgotten. A stopping criterion makes the
    result shorter, or empty.
    """
    n = len(sequence) - len(drafted)
    chosen: list[int] = []
    for i, guess in enumerate([*drafted, None]):
        if drafted:
            sequence.row = i - 1 - len(drafted)
        before = sequence.ids[: n + i] if drafted else sequence.ids
        if sampler.stops is not None and sampler.stops(before, sequence.logits()):
            break
        chosen.append(sequence.sample(sampler, before))
        if chosen[-1] != guess:
            break
    if drafted:
        sequence.cut(n + max(len(chosen) - 1, 0))
    return chosen


def _restore_from_cache(engine: Engine, prompt: abc.Sequence[int]) -> None:
    """Load the cached state that shares more of `prompt` than the sequence does."""
    if engine.cache is None or not prompt or prompt not in engine.cache:
        return
    state = engine.cache[prompt]
    if longest_token_prefix(state.input_ids, prompt) > longest_token_prefix(engine.sequence.ids, prompt):
        engine.set_state(state)


def _save_to_cache(engine: Engine, lease: Lease) -> None:
    """Cache the current state, unless another call uses the context now, or it is closed."""
    if engine.cache is not None and engine.lock.holds(lease):
        with contextlib.suppress(RuntimeError), lease:
            engine.cache[engine.sequence.ids] = engine.state(0)
