"""No option, argument or callback ends the process: llama.cpp's assertions and exceptions become Python's.

All cases run in one process of their own, which says at the end what became of each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.build

# ruff: noqa: E501 - a table
# What to run, and a part of the error that it gives; without one the call must succeed.
CASES: list[tuple[str, str | None]] = [
    # --- nothing left to choose
    ("""llm("x", grammar='root ::= "a"', logit_bias=dict.fromkeys(tokens_with("a"), -inf))""", "the grammar allows only"),
    ("""llm("x", grammar='root ::= "a"', logits_processor=banned("a"))""", "the grammar allows only tokens"),
    ("""llm("x", grammar='root ::= "a"', temperature=0, logits_processor=banned("a"))""", "the grammar allows only"),
    ("""llm("x", grammar='root ::= [b-a]')""", "the grammar allows only tokens"),
    ("""llm("x", grammar='root ::= <[999999]>')""", "or that the vocabulary does not have"),
    ("""llm("x", grammar='root ::= "a"', logit_bias=dict.fromkeys(ends, -inf))""", "the grammar allows only tokens"),
    ("""llm("x", logit_bias=dict.fromkeys(range(llm.n_vocab()), -inf))""", "logit_bias forbids all 4096 tokens"),
    ("""llm("x", logits_processor=lambda ids, logits: logits * 0 - inf)""", "processors forbid all of them"),
    ("""llm("x", logits_processor=lambda ids, logits: logits * 0 - inf, temperature=0)""", "forbid all of them"),
    ("""list(llm("x", grammar='root ::= "a"', logits_processor=banned("a"), stream=True))""", "the grammar allows only"),
    ("""llm.eval([5]); llm.sample(grammar='root ::= "a"', logits_processor=banned("a"))""", "the grammar allows only"),
    ("""llm("x", mirostat_mode=1, logit_bias=dict.fromkeys(range(4095), -inf))""", None),
    ("""llm("x", mirostat_mode=2, logit_bias=dict.fromkeys(range(4095), -inf))""", None),
    ("""llm("x", typical_p=0.5, top_k=0, logit_bias=dict.fromkeys(range(4000), -inf))""", None),
    # --- logits that are none
    ("""llm("x", logits_processor=lambda ids, logits: logits * nan)""", "the logits processor <lambda> returned logits that are NaN"),
    ("""llm("x", logits_processor=one_nan)""", "the logits processor one_nan returned logits that are NaN"),
    ("""llm("x", logits_processor=lambda ids, logits: logits[:5])""", "returned logits of shape [5], expected [4096]"),
    ("""llm("x", logits_processor=lambda ids, logits: np.tile(logits, 2))""", "of shape [8192], expected [4096]"),
    ("""llm("x", logits_processor=lambda ids, logits: None)""", "returned logits of shape [], expected [4096]"),
    ("""llm("x", logits_processor=lambda ids, logits: "abc")""", "returned 'abc', expected 4096 logits"),
    ("""llm("x", logits_processor=lambda ids, logits: logits.astype("f8").tolist())""", None),
    ("""assert llm("x", logits_processor=infinite(77), max_tokens=2)["choices"][0]["text"] == 2 * llm.detokenize([77]).decode()""", None),
    ("""Llama(FILE, rope_freq_base=nan)("x y z")""", "the logits are not finite"),
    ("""Llama(FILE, rope_freq_base=nan)("x y z", temperature=0)""", "the logits are not finite"),
    ("""Llama(FILE, rope_freq_scale=-1e38)("x y z", grammar='root ::= "a"')""", "the logits are not finite"),
    ("""Llama(FILE, rope_freq_base=nan)("x y z", mirostat_mode=1)""", "the logits are not finite"),
    # --- numbers out of range
    ("""llm("x", top_k=2**40)""", None),
    ("""llm("x", top_k=-(2**40))""", None),
    ("""llm("x", top_p=nan)""", "top_p is nan"),
    ("""llm("x", top_p=-5, min_p=5.0, typical_p=-1.0)""", None),
    ("""llm("x", temperature=1e-44)""", None),
    ("""llm("x", temperature=nan)""", "temperature is nan"),
    ("""llm("x", mirostat_mode=2, mirostat_tau=nan)""", "mirostat_tau is nan"),
    ("""llm("x", mirostat_mode=1, mirostat_tau=0.0, mirostat_eta=1e6, max_tokens=50)""", None),
    ("""llm("x", mirostat_mode=2, mirostat_tau=0.0, mirostat_eta=1e6, max_tokens=50)""", None),
    ("""llm("x", logit_bias={1: inf})""", "logit_bias of token 1 is inf"),
    ("""llm("x", logit_bias={1: nan})""", "logit_bias of token 1 is nan"),
    ("""llm("x", logit_bias={1: 1e300})""", None),
    ("""llm("x", logit_bias={1: 10**400})""", "expected a dictionary from token ids to numbers"),
    ("""llm("x", logit_bias={2**40: 1})""", "not in the vocabulary"),
    ("""llm("x", repeat_penalty=1e-40)""", "repeat_penalty is 1e-40"),
    ("""llm("x", repeat_penalty=1e6, presence_penalty=-1e6, typical_p=0.3, max_tokens=50)""", None),
    ("""Llama(FILE, last_n_tokens_size=2**40)("x", repeat_penalty=2.0)""", None),
    ("""llm("x", logprobs=10**9, max_tokens=2)""", None),
    ("""llm("x", max_tokens=10**30)""", None),
    ("""llm("x", seed=2**64)""", None),
    # --- grammars
    ("""llm("x", grammar="root ::= " + "(" * 200_000)""", "nested more than 256 deep"),
    ("""llm("x", grammar="root ::= " + "(" * 256 + '"a"' + ")" * 256)""", None),
    ("""llm("x", grammar='root ::= "' + "(" * 300 + '" [(((] # ((')""", None),
    ("""llm("x", grammar=chain(200_000))""", "the grammar has 200001 rules, expected at most 20000"),
    ("""in_thread(lambda: llm("x", grammar=chain(19_000)))""", None),
    ("""llm("x", grammar='root ::= root "a"')""", "left recursion"),
    ("""llm("x", grammar='root ::= "a"{1,99999999999999999999999}')""", "llama.cpp cannot read the grammar"),
    ("""llm("x", grammar='x ::= "a"')""", "does not contain a 'root' symbol"),
    ("""llm("x", grammar='root ::= "a\\0b"')""", "holds a NUL character"),
    ("""llm("x", grammar='root ::= "\\\\x00"')""", "the grammar allows only tokens"),
    ("""llm("x", grammar='root ::= "é" "日本" [^a]', max_tokens=9)""", None),
    ("""g = llm.generate([5, 6], grammar='root ::= "a"'); [next(g) for _ in range(30)]""", None),
    # --- tokens
    *((f"llm.eval([{token}])", f"token {token} is not in the vocabulary of 4096 tokens") for token in (-1, 4096, 2**31, 2**40)),
    ("llm([5, -1])", "token -1 is not in the vocabulary"),
    ("llm([5.5])", "a token is 5.5, expected an integer"),
    ("llm(['a'])", "a token is 'a', expected an integer"),
    ("list(llm.generate([10**6]))", "token 1000000 is not in the vocabulary"),
    ("llm.score([5, 6, 10**6], 1)", "token 1000000 is not in the vocabulary"),
    ("llm.score([5, -1, 6], 1)", "token -1 is not in the vocabulary"),
    ("llm.detokenize([2**32])", "not in the vocabulary"),
    ("llm.tokenize(bytes(range(256)) * 100, special=True)", None),
    ("Llama(FILE, draft_model=lambda ids: [2**40, 5])('x')", None),
    ("Llama(FILE, draft_model=lambda ids: [4096] * 10_000)('x')", None),
    # --- states
    ("llm.load_state(LlamaState((5, 6), b'', 1))", "the state does not hold the 2 tokens that it names"),
    ("llm.load_state(LlamaState((5, 6), bytes(1000), 1))", "the state does not belong to this model"),
    ("llm.eval([5, 6, 7]); llm.load_state(LlamaState((5,), llm.save_state().llama_state, 1))", "does not hold the 1 tokens"),
    ("llm.eval([5, 6, 7]); llm.load_state(LlamaState((-5,) * 3, llm.save_state().llama_state, 1))", "token -5 is not"),
    ("damaged_states()", None),
    # --- options of a context and a model
    ("Llama(FILE, attention_type=1, n_ctx=2048, n_batch=2048)([5] * 1500)", None),
    ("Llama(FILE, attention_type=7)", "attention_type is 7, expected at most 1"),
    ("Llama(FILE, embedding=True, pooling_type=99)", "pooling_type is 99, expected at most 4"),
    ("Llama(FILE, embedding=True, pooling_type=-7)", "pooling_type is -7, expected at least -1"),
    ("Llama(FILE, embedding=True, pooling_type=4).embed('x')", None),
    ("Llama(FILE, embedding=True)('x')", None),
    ("Llama(FILE, n_seq_max=256, n_ctx=64)('x')", None),
    ("Llama(FILE, n_seq_max=500)", "n_seq_max must be <= 256"),
    ("Llama(FILE, n_threads=513)", "n_threads is 513, expected at most 512"),
    ("Llama(FILE, n_threads_batch=10**6)", "n_threads_batch is 1000000, expected at most 512"),
    ("Llama(FILE, n_ctx=2**32 + 64)", "n_ctx is 4294967360, expected at most 2147483647"),
    ("Llama(FILE, n_batch=2**32 + 1)", "n_batch is 4294967297"),
    ("Llama(FILE, n_batch=1, n_ubatch=2**31 - 1)('x y z')", None),
    ("Llama(FILE, main_gpu=99, split_mode='none')", None),
    ("Llama(FILE, tensor_split=[nan, -1])" , None),
    ("Llama(FILE, rope_scaling_type=2, yarn_orig_ctx=-5)('x y z')", "the logits are not finite"),
    *(
        (f"Llama(FILE, kv_overrides={{'ernie4_5-moe.{key}': {value}}})", f"{key.rpartition('.')[2]}")
        for key, value in [
            ("expert_used_count", 0), ("expert_used_count", 99), ("block_count", 0), ("block_count", 10**9),
            ("attention.head_count_kv", 3), ("rope.dimension_count", 10**6), ("expert_count", 10**6),
            ("interleave_moe_layer_step", 0), ("attention.layer_norm_rms_epsilon", -1.0),
        ]
    ),
    ("Llama(FILE, kv_overrides={'x': 2**70})", "expected a bool, an int of 64 bits"),
    ("Llama(FILE, kv_overrides={5: 2})", "kv_overrides: found the key 5, expected a string"),
    ("Llama(FILE, tensor_buft_overrides='[[:x=CPU')", "is not a valid regular expression"),
    ("Llama(FILE, tensor_buft_overrides={'(' * 500 + ')' * 500: 'CPU'})", "is not a valid regular expression"),
]  # fmt: skip

SCRIPT = """
import json, math, random, sys, threading
import numpy as np
import ernie_llama
from ernie_llama import LlamaState

