"""A reply: a text with attributes."""

from __future__ import annotations

import copy
import io
import json
import pickle
import re
import sqlite3
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
from IPython.lib.pretty import pretty

from llm_magic.errors import InvalidReply
from llm_magic.types import Chunk, Message, Reply, Usage
from tests.scripted import make_reply

TEXT = "The answer is 42.\n"


@pytest.fixture
def reply() -> Reply:
    return make_reply(TEXT, usage=Usage(3, 2, cost=0.5), reasoning="Hm.", dropped_turns=1)


def test_reply_works_like_its_text(reply: Reply) -> None:
    assert reply == TEXT
    assert hash(reply) == hash(TEXT)
    assert {TEXT: 1}[reply] == 1
    assert "42" in reply
    assert (len(reply), reply[:3], reply.upper()) == (18, "The", TEXT.upper())
    assert f"{reply.strip():>20}" == "   The answer is 42."
    assert re.findall(r"\d+", reply) == ["42"]
    assert json.loads(json.dumps({"a": reply})) == {"a": TEXT}
    file = io.StringIO()
    file.write(reply)
    assert file.getvalue() == TEXT
    for text in (reply.text, str(reply), reply + "", "".join([reply]), reply[:], reply.strip()):
        assert type(text) is str
    assert not make_reply("")


def test_reply_is_a_cell_of_a_table(reply: Reply) -> None:
    for column in (pd.Series([reply, reply]), pl.Series([reply, reply]), np.array([reply, reply])):
        assert list(column) == [TEXT, TEXT]
    assert pd.DataFrame([reply]).shape == pl.DataFrame([reply]).shape == (1, 1)
    assert pd.DataFrame({"a": [reply]}).to_csv(index=False) == f'a\n"{TEXT}"\n'
    assert pd.Series([reply]).dtype == pd.Series([TEXT]).dtype
    assert pl.Series([reply]).dtype == pl.String
    assert sqlite3.connect(":memory:").execute("select ?", (reply,)).fetchone() == (TEXT,)


def test_chunk_as_text_is_its_text() -> None:
    chunk = Chunk("a", reasoning="b", tokens=1)
    assert (str(chunk), f"{chunk}") == ("a", "a")
    assert repr(chunk).startswith("Chunk(text='a', reasoning='b'")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickled_reply_is_complete(reply: Reply, protocol: int) -> None:
    again = pickle.loads(pickle.dumps(reply, protocol))
    assert type(again) is Reply
    assert again == reply
    assert vars(again) == vars(reply)
    assert again.usage.cost == 0.5


def test_copied_reply_is_complete(reply: Reply) -> None:
    for again in (copy.copy(reply), copy.deepcopy(reply)):
        assert type(again) is Reply
        assert (again.text, vars(again)) == (reply.text, vars(reply))


def test_copy_that_a_library_makes_of_the_text_is_usable(reply: Reply) -> None:
    copied = type(reply)(reply.upper())  # type: ignore[call-arg]
    assert (copied, copied.usage, copied.messages) == (TEXT.upper(), Usage(), ())
    assert repr(copied) == r"Reply('THE ANSWER IS 42.\n')"


def test_reply_is_immutable(reply: Reply) -> None:
    attributes: Any = reply
    for name in ("model", "text", "other"):
        with pytest.raises(AttributeError):
            setattr(attributes, name, "x")
    with pytest.raises(AttributeError):
        del attributes.model
    assert reply.messages == (Message("user", "?"),)


def test_repr_is_short_and_shows_an_incomplete_answer(reply: Reply) -> None:
    assert repr(reply) == r"Reply('The answer is 42.\n')"
    long = make_reply("x" * 5000, finish_reason="length")
    start = "x" * 60
    assert repr(long) == f"Reply('{start}'…, 5,000 characters, finish_reason='length')"
    assert "\x1b" not in repr(make_reply("\x1b[2J"))


