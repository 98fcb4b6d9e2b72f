"""Conversations in a kernel: cells with and without ids, lists, files, a real model's context."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.kernels import Kernel


@pytest.fixture(autouse=True)
def no_chats(request: pytest.FixtureRequest) -> None:
    """Begin without conversations."""
    name = "loaded" if "loaded" in request.fixturenames else "scripted"
    request.getfixturevalue(name).ok("%llm_reset --all")


def sent(k: Kernel) -> list[str]:
    """Return the contents of the messages of the last call."""
    contents: list[str] = k.value("[m.content for m in backend.requests[-1].messages]")
    return contents


def questions(k: Kernel, chat: str = "talk") -> list[str]:
    """Return the questions of a chat, the stale ones in brackets."""
    found: list[tuple[str, bool]] = k.value(
        f"[(t.question.content, t.stale) for t in llm.chats.get({chat!r}).turns]"
    )
    return [f"({text})" if stale else text for text, stale in found]


def test_a_cell_that_runs_again_replaces_its_turn_also_where_its_text_has_changed(
    scripted: Kernel,
) -> None:
    scripted.ok("%%llm -c talk -s Brief.\nOne", cell_id="a")
    scripted.ok("%%llm -c talk\nTwo", cell_id="b")
    assert sent(scripted) == ["Brief.", "One", "One", "Two"]
    assert scripted.ok("%%llm -c talk -s Brief.\nUno", cell_id="a").text.startswith("Uno")
    assert sent(scripted) == ["Brief.", "Uno"]
    assert questions(scripted) == ["Uno", "(Two)"]

    ran = scripted.ok("%%llm -c talk\nThree", cell_id="c")
    assert sent(scripted) == ["Brief.", "Uno", "Uno", "Three"]
    note, *_ = ran.text.splitlines()
    assert note == (
        "Note: 1 turn of chat 'talk' is stale and not sent. Run the cells above from the top,"
        " or delete the stale turns with %llm_reset talk --stale."
    )
    assert "Note" not in scripted.ok("%%llm -c talk\nTwo", cell_id="b").text
    assert questions(scripted) == ["Uno", "Two", "(Three)"]
    assert scripted.ok("%llm_reset talk --stale").text == "Deleted the stale turns of talk."
    assert scripted.ok("%llm_reset --stale").text == "No turn is stale."
    assert questions(scripted) == ["Uno", "Two"]

    scripted.ok("%%llm\nAlone", cell_id="d")
    assert sent(scripted) == ["Alone"]
    assert scripted.ok("%llm_reset talk").text == "Deleted: talk."
    assert scripted.run("%llm_reset talk").ename == "OptionError"


def test_answer_that_is_no_value_fails_and_changes_no_chat(scripted: Kernel) -> None:
    scripted.ok("backend.will(*whole_answer('{\"a\": 1}'))")
    scripted.ok("%%llm -c talk -f json\nOne", cell_id="a")
    scripted.ok("%%llm -c talk\nTwo", cell_id="b")
    for options in ("-f json", "--choice red,green --schema-by prompt"):
        scripted.ok("for _ in range(2): backend.will(*whole_answer('nothing'))")
        ran = scripted.run(f"%%llm -c talk {options}\nAgain", cell_id="a")
        assert ran.ename == "InvalidReply"
        assert "turn" not in ran.text
        assert questions(scripted) == ["One", "Two"]
        scripted.ok("backend.scripts.clear()")
    scripted.ok("backend.will(*whole_answer('nothing'))")
    scripted.ok("%%llm -c talk -f json --bg -o job\nThree", cell_id="c")
    assert scripted.run("%llm_wait").ename == "InvalidReply"
    assert questions(scripted) == ["One", "Two"]


def test_footer_shows_the_turn_and_how_many_became_stale(scripted: Kernel) -> None:
    def labels(code: str, cell: str) -> list[str]:
        line = scripted.ok(code, cell_id=cell).text.splitlines()[-1]
        return [label for label in line.split(" · ") if "turn" in label or "incomplete" in label]

    for number, cell in enumerate("abc", 1):
        new = "new " if number == 1 else ""
        assert labels(f"%%llm -c talk\n{cell}", cell) == [f"{new}chat talk, turn {number}"]
    assert labels("%%llm -c talk\nb", "b") == ["chat talk, turn 2", "1 later turn became stale"]
    assert labels("%%llm -c talk\na", "a") == ["chat talk, turn 1", "1 later turn became stale"]
    assert labels("%%llm -c talk\nd", "d") == ["chat talk, turn 4"]
    assert labels("%%llm -c 'a b' --plain\na", "e") == ["new chat 'a b', turn 1]"]
    for cell in "bc":
        labels(f"%%llm -c talk\n{cell}", cell)
    assert labels("%%llm -c talk\na", "a") == ["chat talk, turn 1", "2 later turns became stale"]
    # An answer that failed is no turn.
    scripted.ok("backend.will('half', ValueError('No.'))")
    assert (
        "turn" not in scripted.run("%%llm -c talk\nx", cell_id="a").text.partition("Traceback")[0]
    )
    assert labels("%%llm\nx", "x") == []


def test_footer_of_background_turn_is_updated_too(scripted: Kernel) -> None:
    cells = {cell: f"%%llm --bg -o job -c behind\n{cell}" for cell in "abc"}
    _, second, third = [scripted.ok(cells[cell], cell_id=f"bg {cell}") for cell in "abc"]
    shown = (
        "while not all(one.done and one.view.is_shown for one in llm.jobs.all):\n"
        "    __import__('time').sleep(0.01)"
    )
    scripted.ok(shown)
    assert second.text.endswith("chat behind, turn 2")
    # In the foreground, and in the background.
    scripted.ok("%%llm -c behind\nagain", cell_id="bg a")
    assert second.text.endswith("chat behind, turn 2 · stale")
    assert third.html.endswith("chat behind, turn 3 · stale</div>")
    second = scripted.ok(cells["b"], cell_id="bg b")
    scripted.ok(shown)
    assert second.text.endswith("chat behind, turn 2")
    scripted.ok(cells["a"], cell_id="bg a")
    scripted.ok(shown)
    scripted.ok("1")
    assert second.text.endswith("chat behind, turn 2 · stale")
    scripted.ok("%llm_reset behind")


def test_footer_is_updated_when_stale_turns_have_run_again(scripted: Kernel) -> None:
    _, second, *_, last = [scripted.ok(f"%%llm -c talk\n{cell}", cell_id=cell) for cell in "abcd"]
    first = scripted.ok("%%llm -c talk\nagain", cell_id="a")
    assert first.text.endswith("chat talk, turn 1 · 3 later turns became stale")
    assert second.text.endswith("chat talk, turn 2 · stale")
    assert scripted.ok("%%llm -c talk\nb", cell_id="b").text.endswith("chat talk, turn 2")
    assert last.html.endswith("chat talk, turn 4 · stale</div>")
    assert first.text.endswith("chat talk, turn 1 · 2 later turns became stale")
    # A cell that fails is no turn.
    scripted.ok("backend.will(ValueError('No.'))")
    scripted.run("%%llm -c talk\nc", cell_id="c")
    assert first.text.endswith(" · 2 later turns became stale")
    scripted.ok("%%llm -c talk\nc", cell_id="c")
    scripted.ok("%llm_reset --stale")
    for form in (first.text, first.html.removesuffix("</div>")):
        assert "again" in form
        assert form.endswith("chat talk, turn 1")
    # A kernel that has no earlier turn begins a new chat, whatever the notebook shows above.
    scripted.ok("%llm_reset talk")
    assert scripted.ok("%%llm -c talk\nb", cell_id="b").text.endswith(" · new chat talk, turn 1")


def test_reset_without_name_deletes_no_chat_of_several(scripted: Kernel) -> None:
    assert scripted.ok("%llm_reset").text == "No chat to delete."
    for name in ("talk", "'a b'"):
        scripted.ok(f"%llm -c {name} Hi")
    ran = scripted.run("%llm_reset")
    assert (ran.ename, ran.error) == (
        "OptionError",
        "Name the chat to delete: talk, 'a b'. %llm_reset --all deletes all of them.",
    )
    assert "cannot be combined" in scripted.run("%llm_reset talk --all").error
    assert scripted.value("[chat.name for chat in llm.chats.all()]") == ["talk", "a b"]
    assert scripted.ok("%llm_reset 'a b'").text == "Deleted: a b."
    assert scripted.ok("%llm_reset").text == "Deleted: talk."
    for name in ("talk", "other"):
        scripted.ok(f"%llm -c {name} Hi")
    assert scripted.ok("%llm_reset --all").text == "Deleted: talk, other."


def test_new_system_prompt_within_a_chat_is_noted(scripted: Kernel) -> None:
    note = "Note: -s changes the system prompt of chat 'talk' from this turn on."
    assert "Note" not in scripted.ok("%%llm -c talk -s Brief.\nOne", cell_id="a").text
    assert "Note" not in scripted.ok("%%llm -c talk -s Brief.\nTwo", cell_id="b").text
    for option in ("", "--dry-run"):
        ran = scripted.ok(f"%%llm {option} -c talk -s Long.\nThree", cell_id="c")
        assert ran.text.startswith(note)
    assert "Note" not in scripted.ok("%%llm -c talk\nFour", cell_id="d").text
    assert scripted.ok("%%llm -c talk -s ''\nFive", cell_id="e").text.startswith(note)


def test_without_ids_the_text_of_a_cell_stands_for_it(scripted: Kernel) -> None:
    for text in ("One", "Two", "Three"):
        scripted.ok(f"%%llm -c talk\n{text}")
    # The options of a cell are not its question.
    ran = scripted.ok("%%llm -c talk -t 0.1\nTwo")
    assert "no cell ids" in ran.text
    assert "1 turn below it is now stale" in ran.text
    assert questions(scripted) == ["One", "Two", "(Three)"]
    assert "Note" not in scripted.ok("%%llm -c talk\nThree").text
    # Not even where the value that was filled in is another.
    for n in (1, 2):
        scripted.ok(f"n = {n}")
        scripted.ok("%%llm -c talk\nGive me {n}.")
    assert questions(scripted) == ["One", "Two", "Three", "Give me 2."]


@pytest.mark.parametrize("cell_id", ["a", None])
def test_lines_and_python_calls_of_one_cell_are_a_turn_each(
    scripted: Kernel, cell_id: str | None
) -> None:
    code = "%llm -c talk One\n%llm -c talk Two\nfor _ in range(2): llm.generate('On', chat='talk');"
    for _ in range(2):
        scripted.ok(code, cell_id=cell_id)
        assert questions(scripted) == ["One", "Two", "On", "On"]
    scripted.ok("llm.generate('End', chat='talk');", cell_id="z")
    assert sent(scripted) == ["One", "One", "Two", "Two", "On", "On", "On", "On", "End"]
    scripted.ok("llm.generate('The end', chat='talk');", cell_id="z")
    assert questions(scripted)[4:] == ["The end"]


def test_turn_of_deleted_cell_is_not_sent(scripted: Kernel) -> None:
    for cell in "abcd":
        scripted.ok(f"%%llm -c talk\n{cell}", cell_id=cell)
        scripted.ok(f"%llm -c other {cell}\n%llm -c other {cell}2", cell_id=f"o{cell}")
    # As JupyterLab sends it: with the next cell, whatever that does.
    scripted.wait(scripted.send("1 + 1", "x", deleted=["b", "ob", "unknown"]))
    assert questions(scripted) == ["a", "(b)", "(c)", "(d)"]
    assert questions(scripted, "other") == [
        "a",
        "a2",
        *(f"({q})" for q in ("b", "b2", "c", "c2", "d", "d2")),
    ]
    # Where several cells were sent at once, each has it.
    for cell in "cd":
        scripted.wait(scripted.send(f"%%llm -c talk\n{cell}", cell, deleted=["b", "ob", "unknown"]))
    assert sent(scripted) == ["a", "a", "c", "c", "d"]
    assert questions(scripted) == ["a", "(b)", "c", "d"]
    scripted.ok("%llm_reset --stale")
    assert questions(scripted) == ["a", "c", "d"]


def test_a_dry_run_is_no_turn(scripted: Kernel) -> None:
    scripted.ok("%%llm -c talk\nOne", cell_id="a")
    scripted.ok("%llm --dry-run -c talk Two\n%llm -c talk Two", cell_id="b")
    ran = scripted.ok("%llm --dry-run -c talk Two", cell_id="c")
    assert "nothing was sent" in ran.text
    assert [line.split()[1] for line in ran.text.splitlines()[:3]] == ["One", "One", "Two"]
    assert questions(scripted) == ["One", "Two"]
    scripted.ok("%llm -c talk Three", cell_id="b")
    assert questions(scripted) == ["One", "Three"]


def shown(k: Kernel, *, chat: str = "talk") -> list[tuple[str, str, bool]]:
    """Return the question, the answer and the staleness of the turns of a chat."""
    found: list[tuple[str, str, bool]] = k.value(
        f"[(t.question.content, t.answer.content, t.stale) for t in llm.chats.get({chat!r}).turns]"
    )
    return found


def test_turn_waits_for_the_background_turns_before_it(scripted: Kernel) -> None:
    k = scripted
    k.ok(
        "from tests.scripted import Hang\nhang = Hang()\nbackend.will('I', hang, *whole_answer('.'))"
    )
    k.send("%%llm --bg -o first -c talk\nMy name is Ana.", cell_id="a")
    second = k.send("%%llm --bg -o second -c talk\nWhat is my name?", cell_id="b")
    dry = k.ok("%%llm --dry-run -c talk\nAnd hers?", cell_id="c")
    one, two = k.value("(first.number, second.number)")
    assert dry.text.startswith(
        f"Note: job {one} and job {two}, earlier turns of chat 'talk', are not complete: their messages"
        " are not shown. The prompt would wait for them."
    )
    # Another chat, and a prompt without one, do not wait.
    k.ok("%llm -c other Hi\n%llm Hi")
    third = k.send("%%llm -c talk\nAnd hers?", cell_id="c")
    waits = f"queued behind job {two}, the turn before and 1 more of its chat"
    k.wait_for_output(third, waits)
    assert f"job {two}: no answer yet · queued behind job {one}, the turn before" in (
        k.state(second).text
    )
    k.interrupt()
    assert k.wait(third).ename == "Interrupted"
    assert k.value("(first.state, second.state)") == ("running", "queued")
    k.ok("from tests.scripted import at_release\nat_release(hang.go.set)")
    cell = k.send("%%llm -c talk\nAnd hers?", cell_id="c")
    k.wait_for_output(cell, waits)
    k.release()
    ran = k.wait(cell)
    k.ok("while not second.view.is_shown: __import__('time').sleep(0.01)")
    assert sent(k)[::2] == ["My name is Ana.", "What is my name?", "And hers?"]
    assert ran.text.endswith(" · chat talk, turn 3")
    assert "Note" not in ran.text
    assert not any(is_stale for *_, is_stale in shown(k))
    assert k.state(second).text.endswith(" · chat talk, turn 2")
    assert k.value("second.result().messages[1].content") == "I."
    k.ok("%llm_reset other")


def test_turns_that_run_again_in_the_background_wait_for_each_other(scripted: Kernel) -> None:
    k = scripted
    for cell in "abc":
        k.ok(f"%%llm -c talk\n{cell}", cell_id=cell)
    k.ok(
        "from tests.scripted import Hang\nhang = Hang()\nbackend.will('A', hang, *whole_answer('!'))"
    )
    k.ok("%%llm --bg -o one -c talk\na", cell_id="a")
    # A job that is stopped before it reaches the backend leaves its script to the next one.
    assert k.value("hang.reached.wait(30)")
    k.ok("%%llm --bg -o three -c talk\nc", cell_id="c")
    k.ok("%%llm --bg -o two -c talk\nb", cell_id="b")
    # An earlier cell that runs once more is still the turn before.
    k.ok("again = Hang()\nbackend.will('AA', again, *whole_answer('!'))")
    k.ok("%%llm --bg -o one -c talk\na", cell_id="a")
    k.ok("again.go.set()\n%llm_wait")
    assert [question for question, *_ in shown(k)] == ["a", "b", "c"]
    assert k.value("[m.content for m in two.result().messages][:2]") == ["a", "AA!"]


def test_turn_after_a_stopped_or_failed_one_reports_it(scripted: Kernel) -> None:
    k = scripted
    k.ok("from tests.scripted import Hang, at_release")
    for ends, text, note in (
        ("hang, ValueError('No.')", "", "failed: this prompt was sent without it"),
        ("hang", "", "was stopped: this prompt was sent without it"),
        ("'I', hang", "I", "was stopped: its incomplete answer was sent"),
    ):
        k.ok(f"%llm_reset --all\nhang = Hang()\nbackend.will({ends})")
        k.ok("%%llm --bg -o job -c talk\nMy name is Ana.", cell_id="a")
        number = k.value("job.number")
        assert k.value(f"hang.reached.wait(30) and job.text == {text!r}")
        k.ok(f"at_release({'hang.go.set' if 'Error' in ends else 'job.cancel'})")
        note = f"job {number}, an earlier turn of chat 'talk', {note}."
        cell = k.send("%%llm -c talk --quiet\nWhat is my name?", cell_id="b")
        k.wait_for_output(cell, f"queued behind job {number}")
        k.release()
        ran = k.wait(cell)
        assert note in ran.text
        assert "border-left" in ran.html
        assert sent(k)[-1] == "What is my name?"
        assert len(sent(k)) == (3 if text else 1)
        assert f"Note: {note}" not in k.ok("%llm -c talk --plain More").text


def test_a_run_that_fails_leaves_the_chat_as_it_was(scripted: Kernel) -> None:
    for cell in "abc":
        scripted.ok(f"%%llm -c talk\n{cell}", cell_id=cell)
    scripted.ok("backend.will('half', RuntimeError('broken'))")
    assert scripted.run("%%llm -c talk\nother", cell_id="b").status == "error"
    assert scripted.run("%%llm -c talk -t 9\nother", cell_id="b").status == "error"
    assert questions(scripted) == ["a", "b", "c"]


def test_quotes_around_a_whole_prompt_are_noted(scripted: Kernel) -> None:
    note = "Note: the quotes around the prompt are part of it, and are sent."
    for prompt in ('"And which columns?"', "'Which?'"):
        assert scripted.ok(f"%llm {prompt}").text.startswith(note)
        assert sent(scripted) == [prompt]
    for prompt in ('"Yes" or "no"', "Is 'x'", '""', '"', '-- "Which?"', "'Tis Ana's'"):
        assert "quotes" not in scripted.ok(f"%llm {prompt}").text
    assert "quotes" not in scripted.ok('%%llm\n"Which?"').text


def test_chats_table_shows_turns_tokens_and_share_of_context(scripted: Kernel) -> None:
    assert scripted.ok("%llm_chats").text.endswith("No chats. %%llm -c NAME starts one.")
    scripted.ok("%%llm -c talk -s Brief.\nOne two", cell_id="a")
    scripted.ok(f"%%llm -c talk\n{'word ' * 400}", cell_id="b")
    scripted.ok("%%llm -c 'a second'\nHello <b>")
    head, talk, second = scripted.ok("%llm_chats").text.splitlines()
    assert head.split() == ["chat", "turns", "stale", "tokens", "of", "context"]
    assert talk.split() == ["talk", "2", "805", "9.8%"]
    assert second.split() == ["a", "second", "1", "4", "0.0%"]
    scripted.ok("%%llm -c talk\nUno", cell_id="a")
    head, talk, second, note = scripted.ok("%llm_chats").text.splitlines()
    assert talk.split() == ["talk", "2", "1", "2", "0.0%"]
    assert note.startswith("Stale: an earlier turn has changed, or a cell was deleted.")
    shown = scripted.ok("%llm_chats talk").text.splitlines()
    assert [line.split()[0] for line in shown] == ["turn", "1", "2", "Stale:"]
    assert shown[2].split()[-2:] == ["…", "stale"] or shown[2].endswith("stale")
    assert len(shown[2]) < 150
    assert "Hello &lt;b&gt;" in scripted.ok("%llm_chats 'a second'").html
    assert scripted.run("%llm_chats tolk").error.endswith('Did you mean "talk"?')
    scripted.ok("%%llm -c Talk\nHi")
    assert scripted.run("%llm_chats talkk").error.endswith('Did you mean "talk" or "Talk"?')
    assert scripted.run("%llm_chats Talkk").error.endswith('Did you mean "Talk" or "talk"?')
    scripted.ok("%llm_reset Talk")
    scripted.ok("backend.counting = False")
    assert scripted.ok("%llm_chats").text.splitlines()[1].split() == ["talk", "2", "1", "-", "-"]
    scripted.ok("backend.counting = True")


def test_chats_go_to_files_and_come_back(scripted: Kernel, tmp_path: Path) -> None:
    scripted.ok("%%llm -c talk -s Brief.\nOne", cell_id="a")
    scripted.ok("%%llm -c talk\nTwo", cell_id="b")
    path = tmp_path / "talk.json"
    assert scripted.ok(f"%llm_chats talk --export {path}").text == f"Exported to {path}: 2 turns."
    assert json.loads(path.read_text("utf-8"))[0] == {"role": "system", "content": "Brief."}
    assert scripted.run(f"%llm_chats --export {path}").error == (
        f"{path} already exists. Add --force (in Python: replace=True) to overwrite it."
    )
    scripted.ok("%llm_config system=Plain.\n%llm -c bare Hi\n%llm -c none -s '' Hi")
    scripted.ok(f"%llm_chats --export {path} --force")
    systems = {
        name: chat[0]["content"] for name, chat in json.loads(path.read_text("utf-8")).items()
    }
    assert systems == {"talk": "Brief.", "bare": "Plain.", "none": ""}
    scripted.ok("%llm_config --reset system\n%llm_reset bare\n%llm_reset none")
    scripted.ok("%%llm -c talk\nUno", cell_id="a")
    assert scripted.ok(f"%llm_chats --export {path} --force").text == (
        f"Exported to {path}: 1 turn. Not exported because stale: 1 turn."
    )
    assert scripted.run(f"%llm_chats --import {path}").ename == "OptionError"
    scripted.ok("%llm_reset --all")
    assert scripted.ok(f"%llm_chats --import {path}").text == "Imported: talk."
    scripted.ok("%llm -c talk Three", cell_id="c")
    assert sent(scripted) == ["Uno", "Uno", "Three"]
    for wrong in ("--force", f"--export {path} --import {path}", "--import", "one two"):
        ran = scripted.run(f"%llm_chats {wrong}")
        assert (ran.ename, len(ran.traceback)) == ("OptionError", 1)


def test_trim_reports_dropped_turns_even_without_footer(scripted: Kernel) -> None:
    scripted.ok("backend.context = 60")
    try:
        for cell in range(4):
            scripted.ok(f"%%llm -c talk\n{cell} {'word ' * 9}", cell_id=str(cell))
        for options in ("", "--quiet", "--plain", "--plain --quiet"):
            ran = scripted.ok(f"%%llm -c talk --trim {options}\nnow", cell_id="z")
            assert "2 oldest turns dropped (--trim)" in ran.text
            assert sent(scripted)[0].startswith("2 word")
        assert questions(scripted)[4:] == ["now"]
        assert scripted.run("%%llm --trim\nnow").error.startswith("--trim drops turns of a")
    finally:
        scripted.ok("backend.context = 8192")


def test_empty_system_prompt_omits_that_of_a_real_template(loaded: Kernel) -> None:
    added = "system  You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    dry = loaded.ok("%llm --dry-run Hi").text.splitlines()
    assert dry[:2] == [added, "user    Hi"]
    assert dry[3].startswith(
        'SmolLM2-135M-Instruct · 31 tokens · 0.4% of 8,192 · system: of the chat template (-s "" omits it)'
    )
    dry = loaded.ok('%llm --dry-run -s "" Hi').text.splitlines()
    assert (dry[0], dry[2].count("system")) == ("user  Hi", 0)
    assert "· 11 tokens ·" in dry[2]
    for chat in ("", "-c none"):
        loaded.ok(f'%llm {chat} -s "" --max-new-tokens 1 Hi')
        assert loaded.value("llm.last.usage.prompt_tokens") == 11


def test_a_chat_that_is_too_long_for_a_real_model(loaded: Kernel) -> None:
    loaded.ok(
        "from llm_magic.types import Message\n"
        "turn = [Message('user', 'Remember: ' + 'one two three ' * 910), Message('assistant', 'Yes.')]\n"
        "llm.chats.put('full', turn * 3)"
    )
    row = loaded.ok("%llm_chats").text.splitlines()[1].split()
    assert row[:2] == ["full", "3"]
    tokens = int(row[2].replace(",", ""))
    assert 8192 < tokens < 8500
    assert row[3] == f"{tokens / 8192:.1%}"
    ran = loaded.run("%%llm -c full\nHi", cell_id="a")
    assert ran.ename == "PromptTooLong"
    assert "Chat 'full' has 3 turns above it: --trim drops the oldest" in ran.error
    assert f"{tokens:,}"[:2] in ran.error
    # Only counted: on a CPU, to read that much takes a while.
    ran = loaded.ok("%%llm -c full --trim --dry-run\nHi", cell_id="a")
    assert "oldest turn dropped (--trim)" in ran.text
    # Two that would be sent, and the start of the one that is dropped.
    assert ran.text.count("Remember: ") == 3


@pytest.mark.parametrize(
    ("prompt_tokens", "finish", "label"),
    [
        (8190, "length", "the context is full"),
        (8189, "length", "the context is full"),
        (8188, "length", "--max-new-tokens"),
        (8190, "stop", ""),
    ],
)
def test_footer_shows_which_limit_cut_an_answer_off(
    scripted: Kernel, prompt_tokens: int, finish: str, label: str
) -> None:
    answer = f"whole_answer('```\\n', '1', finish={finish!r}, prompt_tokens={prompt_tokens})"
    scripted.ok(f"backend.will(*{answer}); backend.will(*{answer})")
    ran = scripted.ok("%llm -o reply Code, please.")
    end = f" · cut off at 2 tokens ({label})" if label else "269 MB"
    assert ran.text.endswith(end)
    assert scripted.value("(reply.finish_reason, reply.context_full)") == (finish, "full" in label)
    assert ("the context is full" in scripted.ok("reply").html) is ("full" in label)
    advice = "shorten the prompt" if "full" in label else "Use a higher --max-new-tokens."
    assert (advice in scripted.ok("%llm -f code Code, please.").text) is (finish == "length")
