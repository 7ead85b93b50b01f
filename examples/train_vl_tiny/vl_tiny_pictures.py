"""The pictures and questions that examples/ernie-vl-tiny is trained on, and the checkpoint's tokenizer."""

from __future__ import annotations

import io
import random
import string
import zlib
from dataclasses import dataclass

import sentencepiece
from PIL import Image, ImageDraw, ImageFont

DIGITS = "0123456789"
LONGEST = 4
CELL = 28  # pixels of a token's square
SIZES = ((112, 28), (84, 56), (112, 56))  # width, height in pixels: 4 to 8 tokens
COLORS = {
    "black": (15, 15, 15),
    "white": (240, 240, 240),
    "red": (215, 30, 30),
    "green": (20, 140, 40),
    "blue": (35, 60, 220),
    "yellow": (245, 220, 40),
}

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
    """A drawn picture: what is written on it, in what colour, and in which 28-pixel cell it begins."""

    image: Image.Image
    text: str
    color: str
    column: int
    row: int

    def cells(self) -> list[str]:
        """The digit that each cell shows, in raster order; "" for none."""
        columns, rows = self.image.width // CELL, self.image.height // CELL
        shown = [""] * (columns * rows)
        begin = self.row * columns + self.column
        shown[begin : begin + len(self.text)] = self.text
        return shown


def held_out(text: str) -> bool:
    """Whether a text is kept for tests: one in eight, by its checksum. Training draws none of them."""
    return zlib.crc32(text.encode()) % 8 == 0


def random_text(rng: random.Random, longest: int, test: bool = False) -> str:
    """A number of 1 to `longest` digits for training, or of those kept for tests."""
    while True:
        text = "".join(rng.choices(DIGITS, k=rng.randint(1, longest)))
        if held_out(text) == test:
            return text


def draw(rng: random.Random, text: str, size: tuple[int, int]) -> Picture:
    """Write `text` somewhere on a picture of `size` (width, height) in pixels: a digit to a cell, roughly."""
    foreground, background = rng.sample(sorted(COLORS), 2)
    while {foreground, background} in ({"white", "yellow"}, {"black", "blue"}):  # hardly to be read
        foreground, background = rng.sample(sorted(COLORS), 2)
    image = Image.new("RGB", size, COLORS[background])
    pen = ImageDraw.Draw(image)
    font = ImageFont.load_default(rng.randint(22, 30))
    column, row = rng.randrange(size[0] // CELL - len(text) + 1), rng.randrange(size[1] // CELL)
    dx, dy = rng.randint(-3, 3), rng.randint(-3, 3)
    for i, digit in enumerate(text):
        center = (CELL * (column + i) + 14 + dx + rng.randint(-1, 1), CELL * row + 14 + dy)
        pen.text(center, digit, font=font, fill=COLORS[foreground], anchor="mm")
    return Picture(image, text, foreground, column, row)


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
