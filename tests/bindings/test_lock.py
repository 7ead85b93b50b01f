"""One Llama in many threads: they wait for each other, and an abandoned stream says that it has ended."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from ernie_llama import Llama
from ernie_llama._lock import ContextLock

PROMPT = "def main():"


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


def test_another_thread_waits_until_the_lease_is_released() -> None:
    lock = ContextLock()
    lease = lock.acquire()
    assert blocks(lock)
    with lease:
        pass
    assert blocks(lock)
    lease.release()
    assert not blocks(lock)


def test_the_same_thread_replaces_an_open_lease_and_the_old_one_says_so() -> None:
    lock = ContextLock()
    old = lock.acquire()
    new = lock.acquire()
    with pytest.raises(RuntimeError, match=r"this stream has ended: .* its thread used the Llama for something else"):
        old.__enter__()
    old.release()
    with new:
        pass
    assert blocks(lock)


def test_a_lease_of_a_finished_thread_is_free() -> None:
    lock = ContextLock()
    in_thread(lock.acquire)
    assert not blocks(lock)


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


def test_acquire_now_waits_for_the_current_step_only() -> None:
    lock = ContextLock()
    lease = lock.acquire()
    in_thread(lambda: lock.acquire_now().release())
    with pytest.raises(RuntimeError, match="this stream has ended"):
        lease.__enter__()


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
def test_an_abandoned_stream_has_ended(llm: Llama) -> None:
    stream = llm(PROMPT, max_tokens=12, temperature=0, stream=True)
    next(stream)
    expected = llm.logits.argmax()
    assert llm("import os\n", max_tokens=2)["usage"]["completion_tokens"] == 2
    assert llm.tokenize(b"x")  # needs no lease
    with pytest.raises(RuntimeError, match="this stream has ended"):
        next(stream)
    again = llm.generate(llm.tokenize(PROMPT.encode(), special=True), temp=0)
    assert next(again) == expected


@pytest.mark.build
def test_a_discarded_stream_blocks_nobody(llm: Llama) -> None:
    for _ in llm(PROMPT, max_tokens=12, stream=True):
        break
    texts: list[str] = []
    in_thread(lambda: texts.append(llm(PROMPT, max_tokens=4, temperature=0)["choices"][0]["text"]))
    assert texts


@pytest.mark.build
def test_another_thread_waits_until_the_stream_ends(llm: Llama) -> None:
    stream = llm(PROMPT, max_tokens=6, temperature=0, stream=True)
    chunks = [next(stream)]
    other = threading.Thread(target=lambda: llm("x", max_tokens=2))
    other.start()
    other.join(timeout=0.1)
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
    with pytest.raises(RuntimeError, match=r"has ended: .* its thread used the Llama .* \(or closed it\)"):
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
        assert "closed" in str(error) or "has ended" in str(error) or "no logits before eval" in str(error), error

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
