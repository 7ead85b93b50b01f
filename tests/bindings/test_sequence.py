"""What a `Sequence` says of the KV cache: ids, positions and logits. These tests need no library."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence as Ids
from typing import Any

import pytest
from ernie_llama._engine.images import Images
from ernie_llama._engine.sequence import Sequence
from ernie_llama._engine.vision import Image
from ernie_llama._lib.handle import Handle


class FakeContext:
    """A context of 16 cells in batches of 4 that notes what is asked of it."""

    n_ctx, n_batch, pointer = 16, 4, None

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.fails = False

    def decode(self, tokens: Ids[int], n_past: int, n_outputs: int) -> None:
        self.log.append(("decode", list(tokens), n_past, n_outputs))
        if self.fails:
            raise RuntimeError("llama_decode failed")

    def keep(self, n_past: int) -> None:
        self.log.append(("keep", n_past))

    def logits_row(self, row: int) -> int:
        return row


class FakeEncoder:
    """An encoder whose images are evaluated at once."""

    def decode(self, image: Image, _context: object, n_past: int, _n_batch: int) -> int:
        return n_past + image.positions


@pytest.fixture
def context() -> FakeContext:
    return FakeContext()


@pytest.fixture
def images() -> Images:
    return Images(FakeEncoder())  # type: ignore[arg-type]


@pytest.fixture
def sequence(context: FakeContext, images: Images) -> Sequence:
    return Sequence(context, images, None)  # type: ignore[arg-type]


def image(digest: str = "0123456789abcdef") -> Image:
    """An image of four cells and two positions."""
    return Image(digest, 4, 2, Handle("image", ctypes.c_void_p(1), lambda _: None))


def test_a_text_is_evaluated_in_batches(sequence: Sequence, context: FakeContext) -> None:
    sequence.extend([5, 6, 7, 8, 9, 10])
    assert context.log == [("decode", [5, 6, 7, 8], 0, 1), ("decode", [9, 10], 4, 1)]
    assert (sequence.ids, sequence.position) == ([5, 6, 7, 8, 9, 10], 6)


def test_what_does_not_fit_changes_nothing(sequence: Sequence, context: FakeContext) -> None:
    sequence.extend([5] * 10)
    with pytest.raises(ValueError, match=r"Requested tokens \(17\) exceed context window of 16"):
        sequence.extend([5] * 7)
    assert len(sequence) == 10


def test_an_image_takes_fewer_positions_than_cells(sequence: Sequence, images: Images, context: FakeContext) -> None:
    ids = images.ids([5, image(), 6])
    sequence.extend(ids)
    assert sequence.ids == ids == [5, *[ids[1]] * 4, 6]
    assert ids[1] < 0
    assert sequence.position == 1 + 2 + 1
    assert context.log[-1] == ("decode", [6], 3, 1)


def test_keeping_a_prefix_forgets_by_position(sequence: Sequence, images: Images, context: FakeContext) -> None:
    sequence.extend(images.ids([5, image(), 6, 7]))
    sequence.keep(6)
    assert (len(sequence), sequence.position) == (6, 4)
    sequence.keep(1)
    assert (len(sequence), sequence.position) == (1, 1)
    assert context.log[-2:] == [("keep", 4), ("keep", 1)]


def test_the_logits_are_those_of_the_last_token_until_it_is_forgotten(sequence: Sequence) -> None:
    sequence.extend([5, 6, 7], n_outputs=3)
    assert sequence.logits() == -1  # the row
    sequence.row = -3
    sequence.cut(1)  # the last two were a rejected draft
    assert sequence.logits() == -3
    sequence.keep(1)
    with pytest.raises(RuntimeError, match="there are no logits before eval"):
        sequence.logits()


def test_there_are_no_logits_after_an_image(sequence: Sequence, images: Images) -> None:
    sequence.extend(images.ids([5, image()]))
    assert sequence.row is None


def test_a_batch_that_fails_is_forgotten(sequence: Sequence, context: FakeContext) -> None:
    sequence.extend([5, 6])
    context.fails = True
    with pytest.raises(RuntimeError, match="llama_decode failed"):
        sequence.extend([7, 8])
    assert (sequence.ids, sequence.position, sequence.row) == ([5, 6], 2, None)
    assert context.log[-1] == ("keep", 2)


def test_an_image_needs_an_encoder_and_its_pixels(sequence: Sequence, images: Images) -> None:
    ids = list(images.ids([image()]))  # a list of its own: the prompt that owned the pixels is gone
    with pytest.raises(ValueError, match="known by its cached state only: pass the messages again"):
        sequence.extend(ids)
    images.encoder = None
    with pytest.raises(ValueError, match=r"the prompt holds an image: pass Llama\(mmproj_path=...\)"):
        sequence.extend(ids)
    assert len(sequence) == 0


def test_two_images_with_the_same_beginning_of_a_digest_have_ids_of_their_own(images: Images) -> None:
    ids = images.ids([image("0123456789abcdef"), image("01234567ffffffff"), image("0123456789abcdef")])
    assert ids[0] == ids[8] != ids[4]


def test_a_saved_sequence_is_restored_with_the_images_of_another_llama(images: Images) -> None:
    ids = images.ids([5, image("01234567ffffffff"), 6])
    other = Images(None)
    other.ids([image("0123456789abcdef")])  # takes the id
    restored = other.restore(ids, images.sizes(ids))
    assert restored[0] == 5
    assert restored[1] != ids[1]
    assert other.n_positions(restored) == images.n_positions(ids) == 4
