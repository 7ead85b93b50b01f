"""Ask a vision-language model about pictures: python examples/pictures.py MODEL.gguf MMPROJ.gguf PICTURE..."""

import argparse
from pathlib import Path

from ernie_llama import Llama, load_local_image

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", type=Path)
parser.add_argument("mmproj", type=Path)
parser.add_argument("pictures", type=Path, nargs="+", help="PNG, JPEG, GIF or BMP")
parser.add_argument("--question", default="What is written here?")
options = parser.parse_args()

with Llama(options.model, mmproj_path=options.mmproj, image_loader=load_local_image, n_ctx=4096) as llm:
    for path in options.pictures:
        content = [{"type": "image_url", "image_url": str(path)}, {"type": "text", "text": options.question}]
        answer = llm.create_chat_completion([{"role": "user", "content": content}], temperature=0, max_tokens=256)
        print(f"{path}  {options.question}  {answer['choices'][0]['message']['content']}")