FILE, nan, inf = sys.argv[1], math.nan, math.inf

def Llama(file, **options):
    return ernie_llama.Llama(file, **{"n_threads": 1, **options})

def tokens_with(text):
    return [token for token in range(llm.n_vocab()) if text.encode() in llm.detokenize([token])]

def banned(text):
    ids = tokens_with(text)
    def process(_ids, logits):
        logits[ids] = -inf
        return logits
    return process

def one_nan(_ids, logits):
    logits[100] = nan
    return logits

def infinite(token):
    def process(_ids, logits):
        logits[token] = inf
        return logits
    return process

def chain(n):
    return "root ::= a0\\n" + "".join(f"a{i} ::= a{i + 1}\\n" for i in range(n - 1)) + f'a{n - 1} ::= "x"'

def in_thread(call):
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()

def damaged_states():
    rng = random.Random(6)  # makes no text gigabytes long: llama.cpp takes seconds to make room for one
    llm.eval([5, 6, 7] * 20)
    state = llm.save_state()
    for i in range(200):
        data = bytearray(state.llama_state)
        for _ in range(3):
            data[rng.randrange(400 if i % 2 else len(data))] = rng.randrange(256)
        if i == 0:
            data[3] = 16  # the text at the beginning has 256 MB
        try:
            llm.load_state(LlamaState(state.input_ids, bytes(data), 1))
            llm("x", max_tokens=2)
        except (ValueError, RuntimeError):
            pass

llm = Llama(FILE)
ends = [token for token in range(llm.n_vocab()) if llm._model.is_eog(token)]
for i, code in enumerate(json.loads(sys.stdin.read())):
    llm.reset()
    try:
        exec(code)
        said = None
    except (ValueError, RuntimeError, TypeError) as error:
        said = f"{type(error).__name__}: {error}"
    print(json.dumps([i, said]), flush=True)
"""


@pytest.fixture(scope="module")
def said(bf16: str) -> dict[int, str | None]:
    """What each case said, by its number; cases after one that ended the process are missing."""
    codes = json.dumps([code for code, _ in CASES])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, bf16],
        input=codes,
        capture_output=True,
        text=True,
        check=False,
        env=dict(os.environ),
        timeout=600,
    )
    return dict(map(json.loads, done.stdout.splitlines()))


@pytest.mark.parametrize("number", range(len(CASES)), ids=[code[:60] for code, _ in CASES])
def test_the_process_lives_and_says_why(said: dict[int, str | None], number: int) -> None:
    code, expected = CASES[number]
    assert number in said, f"the process ended at or before: {code}"
    if expected is None:
        assert said[number] is None, code
    else:
        assert expected in (said[number] or "no error"), code
