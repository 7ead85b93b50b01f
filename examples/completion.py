"""Complete a prompt.

python examples/completion.py ernie.gguf "def main():"
"""

from __future__ import annotations

import sys

from ernie_llama import Llama


def main(model: str, prompt: str) -> None:
    """Print the prompt and its completion."""
    with Llama(model, n_ctx=1024) as llm:
        completion = llm(prompt, max_tokens=64, temperature=0.8, seed=42, stop=["\n\n\n"], echo=True)
    print(completion["choices"][0]["text"])
    print(f"({completion['usage']['completion_tokens']} tokens, {completion['choices'][0]['finish_reason']})")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