def test_ipython_shows_the_text_alone_and_the_repr_within_a_list(reply: Reply) -> None:
    shown: Callable[[object], str] = pretty
    assert shown(make_reply("**a**\n\x1b[2J")) == "**a**\n␛[2J"
    assert shown([reply]) == f"[{reply!r}]"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": [1, null]}', {"a": [1, None]}),
        (" [1]\n", [1]),
        ("42", 42),
        ('"```"', "```"),
        ('```json\n{"a": 1}\n```', {"a": 1}),
        ('Sure!\n\n~~~~ JSON\n{"a": 1}\n~~~~\nDone [1].', {"a": 1}),
        ('```\n{"a": 1}', {"a": 1}),
        ("```python\nx = {}\n```\n```json\n\n[1, 2]\n\n```", [1, 2]),
        ('Here it is: {"a": "} ]"}. Anything else?', {"a": "} ]"}),
        ('{"a": 1} is the answer.', {"a": 1}),
        ('1. Here:\n   ```json\n   {"a": 1}\n   ```', {"a": 1}),
        ('`{"a": 1}`', {"a": 1}),
        ('Sure:\r\n```json\r\n{"a": 1}\r\n```\r\nDone [1].', {"a": 1}),
    ],
)
def test_json_is_parsed(text: str, value: Any) -> None:
    assert make_reply(text).json() == value


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "there is no object or array in it"),
        ("Paris", "there is no object or array in it"),
        ("{'a': 1}", r"a key in double quotes is missing \(line 1, character 2\)"),
        ('{"a": 1}\n{"a": 2}', "there is more than one value, or text that may be one"),
        ('As [1] shows: {"a": 1}', "there is more than one value"),
        # The list inside is not the answer.
        ('So: {"a": [1, 2],}', "Illegal trailing comma|a key in double quotes is missing"),
        ("```\n[1]\n```\nor\n```\n[2]\n```", "there are 2 blocks of code"),
        ("```json\n[1] or [2]\n```", "there is more than one value"),
        ("```json\n[1\n```", r"a comma or the end is missing \(line 3, character 1\)"),
        ("[" * 100_000, "it is nested too deeply"),
        ("1" * 5000, "Exceeds the limit"),
    ],
)
def test_what_is_not_json_is_one_line(text: str, problem: str) -> None:
    reply = make_reply(text)
    with pytest.raises(InvalidReply, match=problem) as caught:
        reply.json()
    assert caught.value.reply is reply
    assert isinstance(caught.value, ValueError), "as json.loads raises"
    copied = pickle.loads(pickle.dumps(caught.value))
    assert (type(copied), str(copied)) == (InvalidReply, str(caught.value))
    assert "\n" not in str(caught.value)


def test_incomplete_json_names_the_limit() -> None:
    for text in ('{"a": 1', "4", "```json\nresult"):
        with pytest.raises(
            InvalidReply, match=r"cut off at the token limit: use a higher --max-new"
        ):
            make_reply(text, finish_reason="length").json()
    with pytest.raises(InvalidReply, match="the context is full: shorten the prompt"):
        make_reply('{"a": 1', finish_reason="length", context_full=True).json()
    with pytest.raises(InvalidReply, match="it ends in a number"):
        make_reply("4", finish_reason="cancelled").json()
    assert make_reply("[4]", finish_reason="length").json() == [4]


def test_code_is_that_of_the_first_fenced_block() -> None:
    text = "Do:\n```python\nx = 1\n\ny = 2\n```\nor\n```\n2\n```"
    assert make_reply(text).code() == "x = 1\n\ny = 2"
    assert make_reply("```py\nx").code() == "x", "the model ended the answer"
    for text in ("x = 1", "Text:\n\n    x = 1", "```x```"):
        with pytest.raises(InvalidReply, match=r"^The answer contains no fenced code block\.$"):
            make_reply(text).code()
    cut = make_reply("```py\nfor x in", finish_reason="length")
    with pytest.raises(
        InvalidReply, match=r"block is not closed\. .* use a higher --max-new"
    ) as caught:
        cut.code()
    assert caught.value.reply is cut


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    "text",
    [
        "[" * 1_000_000, "[1," * 300_000, "```" + "a" * 1_000_000 + "`", "```\n" * 250_000,
        "```" + " " * 1_000_000 + "`", "```a\n" * 200_000, "``` x\n" + " " * 1_000_000 + "```" * 9 + "x",
        ("```\n" + "`" * 100 + "x\n") * 10_000,
    ],
)  # fmt: skip
def test_hostile_text_takes_no_time(text: str) -> None:
    with pytest.raises(InvalidReply):
        make_reply(text).json()


def test_total_of_tokens_is_unknown_unless_both_counts_are_known() -> None:
    assert Usage(3, 2).total_tokens == 5
    assert Usage(3).total_tokens is None
    assert Usage(None, 2).total_tokens is None
