"""A context: the KV cache, and the logits of the last evaluated batch."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .._lib import structs
from .._lib.handle import Handle
from .._lib.interrupt import Interruptible
from .._lib.log import LOG
from .model import Model

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# Tokens that are evaluated without looking for Ctrl-C meanwhile. That costs a thread, and a call into Python per graph
# node: too much for every generated token, and for guesses of a draft model.
SHORT_BATCH = 16

_NO_ABORT = structs.ggml_abort_callback()


class Context(Handle):
    """Owns a `llama_context`. Methods that name no sequence are about sequence 0, the only one but for scoring."""

    def __init__(self, library: ctypes.CDLL, model: Model, fields: Mapping[str, int | float | bool]) -> None:
        """Make a context; `fields` replace llama.cpp's defaults in `llama_context_params`.

        Raises:
            ValueError: llama.cpp refuses, with its reason (such as too little memory).
        """
        self.params: structs.llama_context_params = library.llama_context_default_params()
        for name, value in fields.items():
            setattr(self.params, name, value)
        LOG.forget()
        pointer = library.llama_init_from_model(model.pointer, self.params)
        if not pointer:
            raise ValueError(f"no context of {self.params.n_ctx} tokens can be made: {LOG.problems()}")
        stop = threading.Event()  # a local: the callback must not keep the handle alive, which keeps the callback
        self._stop = stop
        self._abort = structs.ggml_abort_callback(lambda _data: stop.is_set())
        super().__init__("context", pointer, library.llama_free, model, self._abort)
        self._library = library
        # llama.cpp may round these up.
        self.n_ctx = int(library.llama_n_ctx(pointer))
        self.n_batch = int(library.llama_n_batch(pointer))
        self.n_seq_max = int(library.llama_n_seq_max(pointer))
        self.pooling_type = int(library.llama_pooling_type(pointer))
        self._n_vocab = model.n_vocab()
        self._n_embd = model.n_embd()
        self._one = _batch([0], 0, 1)

    def decode(self, tokens: Sequence[int], n_past: int, n_outputs: int) -> None:
        """Evaluate at most `n_batch` tokens from position `n_past` on, with logits for the last `n_outputs` tokens.

        Raises:
            RuntimeError: llama_decode failed.
            KeyboardInterrupt: Ctrl-C; any part of the tokens may be in the cache then.
        """
        LOG.forget()
        if len(tokens) == 1:
            self._one.token[0], self._one.pos[0] = tokens[0], n_past
            code = self._library.llama_decode(self.pointer, self._one)
        elif len(tokens) <= SHORT_BATCH:
            code = self._library.llama_decode(self.pointer, _batch(tokens, n_past, n_outputs))
        else:
            code = self._decode_interruptible(_batch(tokens, n_past, n_outputs))
        _check(code, len(tokens), n_past)

    def decode_tree(
        self,
        tokens: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
        first: npt.NDArray[np.int32],
        last: npt.NDArray[np.int32],
        outputs: npt.NDArray[np.int8],
    ) -> None:
        """Evaluate at most `n_batch` tokens that belong to the sequences `first` to `last`, with logits where asked.

        Args:
            tokens: the tokens, [n].
            positions: their positions, which follow those of their sequences, [n].
            first: the first of each token's sequences, [n].
            last: the last of each token's sequences, [n].
            outputs: 1 for each token that needs logits, [n].

        Raises:
            RuntimeError: llama_decode failed.
            KeyboardInterrupt: Ctrl-C; any part of the tokens may be in the cache then.
        """
        import numpy as np  # see logits

        LOG.forget()
        sequences = np.arange(self.n_seq_max, dtype=np.int32)
        lists = sequences.ctypes.data + first.astype(np.uintp) * sequences.itemsize  # each token's list starts in there
        counts = last - first + 1
        batch = structs.llama_batch(
            n_tokens=len(tokens),
            token=tokens.ctypes.data_as(ctypes.POINTER(structs.llama_token)),
            pos=positions.ctypes.data_as(ctypes.POINTER(structs.llama_pos)),
            n_seq_id=counts.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            seq_id=lists.ctypes.data_as(ctypes.POINTER(ctypes.POINTER(structs.llama_seq_id))),
            logits=outputs.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )
        _check(self._decode_interruptible(batch), len(tokens), int(positions[0]))

    def _decode_interruptible(self, batch: structs.llama_batch) -> int:
        library, pointer = self._library, self.pointer
        library.llama_set_abort_callback(pointer, self._abort, None)
        try:
            return Interruptible[int](self._stop).run(lambda: library.llama_decode(pointer, batch))
        finally:
            library.llama_set_abort_callback(pointer, _NO_ABORT, None)

    def logits(self, rows: int) -> npt.NDArray[np.float32]:
        """The logits of the last `decode`, [rows, n_vocab], until the next; `rows` is the number of its outputs."""
        import numpy as np  # most users never look at logits, and numpy is most of the import time

        pointer = self._library.llama_get_logits(self.pointer)
        return np.ctypeslib.as_array(pointer, (rows, self._n_vocab))

    def logits_row(self, row: int) -> npt.NDArray[np.float32]:
        """A copy of the logits of one output of the last `decode`, [n_vocab]; -1 is the last output."""
        import numpy as np  # see logits

        pointer = self._library.llama_get_logits_ith(self.pointer, row)
        return np.ctypeslib.as_array(pointer, (self._n_vocab,)).copy()

    def embeddings(self, rows: int) -> list[list[float]]:
        """The hidden states of the last `decode`, [rows, n_embd]; the context must be made for embeddings."""
        pointer = self._library.llama_get_embeddings(self.pointer)
        n = self._n_embd
        return [pointer[i * n : (i + 1) * n] for i in range(rows)]

    def pooled_embedding(self) -> list[float]:
        """The pooled hidden state of the last `decode`, [n_embd]; the context must be made for pooled embeddings."""
        embedding: list[float] = self._library.llama_get_embeddings_seq(self.pointer, 0)[: self._n_embd]
        return embedding

    def state(self) -> bytes:
        """The KV cache, in the form that `set_state` accepts."""
        size = self._library.llama_state_get_size(self.pointer)
        buffer = (ctypes.c_uint8 * size)()
        written = self._library.llama_state_get_data(self.pointer, buffer, size)
        return bytes(memoryview(buffer)[:written])

    def set_state(self, state: bytes) -> None:
        """Restore a KV cache.

        Raises:
            ValueError: it belongs to another model, or to a context with other options.
        """
        LOG.forget()
        buffer = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        if self._library.llama_state_set_data(self.pointer, buffer, len(state)) != len(state):
            raise ValueError(f"the state does not belong to this model and these options: {LOG.problems()}")

    def n_positions(self) -> int:
        """Number of positions that sequence 0 takes."""
        return int(self._library.llama_memory_seq_pos_max(self._library.llama_get_memory(self.pointer), 0)) + 1

    def set_lora(self, adapter: structs.llama_adapter_lora_p, scale: float) -> None:
        """Apply a LoRA adapter of the model."""
        adapters = (structs.llama_adapter_lora_p * 1)(adapter)
        if self._library.llama_set_adapters_lora(self.pointer, adapters, 1, (ctypes.c_float * 1)(scale)):
            raise ValueError(f"the LoRA adapter cannot be used: {LOG.problems()}")

    def copy_sequence(self, sequence: int, n: int) -> None:
        """Make the first `n` tokens of sequence 0 the first of another sequence, too."""
        self._library.llama_memory_seq_cp(self._library.llama_get_memory(self.pointer), 0, sequence, 0, n)

    def keep_sequence(self, sequence: int) -> None:
        """Forget all sequences but one, which becomes sequence 0."""
        memory = self._library.llama_get_memory(self.pointer)
        if sequence:
            self._library.llama_memory_seq_rm(memory, 0, -1, -1)
            self._library.llama_memory_seq_cp(memory, sequence, 0, -1, -1)
        self._library.llama_memory_seq_keep(memory, 0)

    def keep(self, n_past: int) -> None:
        """Forget all positions from `n_past` on."""
        memory = self._library.llama_get_memory(self.pointer)
        if n_past == 0:
            self._library.llama_memory_clear(memory, True)
        elif not self._library.llama_memory_seq_rm(memory, 0, n_past, -1):
            raise RuntimeError(f"this model cannot forget the positions from {n_past} on; call reset()")


def _check(code: int, n_tokens: int, position: int) -> None:
    if code != 0:
        raise RuntimeError(
            f"llama_decode of {n_tokens} tokens at position {position} returned {code}: {LOG.problems()}"
        )


def _batch(tokens: Sequence[int], n_past: int, n_outputs: int) -> structs.llama_batch:
    n = len(tokens)
    return structs.llama_batch(
        n_tokens=n,
        token=(structs.llama_token * n)(*tokens),
        pos=(structs.llama_pos * n)(*range(n_past, n_past + n)),
        logits=(ctypes.c_int8 * n)(*[0] * (n - n_outputs), *[1] * n_outputs),
    )
