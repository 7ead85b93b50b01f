"""Answer the lines of standard input, one JSON object per line: {"prompt": ..., "text": ..., "tokens": ...}.

python examples/batch.py ernie.gguf "Translate to French: " < sentences.txt > answers.jsonl

The instruction that all prompts start with is evaluated once and stays in the cache. To compute several prompts at the
same time, start `ernie-gguf serve ernie.gguf -- --parallel 8` and send them from eight threads.
"""

from __future__ import annotations

import json
import sys

from ernie_llama import Llama


def main(model: str, instruction: str = "") -> None:
    """Print an answer to each line."""
    with Llama(model, n_ctx=2048) as llm:
        for line in sys.stdin:
            prompt = line.rstrip("\n")
            completion = llm(instruction + prompt, max_tokens=32, temperature=0, stop=["\n\n"])
            tokens = completion["usage"]["completion_tokens"]
            result = {"prompt": prompt, "text": completion["choices"][0]["text"], "tokens": tokens}
            print(json.dumps(result, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(*sys.argv[1:])
