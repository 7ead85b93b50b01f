"""Ask a question and show the answer while it is generated, reasoning on stderr.

python examples/streaming_chat.py ernie.gguf "What does os.walk return?"
"""

from __future__ import annotations

import sys

from ernie_llama import Llama


def main(model: str, question: str) -> None:
    """Print the answer token by token; Ctrl-C stops it."""
    with Llama(model, n_ctx=4096, type_k="q8_0", type_v="q8_0") as llm:
        stream = llm.create_chat_completion(
            [
                {"role": "system", "content": "You answer in one sentence."},
                {"role": "user", "content": question},
            ],
            max_tokens=128,
            temperature=0.2,
            seed=42,
            stream=True,
        )
        for chunk in stream:
            delta = chunk["choices"][0]["delta"]
            print(delta.get("reasoning_content", ""), end="", flush=True, file=sys.stderr)
            print(delta.get("content", ""), end="", flush=True)
    print()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
