"""Conversations as files: what is written, what is read, and that a bad file changes nothing."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_magic.errors import OptionError
from llm_magic.session.chats import Chats
from llm_magic.types import Message

TALK = [
    Message("system", "Be brief."), Message("user", "Straße?"), Message("assistant", "Ja 🦊"),
]  # fmt: skip


@pytest.fixture
def chats() -> Chats:
    made = Chats()
    made.put("talk", TALK)
    made.put("other", [Message("user", "1"), Message("assistant", "2")])
    return made


def test_one_chat_is_a_list_and_all_are_an_object(chats: Chats, tmp_path: Path) -> None:
    one, every = tmp_path / "one.json", tmp_path / "every.json"
    assert chats.save(one, "talk") == one
    chats.save(str(every))
    plain = [{"role": m.role, "content": m.content} for m in TALK]
    assert json.loads(one.read_text("utf-8")) == plain
    assert "Straße" in one.read_text("utf-8"), "people read it, too"
    assert list(json.loads(every.read_text("utf-8"))) == ["talk", "other"]
    assert list(tmp_path.iterdir()) in ([one, every], [every, one]), "nothing else is left"

    again = Chats()
    assert again.load(one) == ["one"]
    assert again.load(one, "mine") == ["mine"]
    assert again.load(every) == ["talk", "other"]
    assert again.messages("one") == again.messages("mine") == again.messages("talk") == TALK
    assert again.get("talk").system == "Be brief."
    assert Chats().load(every, "other") == ["other"]


def test_put_takes_messages_as_generate_does(chats: Chats) -> None:
    plain: list[Any] = [{"role": m.role, "content": m.content} for m in TALK]
    chats.put("plain", plain)
    assert chats.messages("plain") == TALK
    wrong: list[Any] = [
        [("user", "Hi")], "Hi", [{"role": "user"}], [Message("user", 5), Message("assistant", "x")],  # type: ignore[arg-type]
        [*TALK, {"role": "user", "content": "Look", "image": "…"}],
    ]  # fmt: skip
    for messages in wrong:
        with pytest.raises(OptionError, match=r"^Chat 'wrong', message \d: "):
            chats.put("wrong", messages)
    assert "wrong" not in chats


def test_stale_turns_are_not_exported(chats: Chats, tmp_path: Path) -> None:
    first = chats.get("talk").turns[0]
    chats.put("talk", [*TALK, Message("user", "more"), Message("assistant", "less")], replace=True)
    first = chats.get("talk").turns[0]
    chats.record(first, chats.context("talk", first.key, first.system))
    chats.save(tmp_path / "t.json", "talk")
    assert len(json.loads((tmp_path / "t.json").read_text("utf-8"))) == 3


def test_existing_file_is_overwritten_only_with_replace(chats: Chats, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    path.write_text("mine")
    with pytest.raises(
        OptionError,
        match=r"talk\.json already exists\. Add --force \(in Python: replace=True\) to overwrite it\.",
    ):
        chats.save(path, "talk")
    assert path.read_text() == "mine"
    chats.save(path, "talk", replace=True)
    chats.put("new", TALK)
    chats.put("other", [Message("user", "x"), Message("assistant", "y")], replace=True)
    with pytest.raises(OptionError, match=r"There is already a chat 'talk'\. Add --force"):
        chats.load(path)
    chats.save(tmp_path / "all.json")
    chats.reset("new")
    with pytest.raises(OptionError, match=r"already a chat 'talk' and 'other'"):
        chats.load(tmp_path / "all.json")
    assert [chat.name for chat in chats.all()] == ["talk", "other"], "not even the one that is new"
    assert chats.load(path, replace=True) == ["talk"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        (b"\xff\xfe[", "is not JSON"),
        ("3", "contains no chat"),
        ("{}", "contains no chat"),
        ('{"a": 1}', "contains no chat"),
        ("[]", "it contains no question"),
        ('["x"]', "message 1: "),
        ('[{"role": "tool", "content": "x"}]', "message 1: the role 'tool' is not one of"),
        ('[{"role": ["user"], "content": "x"}]', "message 1: the role"),
        ('[{"role": "user", "content": null}]', "message 1: its content is not text"),
        ('[{"role": "user", "content": "x", "tool_calls": [1]}]', "but it has tool_calls"),
        ('[{"role": "user", "content": "x"}]', "its last question has no answer"),
        ('[{"role": "system", "content": "x"}]', "it contains no question"),
        (
            '[{"role": "assistant", "content": "x"}]',
            "message 1: the role must be user, not assistant",
        ),
        (
            '[{"role": "system", "content": "x"}, {"role": "user", "content": "x"},'
            ' {"role": "user", "content": "x"}]',
            "message 3: the role must be assistant, not user",
        ),
        ('{"good": [], "bad": [1]}', "chat 'bad', message 1"),
    ],
)
def test_a_bad_file_is_one_line_and_changes_nothing(
    chats: Chats, tmp_path: Path, content: str | bytes, message: str
) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = chats.all()
    with pytest.raises(OptionError) as caught:
        chats.load(path, replace=True)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert chats.all() == before


def test_files_that_cannot_be_used_are_one_line(chats: Chats, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"cannot be read: No such file"):
        chats.load(tmp_path / "none.json")
    with pytest.raises(OptionError, match=r"cannot be read: Is a directory"):
        chats.load(tmp_path)
    with pytest.raises(OptionError, match=r"cannot be written: No such file"):
        chats.save(tmp_path / "no" / "talk.json", "talk")
    with pytest.raises(OptionError, match=r"There is no chat 'tolk'.*Did you mean \"talk\""):
        chats.save(tmp_path / "t.json", "tolk")
    with pytest.raises(OptionError, match="There is no chat to export"):
        Chats().save(tmp_path / "t.json")
    chats.save(tmp_path / "all.json")
    with pytest.raises(OptionError, match=r"contains no chat 'tolk'\. Did you mean"):
        chats.load(tmp_path / "all.json", "tolk")
    assert [path.name for path in tmp_path.iterdir()] == ["all.json"]


def test_what_other_programs_add_and_leave_empty_is_no_error(chats: Chats, tmp_path: Path) -> None:
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "y", "refusal": None, "annotations": []},
    ]
    (tmp_path / "x.json").write_text(json.dumps(messages))
    assert chats.load(tmp_path / "x.json") == ["x"]


@given(st.lists(st.tuples(st.text(), st.text()), min_size=1), st.none() | st.text(min_size=1))
def test_every_text_comes_back(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]], system: str | None
) -> None:
    path = tmp_path_factory.mktemp("chats") / "x.json"
    messages = [Message("system", system)] if system else []
    for question, answer in pairs:
        messages += [Message("user", question), Message("assistant", f"{answer}\ud83e")]
    chats = Chats()
    chats.put("x", messages)
    chats.save(path)
    again = Chats()
    again.load(path)
    assert again.messages("x") == messages


NO_FILES = ["a\0b", "a\ud800b", "", "/", "~nobody_has_this_name/x"]


@pytest.mark.parametrize("path", NO_FILES, ids=ascii)
def test_path_that_no_file_can_have_is_one_line(chats: Chats, path: str) -> None:
    for call in (lambda: chats.save(path, replace=True), lambda: chats.load(path)):
        with pytest.raises(OptionError, match=r"not a valid file name|home directory") as caught:
            call()
        assert "\n" not in str(caught.value)
        str(caught.value).encode()


def test_export_replaces_no_link_device_or_folder(chats: Chats, tmp_path: Path) -> None:
    saved = tmp_path / "saved.json"
    saved.write_text("mine")
    link, dangling, pipe = tmp_path / "link.json", tmp_path / "dangling.json", tmp_path / "pipe"
    link.symlink_to(saved)
    dangling.symlink_to(tmp_path / "nowhere")
    os.mkfifo(pipe)
    for target, why in (
        (link, f"link.json is a symbolic link to {saved}. Write the path of the file itself."),
        (dangling, "is a symbolic link"),
        (pipe, "pipe is not a regular file. Choose another path."),
        (Path("/dev/null"), "/dev/null is not a regular file"),
        (tmp_path, "is not a regular file"),
    ):
        for force in (True, False):
            with pytest.raises(OptionError, match=re.escape(why)):
                chats.save(target, replace=force)
    assert saved.read_text() == "mine"
    assert link.is_symlink()
    assert dangling.is_symlink()
    assert sorted(tmp_path.iterdir()) == sorted([saved, link, dangling, pipe]), "nothing is left"
    chats.save(saved, "talk", replace=True)
    assert Chats().load(link) == ["link"], "reading through a link is fine"


def test_import_of_a_device_or_pipe_is_refused(chats: Chats, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for source in ("/dev/zero", tmp_path / "pipe"):
        with pytest.raises(OptionError, match="is not a regular file"):
            chats.load(source)


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "a\nb", "\x1b[2J", "\x9b"], ids=ascii)
def test_name_with_control_or_half_characters_is_refused(
    chats: Chats, tmp_path: Path, name: str
) -> None:
    with pytest.raises(OptionError, match="cannot be the name of a chat"):
        chats.put(name, TALK)
    path = tmp_path / "x.json"
    path.write_text(json.dumps({name: [{"role": "user", "content": "a"}] * 0}))
    with pytest.raises(OptionError):
        chats.load(path)
    assert [chat.name for chat in chats.all()] == ["talk", "other"]
