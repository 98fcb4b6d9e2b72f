"""Tokens to text as they come give what decoding them all at once gives; stops cut it."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, cast

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from llm_magic.backends.local.generation.detokenizer import Detokenizer
from llm_magic.backends.stop_strings import StopText

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

LETTERS = st.text("abc\n", max_size=12)
STOPS = st.lists(st.text("abc\n", min_size=1, max_size=3), max_size=3)


def feed(stop: StopText, pieces: list[str]) -> str:
    shown = [stop.feed(piece) for piece in pieces]
    return "".join([*shown, stop.flush()])


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(places)]


def ended(text: str, stops: list[str]) -> str:
    """Return the text before the stop that is complete first; of two at once, the longer."""
    for end in range(len(text) + 1):
        begins = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if begins:
            return text[: min(begins)]
    return text


@given(LETTERS, st.lists(st.integers(0, 12), max_size=6), STOPS)
@example("abc", [2], ["abc", "b"])
@example("abc", [], ["abc", "b"])
@example("aab", [1, 2], ["ab"])
def test_a_stop_ends_the_text_wherever_it_was_cut(
    text: str, cuts: list[int], stops: list[str]
) -> None:
    stop = StopText(stops)
    whole = ended(text, stops)
    assert feed(stop, pieces_of(text, cuts)) == whole
    assert stop.reached == any(s in text for s in stops)


@given(LETTERS, st.lists(st.integers(0, 12), max_size=6), st.text("abc\n", min_size=1, max_size=3))
def test_one_stop_is_where_it_is_found_first(text: str, cuts: list[int], stop: str) -> None:
    assert feed(StopText([stop]), pieces_of(text, cuts)) == text.partition(stop)[0]


def test_only_what_may_become_a_stop_is_held_back() -> None:
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


def test_after_a_stop_nothing_comes() -> None:
    stop = StopText(["."])
    assert stop.feed("a.b") == "a"
    assert stop.reached
    assert (stop.feed("c"), stop.flush()) == ("", "")


@pytest.mark.parametrize("stops", [[], [""]])
def test_without_stops_text_passes(stops: list[str]) -> None:
    stop = StopText(stops)
    assert (stop.feed("a"), stop.feed("b"), stop.flush(), stop.reached) == ("a", "b", "", False)


# -- tokenizers without a Rust core -------------------------------------------------------------


class ByteTokenizer:
    """One token a byte, and -1 for a special token."""

    calls = 0
    longest = 0

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        self.calls += 1
        self.longest = max(self.longest, len(ids))
        return bytes(i for i in ids if i >= 0).decode("utf-8", errors="replace")


class WordTokenizer:
    """Words with a space before each, which is stripped from the first one, as SentencePiece does."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(f" w{i}" for i in ids if i >= 0)[1:]


def detokenizer(tokenizer: object) -> Detokenizer:
    return Detokenizer(cast("PreTrainedTokenizerBase", tokenizer))


@given(st.text(st.characters(exclude_characters="\ufffd", exclude_categories=["Cs"])))
@example("a😀é日本")
def test_half_characters_wait_for_their_other_half(text: str) -> None:
    slow = detokenizer(ByteTokenizer())
    parts = [slow.step(byte) for byte in text.encode()]
    assert "".join(parts) == text
    assert "\ufffd" not in "".join(parts)


@given(st.lists(st.one_of(st.integers(-1, 255), st.sampled_from("é😀".encode()))))
def test_steps_and_the_rest_are_the_whole_whatever_comes(ids: list[int]) -> None:
    tokenizer = ByteTokenizer()
    slow = detokenizer(tokenizer)
    parts = [slow.step(i) for i in ids]
    assert "".join([*parts, slow.flush()]) == tokenizer.decode(ids, True)
    assert slow.flush() == ""


@given(st.lists(st.integers(0, 9)))
def test_spaces_between_words_stay(ids: list[int]) -> None:
    tokenizer = WordTokenizer()
    slow = detokenizer(tokenizer)
    assert "".join(slow.step(i) for i in ids) == tokenizer.decode(ids, True)


def test_a_special_token_shows_nothing_and_eats_nothing() -> None:
    tokenizer = WordTokenizer()
    slow = detokenizer(tokenizer)
    ids = [1, 2, -1, 3, -1, -1, 4]
    assert "".join(slow.step(i) for i in ids) == tokenizer.decode(ids, True) == "w1 w2 w3 w4"


def test_each_step_costs_the_same() -> None:
    tokenizer = ByteTokenizer()
    slow = detokenizer(tokenizer)
    for byte in b"x" * 500:
        slow.step(byte)
    assert tokenizer.longest <= 3
    assert tokenizer.calls <= 1000


def test_a_space_after_broken_bytes_is_kept() -> None:
    """As tokenizers of SentencePiece have it, which strip the space of a text's first word."""
    from tokenizers import Tokenizer, decoders, models

    vocabulary = {"<unk>": 0, "hello": 1, "▁world": 2, "▁x": 3}
    vocabulary |= {f"<0x{byte:02X}>": 4 + byte for byte in range(256)}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    ids = [1, *(4 + byte for byte in "你".encode()), 4 + 0xF0, 2, 3]
    detokenizer = Detokenizer(tokenizer)
    text = "".join(map(detokenizer.step, ids)) + detokenizer.flush()
    assert text.startswith("hello你")
    assert text.endswith(" world x")
