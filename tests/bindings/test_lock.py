"""One Llama in many threads: they wait for each other, and a stream goes on as if it were alone."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from ernie_llama import Llama
from ernie_llama._engine import lock
from ernie_llama._engine.lock import ContextLock

PROMPT = "def main():"


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody takes the context from a stream that rests."""
    monkeypatch.setattr(lock, "OTHER_THREAD_REST", 60.0)
    monkeypatch.setattr(lock, "SAME_THREAD_REST", 0.0)


def in_thread(action: Callable[[], object]) -> None:
    thread = threading.Thread(target=action)
    thread.start()
    thread.join(timeout=10)
    assert not thread.is_alive()


def blocks(lock: ContextLock) -> bool:
    """Whether another thread must wait for a lease, which it releases at once."""
    acquired = threading.Event()

    def acquire() -> None:
        lock.acquire().release()
        acquired.set()

    threading.Thread(target=acquire, daemon=True).start()
    return not acquired.wait(timeout=0.05)


@pytest.mark.usefixtures("patient")
def test_another_thread_waits_until_the_lease_is_released() -> None:
    lock = ContextLock()
    lease = lock.acquire()
    assert blocks(lock)
    with lease:
        pass
    assert blocks(lock)
    lease.release()
    assert not blocks(lock)


@pytest.mark.usefixtures("patient")
def test_the_same_thread_replaces_an_open_lease_which_finds_the_context_as_it_left_it() -> None:
    held: list[str] = []
    restored: list[str] = []
    lock = ContextLock(lambda: held[-1], restored.append)
    old = lock.acquire()
    with old:
        held.append("old")
    new = lock.acquire()
    with new:
        held.append("new")
    assert restored == []
    in_thread(new.release)
    with old:
        assert restored == ["old"]
    with old:
        assert restored == ["old"]
    old.release()
    assert not blocks(lock)


def test_a_lease_that_was_never_used_is_not_suspended() -> None:
    lock = ContextLock(lambda: pytest.fail("there is nothing to suspend"))
    first, second = lock.acquire(), lock.acquire()
    with second:
        pass
    second.release()
    with first:
        pass


def test_two_streams_of_one_thread_take_turns() -> None:
    """Each waits until the other rests, and finds what it left."""
    context: list[str] = []

    def resume(state: list[str]) -> None:
        context[:] = state

    lock = ContextLock(lambda: list(context), resume)
    leases = {name: lock.acquire() for name in "ab"}
    for turn in range(3):
        for name, lease in leases.items():
            with lease:
                if turn == 0:
                    context.clear()
                context.append(f"{name}{turn}")
    for name, lease in leases.items():
        with lease:
            assert context == [f"{name}{turn}" for turn in range(3)]


def test_a_stream_that_fails_to_suspend_ends() -> None:
    def suspend() -> None:
        raise MemoryError

    lock = ContextLock(suspend)
    old = lock.acquire()
    with old:
        pass
    with pytest.raises(MemoryError), lock.one_step():
        pass
    with pytest.raises(RuntimeError, match="the Llama is closed"), old:
        pass


def test_a_lease_of_a_finished_thread_is_free() -> None:
    lock = ContextLock()
    in_thread(lock.acquire)
    assert not blocks(lock)


@pytest.mark.usefixtures("patient")
def test_a_lease_belongs_to_the_thread_of_its_last_step() -> None:
    lock = ContextLock()
    lease = lock.acquire()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lease.__enter__).result()
        pool.submit(lambda: lock.end_step(lease)).result()
        waiting = threading.Thread(target=lambda: lock.acquire().release())
        waiting.start()
        waiting.join(timeout=0.05)
        assert waiting.is_alive()
        pool.submit(lambda: lock.acquire().release()).result(timeout=10)
        waiting.join(timeout=10)
        assert not waiting.is_alive()


def test_close_waits_for_the_current_step_only() -> None:
    lock = ContextLock()
    lease = lock.acquire()
    in_thread(lambda: lock.close().release())
    with pytest.raises(RuntimeError, match="the Llama is closed"):
        lease.__enter__()
    with pytest.raises(RuntimeError, match="the Llama is closed"):
        lock.acquire()


def test_reading_between_steps_keeps_the_lease() -> None:
    lock = ContextLock()
    lease = lock.acquire()
    with lock.between_steps():
        pass
    with lease:
        pass


@pytest.mark.build
def test_threads_that_share_a_llama_get_the_texts_of_separate_calls(llm: Llama) -> None:
    prompts = ["def main():", "import os\n", "class Node:", "for i in range("]
    alone = [llm(prompt, max_tokens=12, temperature=0)["choices"][0]["text"] for prompt in prompts]

    def complete(i: int) -> str:
        if i % 2:
            chunks = llm(prompts[i % 4], max_tokens=12, temperature=0, stream=True)
            return "".join(chunk["choices"][0]["text"] for chunk in chunks)
        return llm(prompts[i % 4], max_tokens=12, temperature=0)["choices"][0]["text"]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(complete, range(16))) == alone * 4


@pytest.mark.build
@pytest.mark.parametrize("cached", [True, False])
def test_a_stream_continues_after_other_calls(bf16: str, cached: bool) -> None:
    with Llama(bf16, n_threads=1, cache_prompt=cached) as llm:
        whole = llm(PROMPT, max_tokens=12, seed=1)["choices"][0]["text"]
        chunks = llm(PROMPT, max_tokens=12, seed=1, stream=True)
        text = ""
        for i, chunk in enumerate(chunks):
            text += chunk["choices"][0]["text"]
            if i % 4 == 0:
                assert llm("import os\n", max_tokens=2)["usage"]["completion_tokens"] == 2
            if i == 5:
                llm.reset()
        assert text == whole


