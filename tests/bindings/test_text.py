"""Text from token bytes: stop strings and split characters."""

from __future__ import annotations

import pytest
from ernie_llama._chat.text_stream import TextStream
from hypothesis import given
from hypothesis import strategies as st


def released(stream: TextStream, pieces: list[bytes]) -> list[str]:
    return [stream.feed(piece) for piece in pieces]


def test_text_without_stop_is_released_at_once() -> None:
    stream = TextStream()
    assert released(stream, [b"def", b" main", b"():"]) == ["def", " main", "():"]
    assert stream.flush() == ""


def test_a_stop_string_that_spans_tokens_is_never_shown() -> None:
    stream = TextStream(["\n\nclass"])
    assert released(stream, [b"pass\n", b"\ncl", b"ass A"]) == ["pass", "", ""]
    assert stream.stopped
    assert stream.flush() == ""


def test_text_that_only_resembled_a_stop_string_comes_later() -> None:
    stream = TextStream(["abc"])
    assert released(stream, [b"xab", b"ab", b"d"]) == ["x", "ab", "abd"]
    assert released(stream, [b"ab"]) == [""]
    assert not stream.stopped
    assert stream.flush() == "ab"


def test_the_earliest_stop_string_wins() -> None:
    stream = TextStream(["three", "two"])
    assert stream.feed(b"one two three") == "one "
    assert stream.stopped


def test_empty_stop_strings_are_ignored() -> None:
    stream = TextStream([""])
    assert stream.feed(b"text") == "text"
    assert not stream.stopped


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_split_character_comes_complete(cut: int) -> None:
    stream = TextStream()
    emoji = "🎉".encode()
    assert released(stream, [emoji[:cut], emoji[cut:]]) == ["", "🎉"]


def test_an_incomplete_character_at_the_end_is_dropped_and_invalid_bytes_are_replaced() -> None:
    stream = TextStream()
    assert stream.feed(b"a\xffb\xe6\x97") == "a\ufffdb"
    assert stream.flush() == ""


@given(st.text("ab🎉\n", max_size=20), st.lists(st.text("ab🎉", min_size=1, max_size=3), max_size=3), st.data())
def test_any_split_gives_the_text_before_the_first_stop(text: str, stop: list[str], data: st.DataObject) -> None:
    encoded = text.encode()
    stream = TextStream(stop)
    shown = ""
    while encoded and not stream.stopped:
        n = data.draw(st.integers(1, len(encoded)))
        shown += stream.feed(encoded[:n])
        encoded = encoded[n:]
    shown += stream.flush()
    # Fed in pieces, the stop string that is complete first ends the text, wherever others would begin.
    assert text.startswith(shown)
    assert not any(word in shown for word in stop)
    assert stream.stopped == any(word in text for word in stop)
    if not stream.stopped:
        assert shown == text
