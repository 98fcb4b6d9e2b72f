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


def test_footer_shows_the_turn_and_how_many_became_stale(scripted: Kernel) -> None:
    def labels(code: str, cell: str) -> list[str]:
        line = scripted.ok(code, cell_id=cell).text.splitlines()[-1]
        return [label for label in line.split(" · ") if "turn" in label or "incomplete" in label]

    for number, cell in enumerate("abc", 1):
        assert labels(f"%%llm -c talk\n{cell}", cell) == [f"chat talk, turn {number}"]
    assert labels("%%llm -c talk\nb", "b") == ["chat talk, turn 2", "1 later turn is now stale"]
    assert labels("%%llm -c talk\na", "a") == ["chat talk, turn 1", "1 later turn is now stale"]
    assert labels("%%llm -c talk\nd", "d") == ["chat talk, turn 4"]
    assert labels("%%llm -c 'a b' --plain\na", "e") == ["chat 'a b', turn 1]"]
    for cell in "bc":
        labels(f"%%llm -c talk\n{cell}", cell)
    assert labels("%%llm -c talk\na", "a") == ["chat talk, turn 1", "2 later turns are now stale"]
    # An answer that failed is no turn.
    scripted.ok("backend.will('half', ValueError('No.'))")
    assert (
        "turn" not in scripted.run("%%llm -c talk\nx", cell_id="a").text.partition("Traceback")[0]
    )
    assert labels("%%llm\nx", "x") == []


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


def test_a_run_that_fails_leaves_the_chat_as_it_was(scripted: Kernel) -> None:
    for cell in "abc":
        scripted.ok(f"%%llm -c talk\n{cell}", cell_id=cell)
    scripted.ok("backend.will('half', RuntimeError('broken'))")
    assert scripted.run("%%llm -c talk\nother", cell_id="b").status == "error"
    assert scripted.run("%%llm -c talk -t 9\nother", cell_id="b").status == "error"
    assert questions(scripted) == ["a", "b", "c"]


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
    assert note.startswith("Stale: an earlier turn has changed.")
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
        f"{path} already exists. Add --force to overwrite it."
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
