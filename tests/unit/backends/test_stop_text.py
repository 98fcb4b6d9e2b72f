"""A text ends before the first stop string, and only a possible start of one is held back."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llm_magic.backends.stop_strings import StopText

LETTERS = st.text("abc\n", max_size=12)
STOPS = st.lists(st.text("abc\n", min_size=1, max_size=3), max_size=3)


def feed(stop: StopText, pieces: list[str]) -> str:
    parts = [stop.feed(piece) for piece in pieces]
    return "".join([*parts, stop.flush()])


def pieces_of(text: str, positions: list[int]) -> list[str]:
    ends = [0, *sorted(min(position, len(text)) for position in positions), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(ends)]


def before_stop(text: str, stops: list[str]) -> str:
    """Return the text before the stop string that is complete first; of two, the longer."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


@given(LETTERS, st.lists(st.integers(0, 12), max_size=6), STOPS)
@example("abc", [2], ["abc", "b"])
@example("abc", [], ["abc", "b"])
@example("aab", [1, 2], ["ab"])
def test_stop_string_ends_the_text_however_it_is_split(
    text: str, positions: list[int], stops: list[str]
) -> None:
    stop = StopText(stops)
    whole = before_stop(text, stops)
    assert feed(stop, pieces_of(text, positions)) == whole
    assert stop.reached == any(s in text for s in stops)


@given(LETTERS, st.lists(st.integers(0, 12), max_size=6), st.text("abc\n", min_size=1, max_size=3))
def test_single_stop_string_ends_at_first_occurrence(
    text: str, positions: list[int], stop: str
) -> None:
    assert feed(StopText([stop]), pieces_of(text, positions)) == text.partition(stop)[0]


def test_only_a_possible_stop_string_is_held_back() -> None:
    stop = StopText(["\n\n", "END"])
    assert [stop.feed(piece) for piece in ["a", "\n", "b", "EN", "X"]] == [
        "a",
        "",
        "\nb",
        "",
        "ENX",
    ]
    assert stop.feed("E") == ""
    assert stop.flush() == "E"
    assert stop.flush() == ""


def test_nothing_is_returned_after_a_stop_string() -> None:
    stop = StopText(["."])
    assert stop.feed("a.b") == "a"
    assert stop.reached
    assert (stop.feed("c"), stop.flush()) == ("", "")


@pytest.mark.parametrize("stops", [[], [""]])
def test_text_passes_without_stop_strings(stops: list[str]) -> None:
    stop = StopText(stops)
    assert (stop.feed("a"), stop.feed("b"), stop.flush(), stop.reached) == ("a", "b", "", False)
