"""Every way to ask the session, and what it records of an answer."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd
import pytest

from llm_magic.errors import (
    GenerationFailed,
    GenerationStopped,
    Interrupted,
    LLMMagicError,
    ModelNotLoaded,
    OptionError,
)
from llm_magic.session import Session
from llm_magic.session.requests import Request
from llm_magic.types import Chunk, Message, Reply, Usage
from tests.kernels import ROOT
from tests.scripted import (
    Hang,
    Pause,
    ScriptedBackend,
    scripted_session,
    show,
    stop_when,
    whole_answer,
)


@pytest.fixture
def scripted() -> Iterator[tuple[Session, ScriptedBackend]]:
    with scripted_session() as pair:
        yield pair


def generate(session: Session, prompt: str, **about: str) -> str:
    return session.generate(prompt, **about).text  # type: ignore[arg-type]


def stream(session: Session, prompt: str, **about: str) -> str:
    return "".join(c.text for c in session.stream(prompt, **about))  # type: ignore[arg-type]


def agenerate(session: Session, prompt: str, **about: str) -> str:
    async def cell() -> str:
        return (await session.agenerate(prompt, **about)).text  # type: ignore[arg-type]

    return asyncio.run(cell())


def astream(session: Session, prompt: str, **about: str) -> str:
    async def cell() -> str:
        chunks = session.astream(prompt, **about)  # type: ignore[arg-type]
        return "".join([chunk.text async for chunk in chunks])

    return asyncio.run(cell())


WAYS = pytest.mark.parametrize("ask", [generate, stream, agenerate, astream])
Pair = tuple[Session, ScriptedBackend]


@WAYS
def test_every_way_to_ask_gives_the_same(scripted: Pair, ask: Callable[..., str]) -> None:
    session, backend = scripted
    assert ask(session, "one two three", system="be brief", temperature=0.1) == "one two three"
    (call,) = backend.requests
    assert call.messages == (Message("system", "be brief"), Message("user", "one two three"))
    assert (call.name, call.config.temperature, call.outcome) == ("tiny", 0.1, "whole")
    reply = session.last
    assert reply is not None
    assert (reply.text, reply.finish_reason) == ("one two three", "stop")
    assert reply.messages == call.messages


def test_reply_has_all_that_the_backend_reported(scripted: Pair) -> None:
    session, backend = scripted
    backend.will(
        Chunk(usage=Usage(12, 0, 4)),
        Chunk(reasoning="hmm ", tokens=1, time=1.0),
        Chunk(text="Paris", tokens=1, time=2.0),
        Chunk(text=".", tokens=2, time=5.0),
        Chunk(finish_reason="length", usage=Usage(12, 4, 4)),
    )
    reply = session.generate("Which town?")
    assert str(reply) == reply.text == "Paris."
    assert (reply.model, reply.backend, reply.finish_reason) == ("tiny", "local", "length")
    assert (reply.reasoning, reply.usage) == ("hmm", Usage(12, 4, 4))
    assert reply.messages == (Message("user", "Which town?"),)
    assert reply.timing.tokens_per_s == pytest.approx(3 / 4)  # after the first, over 4 seconds
    assert reply.timing.total_s > 0
    assert session.last is reply
    with pytest.raises(AttributeError):
        reply.text = "other"  # type: ignore[misc]


def test_what_the_backend_does_not_report_is_none(scripted: Pair) -> None:
    session, backend = scripted
    backend.will(Chunk(text="x", finish_reason="stop"))
    reply = session.generate("?")
    assert reply.usage == Usage(None, None, None)
    assert (reply.timing.first_token_s, reply.timing.tokens_per_s) == (None, None)


@WAYS
def test_stream_without_finish_reason_is_truncated(scripted: Pair, ask: Callable[..., str]) -> None:
    session, backend = scripted
    backend.will("half an ", "ans")
    assert ask(session, "?") == "half an ans"
    assert session.last is not None
    assert session.last.finish_reason == "truncated"


@WAYS
def test_an_error_in_the_middle_keeps_the_text_and_is_raised(
    scripted: Pair, ask: Callable[..., str]
) -> None:
    session, backend = scripted
    backend.will("half", GenerationFailed("The model broke."))
    with pytest.raises(GenerationFailed, match="The model broke"):
        ask(session, "?", chat="c")
    assert session.last is not None
    assert (session.last.text, session.last.finish_reason) == ("half", "truncated")
    assert session.chats.all() == []
    assert backend.requests[0].outcome == "failed"


def test_an_interrupt_keeps_the_text_and_the_model(scripted: Pair) -> None:
    session, backend = scripted
    hang, seen = Hang(), threading.Event()

    def read() -> None:
        for chunk in session.stream("?", chat="stream"):
            if chunk.text == "an answer":
                seen.set()

    ways: list[tuple[threading.Event, Callable[[], object]]] = [
        (hang.reached, lambda: session.generate("?", chat="generate")),
        (seen, read),
    ]
    for event, ask in ways:
        backend.will("half ", "an answer", hang)
        stop_when(event)
        with pytest.raises(
            Interrupted, match="Stopped after 2 tokens; the answer so far"
        ) as caught:
            ask()
        assert caught.value.reply is session.last
        assert isinstance(session.last, Reply)
        assert (session.last.text, session.last.finish_reason) == ("half an answer", "cancelled")
        assert backend.requests[-1].outcome == "closed"
    assert session.status().status == "Ready"
    assert [chat.turns[0].answer.content for chat in session.chats.all()] == ["half an answer"] * 2


@pytest.mark.parametrize(
    ("script", "message", "completion"),
    [
        ([], "Stopped before the first word.", None),
        ([Chunk(usage=Usage(9, 0, 0))], "Stopped before the first word.", 0),
        ([Chunk(text="half")], "Stopped after 4 characters; the answer so far", None),
        ([Chunk(reasoning="hm")], "Stopped after 2 characters; the answer so far", None),
        ([Chunk(text="half", usage=Usage(9, 0))], "Stopped after 4 characters; ", None),
        ([Chunk(text="half", usage=Usage(9, 2))], "Stopped after 2 tokens; the answer so far", 2),
        (["one"], "Stopped after 1 token; the answer so far", 1),
    ],
)
def test_missing_token_count_is_not_taken_for_no_text(
    scripted: Pair, script: list[str | Chunk], message: str, completion: int | None
) -> None:
    session, backend = scripted
    hang = Hang()
    backend.will(*script, hang)
    stop_when(hang.reached)
    with pytest.raises(Interrupted, match=f"^{re.escape(message)}") as caught:
        session.generate("?")
    reply = caught.value.reply
    assert reply is not None
    assert reply.usage.completion_tokens == completion


def test_job_reports_characters_where_tokens_are_unknown(scripted: Pair) -> None:
    session, backend = scripted
    hang = Hang()
    backend.will(Chunk(text="x" * 331), hang)
    job = session.ask(Request("?"), background=True)
    assert hang.reached.wait(5)
    assert (job.state, job.tokens, job.amount) == ("running", None, "331 characters")
    assert ", 331 characters so far, " in repr(job)
    job.cancel()
    with pytest.raises(GenerationStopped, match=r"^Job 1 was stopped after 331 characters"):
        job.result(5)
    assert job.amount == "331 characters"


def test_job_is_read_no_faster_than_it_is_displayed(scripted: Pair) -> None:
    session, backend = scripted
    pieces = list(map(str, range(20_000)))
    backend.will(*[step for piece in pieces for step in (piece, Pause(0))])
    job = session.ask(Request("?"), background=True)
    updates = job.updates()
    next(updates)
    time.sleep(1)
    assert len(job.text) < 40_000, "the answer waits for its display"
    for _ in updates:
        pass
    assert job.result(10).text == "".join(pieces)


def test_leaving_a_stream_early_stops_the_model(scripted: Pair) -> None:
    session, backend = scripted
    backend.will("a", "b", Hang())
    for chunk in session.stream("?"):
        if chunk.text == "b":
            break
    assert backend.requests[0].outcome == "closed"
    assert session.last is not None
    assert (session.last.text, session.last.finish_reason) == ("ab", "cancelled")


def test_cancelling_the_task_stops_the_model(scripted: Pair) -> None:
    session, backend = scripted

    async def cell() -> None:
        hang = Hang()
        backend.will("a", hang)
        task = asyncio.create_task(session.agenerate("?"))
        await asyncio.to_thread(hang.reached.wait, 5)
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cell())
    assert backend.requests[0].outcome == "closed"
    assert session.last is not None
    assert (session.last.text, session.last.finish_reason) == ("a", "cancelled")


def test_display_that_fails_stops_the_model_and_leaves_what_was_shown(scripted: Pair) -> None:
    session, backend = scripted
    backend.will("a", Hang())
    response = session.ask(Request("?", chat="c"))
    with pytest.raises(ZeroDivisionError) as caught:
        show(response, lambda: 1 / 0 if response.text else None)
    assert backend.requests[0].outcome == "closed"
    assert (response.state, response.error) == ("failed", caught.value)
    assert response.reply is session.last
    assert response.reply is not None
    assert (response.reply.text, response.reply.finish_reason) == ("a", "truncated")
    assert session.chats.all() == []


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("temperature", " Use llm.generation.temperature."),
        ("temprature", ' Did you mean "llm.generation.temperature"?'),
        ("genrate", ' Did you mean "llm.generate"?'),
        ("chat", ' Use llm.generate(PROMPT, chat="NAME").'),
        ("colour", ""),
        ("_colour", ""),
    ],
)
def test_unknown_attribute_suggests_the_one_that_was_meant(
    scripted: Pair, name: str, advice: str
) -> None:
    session, _ = scripted
    with pytest.raises(AttributeError) as caught:
        getattr(session, name)
    assert str(caught.value) == f"'Session' object has no attribute {name!r}.{advice}"
    if not name.startswith("_"):
        with pytest.raises(AttributeError, match=re.escape(str(caught.value))):
            setattr(session, name, 0)
        assert name not in vars(session)


def test_dry_run_of_a_text_is_that_of_its_request(scripted: Pair) -> None:
    session, backend = scripted
    dry = session.dry_run("Hi", system="s", temperature=0)
    assert dry.messages == (Message("system", "s"), Message("user", "Hi"))
    assert (dry.config.temperature, backend.requests) == (0, [])


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (
            "?",
            {"format": "json"},
            "'format' is not an option. For JSON, call json() of the reply.",
        ),
        (
            "?",
            {"stream": True},
            "'stream' is not an option. Call llm.stream, which yields the answer",
        ),
        ("", {"messages": []}, "The prompt comes first, without a name: llm.generate(MESSAGES)."),
        ("", {"prompts": []}, 'For several prompts: llm.map("{item}", PROMPTS).'),
        ("", {}, "The prompt is empty. It comes first, as in llm.generate(PROMPT)."),
        ("?", {"sytem": "s"}, "'sytem' is not an option. Did you mean \"system\"?"),
        ("?", {"colour": 1}, "Available: model, system, chat, trim, max_new_tokens, "),
        (["Hello", "World"], {}, "For several: [llm.generate(prompt) for prompt in prompts]"),
    ],
)
def test_wrong_call_shows_what_to_write(
    scripted: Pair, prompt: Any, options: dict[str, Any], message: str
) -> None:
    session, backend = scripted
    with pytest.raises(OptionError) as caught:
        session.generate(prompt, **options)
    assert message in str(caught.value)
    assert backend.requests == []


@WAYS
@pytest.mark.parametrize("prompt", ["", "  \n "])
def test_an_empty_prompt_is_refused(scripted: Pair, ask: Callable[..., str], prompt: str) -> None:
    session, backend = scripted
    with pytest.raises(OptionError, match="The prompt is empty"):
        ask(session, prompt)
    assert (backend.requests, session.last) == ([], None)


@WAYS
def test_wrong_options_are_refused_before_anything_is_sent(
    scripted: Pair, ask: Callable[..., str]
) -> None:
    session, backend = scripted
    wrong: list[tuple[type[LLMMagicError], dict[str, object]]] = [
        (OptionError, {"temperature": 9}),
        (OptionError, {"temprature": 0}),
        (OptionError, {"extra": {"unknown": 1}}),
        (ModelNotLoaded, {"model": "other"}),
    ]
    for kind, options in wrong:
        with pytest.raises(kind):
            ask(session, "?", **options)
    assert backend.requests == []
    assert ask(session, "?", extra={"known": 1}) == "?"


def test_a_list_of_messages_is_a_prompt_too(scripted: Pair) -> None:
    session, backend = scripted
    turns = [Message("user", "a"), Message("assistant", "b"), Message("user", "c d")]
    assert session.generate(turns, system="s").text == "c d"
    assert backend.requests[0].messages == (Message("system", "s"), *turns)
    with pytest.raises(OptionError, match="The prompt is empty"):
        session.generate([])


@WAYS
def test_system_prompt_of_the_session_is_sent_where_a_prompt_has_none(
    scripted: Pair, ask: Callable[..., str]
) -> None:
    session, backend = scripted
    session.generation.system = "polite"
    for about in ({}, {"system": "own"}, {"system": ""}):
        ask(session, "a", **about)
    ask(session, [{"role": "system", "content": "own"}, {"role": "user", "content": "a"}])
    systems = [[m.content for m in call.messages[:-1]] for call in backend.requests]
    assert systems == [["polite"], ["own"], [""], ["own"]]


@WAYS
def test_messages_may_be_dictionaries_of_role_and_content(
    scripted: Pair, ask: Callable[..., str]
) -> None:
    session, backend = scripted
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "c d"}]
    assert ask(session, turns) == "c d"
    assert backend.requests[0].messages == (Message("system", "s"), Message("user", "c d"))


@WAYS
@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        (3, "A prompt cannot be of type int."),
        (None, "A prompt cannot be of type NoneType."),
        (b"x", "A prompt cannot be of type bytes."),
        (float("nan"), "The prompt is nan, a missing value. Omit such rows first"),
        (pd.NA, "The prompt is <NA>, a missing value."),
        (pd.NaT, "The prompt is NaT, a missing value."),
        (2.5, "A prompt cannot be of type float."),
        ({"role": "user", "content": "x"}, "A prompt cannot be of type dict."),
        (["a", "b"], "A call has one prompt. For several: "),
        ([Message("user", "a"), 3], "The prompt, message 2: "),
        ([{"role": "nobody", "content": "x"}], "The prompt, message 1: the role 'nobody' is not one of"),
        ([{"role": ["user"], "content": "x"}], "The prompt, message 1: the role "),
        ([{"role": "user", "content": None}], "The prompt, message 1: its content is not text."),
        ([{"role": "user", "content": "x", "images": ["y"]}], "The prompt, message 1: a chat is only text"),
        ([Message("user", 3)], "The prompt, message 1: its content is not text."),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_prompt_that_is_neither_text_nor_messages_is_refused(
    scripted: Pair, ask: Callable[..., str], prompt: Any, reason: str
) -> None:
    session, backend = scripted
    with pytest.raises(OptionError) as caught:
        ask(session, prompt)
    assert str(caught.value).startswith(reason)
    assert "\n" not in str(caught.value)
    assert (backend.requests, session.last) == ([], None)


def test_the_named_model_answers(scripted: Pair) -> None:
    session, backend = scripted
    session.load("org/other", name="alias", keep=True)
    assert session.generate("?", model="tiny").model == "tiny"
    assert session.generate("?").model == "alias"
    assert [call.name for call in backend.requests] == ["tiny", "alias"]


def test_several_threads_ask_at_once(scripted: Pair) -> None:
    session, backend = scripted
    texts: dict[str, str] = {}

    def ask(prompt: str) -> None:
        texts[prompt] = session.generate(prompt).text

    for _ in range(4):
        backend.will(Pause(0.02), Chunk(text="scripted", finish_reason="stop"))
    prompts = [f"question {n}" for n in range(8)]
    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    echoed = {prompt: text for prompt, text in texts.items() if text != "scripted"}
    assert sorted(texts) == prompts
    assert len(echoed) == 4
    assert all(prompt == text for prompt, text in echoed.items())


@WAYS
def test_half_characters_are_replaced_in_what_is_sent(
    scripted: Pair, ask: Callable[..., str]
) -> None:
    session, backend = scripted
    backend.will(*whole_answer("half \udc9f"))
    ask(session, "a\ud800b \ud83d\ude00", system="\udfff", chat="c")
    ask(session, "next", system="\udfff", chat="c")
    contents = [m.content for m in backend.requests[-1].messages]
    assert contents == ["\ufffd", "a\ufffdb \U0001f600", "half \ufffd", "next"]
    dry = session.dry_run(Request("\ud800"))
    assert [m.content for m in dry.messages] == ["\ufffd"]


@WAYS
@pytest.mark.parametrize(
    "options",
    [
        {"stop": ""}, {"stop": ["a", ""]}, {"stop": "\ud800"}, {"chat": "\ud800"}, {"chat": "a\0"},
        {"model": "\ud800"}, {"seed": -(10**5000)}, {"temperature": "x" * 10**6},
    ],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
def test_hostile_option_is_one_short_line(
    scripted: Pair, ask: Callable[..., str], options: dict[str, Any]
) -> None:
    session, backend = scripted
    with pytest.raises((OptionError, ModelNotLoaded)) as caught:
        ask(session, "?", **options)
    assert len(str(caught.value)) < 400
    str(caught.value).encode()
    assert (backend.requests, session.chats.all()) == ([], [])


@pytest.mark.parametrize("name", ["\ud800", "a\0b", "a\nb"], ids=ascii)
def test_model_is_not_given_an_unprintable_name(scripted: Pair, name: str) -> None:
    session, _backend = scripted
    for load in (session.load, session.load_later):
        with pytest.raises(OptionError, match="cannot be the name of a model"):
            load("org/other", name=name)
    assert session.status().active_model == "tiny"


def test_dir_has_what_the_documentation_describes(scripted: Pair) -> None:
    session, _ = scripted
    page = (ROOT / "docs" / "reference" / "python.md").read_text("utf-8")
    described = set(re.findall(r":: Session\.(\w+)", page))
    assert {name for name in dir(session) if name[0] != "_"} == described
    section = page.partition("response.Response()")[2].partition("jobs.Jobs()")[0]
    described = {
        word for line in re.findall(r":members: (.*)", section) for word in line.split(", ")
    }
    described |= set(re.findall(r"attribute:: (\w+)", section))
    assert {name for name in dir(session.ask(Request("?"))) if name[0] != "_"} == described


def test_values_have_a_short_repr(scripted: Pair) -> None:
    session, _ = scripted
    session.generate("one", chat="zoo")
    assert repr(session.chats["zoo"]) == "<Chat zoo: 1 turn>"
    assert repr(session.status()) == "<Status: Ready, tiny; %llm_status shows it as a table>"
    chunks = session.stream("two")
    assert "for chunk in llm.stream(…): print(chunk.text" in repr(chunks)
    assert [chunk.text for chunk in chunks if chunk.text]
