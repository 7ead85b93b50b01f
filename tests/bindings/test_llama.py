"""`Llama` on the example model: tokens, logits, and its life from load to close."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from ernie_llama import Llama
from ernie_llama._engine.context import SHORT_BATCH
from ernie_llama._engine.params import physical_cores

pytestmark = pytest.mark.build

PROMPT = b"def main():\n    return "
TEXTS = ["def main():\n    return 0\n", "  two spaces", "naïve Grüße — 日本語 🎉", "a\ttab\r\n", "\x00 zero"]

# Logits span about 20. In another batch size llama.cpp takes other BF16 kernels, which differ by up to 0.07 here;
# logits of a wrong row or position differ by several units.
OTHER_BATCH = 0.2


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_give_the_text_back(llm: Llama, text: str) -> None:
    tokens = llm.tokenize(text.encode(), add_bos=False)
    assert all(0 <= token < llm.n_vocab() for token in tokens)
    assert llm.detokenize(tokens).decode() == text


def test_special_tokens_are_text_unless_asked_for(llm: Llama) -> None:
    assert llm.tokenize(b"</s>", add_bos=False, special=True) == [llm.token_eos()]
    assert len(llm.tokenize(b"</s>", add_bos=False)) > 1
    assert llm.detokenize([llm.token_eos()]) == b""
    assert llm.detokenize([llm.token_eos()], special=True) == b"</s>"


def test_bos_follows_the_metadata(llm: Llama) -> None:
    added = llm.metadata["tokenizer.ggml.add_bos_token"] == "true"
    plain = llm.tokenize(b"x", add_bos=False)
    assert llm.tokenize(b"x") == ([llm.token_bos(), *plain] if added else plain)


def test_a_token_outside_the_vocabulary_is_an_error(llm: Llama) -> None:
    with pytest.raises(ValueError, match="token 4096 is not in the vocabulary of 4096 tokens"):
        llm.detokenize([4096])
    with pytest.raises(ValueError, match="token 4096 is not in the vocabulary of 4096 tokens"):
        llm.eval([4096])


def test_sizes_and_metadata(llm: Llama) -> None:
    assert (llm.n_ctx(), llm.n_vocab(), llm.n_embd()) == (512, 4096, 256)
    assert (llm.token_bos(), llm.token_eos()) == (1, 2)
    assert llm.metadata["general.architecture"] == "ernie4_5-moe"
    assert llm.metadata["ernie4_5-moe.block_count"] == "3"
    assert "{% for message in messages %}" in llm.metadata["tokenizer.chat_template"]


def test_n_ctx_0_is_the_context_length_of_the_model(bf16: str) -> None:
    with Llama(bf16, n_threads=1, n_ctx=0) as llm:
        assert llm.n_ctx() == int(llm.metadata["ernie4_5-moe.context_length"])


def test_logits_are_those_of_the_last_token_and_repeat_exactly(llm: Llama) -> None:
    tokens = llm.tokenize(PROMPT)
    llm.eval(tokens)
    first = llm.logits
    assert first.shape == (4096,)
    assert first.dtype == np.float32
    assert np.isfinite(first).all()
    llm.reset()
    llm.eval(tokens)
    assert np.array_equal(llm.logits, first)
    assert llm.n_tokens == len(tokens)


def test_logits_before_eval_and_scores_without_logits_all_are_errors(llm: Llama) -> None:
    with pytest.raises(RuntimeError, match="no logits before eval"):
        _ = llm.logits
    with pytest.raises(RuntimeError, match="nothing to sample from before eval"):
        llm.sample()
    with pytest.raises(ValueError, match="logits_all=True"):
        _ = llm.scores


def test_logits_all_keeps_the_scores_of_every_token(bf16: str, llm: Llama) -> None:
    tokens = llm.tokenize(PROMPT * 10)
    with Llama(bf16, n_threads=1, n_ctx=512, n_batch=32, logits_all=True) as all_llm:
        assert all_llm.scores.shape == (0, 4096)
        all_llm.eval(tokens[:50])
        all_llm.eval(tokens[50:])
        assert all_llm.scores.shape == (len(tokens), 4096)
        assert np.array_equal(all_llm.logits, all_llm.scores[-1])
        for n in (1, 33, 50, len(tokens)):
            llm.reset()
            llm.eval(tokens[:n])
            np.testing.assert_allclose(all_llm.scores[n - 1], llm.logits, atol=OTHER_BATCH)


def test_a_prompt_longer_than_n_batch_is_evaluated_in_pieces(bf16: str, llm: Llama) -> None:
    tokens = llm.tokenize(PROMPT * 20)
    llm.eval(tokens)
    with Llama(bf16, n_threads=1, n_ctx=512, n_batch=16) as small:
        small.eval(tokens)
        assert len(tokens) > 100
        np.testing.assert_allclose(small.logits, llm.logits, atol=OTHER_BATCH)


def test_eval_beyond_the_context_names_both_numbers_and_changes_nothing(llm: Llama) -> None:
    llm.eval([5] * 500)
    with pytest.raises(ValueError, match=r"Requested tokens \(513\) exceed context window of 512"):
        llm.eval([5] * 13)
    llm.eval([5] * 12)
    assert llm.n_tokens == 512


def test_greedy_sample_is_the_largest_logit(llm: Llama) -> None:
    llm.eval(llm.tokenize(PROMPT))
    assert llm.sample(temp=0) == int(llm.logits.argmax())


def test_missing_folder_and_foreign_files_are_refused(built_library: None, tmp_path: Path) -> None:
    foreign = tmp_path / "model.safetensors"
    foreign.write_bytes(b"{}")
    with pytest.raises(ValueError, match=r"nowhere\.gguf does not exist"):
        Llama(tmp_path / "nowhere.gguf")
    with pytest.raises(ValueError, match="is not a file; expected a GGUF file"):
        Llama(tmp_path)
    with pytest.raises(ValueError, match=r"is not a GGUF file: it starts with b'\{\}', expected b'GGUF'"):
        Llama(foreign)


@pytest.mark.parametrize(
    ("option", "value", "least"), [("n_ctx", -1, 0), ("n_batch", 0, 1), ("n_ubatch", 0, 1), ("n_threads", -1, 1)]
)
def test_sizes_out_of_range_are_refused(bf16: str, option: str, value: int, least: int) -> None:
    with pytest.raises(ValueError, match=f"{option} is {value}, expected at least {least}"):
        Llama(bf16, **{option: value})  # type: ignore[arg-type]  # one option of several types


def test_the_default_is_one_thread_per_core(bf16: str) -> None:
    with Llama(bf16) as llm:
        llm.eval([5, 6, 7])
        assert np.isfinite(llm.logits).all()
    assert 1 <= physical_cores() <= (os.cpu_count() or 1)


def test_a_program_may_end_without_closing(bf16: str) -> None:
    code = f"from ernie_llama import Llama; llm = Llama({bf16!r}, n_threads=1); llm('x', max_tokens=2)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.parametrize(
    ("size", "reason"), [(6_000_000, "tensor .* data is not within the file bounds"), (20, "failed to read")]
)
def test_a_truncated_file_is_refused_with_the_reason_of_llama_cpp(
    bf16: str, tmp_path: Path, size: int, reason: str
) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(Path(bf16).read_bytes()[:size])
    with pytest.raises(ValueError, match=f"cut.gguf cannot be loaded: .*{reason}"):
        Llama(cut)


def test_nothing_is_printed_unless_verbose(bf16: str, capfd: pytest.CaptureFixture[str]) -> None:
    with Llama(bf16, n_threads=1) as llm:
        llm("x", max_tokens=2)
    assert capfd.readouterr() == ("", "")
    with Llama(bf16, n_threads=1, verbose=True):
        pass
    assert "general.architecture" in capfd.readouterr().err
    Llama(bf16, n_threads=1).close()


def test_close_twice_and_use_after_close(bf16: str) -> None:
    llm = Llama(bf16, n_threads=1)
    tokens = llm.tokenize(PROMPT)
    llm.close()
    llm.close()
    for use in (
        lambda: llm.tokenize(PROMPT),
        lambda: llm.detokenize(tokens),
        lambda: llm.eval(tokens),
        lambda: llm("x"),
        llm.reset,
        llm.n_vocab,
        llm.token_eos,
    ):
        with pytest.raises(RuntimeError, match="closed: create a new Llama"):
            use()


# In a process of its own: what other tests leave in malloc's arenas moves the figure by as much as a leak would.
LOADS = """
import ctypes, gc, os, sys
from pathlib import Path
from ernie_llama import Llama

