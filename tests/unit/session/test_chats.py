"""A notebook means what it shows: turns are replaced in place, and what followed them is stale."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_magic.errors import GenerationFailed, Interrupted, OptionError, ServerUnreachable
from llm_magic.session import Session
from llm_magic.session.cell_keys import Cell
from llm_magic.session.chats import Chats, Context, Turn
from llm_magic.session.requests import Request
from llm_magic.types import Message
from tests.scripted import Hang, ScriptedBackend, scripted_session, stop_when, whole_answer


class Notebook:
    """Cells with ids, which ask in a chat; every answer is the question in capitals."""

    def __init__(self, session: Session, backend: ScriptedBackend) -> None:
        self.session, self.backend = session, backend

    def ask(self, cell: str, text: str, system: str | None = None, chat: str = "c") -> list[str]:
        """Run a cell; returns what was sent: questions in small letters, answers in capitals."""
        self.backend.will(*whole_answer(text.upper()))
        self.session.ask(Request(text, chat=chat, key=cell, system=system)).result()
        return self.sent()

    def sent(self) -> list[str]:
        return [message.content for message in self.backend.requests[-1].messages]

    def turns(self, chat: str = "c") -> list[str]:
        """Return the questions of a chat, the stale ones in brackets."""
        turns = self.session.chats.get(chat).turns
        return [f"({t.question.content})" if t.stale else t.question.content for t in turns]


@pytest.fixture
def notebook() -> Iterator[Notebook]:
    """Return a notebook whose chat ``c`` has five turns: a to e."""
    with scripted_session() as (session, backend):
        made = Notebook(session, backend)
        for cell in "abcde":
            made.ask(cell, cell)
        yield made


def test_a_question_sees_the_turns_above_it(notebook: Notebook) -> None:
    assert notebook.sent() == ["a", "A", "b", "B", "c", "C", "d", "D", "e"]
    roles = [message.role for message in notebook.backend.requests[-1].messages]
    assert roles == ["user", "assistant"] * 4 + ["user"]
    assert notebook.turns() == ["a", "b", "c", "d", "e"]


def test_cell_run_again_sees_the_turns_above_it_and_makes_those_below_stale(
    notebook: Notebook,
) -> None:
    assert notebook.ask("b", "other") == ["a", "A", "other"]
    assert notebook.turns() == ["a", "other", "(c)", "(d)", "(e)"]


def test_a_new_cell_is_sent_no_stale_turn(notebook: Notebook) -> None:
    notebook.ask("b", "other")
    assert notebook.session.chats.context("c", "f").stale == 3
    assert notebook.ask("f", "f") == ["a", "A", "other", "OTHER", "f"]
    assert notebook.turns() == ["a", "other", "(c)", "(d)", "(e)", "f"]


def test_running_the_stale_cells_from_the_top_makes_all_fresh_again(notebook: Notebook) -> None:
    notebook.ask("b", "other")
    notebook.ask("f", "f")
    assert notebook.ask("c", "c") == ["a", "A", "other", "OTHER", "c"]
    assert notebook.turns() == ["a", "other", "c", "(d)", "(e)", "(f)"]
    assert notebook.ask("d", "d")[-2:] == ["C", "d"]
    notebook.ask("e", "e")
    assert notebook.ask("f", "f") == [
        "a", "A", "other", "OTHER", "c", "C", "d", "D", "e", "E", "f",
    ]  # fmt: skip
    assert notebook.turns() == ["a", "other", "c", "d", "e", "f"]


def test_a_stale_cell_run_before_those_above_it_sees_only_the_fresh_ones(
    notebook: Notebook,
) -> None:
    notebook.ask("b", "other")
    assert notebook.ask("e", "e") == ["a", "A", "other", "OTHER", "e"]
    assert notebook.turns() == ["a", "other", "(c)", "(d)", "e"]
    notebook.ask("c", "c")
    assert notebook.turns() == ["a", "other", "c", "(d)", "(e)"]


def test_the_last_cell_run_twice_in_a_row_is_one_turn(notebook: Notebook) -> None:
    assert notebook.ask("e", "e") == notebook.ask("e", "e")
    assert notebook.turns() == ["a", "b", "c", "d", "e"]


def test_running_all_again_ends_as_the_first_time(notebook: Notebook) -> None:
    first = notebook.sent()
    for cell in "abcde":
        notebook.ask(cell, cell)
        assert notebook.session.chats.context("c", cell).stale == 0, "no run of all has a note"
    assert notebook.sent() == first
    assert notebook.turns() == ["a", "b", "c", "d", "e"]


def test_the_same_cell_in_two_chats_is_a_turn_of_each(notebook: Notebook) -> None:
    assert notebook.ask("b", "b", chat="other") == ["b"]
    assert notebook.turns() == ["a", "b", "c", "d", "e"]
    notebook.ask("a", "new")
    assert notebook.turns("other") == ["b"]


# -- failures ---------------------------------------------------------------------------------


def test_a_run_that_fails_leaves_the_chat_as_it_was(notebook: Notebook) -> None:
    notebook.ask("b", "b")
    before = notebook.turns()
    for script in ((ServerUnreachable("Gone."),), ("half", GenerationFailed("Broken.")), ("cut",)):
        notebook.backend.will(*script)
        request = Request("other", chat="c", key="b")
        if script == ("cut",):
            assert notebook.session.ask(request).result().finish_reason == "truncated"
        else:
            with pytest.raises((ServerUnreachable, GenerationFailed)):
                notebook.session.ask(request).result()
        assert notebook.turns() == before
    with pytest.raises(OptionError):
        notebook.session.ask(Request("  ", chat="c", key="b")).result()
    assert notebook.turns() == before


@pytest.mark.parametrize("text", ["", "half"])
def test_stopped_run_is_a_turn_with_the_text_so_far(notebook: Notebook, text: str) -> None:
    hang = Hang()
    notebook.backend.will(*([text] if text else []), hang)
    stop_when(hang.reached)
    with pytest.raises(Interrupted):
        notebook.session.ask(Request("other", chat="c", key="b")).result()
    if text:
        assert notebook.turns() == ["a", "other", "(c)", "(d)", "(e)"]
        assert notebook.ask("f", "f") == ["a", "A", "other", "half", "f"]
    else:
        assert notebook.turns() == ["a", "b", "c", "d", "e"]


# -- system prompts ---------------------------------------------------------------------------


def test_a_system_prompt_holds_from_its_cell_on(notebook: Notebook) -> None:
    assert notebook.ask("c", "c", system="brief") == ["brief", "a", "A", "b", "B", "c"]
    assert notebook.ask("d", "d")[0] == "brief"
    # Above it nothing has changed.
    assert notebook.ask("b", "b") == ["a", "A", "b"]
    # Its cell is stale, and so is its turn.
    assert notebook.ask("f", "f") == ["a", "A", "b", "B", "f"]
    assert notebook.ask("c", "c", system="long")[0] == "long"
    assert notebook.turns() == ["a", "b", "c", "(d)", "(e)", "(f)"]
    assert notebook.ask("d", "d")[0] == "long"
    assert notebook.session.chats.get("c").system == "long"


def test_an_empty_system_prompt_ends_the_one_before(notebook: Notebook) -> None:
    notebook.ask("a", "a", system="brief")
    # An empty system message: the backend adds none either.
    assert notebook.ask("b", "b", system="") == ["", "a", "A", "b"]
    assert notebook.ask("c", "c") == ["", "a", "A", "b", "B", "c"]
    assert notebook.session.chats.get("c").system == ""


def test_the_system_prompt_of_the_session_is_sent_where_the_chat_has_none(
    notebook: Notebook,
) -> None:
    generation = notebook.session.generation
    generation.system = "polite"
    assert notebook.ask("b", "b") == ["polite", "a", "A", "b"]
    # A change applies to the next question, and makes no turn stale.
    generation.system = "rude"
    assert notebook.ask("c", "c") == ["rude", "a", "A", "b", "B", "c"]
    assert notebook.turns()[:3] == ["a", "b", "c"]
    # One of its own stays, even an empty one.
    assert notebook.ask("d", "d", system="brief")[0] == "brief"
    assert notebook.ask("e", "e")[0] == "brief"
    assert notebook.ask("d", "d", system="")[:2] == ["", "a"]
    assert notebook.ask("e", "e")[:2] == ["", "a"]
    assert notebook.turns() == ["a", "b", "c", "d", "e"]
    assert notebook.session.chats.messages("c")[0] == Message("system", "")
    # It was not recorded as the chat's.
    generation.system = None
    assert notebook.ask("c", "c") == ["a", "A", "b", "B", "c"]


# -- from Python ------------------------------------------------------------------------------


def test_outside_of_cells_every_call_is_a_new_turn(notebook: Notebook) -> None:
    for _ in range(2):
        notebook.session.generate("on", chat="p")
    assert notebook.sent() == ["on", "on", "on"]
    assert notebook.turns("p") == ["on", "on"]


def test_a_cell_that_asks_in_a_loop_has_a_turn_for_each_and_replaces_them_all(
    notebook: Notebook,
) -> None:
    def run(run: str, *texts: str, cell: str = "x", code: str = "a loop") -> list[str]:
        notebook.session.cells.current = lambda: Cell(cell, code, run)
        for text in texts:
            notebook.session.generate(text, chat="p")
        return notebook.turns("p")

    assert run("1", "on", "on", "on") == ["on", "on", "on"]
    assert notebook.sent() == ["on", "on", "on", "on", "on"]
    assert run("2", "one", "two") == ["one", "two", "(on)"]
    # Without an id the code of the cell stands for it.
    assert run("3", "x", cell="", code="first") == ["one", "two", "(on)", "x"]
    assert run("4", "y", cell="", code="first") == ["one", "two", "(on)", "y"]
    assert run("5", "z", cell="", code="second") == ["one", "two", "(on)", "y", "z"]


def test_concurrent_turns_of_a_chat_are_answered_in_order(notebook: Notebook) -> None:
    async def together() -> None:
        hang = Hang()
        notebook.backend.will(hang, *whole_answer("FIRST"))
        asking = asyncio.gather(
            notebook.session.agenerate("first", chat="c"),
            notebook.session.agenerate("second", chat="c"),
        )
        await asyncio.to_thread(hang.reached.wait, 5)
        hang.go.set()
        await asking

    asyncio.run(together())
    assert notebook.turns()[5:] == ["first", "second"]
    assert notebook.sent()[-3:] == ["first", "FIRST", "second"]


def test_turn_without_the_one_that_is_above_it_now_is_stale_from_the_start(
    notebook: Notebook,
) -> None:
    session = notebook.session
    for number, _ in enumerate(session.stream("first turn", chat="c")):
        if not number:
            # It does not wait: the answer ends only if this loop continues.
            session.generate("second", chat="c")
    assert notebook.turns()[5:] == ["second", "(first turn)"]


def test_answer_does_not_restore_a_chat_that_was_deleted_meanwhile(
    notebook: Notebook,
) -> None:
    hang = Hang()
    notebook.backend.will(hang, *whole_answer("late"))
    job = notebook.session.ask(Request("f", chat="c", key="f"), background=True)
    assert hang.reached.wait(5)
    notebook.session.reset("c")
    hang.go.set()
    assert job.result(5).text == "late"
    assert notebook.session.chats.all() == []


SYSTEMS = st.sampled_from([None, None, "brief", "long", ""])
START = st.tuples(st.sampled_from("abcd"), SYSTEMS)
END = st.integers(0, 3)
LOSE = st.sampled_from("abcd")


@settings(max_examples=500)
@given(st.lists(START | END | LOSE, max_size=30))
def test_a_fresh_turn_was_answered_in_sight_of_the_fresh_turns_above_it(
    steps: list[tuple[str, str | None] | int | str],
) -> None:
    """However cells are run again, and in whatever order answers that overlap come to an end."""
    chats = Chats()
    running: list[tuple[Turn, Context]] = []
    seen: dict[Message, tuple[Message, ...]] = {}
    for number, step in enumerate(steps):
        if isinstance(step, tuple):
            key, system = step
            question = Message("user", f"question {number}")
            turn = Turn(key, question, Message("assistant", f"answer {number}"), system)
            running.append((turn, chats.context("c", key, system)))
        elif isinstance(step, str):
            chats.lose(step)
        elif step < len(running):
            turn, sent = running.pop(step)
            chats.record(turn, sent)
            seen[turn.question] = sent.messages()
        for turn in (turn for chat in chats.all() for turn in chat.fresh):
            assert chats.context("c", turn.key, turn.system).messages() == seen[turn.question]
    for chat in chats.all():
        keys = [turn.key for turn in chat.turns]
        assert len(keys) == len(set(keys))


# -- deleting ---------------------------------------------------------------------------------


def test_looking_makes_no_chat(notebook: Notebook) -> None:
    notebook.session.chats.context("none", "1", "be brief")
    assert [chat.name for chat in notebook.session.chats.all()] == ["c"]


def test_reset_deletes_only_stale_turns(notebook: Notebook) -> None:
    chats = notebook.session.chats
    assert chats.reset(stale=True) == []
    notebook.ask("c", "other")
    assert chats.reset("c", stale=True) == ["c"]
    assert notebook.turns() == ["a", "b", "other"]
    assert chats.context("c", "f").stale == 0


def test_reset_deletes_one_chat_or_all(notebook: Notebook) -> None:
    chats = notebook.session.chats
    for name in ("first", "second"):
        notebook.ask("1", "x", chat=name)
    assert chats.reset("first") == ["first"]
    assert chats.reset() == ["c", "second"]
    assert chats.all() == []


def test_unknown_chat_is_an_error_that_names_the_others(notebook: Notebook) -> None:
    notebook.session.reset()
    with pytest.raises(OptionError, match=r"no chat 'c'\. Chats: none\."):
        notebook.session.reset("c")
    notebook.ask("1", "x", chat="summary")
    for ask in (notebook.session.reset, notebook.session.chats.messages):
        with pytest.raises(OptionError, match=r"no chat 'sumary'\. Did you mean \"summary\"\?"):
            ask("sumary")
    assert notebook.session.chats.messages("summary") == [
        Message("user", "x"), Message("assistant", "X"),
    ]  # fmt: skip


def test_dry_run_leaves_the_numbers_of_turns(notebook: Notebook) -> None:
    session = notebook.session
    for run in range(2):
        session.cells.current = lambda run=run: Cell("x", "a cell", str(run))  # type: ignore[misc]
        for text in ("One", "Two"):
            for _ in range(run):
                session.dry_run(Request(text, chat="new"))
            session.ask(Request(text, chat="new")).result()
        assert notebook.turns("new") == ["One", "Two"]
