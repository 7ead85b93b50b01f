"""The pictures and questions that examples/ernie-vl-tiny is trained on, and the checkpoint's tokenizer."""

from __future__ import annotations

import functools
import io
import random
import string
import zlib
from dataclasses import dataclass

import sentencepiece
from PIL import Image, ImageDraw, ImageFont

DIGITS, LETTERS = string.digits, string.ascii_uppercase
LONGEST = 5
CELL = 28  # pixels of a token's square
SIZES = ((112, 28), (140, 28), (84, 56), (112, 56), (140, 56))  # width, height in pixels: 4 to 10 tokens
FONT_SIZES = range(22, 31)
SHIFT, JITTER = 3, 1  # pixels by which a text and each of its characters leave the middle of their cells
COLORS = {
    "black": (15, 15, 15),
    "white": (240, 240, 240),
    "red": (215, 30, 30),
    "green": (20, 140, 40),
    "blue": (35, 60, 220),
    "yellow": (245, 220, 40),
}
HARD = ({"white", "yellow"}, {"black", "blue"})  # hardly to be read
PAIRS = [(text, ground) for text in COLORS for ground in COLORS if text != ground and {text, ground} not in HARD]

BEGIN, END = "<|begin_of_sentence|>", "<|end_of_sentence|>"
# The vision tokens are the last of the vocabulary, as in ERNIE's.
IMAGE, IMAGE_START, IMAGE_END = "<|image@placeholder|>", "<|IMAGE_START|>", "<|IMAGE_END|>"
VISION_TOKENS = (
    IMAGE,
    IMAGE_START,
    IMAGE_END,
    "<|VIDEO_START|>",
    "<|VIDEO_END|>",
    "<|LOC_0|>",
    "<|LOC_1|>",
    "<|LOC_2|>",
)
VOCAB = 512
FIRST_VISION = VOCAB - len(VISION_TOKENS)

READ, COLOR = "What is written here?", "What color is the text?"

CHAT_TEMPLATE = """\
{{- '<|begin_of_sentence|>' -}}
{%- set pictures = namespace(count=0) -%}
{%- for message in messages -%}
    {%- if message['role'] == 'assistant' -%}
        {{- 'Assistant: ' + message['content'] + '<|end_of_sentence|>' -}}
    {%- else -%}
        {{- 'User: ' if message['role'] == 'user' else '' -}}
        {%- if message['content'] is string -%}
            {{- message['content'] -}}
        {%- else -%}
            {%- for part in message['content'] -%}
                {%- if part['type'] in ('image', 'image_url') -%}
                    {%- set pictures.count = pictures.count + 1 -%}
                    {{- 'Picture ' ~ pictures.count ~ ':<|IMAGE_START|><|image@placeholder|><|IMAGE_END|>' -}}
                {%- elif part['type'] == 'text' -%}
                    {{- part['text'] -}}
                {%- endif -%}
            {%- endfor -%}
        {%- endif -%}
        {{- '\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'Assistant: ' -}}
{%- endif -%}
"""


@dataclass(frozen=True)
class Picture:
    """A drawn picture, what is written on it and in what colour."""

    image: Image.Image
    text: str
    color: str


def held_out(text: str) -> bool:
    """Whether a text is kept for tests: one in eight, by its checksum. Training draws none of them."""
    return zlib.crc32(text.encode()) % 8 == 0


def random_text(rng: random.Random, characters: str, length: int, test: bool) -> str:
    """A number or a word for training, or of those kept for tests."""
    while True:
        text = "".join(rng.choices(characters, k=length))
        if held_out(text) == test:
            return text


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font."""
    found = ImageFont.load_default(size)
    if not isinstance(found, ImageFont.FreeTypeFont):
        raise RuntimeError("Pillow was built without FreeType, which its own font needs")
    return found


def draw(rng: random.Random, text: str, size: tuple[int, int]) -> Picture:
    """Write `text` somewhere on a picture of `size` (width, height) in pixels: a character to a cell, roughly."""
    foreground, background = rng.choice(PAIRS)
    image = Image.new("RGB", size, COLORS[background])
    pen = ImageDraw.Draw(image)
    used = font(rng.choice(FONT_SIZES))
    column, row = rng.randrange(size[0] // CELL - len(text) + 1), rng.randrange(size[1] // CELL)
    x = CELL * column + CELL // 2 + rng.randint(-SHIFT, SHIFT)
    y = CELL * row + CELL // 2 + rng.randint(-SHIFT, SHIFT)
    for i, character in enumerate(text):
        center = (x + CELL * i + rng.randint(-JITTER, JITTER), y)
        pen.text(center, character, font=used, fill=COLORS[foreground], anchor="mm")
    return Picture(image, text, foreground)


def placeholder(number: int, tokens: int) -> str:
    """What stands in the prompt for the picture of that number."""
    return f"Picture {number}:{IMAGE_START}{IMAGE * tokens}{IMAGE_END}"


def prompt(content: str) -> str:
    """A conversation of one question, up to the answer."""
    return f"{BEGIN}User: {content}\nAssistant: "


def make_tokenizer() -> bytes:
    """A SentencePiece model of the characters, the bytes and the few words that the prompts have."""
    words = [prompt(f"Picture 1:Picture 2:{question}") for question in (READ, COLOR, *map(read_of, (1, 2)), "Write ")]
    corpus = [line.removeprefix(BEGIN) for line in [*words, *COLORS] for _ in range(20)]
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_writer=out,
        model_type="bpe",
        vocab_size=440,
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=[BEGIN, END],
        required_chars=DIGITS + string.ascii_letters + ".,:;?!'+-=",
        minloglevel=2,
    )
    return out.getvalue()


def read_of(number: int) -> str:
    """The question about one of several pictures."""
    return f"What is written in picture {number}?"


class Tokenizer:
    """Text to ids, the vision tokens included."""

    def __init__(self, model: bytes) -> None:
        self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        if self._pieces.vocab_size() > FIRST_VISION:
            raise ValueError(f"{self._pieces.vocab_size()} pieces, expected at most {FIRST_VISION}")

    def encode(self, text: str) -> list[int]:
        """Ids of `text`."""
        for i, token in enumerate(VISION_TOKENS):
            if token in text:
                before, after = text.split(token, 1)
                return [*self.encode(before), FIRST_VISION + i, *self.encode(after)]
        ids: list[int] = self._pieces.encode(text)
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of `ids` below the vision tokens."""
        text: str = self._pieces.decode([i for i in ids if i < FIRST_VISION])
        return text