@pytest.mark.build
def test_logprobs_and_scores_of_a_stream_that_others_interrupt(bf16: str) -> None:
    with Llama(bf16, n_threads=1, logits_all=True) as llm:
        whole = llm(PROMPT, max_tokens=8, seed=1, logprobs=2)["choices"][0]["logprobs"]
        entries = []
        for chunk in llm(PROMPT, max_tokens=8, seed=1, logprobs=2, stream=True):
            if (logprobs := chunk["choices"][0]["logprobs"]) is not None:
                entries += logprobs["token_logprobs"]
            llm("x", max_tokens=3)
        assert whole is not None
        assert entries == pytest.approx(whole["token_logprobs"])
        tokens = llm.generate(llm.tokenize(b"def main():"), temp=0)
        for _ in range(3):
            next(tokens)
        scores = llm.scores.copy()
        llm("something else", max_tokens=5)
        next(tokens)
        np.testing.assert_array_equal(llm.scores[: len(scores)], scores)


# What a request of FastAPI's StreamingResponse does: starlette.concurrency.iterate_in_threadpool asks for each chunk in
# some thread of a pool, and a client may go away in the middle.
def serve(llm: Llama, pool: ThreadPoolExecutor, prompt: str, n: int | None) -> str:
    stream = llm(prompt, max_tokens=12, temperature=0, stream=True)
    text = ""
    for _ in itertools.count() if n is None else range(n):
        chunk: Any = pool.submit(next, stream, None).result(timeout=300)
        if chunk is None:
            break
        text += chunk["choices"][0]["text"]
    return text


@pytest.mark.build
@pytest.mark.parametrize("n_pool", [2, 4, 40])
def test_the_streams_of_a_web_framework_are_whole(llm: Llama, n_pool: int) -> None:
    prompts = ["def main():", "import os\n", "class Node:", "for i in range("]
    alone = {prompt: llm(prompt, max_tokens=12, temperature=0)["choices"][0]["text"] for prompt in prompts}

    def client(number: int) -> list[tuple[str, str]]:
        rng = random.Random(number)
        done = []
        for _ in range(15 if n_pool > 2 else 2):
            prompt = rng.choice(prompts)
            n = rng.choice([None, None, None, 3])
            if (text := serve(llm, pool, prompt, n)) and n is None:
                done.append((prompt, text))
        return done

    with ThreadPoolExecutor(n_pool) as pool, ThreadPoolExecutor(4) as clients:
        results = [each for done in clients.map(client, range(4)) for each in done]
    assert len(results) > (30 if n_pool > 2 else 2)
    assert [text for _, text in results] == [alone[prompt] for prompt, _ in results]


@pytest.mark.build
def test_a_discarded_stream_blocks_nobody(llm: Llama) -> None:
    for _ in llm(PROMPT, max_tokens=12, stream=True):
        break
    texts: list[str] = []
    in_thread(lambda: texts.append(llm(PROMPT, max_tokens=4, temperature=0)["choices"][0]["text"]))
    assert texts


@pytest.mark.build
@pytest.mark.usefixtures("patient")
def test_another_thread_waits_until_the_stream_ends(llm: Llama) -> None:
    stream = llm(PROMPT, max_tokens=6, temperature=0, stream=True)
    chunks = [next(stream)]
    other = threading.Thread(target=lambda: llm("x", max_tokens=2))
    other.start()
    other.join(timeout=0.03)
    assert other.is_alive()
    chunks += stream
    other.join(timeout=10)
    assert not other.is_alive()
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


@pytest.mark.build
def test_close_ends_an_open_stream(bf16: str) -> None:
    llm = Llama(bf16, n_threads=1)
    stream = llm(PROMPT, max_tokens=6, stream=True)
    next(stream)
    llm.close()
    with pytest.raises(RuntimeError, match="the Llama is closed"):
        next(stream)


@pytest.mark.build
def test_close_waits_for_a_thread_that_computes(bf16: str) -> None:
    llm = Llama(bf16, n_threads=1, n_ctx=2048, n_batch=64)
    outcomes: list[object] = []
    begun = threading.Event()

    def evaluate() -> None:
        begun.set()
        try:
            llm.eval([5] * 1024)
            outcomes.append("evaluated")
        except RuntimeError as error:
            outcomes.append(error)

    thread = threading.Thread(target=evaluate)
    thread.start()
    begun.wait()
    llm.close()
    thread.join(timeout=30)
    assert outcomes == ["evaluated"] or "closed" in str(outcomes[0])


STRESS = """
import sys, threading
from ernie_llama import Llama

def use(llm, i):
    try:
        while True:
            if i == 0:
                llm("def main():", max_tokens=3, logprobs=1)
            elif i == 1:
                for _ in llm("import os", max_tokens=5, stream=True):
                    break
            elif i == 2:
                llm.detokenize(llm.tokenize(b"some text here" * 20))
            else:
                llm.eval([5, 6, 7]), llm.logits, llm.load_state(llm.save_state()), llm.reset()
    except RuntimeError as error:
        assert "closed" in str(error) or "no logits before eval" in str(error), error

for _ in range(8):
    llm = Llama(sys.argv[1], n_threads=1, n_ctx=256)
    threads = [threading.Thread(target=use, args=(llm, i % 4)) for i in range(8)]
    for thread in threads:
        thread.start()
    threads[0].join(0.05)
    llm.close()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
print("done")
"""


@pytest.mark.build
def test_close_during_any_call_of_other_threads_gives_errors_not_crashes(bf16: str) -> None:
    command = [sys.executable, "-c", STRESS, bf16]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ), timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
