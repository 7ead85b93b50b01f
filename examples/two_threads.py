"""Two threads with a Llama each: they share the mapped weights and generate at the same time.

python examples/two_threads.py ernie.gguf "def main():" "import os"

Threads that share one Llama wait for each other instead.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

from ernie_llama import Llama


def complete(model: str, prompt: str) -> str:
    """The prompt and its greedy completion."""
    with Llama(model, n_ctx=512, n_threads=1) as llm:
        return llm(prompt, max_tokens=32, temperature=0, echo=True)["choices"][0]["text"]


def main(model: str, *prompts: str) -> None:
    """Print the completions in the order of the prompts."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        for text in pool.map(lambda prompt: complete(model, prompt), prompts):
            print(text, end="\n\n")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
