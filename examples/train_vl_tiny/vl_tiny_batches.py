"""Endless batches of drawn pictures with questions and answers, made on the device that trains.

A GPU would wait for pictures that Pillow draws. So Pillow draws each character once in every size; pictures are then
put together from those as `draw` does it, all pictures of a batch at once.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw
from vl_tiny_pictures import (
    CELL,
    COLOR,
    COLORS,
    DIGITS,
    END,
    FONT_SIZES,
    JITTER,
    LETTERS,
    LONGEST,
    PAIRS,
    READ,
    SHIFT,
    SIZES,
    Tokenizer,
    font,
    held_out,
    placeholder,
    prompt,
    read_of,
)

IGNORED = -100
CHARACTERS = DIGITS + LETTERS
BLANK = len(CHARACTERS)
KINDS = [(DIGITS, length) for length in range(1, LONGEST + 1)] + [(LETTERS, length) for length in range(1, LONGEST + 1)]
SHARES = [1.0, 4.0, 3.0, 3.0, 3.0, 0.5, 0.5, 1.0, 1.5, 1.5]  # of KINDS
HALF = 24  # pixels from a character's middle to the border of its mask
TEXTS = 60_000  # tried of each kind
COLOR_SHARE, PAIR_SHARE, REPEAT_SHARE = 0.15, 0.2, 0.03


@dataclass(frozen=True)
class Pictures:
    """Pictures of one size: patches [n, patches, 588] in 0 to 255, and the token [n, cells] that each cell shows."""

    patches: torch.Tensor
    cells: torch.Tensor
    grid: tuple[int, int, int]
    colors: torch.Tensor  # [n], numbers of COLORS


@dataclass(frozen=True)
class Batch:
    """Prompts of one length with the pictures that they show, first pictures first, and what follows."""

    ids: torch.Tensor  # [n, tokens]
    labels: torch.Tensor  # [n, tokens]
    pictures: list[Pictures]


def masks() -> torch.Tensor:
    """[font sizes, characters + 1, 48, 48] coverage of 0 to 255, the character in the middle; the last is blank."""
    out = torch.zeros(len(FONT_SIZES), BLANK + 1, 2 * HALF, 2 * HALF)
    for i, size in enumerate(FONT_SIZES):
        for j, character in enumerate(CHARACTERS):
            image = Image.new("L", (2 * HALF, 2 * HALF))
            ImageDraw.Draw(image).text((HALF, HALF), character, font=font(size), fill=255, anchor="mm")
            out[i, j] = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(2 * HALF, 2 * HALF)
    return out


def all_texts(test: bool) -> list[torch.Tensor]:
    """For each of KINDS texts for training, or those kept for tests: [n, LONGEST] numbers of their characters."""
    rng = random.Random("texts")
    out = []
    for characters, length in KINDS:
        tried = sorted({"".join(rng.choices(characters, k=length)) for _ in range(TEXTS)})
        rows = [[CHARACTERS.index(each) for each in text] for text in tried if held_out(text) == test]
        out.append(torch.nn.functional.pad(torch.tensor(rows).reshape(-1, length), (0, LONGEST - length), value=BLANK))
    return out


class Drawer:
    """Draws batches, of texts for training or of those kept for tests."""

    def __init__(self, tokenizer: Tokenizer, device: str, test: bool = False) -> None:
        self.tokenizer, self.device = tokenizer, device
        self.rng = random.Random(f"test {test}")
        texts = all_texts(test)
        self.masks = masks().to(device)
        self.texts = torch.cat(texts).to(device)
        self.counts = torch.tensor([len(each) for each in texts], device=device)
        self.shares = torch.tensor(SHARES) * torch.tensor([len(each) > 0 for each in texts])
        self.rgb = torch.tensor(list(COLORS.values()), dtype=torch.float32, device=device)
        names = list(COLORS)
        self.pairs = torch.tensor([(names.index(a), names.index(b)) for a, b in PAIRS], device=device)
        self.character_ids = torch.tensor([*(self._one(each) for each in CHARACTERS), 0], device=device)
        self.end = self._one(END)
        answers = [torch.tensor(tokenizer.encode(name + END)) for name in names]
        padded = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=IGNORED)
        self.color_answers = padded.to(device)

    def _one(self, text: str) -> int:
        (found,) = self.tokenizer.encode(text)
        return found

    def _below(self, count: int, below: int | torch.Tensor) -> torch.Tensor:
        """`count` random whole numbers, each less than `below`."""
        return (torch.rand(count, device=self.device) * below).long()

    def choose(self, n: int, longest: int, kind: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Texts [n, LONGEST] of at most `longest` characters, or all of a kind, and their lengths."""
        lengths = torch.tensor([length for _, length in KINDS])
        if kind is None:
            kinds = torch.multinomial(self.shares * (lengths <= longest), n, replacement=True)
        else:
            kinds = torch.full((n,), kind)
        kinds = kinds.to(self.device)
        begin = self.counts.cumsum(0) - self.counts
        return self.texts[begin[kinds] + self._below(n, self.counts[kinds])], lengths.to(self.device)[kinds]

    def draw(self, characters: torch.Tensor, lengths: torch.Tensor, size: tuple[int, int]) -> Pictures:
        """The texts, each somewhere on a picture of `size`."""
        (width, height), n = size, len(lengths)
        columns, rows = width // CELL, height // CELL
        column, row = self._below(n, columns + 1 - lengths), self._below(n, rows)
        pair, used = self.pairs[self._below(n, len(self.pairs))], self._below(n, len(FONT_SIZES))
        dx, dy = (self._below(n, 2 * SHIFT + 1) - SHIFT for _ in range(2))
        ink, image = (
            self.rgb[pair[:, 0], :, None, None],
            self.rgb[pair[:, 1], :, None, None].expand(-1, -1, height, width),
        )
        across, down = torch.arange(width, device=self.device), torch.arange(height, device=self.device)
        y = (down - (CELL * row + CELL // 2 + dy)[:, None] + HALF).clamp(0, 2 * HALF - 1)
        for i in range(LONGEST):
            middle = CELL * (column + i) + CELL // 2 + dx + self._below(n, 2 * JITTER + 1) - JITTER
            x = (across - middle[:, None] + HALF).clamp(0, 2 * HALF - 1)
            mask = self.masks[used[:, None, None], characters[:, i, None, None], y[:, :, None], x[:, None, :]]
            image = (image + (ink - image) * mask[:, None] / 255).round()
        patches = image.reshape(n, 3, rows, 2, 14, columns, 2, 14).permute(0, 2, 5, 3, 6, 1, 4, 7)
        at = torch.arange(rows * columns, device=self.device) - (row * columns + column)[:, None]
        shown = self.character_ids[characters].gather(1, at.clamp(0, LONGEST - 1))
        cells = torch.where((at >= 0) & (at < lengths[:, None]), shown, 0)
        return Pictures(patches.reshape(n, -1, 588), cells, (1, 2 * rows, 2 * columns), pair[:, 0])

    def answers(self, characters: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Tokens [n, LONGEST + 1] of the texts, each with an end."""
        at = torch.arange(LONGEST + 1, device=self.device)
        ids = torch.nn.functional.pad(self.character_ids[characters], (0, 1))
        ids = torch.where(at < lengths[:, None], ids, IGNORED)
        return torch.where(at == lengths[:, None], self.end, ids)

    def _tokens(self, text: str) -> torch.Tensor:
        return torch.tensor(self.tokenizer.encode(text), device=self.device)

    def batch(self, start: str | torch.Tensor, answers: torch.Tensor, pictures: list[Pictures]) -> Batch:
        """Answers after `start`, which is one text for all or tokens for each."""
        begin = self._tokens(start).expand(len(answers), -1) if isinstance(start, str) else start
        ids = torch.cat([begin, answers.clamp(min=0)], 1)
        return Batch(ids, torch.cat([torch.full_like(begin, IGNORED), answers], 1), pictures)

    def read(self, n: int, longest: int = LONGEST, kind: int | None = None, plain: bool = False) -> Batch:
        """What is written on a picture; the picture comes first if `plain`."""
        length = longest if kind is None else KINDS[kind][1]
        size = self.rng.choice([each for each in SIZES if each[0] >= CELL * length or kind is None])
        characters, lengths = self.choose(n, min(longest, size[0] // CELL), kind)
        pictures = self.draw(characters, lengths, size)
        shown = placeholder(1, pictures.cells.shape[1])
        start = shown + READ if plain or self.rng.random() < 0.8 else READ + shown
        return self.batch(prompt(start), self.answers(characters, lengths), [pictures])

    def color(self, n: int) -> Batch:
        """The colour of the text on a picture."""
        size = self.rng.choice(SIZES)
        pictures = self.draw(*self.choose(n, size[0] // CELL), size)
        shown = placeholder(1, pictures.cells.shape[1])
        start = shown + COLOR if self.rng.random() < 0.8 else COLOR + shown
        return self.batch(prompt(start), self.color_answers[pictures.colors], [pictures])

    def pair(self, n: int) -> Batch:
        """What is written on the first or the second of two pictures; the question comes last, first or between."""
        texts, pictures = [], []
        for _ in range(2):
            size = self.rng.choice(SIZES)
            texts.append(self.choose(n, size[0] // CELL))
            pictures.append(self.draw(*texts[-1], size))
        shown = [placeholder(i + 1, each.cells.shape[1]) for i, each in enumerate(pictures)]
        number = self.rng.randrange(2)
        asked = read_of(number + 1)
        orders = [[*shown, asked], [*shown, asked], [asked, *shown], [shown[0], asked, shown[1]]]
        return self.batch(prompt("".join(self.rng.choice(orders))), self.answers(*texts[number]), pictures)

    def repeat(self, n: int) -> Batch:
        """A text to repeat, without a picture."""
        characters, lengths = self.choose(n, LONGEST, self.rng.randrange(len(KINDS)))
        start, end = (
            torch.tensor(self.tokenizer.encode(part), device=self.device) for part in prompt("Write \0.").split("\0")
        )
        text = self.character_ids[characters[:, : int(lengths[0])]]
        begin = torch.cat([start.expand(n, -1), text, end.expand(n, -1)], 1)
        answers = self.answers(characters, lengths)
        ids = torch.cat([begin, answers.clamp(min=0)], 1)
        return Batch(ids, torch.cat([torch.full_like(begin, IGNORED), answers], 1), [])

    def mixed(self, n: int) -> Batch:
        """One of all kinds."""
        chance = self.rng.random()
        if chance < COLOR_SHARE:
            return self.color(n)
        if chance < COLOR_SHARE + PAIR_SHARE:
            return self.pair(n)
        return self.repeat(n) if chance < COLOR_SHARE + PAIR_SHARE + REPEAT_SHARE else self.read(n)
