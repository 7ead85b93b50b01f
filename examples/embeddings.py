"""Find the lines of standard input that are closest to a text.

python examples/embeddings.py ernie.gguf "open a file" < lines.txt
"""

from __future__ import annotations

import sys

from ernie_llama import Llama

MEAN = 1  # the mean over a text's tokens


def main(model: str, text: str, n: str = "3") -> None:
    """Print the `n` closest lines, closest first, with the cosine of their embeddings."""
    lines = [line.rstrip("\n") for line in sys.stdin if line.strip()]
    with Llama(model, embedding=True, pooling_type=MEAN, n_ctx=1024) as llm:
        wanted, *found = llm.embed([text, *lines], normalize=True)
    cosines = [sum(x * y for x, y in zip(wanted, each, strict=True)) for each in found]
    for cosine, line in sorted(zip(cosines, lines, strict=True), reverse=True)[: int(n)]:
        print(f"{cosine:.3f} {line}")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    main(*sys.argv[1:])