def resident_bytes():
    ctypes.CDLL(None).malloc_trim(0)  # what is free goes back, or arenas that grow look like a leak
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def load():
    llm = Llama(sys.argv[1], n_threads=1, n_ctx=4096)
    llm("x y", max_tokens=2)
    if sys.argv[2] == "closed":
        llm.close()

def collect():
    for _ in range(2):  # a model becomes garbage when its context is gone
        gc.collect()

for _ in range(5):  # until caches have their size
    load()
collect()
before = resident_bytes()
for _ in range(30):
    load()
collect()
print(resident_bytes() - before)
"""


@pytest.mark.parametrize("end", ["closed", "collected"])
def test_many_loads_do_not_leak(bf16: str, end: str) -> None:
    done = subprocess.run([sys.executable, "-c", LOADS, bf16, end], capture_output=True, text=True, check=True)
    # A leaked context is 6 MB of KV cache, a leaked model 12 MB of weights. (Measured: 3 kB per load.)
    assert int(done.stdout) < 30 * 30_000


def test_after_ctrl_c_between_tokens_the_model_still_works(llm: Llama) -> None:
    tokens = llm.tokenize(PROMPT)
    seen = 0
    with pytest.raises(KeyboardInterrupt):
        for _ in llm.generate(tokens, temp=0):
            seen += 1
            if seen == 3:
                signal.raise_signal(signal.SIGINT)
    assert seen == 3
    assert llm("def main():", max_tokens=4)["usage"]["completion_tokens"] == 4


def test_after_ctrl_c_during_a_prompt_the_model_still_works(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = llm.tokenize(PROMPT * 8)
    assert len(tokens) > SHORT_BATCH + 2
    llm.eval(tokens)
    expected = llm.logits
    llm.reset()
    llm.eval(tokens[:2])

    main = threading.main_thread().ident
    assert main is not None
    stop = llm._ctx._stop
    original = threading.Event.is_set

    def interrupt_on_first_poll(event: threading.Event) -> bool:
        if event is stop and not original(event):
            signal.pthread_kill(main, signal.SIGINT)
            event.wait(timeout=10)
        return original(event)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Event, "is_set", interrupt_on_first_poll)
        with pytest.raises(KeyboardInterrupt):
            llm.eval(tokens[2:])
    assert llm.n_tokens == 2
    llm.reset()
    llm.eval(tokens)
    assert np.array_equal(llm.logits, expected)


@pytest.mark.parametrize("text", [b"\n", b" ", b"\xff", "é".encode(), b"ab"])
def test_long_texts_are_tokenized_in_linear_time(llm: Llama, text: bytes) -> None:
    """Of what the vocabulary has no token for, too: 1,000,000 line feeds took 208 s."""
    begin = time.process_time()
    assert len(llm.tokenize(text * 400_000)) > 10_000
    assert time.process_time() - begin < 5
