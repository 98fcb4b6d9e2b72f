"""The exact lines and tables that magics show."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from llm_magic.backends.manager import LoadResult
from llm_magic.config.settings import SessionConfig
from llm_magic.notebook.display import messages
from llm_magic.notebook.display.live_output import muted
from llm_magic.notebook.display.tables import Table
from llm_magic.session.requests import Request
from llm_magic.types import MemoryUse, ModelInfo, Progress, Timing, Unloaded, Usage
from tests.scripted import make_reply, scripted_session

INFO = ModelInfo(
    "SmolLM2-135M-Instruct", "local", where="bundled", source="/x.gguf", device="cpu",
    dtype="bfloat16", size=269_060_000, context_length=8192, load_s=0.94,
)  # fmt: skip
READY = "SmolLM2-135M-Instruct · local cpu bf16 · 269 MB · 8,192 ctx"
GONE = Unloaded("old", 269_060_000, MemoryUse(1_200_000_000), MemoryUse(931_000_000))
USUAL = {"usage": Usage(31, 4, 0), "timing": Timing(0.123, 0.5, 41.6)}


def test_the_line_of_a_model_that_is_ready() -> None:
    assert messages.ready_lines(LoadResult(INFO)) == [f"{READY} · ready in 0.9 s"]
    unmeasured = dataclasses.replace(INFO, load_s=None)
    assert messages.ready_lines(LoadResult(unmeasured)) == [f"{READY} · ready"]
    result = LoadResult(INFO, was_loaded=True, unloaded=[GONE])
    assert messages.ready_lines(result) == [
        f"{READY} · already loaded",
        "Unloaded old (269 MB) · process 1.2 GB → 931 MB",
    ]
    noted = LoadResult(INFO, unloaded=[GONE], notes=("Converted once to /cache",))
    assert messages.ready_lines(noted)[1:] == [
        "Converted once to /cache",
        messages.unloaded_line(GONE),
    ]


def test_a_model_of_the_same_name_at_another_server_is_replaced() -> None:
    info = ModelInfo("fast", "openai", where="server", source="fast", server="localhost:8145")
    gone = Unloaded("fast", 0, MemoryUse(1), MemoryUse(1), note="it stays there", server="far:1")
    lines = messages.ready_lines(LoadResult(info, unloaded=[gone]))
    assert lines[1:] == ["Replaces fast on far:1"]
    other = dataclasses.replace(gone, name="slow")
    assert messages.ready_lines(LoadResult(info, unloaded=[other]))[1:] == [
        "Unloaded slow · it stays there"
    ]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"quantization": "4bit", "device": "cuda:0"},
         "SmolLM2-135M-Instruct · local cuda:0 4bit · 269 MB · 8,192 ctx"),
        ({"dtype": "float32", "size": None}, "SmolLM2-135M-Instruct · local cpu fp32 · 8,192 ctx"),
        ({"dtype": "", "device": "", "size": None, "context_length": None},
         "SmolLM2-135M-Instruct · local"),
    ],
)  # fmt: skip
def test_the_line_of_a_model_omits_unknown_values(changes: Any, line: str) -> None:
    assert messages.model_line(dataclasses.replace(INFO, **changes)) == line


def test_unload_line_names_changed_gpus_and_holders() -> None:
    gone = Unloaded(
        "m", 2_000_000_000,
        MemoryUse(10**9, (("cuda:0", 2_000_000_000), ("cuda:1", 5))),
        MemoryUse(10**9, (("cuda:0", 0), ("cuda:1", 5))),
        ("a list", "a variable of __main__"),
    )  # fmt: skip
    assert messages.unloaded_line(gone) == (
        "Unloaded m (2.0 GB) · process 1.0 GB → 1.0 GB, cuda:0 2.0 GB → 0 kB"
        " · still held by a list, a variable of __main__"
    )


def test_unload_line_names_three_holders_and_counts_the_others() -> None:
    held = MemoryUse(10**9, ())
    gone = Unloaded("m", 2_000_000_000, held, held, ("Store.w", "a", "b", "c", "d[0]"))
    assert messages.unloaded_line(gone).endswith(" · still held by Store.w, a, b and 2 more")


@pytest.mark.parametrize(
    ("changes", "size", "line"),
    [
        ({}, 269_000_000,
         "tiny · 31 → 4 tokens · first after 0.12 s · 42 tokens/s · 269 MB"),
        ({}, None, "tiny · 31 → 4 tokens · first after 0.12 s · 42 tokens/s"),
        ({"timing": Timing(0.12, 4.0, 0.76)}, None,
         "tiny · 31 → 4 tokens · first after 0.12 s · 0.8 tokens/s"),
        ({"finish_reason": "length"}, None,
         "tiny · 31 → 4 tokens · first after 0.12 s · 42 tokens/s"
         " · cut off at 4 tokens (--max-new-tokens)"),
        ({"timing": Timing(12.5, 13.0, 42.0, load_s=12.34)}, None,
         "tiny · 31 → 4 tokens · first after 0.16 s and 12.3 s for the load · 42 tokens/s"),
        ({"usage": Usage(31, 4, cost=0.00095)}, None,
         "tiny · 31 → 4 tokens · first after 0.12 s · 42 tokens/s · $0.00095"),
        ({"usage": Usage(31, 1)}, None,
         "tiny · 31 → 1 token · first after 0.12 s · 42 tokens/s"),
        ({"finish_reason": "cancelled", "usage": Usage(), "timing": Timing(None, 1.0, None)}, None,
         "tiny · stopped by you; incomplete"),
        ({"finish_reason": "truncated", "usage": Usage(31, None), "timing": Timing(None, 1, None)},
         None, "tiny · ended early; incomplete"),
        ({"finish_reason": "length", "usage": Usage(), "timing": Timing(None, 1.0, None)}, None,
         "tiny · cut off (--max-new-tokens)"),
    ],
)  # fmt: skip
def test_the_footer(changes: Any, size: int | None, line: str) -> None:
    model = ModelInfo("tiny", "local", size=size)
    assert messages.footer(make_reply("Paris.", **(USUAL | changes)), model) == line


def test_the_footer_shows_no_size_of_a_model_on_a_server() -> None:
    model = ModelInfo("tiny", "ollama", size=269_000_000, server="127.0.0.1:11434")
    assert "MB" not in messages.footer(make_reply("Paris.", **USUAL), model)


def test_the_status() -> None:
    with scripted_session(load=False) as (session, _):
        assert repr(messages.status_table(session.status())) == (
            "status        Inactive\nbackend       local\nactive model  none · %llm_load loads one"
        )
        session.load("org/tiny")
        assert repr(messages.status_table(session.status())).splitlines() == [
            "status                  Ready",
            "backend                 local",
            "active model            tiny · local cpu bf16 · 269 MB · 8,192 ctx",
            "source                  /models/org/tiny",
            "device                  cpu",
            "dtype                   bfloat16",
            "quantization            none",
            "memory of this process  2 kB",
        ]
        status = dataclasses.replace(
            session.status(), status="Loading", progress=Progress("reading the weights", 0.5),
            last_error="It broke.", memory=MemoryUse(10**9, (("cuda:0", 2 * 10**9),)),
        )  # fmt: skip
        text = repr(messages.status_table(status))
        assert "loading                 reading the weights 50%" in text
        assert "memory on cuda:0        2.0 GB" in text
        assert text.endswith("last load               failed: It broke.")


def test_the_models() -> None:
    found = [
        ModelInfo("a", "local", where="cache", size=10**9),
        ModelInfo("b", "local", where="folder"),
        ModelInfo("c", "local", where="gguf", context_length=32768),
    ]
    assert repr(messages.models_table(found, (INFO,))).splitlines() == [
        "where         model                  size    context",
        "loaded        SmolLM2-135M-Instruct  269 MB  8,192",
        "hub cache     a                      1.0 GB",
        "local folder  b",
        "GGUF file     c                              32,768",
    ]
    assert "No models found. %llm_load MODEL" in repr(messages.models_table([], ()))


def test_the_dry_run() -> None:
    with scripted_session() as (session, _):
        dry = session.dry_run(
            Request("one two\n  three", system="be brief", options={"temperature": 0})
        )
        assert repr(messages.dry_run_table(dry)).splitlines() == [
            "system  be brief",
            "user    one two",
            "          three",
            "",
            "tiny · 5 tokens · under 0.1% of 8,192 · nothing was sent",
            "max_new_tokens 512, temperature 0.0, top_p 0.9, top_k 50, repetition_penalty 1.15",
        ]


def test_the_settings() -> None:
    with scripted_session(load=False) as (session, _):
        lines = repr(messages.config_table(session)).splitlines()
        assert lines[0].split() == ["setting", "value", "range", "meaning"]
        assert lines[2].startswith("temperature         0.7    0 to 2           0 always takes")
        assert lines[6].startswith("seed                none   0 to 4294967295")
        session.generation.update(temperature=0.2, stop=["END"])
        text = repr(messages.config_table(session))
        assert "temperature         0.2 *" in text
        assert '"END" *' in text
        assert text.endswith("* changed in this session. %llm_config --reset restores it.")
        text = repr(messages.config_table(session, ["top_k"]))
        assert [line.split()[:2] for line in text.splitlines()[1:]] == [["top_k", "50"]]


SERVED = ModelInfo("gpt", "openai", context_length=8192)
LIMIT = ["max_new_tokens"]


def test_changed_settings() -> None:
    before = SessionConfig(temperature=0.7, stop=("a\n",), extra={"a": [1]})
    after = before.replace(
        temperature=0.2, stop=(), extra={"a": [1], "b": "x"}, system="Be\nbrief."
    )
    names = ["system", "temperature", "stop", "top_p", "extra"]
    assert repr(messages.changes_table(before, after, names, None)).splitlines() == [
        "temperature  0.7 → 0.2",
        "top_p        0.9 (unchanged)",
        'stop         "a\\n" → none',
        'extra        a=[1] → a=[1] b="x"',
        "system       none → Be brief.",
    ]
    table = messages.changes_table(before, after.replace(top_k=3), ["top_k", "seed"], SERVED)
    assert table.note == "Not supported by openai, so not sent: top_k."
    table = messages.changes_table(before, after.replace(max_new_tokens=9000), LIMIT, SERVED)
    assert table.note == (
        "max_new_tokens 9,000 is more than the context of gpt (8,192 tokens): no answer can be that long."
    )
    assert messages.changes_table(before, before, LIMIT, SERVED).note == ""
    assert repr(messages.changes_table(before, before, [], SERVED)) == "No setting has changed."


def test_a_table_escapes_what_it_shows() -> None:
    table = Table(("a", "<b>"), [["<script>", "1 & 2"]], "note <i>")
    html = table._repr_html_()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert "1 &amp; 2" in html
    assert "note &lt;i&gt;" in html
    assert repr(table) == "a         <b>\n<script>  1 & 2\nnote <i>"
    assert "<thead>" not in Table(("", ""), [["x", "y"]])._repr_html_()
    assert repr(Table(("",), [], "Nothing.")) == "Nothing."


def test_option_in_the_line_below_an_answer_stays_in_one_line() -> None:
    line = muted("tiny · cut off at 3 tokens (--max-new-tokens) · -- <b>")
    span = '<span style="white-space: nowrap">(--max-new-tokens)</span>'
    assert line.endswith(f'">tiny · cut off at 3 tokens {span} · -- &lt;b&gt;</div>')


def test_short_cells_of_a_table_are_not_wrapped() -> None:
    html = Table(("", ""), [["24 tokens", "a longer text " * 9]])._repr_html_()
    assert [cell.count("nowrap") for cell in html.split("<td ")] == [0, 1, 0]


def test_table_scrolls_and_squeezes_no_column_and_breaks_no_option() -> None:
    cell = "queued behind job 2 (SmolLM2) · --compile"
    html = Table(("a", "b"), [["1", cell]])._repr_html_()
    # JupyterLab gives all columns the same width without the layout.
    assert '<div style="overflow-x: auto"><table style="table-layout: auto;">' in html
    assert "min-width: 11em; overflow-wrap: anywhere;" in html.split("<td ")[2]
    assert html.count('<span style="white-space: nowrap">--compile</span>') == 1
