"""Ask a vision-language model about videos: python examples/video.py MODEL.gguf MMPROJ.gguf VIDEO..."""

import argparse
from pathlib import Path

from ernie_llama import Llama, load_local_video

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", type=Path)
parser.add_argument("mmproj", type=Path)
parser.add_argument("videos", type=Path, nargs="+", help="what ffmpeg reads: MP4, WebM, ...")
parser.add_argument("--question", default="What happens here?")
options = parser.parse_args()

with Llama(options.model, mmproj_path=options.mmproj, video_loader=load_local_video, n_ctx=32768) as llm:
    for path in options.videos:
        content = [{"type": "video_url", "video_url": str(path)}, {"type": "text", "text": options.question}]
        answer = llm.create_chat_completion([{"role": "user", "content": content}], temperature=0, max_tokens=256)
        print(f"{path}  {options.question}  {answer['choices'][0]['message']['content']}")
