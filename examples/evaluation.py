"""Compare models by how well they choose between two continuations; lm-evaluation-harness does this on a large scale.

python examples/evaluation.py wint4.gguf wint2.gguf < pairs.jsonl

Each line of standard input is {"context": ..., "good": ..., "bad": ...}. For real benchmarks:

    ernie-gguf eval wint2.gguf --tasks gsm8k,cmmlu
"""

from __future__ import annotations

import json
import sys

from ernie_llama import Llama


def logprob(llm: Llama, context: str, continuation: str) -> float:
    """The log probability of a continuation."""
    before, whole = (llm.tokenize(text.encode(), special=True) for text in (context, context + continuation))
    return sum(each for each, _ in llm.score(whole, len(whole) - len(before)))


def main(*models: str) -> None:
    """Print the share of good choices of each model."""
    pairs = [json.loads(line) for line in sys.stdin]
    for model in models:
        with Llama(model, n_ctx=1024) as llm:
            good = [logprob(llm, p["context"], p["good"]) > logprob(llm, p["context"], p["bad"]) for p in pairs]
        print(f"{sum(good) / len(good):.1%} of {len(good)}  {model}")


if __name__ == "__main__":
    main(*sys.argv[1:])
