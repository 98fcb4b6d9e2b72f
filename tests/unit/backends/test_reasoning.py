"""Reasoning between tags is separate from the text, however an answer is split into pieces."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Iterator, Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llm_magic.backends.reasoning import ReasoningSplitter, split_reasoning
from llm_magic.errors import GenerationFailed, Interrupted
from llm_magic.types import Chunk, Usage
from tests.scripted import Hang, scripted_session, stop_when

USAGE = Usage(5, 9, 1)
END = Chunk(finish_reason="stop", usage=USAGE)
TEXTS = st.lists(
    st.sampled_from(
        ["<think>", "</think>", "\n", "\n\n", " ", "a", "Paris", "<", ">", "/", "think", "</",
         "<think", "\n</thin"]
    ),
    max_size=12,
).map("".join)  # fmt: skip


def pieces_of(text: str, positions: Sequence[int]) -> list[str]:
    """Return `text` in pieces."""
    ends = sorted({0, len(text), *(n % (len(text) + 1) for n in positions)})
    return [text[a:b] for a, b in itertools.pairwise(ends)]


def fed(*chunks: Chunk, flush: bool = False) -> list[Chunk]:
    """Return what a splitter makes of the chunks of an answer."""
    splitter = ReasoningSplitter()
    out = [piece for chunk in chunks for piece in splitter.feed(chunk)]
    return [*out, *(splitter.flush() if flush else ())]


def joined(chunks: Sequence[Chunk]) -> tuple[str, str]:
    """Return the reasoning and the text of an answer, put together as a reply does it."""
    reasoning, text = "", ""
    for chunk in chunks:
        if chunk.ends_reasoning:
            reasoning, text = reasoning + text, ""
        reasoning, text = reasoning + chunk.reasoning, text + chunk.text
    return reasoning, text


def split(*texts: str) -> tuple[str, str]:
    """Return the reasoning and the text of an answer in pieces."""
    return joined(fed(*(Chunk(text=text) for text in texts), END))


@pytest.mark.parametrize(
    ("answer", "reasoning", "text"),
    [
        ("Paris.", "", "Paris."),
        ("<think>Hm.</think>Paris.", "Hm.", "Paris."),
        ("<think>\nHm.\n</think>\n\nParis.\n", "\nHm.\n", "Paris.\n"),
        ("\n <think>Hm.</think> Paris.", "Hm.", "Paris."),
        ("<think></think>Paris.", "", "Paris."),
        ("<think>\n\n</think>\n\nParis.", "\n\n", "Paris."),
        ("<think>no end", "no end", ""),
        ("<think>no end</thin", "no end</thin", ""),
        ("<think>", "", ""),
        ("<think>a <think> b</think>c", "a <think> b", "c"),
        ("Hm.\n</think>\n\nParis.", "Hm.\n", "Paris."),
        ("</think>Paris.", "", "Paris."),
        ("\n\n</think>\n\nParis.", "", "Paris."),
        ("Hm.\n</think>", "Hm.\n", ""),
        ("Paris.\n", "", "Paris.\n"),
        ("<thin", "", "<thin"),
        ("</thinker> is none", "", "</thinker> is none"),
        ("  indented", "", "  indented"),
        ("", "", ""),
    ],
)
def test_reasoning_ends_at_its_closing_tag(answer: str, reasoning: str, text: str) -> None:
    assert split(answer) == (reasoning, text)
    assert split(*answer) == (reasoning, text)


@pytest.mark.parametrize(
    "answer",
    [
        "Write <think> first and </think> last.",
        "Write\n<think>\nHm.\n</think>\nfor that.",
        "`<think>` opens,\n</think>\ncloses.",
        "A line ends with </think>\nand goes on.",
        "<thinking>is another tag</thinking>",
        "a < b and\n</b> too",
    ],
)
def test_answer_about_tags_stays_whole(answer: str) -> None:
    assert split(answer) == split(*answer) == ("", answer)


def test_tags_after_the_reasoning_are_text() -> None:
    answer = "<think>Hm.</think>Use\n</think>\nand <think> as you like.</think>"
    assert split(answer) == split(*answer) == ("Hm.", answer.removeprefix("<think>Hm.</think>"))


@given(TEXTS, st.lists(st.integers(0, 100), max_size=10))
@example("a\n</think>b", [1, 2, 5])
@example("a</think>\n</think>b", [1])
@example("a <think>\n</think>b", [4])
@example("\n</think", [1])
def test_reasoning_and_text_do_not_depend_on_the_pieces(text: str, positions: list[int]) -> None:
    whole = split(text)
    assert split(*pieces_of(text, positions)) == whole
    assert split(*text) == whole


@given(TEXTS, st.lists(st.integers(0, 100), max_size=10))
def test_only_one_pair_of_tags_and_blanks_are_omitted(text: str, positions: list[int]) -> None:
    reasoning, answer = split(*pieces_of(text, positions))
    left = sorted(text)
    for character in reasoning + answer:
        left.remove(character)
    tags = "<think></think>"
    assert sorted("".join(left).replace("\n", "").replace(" ", "")) in (
        sorted(""), sorted("<think>"), sorted("</think>"), sorted(tags),
    )  # fmt: skip


@given(TEXTS, st.lists(st.integers(0, 100), max_size=10))
def test_counts_and_the_end_are_neither_lost_nor_doubled(text: str, positions: list[int]) -> None:
    pieces = pieces_of(text, positions)
    chunks = [Chunk(text=piece, tokens=2, time=1.0 + n) for n, piece in enumerate(pieces)]
    out = fed(*chunks, END)
    assert sum(chunk.tokens for chunk in out) == 2 * len(pieces)
    assert [c.usage for c in out if c.usage] == [USAGE]
    assert [c.finish_reason for c in out if c.finish_reason] == ["stop"]
    assert out[-1].finish_reason == "stop"
    assert {c.time for c in out} <= {0.0, *(c.time for c in chunks)}


def test_answer_in_one_piece_with_its_end_is_split_too() -> None:
    whole = Chunk(text="<think>Hm.</think>\nParis", finish_reason="length", usage=USAGE, tokens=7)
    out = fed(whole)
    assert joined(out) == ("Hm.", "Paris")
    assert [(c.finish_reason, c.usage, c.tokens) for c in out] == [
        (None, None, 0),
        ("length", USAGE, 7),
    ]
    for text, reasoning, answer in (
        ("\n", "", "\n"),
        ("<think>a", "a", ""),
        ("a\n</think>", "a\n", ""),
    ):
        out = fed(Chunk(text=text, finish_reason="stop", usage=USAGE, tokens=3))
        assert joined(out) == (reasoning, answer)
        assert [c.usage for c in out if c.usage] == [USAGE]
        assert sum(c.tokens for c in out) == 3


def test_words_are_not_held_back() -> None:
    splitter = ReasoningSplitter()
    for text in ("Paris", " is", " a town\nof", " <b>"):
        assert [c.text for c in splitter.feed(Chunk(text=text))] == [text]
    splitter = ReasoningSplitter()
    assert list(splitter.feed(Chunk(text="<think>"))) in ([], [Chunk()])
    assert [c.reasoning for c in splitter.feed(Chunk(text="so"))] == ["so"]


def test_reasoning_that_a_server_separates_passes_through() -> None:
    chunks = [
        Chunk(reasoning="Hm.", tokens=1),
        Chunk(text="<think>", tokens=1),
        Chunk(text="is a tag\n</think>", tokens=1),
        END,
    ]
    assert fed(*chunks) == chunks


def test_notices_pass_through_and_change_nothing() -> None:
    notice = Chunk(notice="429, attempt 2 of 3 after 1 s")
    chunks = [notice, Chunk(text="<think>a"), notice, Chunk(text="</think>b"), END]
    out = fed(*chunks)
    assert joined(out) == ("a", "b")
    assert [c.notice for c in out if c.notice] == [notice.notice] * 2


@pytest.mark.parametrize("before", ["<", "<think", "\n\n</thi"])
def test_text_before_the_reasoning_of_a_server_is_not_lost(before: str) -> None:
    chunks = [Chunk(text=before), Chunk(reasoning="Hm."), Chunk(text="Paris."), END]
    assert joined(fed(*chunks)) == ("Hm.", f"{before}Paris.")


def test_chunk_with_text_and_reasoning_keeps_both() -> None:
    chunks = [Chunk(text="<think>a"), Chunk(text="b", reasoning="c"), END]
    reasoning, text = joined(fed(*chunks))
    assert (sorted(reasoning), text) == (["a", "b", "c"], "")


def source(*steps: Chunk | Exception) -> AsyncGenerator[Chunk, None]:
    """Return an answer that follows a script."""

    async def answer() -> AsyncGenerator[Chunk, None]:
        for step in steps:
            if isinstance(step, Exception):
                raise step
            yield step

    return answer()


async def taken(chunks: AsyncGenerator[Chunk, None], into: list[Chunk]) -> None:
    """Put the chunks of an answer into a list, until it ends or breaks."""
    async for chunk in chunks:
        into.append(chunk)


@pytest.mark.parametrize(
    ("held", "reasoning", "text"),
    [("<thi", "", "<thi"), ("a\n</th", "", "a\n</th"), ("<think>a</th", "a</th", ""),
     ("<think>a", "a", ""), ("\n", "", "\n")],
)  # fmt: skip
def test_held_back_text_is_yielded_when_an_answer_breaks_off(
    held: str, reasoning: str, text: str
) -> None:
    out: list[Chunk] = []
    failing = source(Chunk(text=held), GenerationFailed("It broke."))
    with pytest.raises(GenerationFailed, match="It broke"):
        asyncio.run(taken(split_reasoning(failing, []), out))
    assert joined(out) == (reasoning, text)


@pytest.mark.parametrize("held", ["<thi", "a\n</th", "\n"])
def test_held_back_text_is_yielded_at_an_end_without_a_reason(held: str) -> None:
    out: list[Chunk] = []
    asyncio.run(taken(split_reasoning(source(Chunk(text=held)), []), out))
    assert joined(out) == ("", held)


@pytest.mark.parametrize("held", ["a\n</th", "a\n"])
def test_held_back_text_is_in_an_interrupted_answer(held: str) -> None:
    with scripted_session() as (session, backend):
        hang = Hang()
        backend.will(held, hang)
        stop_when(hang.reached)
        with pytest.raises(Interrupted):
            session.generate("?")
        assert session.last is not None
        assert session.last.text == held


def test_source_is_closed_when_its_reader_leaves() -> None:
    closed: list[bool] = []

    async def answer() -> AsyncGenerator[Chunk, None]:
        try:
            yield Chunk(text="a")
            yield Chunk(text="b")
        finally:
            closed.append(True)

    async def leave() -> None:
        chunks = split_reasoning(answer(), [])
        assert (await anext(chunks)).text == "a"
        await chunks.aclose()

    asyncio.run(leave())
    assert closed == [True]


def many(text: str, size: int) -> Iterator[Chunk]:
    """Yield a long text in small pieces."""
    return (Chunk(text=text) for _ in range(size))


def test_long_answer_is_not_stored_a_second_time() -> None:
    splitter = ReasoningSplitter()
    for chunk in many("word \n", 5000):
        list(splitter.feed(chunk))
    stored = [value for value in vars(splitter).values() if isinstance(value, str)]
    assert sum(map(len, stored)) < 100
