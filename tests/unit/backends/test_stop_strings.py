"""An answer ends before the first stop string, and only a possible start of one is held back."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llm_magic.backends.stop_strings import StopText
from llm_magic.errors import IncompleteReply, Interrupted
from llm_magic.session import Session
from llm_magic.types import Chunk, Usage
from tests.fault_server import CHAT, FaultServer
from tests.http_server import HttpServer
from tests.kernels import within_a_second
from tests.ollama_server import OllamaServer
from tests.remote_sessions import (
    OLLAMA_CHAT,
    chat_path,
    last,
    questions,
    session_on,
    still_works,
)
from tests.scripted import read, stop_when
from tests.until import until
from tests.wire import (
    Hold,
    Pause,
    Reset,
    Slow,
    Step,
    delta,
    json_answer,
    ndjson,
    sse,
    sse_words,
    usage,
)

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


# --- servers that include a stop string in their answer, or go on after it ---


@pytest.fixture(params=["vllm", "openai", "instructlab", "ollama"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def server(backend: str) -> Iterator[HttpServer]:
    with OllamaServer() if backend == "ollama" else FaultServer() as running:
        yield running


@pytest.fixture
def session(server: HttpServer, backend: str) -> Iterator[Session]:
    with session_on(server, backend) as made:
        yield made


def streamed(server: HttpServer, *texts: str, end: bool = True, finish: str = "stop") -> list[Step]:
    """Return a streamed answer in the protocol of a server."""
    if isinstance(server, FaultServer):
        chunks = [*map(delta, texts), *([delta(finish=finish), usage(3, 7)] if end else [])]
        return sse(*chunks, done=end)
    objects = [{"message": {"content": text}, "done": False} for text in texts]
    last_one = {"message": {}, "done": True, "done_reason": finish,
                "prompt_eval_count": 3, "eval_count": 7}  # fmt: skip
    return ndjson(*objects, *([last_one] if end else []))


@pytest.mark.parametrize(
    ("texts", "stop", "text"),
    [
        (["one END"], ["END"], "one "),
        (["one ", "E", "N", "D"], ["END"], "one "),
        (["one EN", "D"], ["END"], "one "),
        (["one EEN", "DEND"], ["END"], "one E"),
        (["one EN", "TER"], ["END"], "one ENTER"),
        (["one EN"], ["END"], "one EN"),
        (["one\n", "\n"], ["\n\n"], "one"),
        (["one\n"], ["\n\n"], "one\n"),
        (["a b c"], ["c", "b"], "a "),
        (["END"], ["END"], ""),
        (["one Ü", "BER"], ["ÜBER"], "one "),
        (["<think>a</think>", "one END"], ["END"], "one "),
    ],
    ids=["whole", "letters", "split", "again", "other", "half", "lines", "half-lines", "first-of-two",
         "at-once", "unicode", "reasoning"],
)  # fmt: skip
def test_stop_string_of_a_server_is_not_shown_however_it_is_split(
    session: Session, server: HttpServer, texts: list[str], stop: list[str], text: str
) -> None:
    server.will(chat_path(server), *streamed(server, *texts))
    reply = session.generate("?", stop=stop)
    assert (reply.text, reply.finish_reason, reply.usage) == (text, "stop", Usage(3, 7, None))
    connections = server.connections
    still_works(session)
    assert server.connections == connections


def test_connection_of_server_that_goes_on_is_closed(session: Session, server: HttpServer) -> None:
    hold = Hold()
    script = streamed(server, "one EN", "D two", " three", end=False)
    server.will(chat_path(server), *script, hold)
    reply = session.generate("?", stop=["END"])
    assert (reply.text, reply.finish_reason) == ("one ", "stop")
    assert questions(server)[0].left.wait(within_a_second())
    still_works(session)


@pytest.mark.parametrize(
    "after", [Hold(), Slow(b" " * 6000, 0.01), Reset()], ids=["hold", "trickle", "reset"]
)
def test_server_that_does_not_end_after_stop_string_is_closed_soon(
    session: Session, server: HttpServer, after: Step
) -> None:
    server.will(chat_path(server), *streamed(server, "one ", "END", end=False), after)
    began = time.monotonic()
    reply = session.generate("?", stop=["END"])
    assert time.monotonic() - began < within_a_second()
    assert (reply.text, reply.finish_reason) == ("one ", "stop")
    still_works(session)


def test_stop_string_at_length_limit_is_the_end(session: Session, server: HttpServer) -> None:
    server.will(chat_path(server), *streamed(server, "one END", finish="length"))
    assert session.generate("?", stop=["END"]).finish_reason == "stop"


def test_only_the_start_of_a_stop_string_of_a_server_is_held_back(
    session: Session, server: HttpServer
) -> None:
    server.will(chat_path(server), *streamed(server, "one two", " thr", "ee E", "lse"))
    texts = [chunk.text for chunk in session.stream("?", stop=["END"]) if chunk.text]
    assert texts == ["one two", " thr", "ee ", "Else"]


def test_held_back_text_is_in_an_answer_that_breaks_off(
    session: Session, server: HttpServer
) -> None:
    server.will(chat_path(server), *streamed(server, "one EN", end=False), Pause(0.1), Reset())
    with pytest.raises(IncompleteReply):
        session.generate("?", stop=["END"])
    assert last(session).text == "one EN"


def test_held_back_text_is_in_an_interrupted_answer(session: Session, server: HttpServer) -> None:
    server.will(chat_path(server), *streamed(server, "one ", "EN", end=False), Hold())
    heard = threading.Event()

    def take(chunk: Chunk) -> None:
        if chunk.text:
            # The piece that is held back comes right after this one.
            until(lambda: questions(server)[0].chunks_sent == 2, "the answer does not go on")
            threading.Timer(1, heard.set).start()

    stop_when(heard)
    with pytest.raises(Interrupted):
        read(session.stream("?", stop=("END",)), take)
    assert (last(session).text, last(session).finish_reason) == ("one EN", "cancelled")


def test_stop_string_in_separate_reasoning_does_not_end_the_answer(server: HttpServer) -> None:
    if not isinstance(server, FaultServer):
        return
    with session_on(server) as session:
        server.will(CHAT, *sse(delta(reasoning="a END b"), delta("one"), delta(finish="stop")))
        reply = session.generate("?", stop=["END"])
        assert (reply.reasoning, reply.text) == ("a END b", "one")


def test_answer_in_one_piece_ends_before_stop_string(session: Session, server: HttpServer) -> None:
    message = {"role": "assistant", "content": "one END two"}
    if isinstance(server, FaultServer):
        choice = {"index": 0, "message": message, "finish_reason": "length"}
        server.will(CHAT, *json_answer(200, {"choices": [choice]}))
    else:
        server.will(OLLAMA_CHAT, *json_answer(200, {"message": message, "done": True}))
    reply = session.generate("?", stop=["END"])
    assert (reply.text, reply.finish_reason) == ("one ", "stop")


def test_stop_string_ends_every_answer_of_many(server: HttpServer, session: Session) -> None:
    for _ in range(4):
        server.will(chat_path(server), *streamed(server, "one E", "ND"))

    async def ask() -> list[str]:
        answers = (session.agenerate(prompt, stop=["END"]) for prompt in "abcd")
        return [reply.text for reply in await asyncio.gather(*answers)]

    assert asyncio.run(ask()) == ["one "] * 4


def test_answer_without_stop_strings_is_whole() -> None:
    with FaultServer() as server, session_on(server) as session:
        server.will(CHAT, *sse_words("one ", "END", " two"))
        assert session.generate("?").text == "one END two"
