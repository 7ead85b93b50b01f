"""Show what the files that `make demo` has converted weigh, and what each reads on images.

python examples/demo.py MODEL.gguf... IMAGE.png...

The mmproj of a model lies beside it as MODEL.mmproj.
"""

from __future__ import annotations

import sys
from pathlib import Path

from ernie_llama import Llama, load_local_image
from rich.console import Console
from rich.table import Table

QUESTION = "What is written here?"


def read(model: Path, images: list[Path]) -> list[str]:
    """The answer of the model in this file to QUESTION, for every image."""
    mmproj = model.with_suffix(".mmproj")
    with Llama(model, mmproj_path=mmproj, image_loader=load_local_image, n_ctx=512) as llm:
        contents = [
            [{"type": "image_url", "image_url": str(image)}, {"type": "text", "text": QUESTION}] for image in images
        ]
        answers = [
            llm.create_chat_completion([{"role": "user", "content": content}], temperature=0, max_tokens=16)
            for content in contents
        ]
    return [answer["choices"][0]["message"]["content"] or "" for answer in answers]


def main(paths: list[Path]) -> None:
    """Print a column for each model and a line for each image."""
    models = [path for path in paths if path.suffix == ".gguf"]
    images = [path for path in paths if path.suffix != ".gguf"]
    table = Table(QUESTION, box=None)
    for model in models:
        table.add_column(model.name, justify="right")
    table.add_row("", *(f"{model.stat().st_size / 1e6:.1f} MB" for model in models))
    columns = [read(model, images) for model in models]
    for image, *answers in zip(images, *columns, strict=True):
        table.add_row(image.name, *answers)
    Console(highlight=False).print(table)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main([Path(name) for name in sys.argv[1:]])
