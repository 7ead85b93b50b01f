"""Show what the files that `make demo` has converted weigh, and what each writes for the same prompt.

python examples/demo.py build/demo/ernie-tiny-bf16.gguf build/demo/ernie-tiny-ccq2.gguf
"""

from __future__ import annotations

import sys
from pathlib import Path

from ernie_llama import Llama
from rich.console import Console
from rich.table import Table

PROMPT = "def read_"
MAX_TOKENS = 48


def main(paths: list[Path]) -> None:
    """Print a table of sizes, then the greedy continuation of PROMPT by every model."""
    console = Console(highlight=False)
    sizes = Table("file", "MB", "of the first", title=f"{paths[0].parent}")
    texts = []
    for path in paths:
        sizes.add_row(
            path.name, f"{path.stat().st_size / 1e6:.1f}", f"{path.stat().st_size / paths[0].stat().st_size:.0%}"
        )
        with Llama(path, n_ctx=512) as llm:
            texts.append(llm(PROMPT, max_tokens=MAX_TOKENS, temperature=0, echo=True)["choices"][0]["text"])
    console.print(sizes)
    for path, text in zip(paths, texts, strict=True):
        console.rule(path.name)
        console.print(text, markup=False)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main([Path(name) for name in sys.argv[1:]])
