"""Endless batches of drawn clips with questions about what comes first, made on the device that trains.

Every frame bears its time, as the video processor of ERNIE-4.5-VL writes it.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from PIL import Image
from vl_tiny_batches import IGNORED, KINDS, Batch, Drawer, Seen, patches_of
from vl_tiny_films import CLIP_SIZES, FRAMES, RATES
from vl_tiny_pictures import (
    CELL,
    DIGITS,
    FIRST,
    LAST,
    LETTERS,
    MOVE,
    READ,
    SIDES,
    placeholder,
    prompt,
    stamp,
    video_placeholder,
)

QUESTIONS = (FIRST, LAST, MOVE)
SHARES = [0.3, 0.4, 0.3]  # of QUESTIONS
CHANGING = [KINDS.index(kind) for kind in ((DIGITS, 2), (DIGITS, 2), (DIGITS, 3), (LETTERS, 2), (LETTERS, 3))]
PICTURE_SHARE = 0.15  # of clips that a picture stands beside
LUMA = (0.299, 0.587, 0.114)


@functools.cache
def stamps(size: tuple[int, int], frames: int, rate: int, file: Path | None) -> torch.Tensor:
    """[2, frames, height, width] shares of black and of white in the stamps of a clip's frames, in a font's glyphs."""
    out = []
    for number in range(frames):
        images = [Image.new("RGB", size, (value,) * 3) for value in (0, 255)]
        for image in images:
            stamp(image, number / rate, file)
        low, high = (torch.tensor(list(image.getdata(0)), dtype=torch.float32) / 255 for image in images)
        out.append(torch.stack([1 - high, low]).reshape(2, size[1], size[0]))
    return torch.stack(out, 1)


def compressed(frames: torch.Tensor) -> torch.Tensor:
    """Frames [..., 3, height, width] with a colour per 2x2 pixels, as video files have them."""
    luma = (frames * torch.tensor(LUMA, device=frames.device)[:, None, None]).sum(-3, keepdim=True)
    color = torch.nn.functional.avg_pool2d((frames - luma).flatten(0, -4), 2).repeat_interleave(2, -1)
    return (luma + color.repeat_interleave(2, -2).reshape(frames.shape)).clamp(0, 255).round()


class Filmer:
    """Draws batches of clips with what a `Drawer` has, its texts among it."""

    def __init__(self, drawer: Drawer, fonts: list[Path | None]) -> None:
        self.drawer, self.fonts = drawer, fonts
        self.directions = drawer.endings(["left", "right"])

    def _below(self, count: int, below: int | torch.Tensor) -> torch.Tensor:
        return (torch.rand(count, device=self.drawer.device) * below).long()

    def film(self, frames: torch.Tensor, cells: torch.Tensor, rate: int) -> Seen:
        """Frames [n, frames, 3, height, width] with their times, compressed or not, and as many as pairs have.

        `cells` [n, frames, cells]: the token that each cell of a frame shows.
        """
        rng, (n, count, _, height, width) = self.drawer.rng, frames.shape
        if rng.random() < 0.7:
            frames = compressed(frames)
        black, white = stamps((width, height), count, rate, rng.choice(self.fonts)).to(frames.device)[:, None, :, None]
        frames = (frames * (1 - black - white) + 255 * white).round()
        if count % 2:
            frames, cells = (torch.cat([each, each[:, -1:]], 1) for each in (frames, cells))
        first, second = cells[:, ::2], cells[:, 1::2]
        shown = torch.where(first == second, first, IGNORED).flatten(1)
        patches = patches_of(frames.flatten(0, 1)).reshape(n, -1, 588)
        return Seen(patches, shown, (frames.shape[1], height // 14, width // 14))

    def change(self, n: int) -> tuple[Seen, list[torch.Tensor]]:
        """A text that another replaces, each in two frames or more, and answers that give the first and the last."""
        drawer, rng = self.drawer, self.drawer.rng
        size, count, kind, pair = rng.choice(CLIP_SIZES), rng.choice(FRAMES), rng.choice(CHANGING), drawer.colors(n)
        texts = [drawer.choose(n, KINDS[kind][1], kind) for _ in range(2)]
        (before, cells_before), (after, cells_after) = (drawer.paint(*text, size, pair) for text in texts)
        at = 2 + self._below(n, count - 3)
        later = torch.arange(count, device=at.device) >= at[:, None]
        frames = torch.where(later[..., None, None, None], after[:, None], before[:, None])
        cells = torch.where(later[..., None], cells_after[:, None], cells_before[:, None])
        return self.film(frames, cells, rng.choice(RATES)), [drawer.answers(*text) for text in texts]

    def move(self, n: int) -> tuple[Seen, torch.Tensor]:
        """A square that crosses the clip to the left or to the right, and the answers."""
        drawer, rng = self.drawer, self.drawer.rng
        (width, height), count = rng.choice(CLIP_SIZES), rng.choice(FRAMES)
        ink, ground = drawer.rgb[drawer.colors(n)].unbind(1)
        side, direction = SIDES[0] + self._below(n, len(SIDES)), self._below(n, 2)
        room = width - side  # of which it crosses three quarters or more
        step = (room - self._below(n, room // 4 + 1)) // (count - 1)
        begin, top = self._below(n, room - step * (count - 1) + 1), self._below(n, height - side + 1)
        number = torch.arange(count, device=drawer.device)
        left = begin[:, None] + step[:, None] * torch.where(direction[:, None] == 1, number, count - 1 - number)
        across, down = torch.arange(width, device=drawer.device), torch.arange(height, device=drawer.device)
        inside_x = (across >= left[..., None]) & (across < (left + side[:, None])[..., None])
        inside_y = (down >= top[:, None]) & (down < (top + side)[:, None])
        inside = (inside_x[:, :, None, :] & inside_y[:, None, :, None])[:, :, None]
        frames = torch.where(inside, ink[:, None, :, None, None], ground[:, None, :, None, None])
        cells = torch.full((n, count, width // CELL * (height // CELL)), IGNORED, device=drawer.device)
        return self.film(frames, cells, rng.choice(RATES)), self.directions[direction]

    def ask(self, n: int, question: str, alone: bool = False) -> Batch:
        """A question about a clip, perhaps with a picture before or behind it."""
        if question == MOVE:
            clip, answers = self.move(n)
        else:
            clip, (first, last) = self.change(n)
            answers = last if question == LAST else first
        rng, drawer, seen = self.drawer.rng, self.drawer, [clip]
        shown = [video_placeholder(1, clip.cells.shape[1])]
        if not alone and rng.random() < PICTURE_SHARE:
            size, where = rng.choice(CLIP_SIZES[:2]), rng.randrange(2)
            text = drawer.choose(n, size[0] // CELL)
            picture = drawer.draw(*text, size)
            seen.insert(where, picture)
            shown.insert(where, placeholder(1, picture.cells.shape[1]))
            if rng.random() < 0.4:
                question, answers = READ, drawer.answers(*text)
        start = "".join([*shown, question] if alone or rng.random() < 0.85 else [question, *shown])
        return drawer.batch(prompt(start), answers, seen)

    def mixed(self, n: int) -> Batch:
        """One of all questions."""
        return self.ask(n, self.drawer.rng.choices(QUESTIONS, SHARES)[0])
