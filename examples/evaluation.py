"""Compare models by how well they choose between two continuations; lm-evaluation-harness does this on a large scale.

python examples/evaluation.py wint4.gguf wint2.gguf < pairs.jsonl

Each line of standard input is {"context": ..., "good": ..., "bad": ...}. For real benchmarks:

    ernie-gguf eval wint2.gguf --tasks gsm8k,cmmlu
"""

from __future__ import annotations

import json
import sys

from ernie_llama import Llama


def text(llm: Llama, context: str, continuation: str) -> tuple[list[int], int]:
    """The tokens of both, and how many belong to the continuation."""
    before, whole = (llm.tokenize(text.encode(), special=True) for text in (context, context + continuation))
    return whole, len(whole) - len(before)


def main(*models: str) -> None:
    """Print the share of good choices of each model."""
    pairs = [json.loads(line) for line in sys.stdin]
    for model in models:
        with Llama(model, n_ctx=1024, n_seq_max=64) as llm:
            texts = [text(llm, pair["context"], pair[key]) for pair in pairs for key in ("good", "bad")]
            totals = {i: sum(logprob for logprob, _ in scores) for i, scores in llm.score_many(texts)}
        good = [totals[i] > totals[i + 1] for i in range(0, len(texts), 2)]
        print(f"{sum(good) / len(good):.1%} of {len(good)}  {model}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
