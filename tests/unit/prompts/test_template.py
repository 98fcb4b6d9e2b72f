"""What `fill` and `to_text` promise: values go in, and every other brace stays byte for byte."""

from __future__ import annotations

import ast
import json
import linecache
import re
import subprocess
import sys
import time
from collections import ChainMap
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from llm_magic.errors import PromptError
from llm_magic.prompts.template import Filled, fill
from llm_magic.prompts.values_as_text import to_text
from llm_magic.types import Usage
from tests.scripted import make_reply


class Unreadable:
    """Its text and its property raise."""

    def __str__(self) -> str:
        raise ValueError("no text\nat all")

    @property
    def prop(self) -> str:
        raise RuntimeError("first line\nsecond line")


class Unprintable(Exception):
    def __str__(self) -> str:
        raise ValueError("not even this")


class Raising:
    """A property of it raises the given error."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    @property
    def value(self) -> None:
        raise self._error


NAMES: dict[str, Any] = {
    "name": "Ada",
    "other": "OTHER",
    "a": 1,
    "b": 2,
    "x": 3,
    "y": 4,
    "i": 5,
    "n": 6,
    "train": "TRAIN",
    "d": {"k": "v", "}": "brace", "it's": "quoted", 7: "seven"},
    "xs": [10, 20, 30],
    "obj": SimpleNamespace(attr=SimpleNamespace(deep="DEEP"), _private="private"),
    "f": lambda *args, **named: f"{args}{named}",
    "table": {("r", 0): "cell"},
    "invalid": Unreadable(),
    "_": "last",
    "__name__": "__main__",
    "__builtins__": {},
}


def text_of(template: str) -> str:
    return fill(template, NAMES).text


# --- references


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{name}", "Ada"),
        ("Hello {name}, {name}!", "Hello Ada, Ada!"),
        ("{name}{other}", "AdaOTHER"),
        ("{obj.attr.deep}", "DEEP"),
        ('{d["k"]}', "v"),
        ("{d['k']}", "v"),
        ("{d[7]}", "seven"),
        ('{d["}"]}', "brace"),
        ('{d["it\'s"]}', "quoted"),
        (r"{d['it\'s']}", "quoted"),
        ("{xs[0]}", "10"),
        ("{xs[-1]}", "30"),
        ("{xs[1:]}", "[20, 30]"),
        ("{xs[::-1]}", "[30, 20, 10]"),
        ("{xs[a]}", "20"),
        ("{xs[-a]}", "30"),
        ('{table["r", 0]}', "cell"),
        ("{name.upper()}", "ADA"),
        ('{name.replace("A", other)}', "OTHERda"),
        ("{name.upper().lower()[0]}", "a"),
        ("{name!r}", "'Ada'"),
        ("{a:.2f}", "1.00"),
        ("{a - b}", "-1"),
        ("{-a}", "-1"),
        ("{(name)}", "Ada"),
        ("{len(xs)}", "3"),
        ("{{not_here} {name}", "{{not_here} Ada"),
        ("{'a': {len(xs)}}", "{'a': 3}"),
        ("{_}", "last"),
        ("report_{name}.csv", "report_Ada.csv"),
        ("issue #{a}", "issue #1"),
        (r"line\n{name}\t{name}", r"line\nAda\tAda"),
        (r"C:\data\{name}", r"C:\data\Ada"),
        ('{"a": {"b": {name}}}', '{"a": {"b": Ada}}'),
        ("{{name} {", "{Ada {"),
        ("Solve $x + {a} = {b}$", "Solve $x + 1 = 2$"),
        ("f'(x) = {a} and f'(0)", "f'(x) = 1 and f'(0)"),
    ],
)
def test_reference_becomes_its_value(template: str, expected: str) -> None:
    assert text_of(template) == expected


def test_used_lists_the_references_once_in_order() -> None:
    filled = fill('{d["k"]} {name} {{other}} {d["k"]}', NAMES)
    assert filled == Filled("v Ada {other} v", ('d["k"]', "name"), ())


def test_any_mapping_will_do() -> None:
    assert fill("{a}{b}", ChainMap({"a": "1"}, {"b": "2"})).text == "12"


def test_inserted_values_are_never_scanned() -> None:
    names = {"one": "{two} {{two}} \\frac{", "two": "{one}"}
    assert fill("{one}|{two}|{one}", names).text == f"{names['one']}|{{one}}|{names['one']}"


# --- what stays


@pytest.mark.parametrize(
    "template",
    [
        "",
        "{}",
        "{0}",
        "{ name }",
        "{name }",
        "{\nname}",
        "{name\n}",
        "{name",
        "name}",
        "{a=}",
        "{a:b}",
        "{a, b}",
        "{a: b}",
        "{a or b}",
        "{a if b else x}",
        "{*xs}",
        "{**d}",
        "{a for a in xs}",
        "{a: b for a in xs}",
        "{a:1}",
        "{a: 1}",
        "{a:1,b:2}",
        "{a:b,x:y}",
        "{a # comment}",
        "{a:{b}}",
        "{a:>{b}}",
        "{xs, a}",
        "{[a]}",
        "{a; b}",
        "{obj._private}",
        "{f(x for x in xs)}",
        "{f(*xs)}",
        "{f(**d)}",
        "{f(lambda: a)}",
        "{f(nothere)}",
        "{xs[nothere]}",
        "{f(a := b)}",
        "{f(a < b)}",
        "{f({1})}",
        "{'name'}",
        '{b"x".upper()}',
        '{a."x"}',
        "{name.}",
        "{name.class}",
        "{name..upper}",
        "{xs[0}",
        '{d["k]}',
        '{d["\\d"]}',
        '{d["\0"]}',
        '{d["\ud800"\ud800]}',
        "{a[1or 2]}",
        "{print}",
        "{True}",
        "{__name__}",
        "{__builtins__}",
        "{__class__.x}",
        '{"name": "Ada", "n": {"a": 1}}',
        "{'a': [1, 2, {}]}",
        "{k: v for k, v in d.items()}",
        "${name} ${{name}} ${{ name }} `${name}`",
        "{{ name }} {{name|upper}} {% if name %} {{nothere}} {{{name}}} {{{{name}}}}",
        "body {color: red} a{b:c}",
        "fn main() { let x = 1; }",
    ],
)
def test_other_braces_stay(template: str) -> None:
    assert fill(template, NAMES).text == template
    assert fill(template, NAMES).used == ()


@pytest.mark.parametrize(
    "template",
    [
        r"\frac{a}{b}",
        r"\sqrt[3]{x}",
        r"\dfrac*{a}{b}",
        r"\sum_{i=1}^{n} x_{i}^{n}",
        r"\sum_{i}^{n}",
        r"\mathbf{x}_{i}",
        r"\begin{x}\end{x}",
        r"\frac{1}{1+{x}} \frac{{x}}{2}",
        r"\newcommand{\a}[1]{a{b}}",
        "x_{i} = y_{n}",
        "10^{n} e^{x}",
        "the $loss_{train}$ and $$loss_{train}$$",
        r"\d{n} \u{a} \{a, b\}",
        r"\\frac{a}{b}",
    ],
)
def test_latex_stays(template: str) -> None:
    assert text_of(template) == template
    assert text_of(template + " {name}") == template + " Ada"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (r"\textbf{Hi} {name}", r"\textbf{Hi} Ada"),
        (r"why does \frac{ fail, {name}?", r"why does \frac{ fail, Ada?"),
        ("at $5 for loss_{train}, or $6", "at $5 for loss_TRAIN, or $6"),
        ("{name}_{other}^2", "Ada_OTHER^2"),
        ("^{name}", "^Ada"),
    ],
)
def test_latex_ends_where_it_ends(template: str, expected: str) -> None:
    assert text_of(template) == expected


@pytest.mark.parametrize(
    "literal",
    [
        'f"{x}"',
        "f'{x}'",
        'F"a {x} b {y}"',
        'rf"{x}\\"{y}"',
        'fr"{x}"',
        'f"{d["k"]} {x}"',
        "f'{d['k']} {x}'",
        'f"{x:{y}}"',
        'f"{{name}}"',
        'f"""\n{x}\n"{y}" """',
        "f'''{x}\n'''",
    ],
)
def test_f_strings_stay(literal: str) -> None:
    template = f"print({literal})"
    assert text_of(template) == template
    assert text_of(template + " {name}") == template + " Ada"


@pytest.mark.parametrize("template", ['if"{a}"', '"{a}"', 'f"{a}', 'f """{a}"""'])
def test_quotes_without_an_f_prefix_are_filled(template: str) -> None:
    assert text_of(template) == template.replace("{a}", "1")


@pytest.mark.parametrize("ref", ["name", 'd["k"]', 'd["missing"]', "xs[0:1]", "name.__class__"])
def test_double_braces_are_a_literal(ref: str) -> None:
    assert fill(f"<{{{{{ref}}}}}>", NAMES) == Filled(f"<{{{ref}}}>")


# --- errors


@pytest.mark.parametrize(
    ("ref", "error"),
    [
        ("xs[9]", "IndexError: list index out of range"),
        ("name.nope", "AttributeError: 'str' object has no attribute 'nope'"),
        ("a + name", "TypeError: unsupported operand type(s) for +: 'int' and 'str'"),
        ("name.nope()", "AttributeError: 'str' object has no attribute 'nope'"),
        ("xs[a / 2]", "TypeError: list indices must be integers or slices, not float"),
        ("invalid.prop", "RuntimeError: first line"),
        ("invalid", "ValueError: no text"),
    ],
)
def test_error_names_the_reference_in_one_line(ref: str, error: str) -> None:
    with pytest.raises(PromptError) as caught:
        text_of(f"before {{{ref}}} after")
    first = (
        "Correct the name nope"
        if error.startswith("Attribute")
        else ("Correct the expression, or assign its value to a variable first")
    )
    escape = f"To send the braces unchanged, write {{{{{ref}}}}}."
    assert str(caught.value) == f"{{{ref}}}: {error}. {first}. {escape}"
    assert caught.value.__context__ is None
    assert "Traceback" in caught.value.details


def test_error_that_cannot_be_printed() -> None:
    with pytest.raises(PromptError, match="Unprintable"):
        fill("{owner.value}", {"owner": Raising(Unprintable())})


def test_syntax_error_of_the_users_code() -> None:
    error = SyntaxError("bad", ("file", 1, 1, "code", 1, 2))
    with pytest.raises(PromptError, match=r"^\{owner\.value\}: SyntaxError: bad\. Correct"):
        fill("{owner.value}", {"owner": Raising(error)})


@pytest.mark.parametrize(
    ("ref", "near"),
    [
        ('deep["pirce"]', "price"),
        ("deep.itms()", "items"),
        ("name.uper()", "upper"),
        ("obj.atr", "attr"),
        ('df["prise"].mean()', "price"),
        ("df.prise", "price"),
        ("df.haed()", "head"),
        ("pair.lefft", "left"),
        ('df.groupby("prise").size()', "price"),
        ('df.groupby("price")["prise"]', "price"),
        ('df.sort_values(by=["prise"])', "price"),
        ('df.drop(columns=["prise"])', "price"),
    ],
)
def test_error_suggests_a_similar_attribute_key_or_column(ref: str, near: str) -> None:
    assert advice_of(ref) == f'Did you mean "{near}"?'


@pytest.mark.parametrize(
    ("ref", "advice"),
    [
        ('deep["kk"]', "The keys are ['price']."),
        ("deep.kk", "The keys are ['price']."),
        ("deep[3]", "The keys are ['price']."),
        ("deep.price", 'For the key, write ["price"].'),
        ('df["c9"]', "The columns are ['price']."),
        ('df.loc[0, "c9"]', "The columns are ['price']."),
        ("df.loc[7]", "The labels are [0]."),
        ('df.loc[:, ["price", "prise"]]', 'Did you mean "price"?'),
        ('df.at[0, "prise"]', 'Did you mean "price"?'),
        ('row.loc["prise"]', 'Did you mean "price"?'),
        ('df.merge(other, on="price")', "The columns are ['name']."),
        ("df.c9", "The columns are ['price']."),
        ('row["c9"]', "The labels are ['price']."),
        ('deep["kk"].nope', "The keys are ['price']."),
        ('{}["kk"]', "Correct the key."),
        ("pair.nope", "The attributes are left, right."),
        (
            "reply.nope",
            "The attributes are model, backend, finish_reason, usage, timing, messages,"
            " reasoning, dropped_turns, context_full, probabilities, value, retry, ….",
        ),
        ("reply.txet", 'Did you mean "text"?'),
        ("reply.content", "The reply is the text itself."),
        ('df.groupby("kk").size()', "The columns are ['price']."),
        ("name:.2f", "The value is a text, not a number."),
        ("nine:,.2f", "The value is a text; write {float(nine):,.2f}."),
    ],
)
def test_error_lists_the_keys_or_columns_if_none_is_similar(ref: str, advice: str) -> None:
    assert advice_of(ref.replace("{}", "empty")) == advice


def test_dict_in_an_expression_has_a_note() -> None:
    names = {"df": pd.DataFrame({"n": [1]})}
    codes = ('df.rename(columns={"n": "m"})', 'df.agg({"n": "mean"}).n:.2f', "len({1, 2})")
    for code in (*codes, 'df | {"b": 2}', 'df["n"] | {"b": {"c": 2}}:.2f'):
        filled = fill(f"Is {{{code}}} right?", names)
        assert filled.text == f"Is {{{code}}} right?"
        assert filled.notes == (
            f"{{{code}}} was not replaced: it contains braces, as those of a dict or a set."
            " Assign it to a variable first, and refer to that",
        )
    for text in ('`{df.agg({"n": 1})}`', '{"df": {"n": 1}}', "f(x) { df({1}) }", '{f({"n": 1})}'):
        assert fill(text, names) == Filled(text)


def advice_of(ref: str) -> str:
    """Return the sentence between the error of a reference and how to send its braces."""
    df = pd.DataFrame({"price": [1]})
    deep, row = {"price": 1}, df.iloc[0]
    names = {**NAMES, "deep": deep, "df": df, "row": row, "empty": {}, "pair": Pair(1, "r")}
    names["reply"] = make_reply("text")
    names |= {"nine": "9.5", "other": pd.DataFrame({"name": ["a"]})}
    with pytest.raises(PromptError) as caught:
        fill(f"{{{ref}}}", names)
    text, _, end = str(caught.value).partition(" To send the braces unchanged, write ")
    assert end == f"{{{{{ref}}}}}."
    return re.split(r"['\].] (?=Did|The|For|Correct)|\. (?=Did|The|For|Correct)", text)[-1]


def test_interrupt_passes() -> None:
    with pytest.raises(KeyboardInterrupt):
        fill("{owner.value}", {"owner": Raising(KeyboardInterrupt())})


@pytest.mark.parametrize(
    "ref",
    [
        "name.__class__",
        "f(name.__class__)",
        "xs.__len__()",
        "len(__name__)",
        "xs[name.__x__]",
        "__name__",
    ],
)
def test_names_with_two_underscores_are_refused(ref: str) -> None:
    filled = fill(f"{{{ref}}}", NAMES)
    assert filled.text == f"{{{ref}}}"
    assert filled.notes[0].startswith(f"{{{ref}}} was not replaced: it ")


def test_dunder_access_on_an_unknown_name_is_text() -> None:
    assert text_of("{nothere.__class__}") == "{nothere.__class__}"


def test_note_names_the_rule_for_two_underscores() -> None:
    for names in (NAMES, {**NAMES, "__name__": "__main__"}):
        assert fill("In {__name__}.", names).notes == (
            "{__name__} was not replaced: it reads __name__; names that begin with two underscores"
            " are refused. Assign it to a variable first, and refer to that",
        )


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("${a:.2f}", "$1.00"),
        ("US${a * 1234:,.2f}!", "US$1,234.00!"),
        ("${a * 1000:,}", "$1,000"),
        ("${len(xs):,d}", "$3"),
        ("${{a:.2f}}", "${a:.2f}"),
        ("$ {a}", "$ 1"),
    ],
)
def test_number_format_after_a_dollar_is_filled(template: str, text: str) -> None:
    assert fill(template, NAMES) == Filled(text, fill(template, NAMES).used)


@pytest.mark.parametrize(
    "template",
    [
        "${a}", "${name.upper()}", "${a * 2}", "${a:-5}", "${a:=5}", "${a:+.2f}", "${a:2}", "${a:1:2}",
        "${a?.b}", "${{ a }}", "${{a}}", "${#xs[@]}", "${xs[0]}", "${a%%.2f}", "${nothere:.2f}",
        "${a:.c=.o}", "${a:?.2f}", "f'${a:.2f}'",
    ],
)  # fmt: skip
def test_shell_and_javascript_after_a_dollar_stay(template: str) -> None:
    assert fill(f"{template} $", NAMES).text == f"{template} $"


@pytest.mark.parametrize("template", ["${{a}}", "${nmae}", "${f(a)}", "${await f(a)}"])
def test_code_after_a_dollar_that_would_not_be_evaluated_gets_no_note(template: str) -> None:
    assert fill(template, NAMES).notes == ()


# --- notes

# Prompts with braces that are no references, as people paste them.
BRACES = [
    'Return JSON like {"name": "Ada", "age": 36, "xs": [{"id": 1}, {"id": 2}]}.',
    "Return JSON: {name: string, age: number}, or [{a: b}]",
    'Answer as {"name": name, "x": x}',
    "Fix this dict: d = {'a': 1, 'b': [1, 2]}",
    "Is {1, 2, 3} a set? And {a, b, x}?",
    "What is {x for x in xs}, what is {k: v for k, v in d.items()}?",
    "Explain print(f'{name} is {x:.2f}') and f\"{nmae}\"",
    'Explain:\n```python\nprint(f"{name} has {len(xs)} items, {nmae}")\n```',
    'Explain:\n```python\nprint("{} and {}".format(a, b))\n```',
    r"Simplify \frac{a}{b} + \sqrt{x^2} + \frac{qqqq}{rrrr}",
    r"Compute $\sum_{i=1}^{n} x_{i}$ and $e^{i\pi}$ and \mathbb{E}[x]",
    r"\begin{align} a &= b \\ c &= d \end{align} \cite{knuth84} \ref{fig:x}",
    "Explain function foo() { return x; } and for (;;) { printf(a); }",
    "body { color: red; margin: 0 } a { color: blue }",
    "rename {a,b}.txt, mv file.{txt,md}, for i in {1..10}; do echo $i; done",
    "awk '{print $1}' and awk '{ sum += $1 } END { print sum }'",
    "Jinja: Hello {{ name }}, {% for i in xs %}{{ i }}{% endfor %} {{nmae}}",
    "regex [0-9]{3}-[0-9]{4} and \\d{3} and \\w{2,5}",
    'Go: type T struct { X int `json:"x"` }',
    "Chemistry: Fe^{2+}, SO_4^{2-}, H_{2}O",
    "GraphQL: query { user(id: 1) { name posts { title } } }",
    "const { a, b } = props; import { useState } from 'react'",
    'Terraform: "${var.region}", Actions: ${{ secrets.TOKEN }}, PowerShell: ${env:PATH}',
    "Cypher: MATCH (n {name: 'Ada'}) RETURN n; Mongo: db.users.find({age: {$gt: 5}})",
    'Prometheus: http_requests_total{job="api"}[5m]',
    "docker ps --format '{{.Names}} {{.Status}}', git HEAD@{1}, find . -exec rm {} \\;",
    "yaml: {a: 1, b: {c: 2}}, helm: {{ .Values.name }}, vue: <p>{{ title }}</p>",
    "C: int a[] = {1,2,3}; C++: auto l = [&](int x){ return x; };",
    "BibTeX: @article{knuth84,\n  title={Literate {P}rogramming},\n  year={1984}\n}",
    'JSON schema: {"type":"object","properties":{"x":{"type":"number"}}}',
]


@pytest.mark.parametrize(
    ("template", "note"),
    [
        ("Hi {nmae}!", '{nmae} was not replaced: nmae is not defined. Did you mean "name"?'),
        ('say "{qqqq}".', "{qqqq} was not replaced: qqqq is not defined."),
        ("{name} and {nmae}", '{nmae} was not replaced: nmae is not defined. Did you mean "name"?'),
        ("{nmae}\n", '{nmae} was not replaced: nmae is not defined. Did you mean "name"?'),
        ("```\ncode\n```\n{qqqq}", "{qqqq} was not replaced: qqqq is not defined."),
        (
            "{len(nmae)}",
            '{len(nmae)} was not replaced: nmae is not defined. Did you mean "name"?',
        ),
        ("{nmae:.2f}", '{nmae:.2f} was not replaced: nmae is not defined. Did you mean "name"?'),
        ("{nmae.x}", '{nmae.x} was not replaced: nmae is not defined. Did you mean "name"?'),
        ("{q}", "{q} was not replaced: q is not defined."),
        ("x = {qqqq}", "{qqqq} was not replaced: qqqq is not defined."),
        ("<b>{qqqq}</b>", "{qqqq} was not replaced: qqqq is not defined."),
        ('{"a": 1} for {qqqq}', "{qqqq} was not replaced: qqqq is not defined."),
        ('for {qqqq}: {"a": {}}', "{qqqq} was not replaced: qqqq is not defined."),
        ('Title: {qqqq}\n{"a": [1]}', "{qqqq} was not replaced: qqqq is not defined."),
        (r"$\frac{x}{y}$ of {qqqq}", "{qqqq} was not replaced: qqqq is not defined."),
        ("file_{qqqq}.csv", "{qqqq} was not replaced: qqqq is not defined."),
        ("{name}{qqqq}", "{qqqq} was not replaced: qqqq is not defined."),
        ("`code` and {qqqq} `code`", "{qqqq} was not replaced: qqqq is not defined."),
        ("{ name }", "{ name } was not replaced: it has spaces beside the braces; write {name}"),
        (
            "{a:b}",
            "{a:b} was not replaced: it may be an entry of a dict or CSS; for a format spec put"
            " > after the colon",
        ),
        (
            "${a}",
            "${a} was not replaced: shell and JavaScript code use this form. Write ${a:,} or ${a:.2f} for a"
            " number, else $ {a}",
        ),
        (
            "${a * 2}",
            "${a * 2} was not replaced: shell and JavaScript code use this form. Write ${a * 2:,} or"
            " ${a * 2:.2f} for a number, else $ {a * 2}",
        ),
        (
            '${d["k"]}',
            '${d["k"]} was not replaced: shell and JavaScript code use this form. Write ${d["k"]:,} or'
            ' ${d["k"]:.2f} for a number, else $ {d["k"]}',
        ),
        (
            "${a:+5}",
            "${a:+5} was not replaced: shell and JavaScript code use this form. Write $ {a:+5}",
        ),
        ("{a=} {name=!r:>9}", "{a=} was not replaced: it ends with =; write a={a}"),
        ("{*xs}", "{*xs} was not replaced: it contains a star"),
        ("{a:=5}", "{a:=5} was not replaced: it contains :="),
        ("{len(xs}", "{len(xs} was not replaced: it has a bracket that is not closed"),
        ("{xs[0} or {xs[1]}", "{xs[0} was not replaced: it has a bracket that is not closed"),
        ('{d["k]}', '{d["k]} was not replaced: it has a quote that is not closed'),
        *(
            (text, "{xs[0] was not replaced: it has no closing brace; write {xs[0]}")
            for text in ("{xs[0] and tell me", "{xs[0]] more", "Look at {xs[0]", "{xs[0], {name}")
        ),
        (
            "{d.get('k') is {name}",
            "{d.get('k') was not replaced: it has no closing brace; write {d.get('k')}",
        ),
        *(
            (text, "{name was not replaced: it has no closing brace; write {name}")
            for text in ("Hi {name and {a}", "Hi {name, and bye", "Say {name", "Is it {name?")
        ),
        ("Is it {a{", "{a was not replaced: it has no closing brace; write {a}"),
        ("Is { a } {a{", "{ a } was not replaced: it has spaces beside the braces; write {a}"),
        ("{a :.2f}", "{a :.2f} was not replaced: it has a space beside the colon; write {a:.2f}"),
        (
            "{xs[0]: ,.2f}",
            "{xs[0]: ,.2f} was not replaced: it has a space beside the colon; write {xs[0]:,.2f}",
        ),
        (
            "{spaced.per head}",
            '{spaced.per head} was not replaced: it has a name with spaces; write {spaced["per head"]}',
        ),
        (
            "{name.upper}",
            "{name.upper} was not replaced: it reads a method; write .upper() to call it",
        ),
        *(
            (text, f"{shown} was not replaced: it {reason}")
            for text, shown, reason in (
                (
                    "Mean {xs[0]:.2f and all",
                    "{xs[0]:.2f",
                    "has no closing brace; write {xs[0]:.2f}",
                ),
                ("{xs[0]:,.1f) ok", "{xs[0]:,.1f", "has no closing brace; write {xs[0]:,.1f}"),
                (
                    "{name,upper()}",
                    "{name,upper()}",
                    "has a comma in place of a dot; write {name.upper()}",
                ),
                ("See {xs;} now", "{xs;}", "ends with a semicolon; write {xs}"),
                ("{xs !r}", "{xs !r}", "has a space before the conversion; write {xs!r}"),
                ("{a !s:>9}", "{a !s:>9}", "has a space before the conversion; write {a!s:>9}"),
                ("{xs[0]!}", "{xs[0]!}", "has !, which is not a conversion; write {xs[0]}"),
                ("{xs[0]!d}", "{xs[0]!d}", "has !d, which is not a conversion; write {xs[0]}"),
                (
                    "{{{len(xs)}}}",
                    "{{{len(xs)}}}",
                    "has three braces on each side; write {len(xs)}",
                ),
                ("{{{name}}}", "{{{name}}}", "has three braces on each side; write {name}"),
                ("{{ name }}", "{{ name }}", "has double braces with spaces; write {name}"),
                (
                    "{name:upper}",
                    "{name:upper}",
                    'has the format spec "upper", which Python does not support; write {name.upper()}',
                ),
                ("{name, other}", "{name, other}", "has several names; write {name} {other}"),
                ("{name; other}", "{name; other}", "has several names; write {name} {other}"),
                ("Is {t, u} far?", "{t, u}", "has several names; write {t} {u}"),
                ("{t; name}", "{t; name}", "has several names; write {t} {name}"),
                (
                    "{t:foo}",
                    "{t:foo}",
                    'has the format spec "foo", which Python does not support; write {t}',
                ),
                (
                    'Is "{x:foo}" much?',
                    "{x:foo}",
                    'has the format spec "foo", which Python does not support; write {x}',
                ),
                ("{xs[0]]}", "{xs[0]]}", "has a closing bracket too many"),
                (
                    'f"{a} of {{n}}"',
                    'f"{a} of {{n}}"',
                    "is an f-string; omit the f to insert the values",
                ),
                (
                    "Is f'{xs[0]}' much?",
                    "f'{xs[0]}'",
                    "is an f-string; omit the f to insert the values",
                ),
            )
        ),
        (
            "{xs[0]}} ok",
            "{xs[0]}} has one closing brace too many, which is sent; write {xs[0]}",
        ),
        ("{{a}", "{{a} has one opening brace too many, which is sent; write {a}"),
        (
            "${nmae:.2f}",
            '{nmae:.2f} was not replaced: nmae is not defined. Did you mean "name"?',
        ),
    ],
)
def test_note_names_what_was_left(template: str, note: str) -> None:
    names = {**NAMES, "spaced": {"per head": 1}, "t": "Rome", "u": "Oslo"}
    assert fill(template, names).notes[:1] == (note,)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("_", "_ is a name of IPython. Assign the value to a variable first."),
        ("_i12", "_i12 is a name of IPython. Assign the value to a variable first."),
        ("Out", "Out as a whole is not read; write {Out[NUMBER]}."),
        ("len", "len is a function; write {len(…)} with its argument."),
        ("id", "id is a name of Python, not a variable."),
        ("_private", "_private is not defined."),
    ],
)
def test_note_about_a_name_that_is_defined_but_not_read_does_not_deny_it(
    code: str, reason: str
) -> None:
    assert fill(f"What is {{{code}}}?", {}).notes == (f"{{{code}}} was not replaced: {reason}",)


@pytest.mark.parametrize(
    "template",
    [
        "{a: .5} {a: 3} {a : b} {a{b} {a{",
        "else {xs[0] and `{xs[0] x`",
        "if (x) {xs[0];",
        "p{a{ color: red; }",
        "{d.other key} {xs.per head}",
        "{0} {} { nmae } {{nmae}} {{nmae.x}}",
        '{"k": {nmae}}',
        "`{nmae}`",
        "```\n{nmae}\n```",
        "call.{nmae}[0] {nmae}[0]",
        "{nmae};",
        "<b class={nmae}>",
        "import {nmae} from 'react'",
        '{\n  "k": {nmae}\n}',
        "import {nmae} from 'react';",
        r"\frac{nmae}{nmae}",
        'f"{nmae}"',
        "${nmae}",
        "{ name, other }",
        "{None} {else}",
        "{name}",
        ".cls{display:none} {a:red} {qqqq:1}",
        "function(x) { x + 1 } and x => { x } and o = { x }",
        "```js\nconst f = (x) => { return `${x} ${name}`; }\n```",
        "`${a}`",
        "{xs[0], xs[1]} {len(xs): a} {len(x) for x in xs}",
        "{call(a} {xs[0].. d[",
        "{{{nmae}}} {{ nmae }} {{{{len(xs)}}}} {a,b} {a,len(xs)} {a,x(y)} {a, b}; {x;y}",
        '{"k": {"v": {a}}} {\n  "k": {a}}\n{{a}: b} and {{a}\n}',
        "if (!a) { a; }\nfunction(x) {x;} => {x;} `{xs;}` `{{a}` `{a}}`",
        'print(f"{a}")\nreturn f"{a}"\n    f"{a}"\nx = f"{a}"\n`f"{a}"` if f"{a}" else',
        "```\nf'{a}'\n```",
        "{call;} {call !r} {call!} {call]}",
        "{t,u}.txt {t, a} {t, 1} ${t, u} `{t, u}` { t, u } {{t, u}}",
        r"$\{t, u\}$ and S = \{t, u\}, \text{t, u} and $x \in {t, u}$",
        "Return {name:string}, or {a:int}; a{t:foo} /items/{t:path} {t:red}",
        'print({t:foo}) and {"t": {t:foo}}',
        *BRACES,
    ],
)
def test_code_gets_no_note(template: str) -> None:
    assert fill(template, {**NAMES, "t": "Rome", "u": "Oslo"}).notes == ()


def test_notes_are_few_and_the_others_are_counted() -> None:
    text = " ".join(["{q1}", "{q1}", *(f"{{q{number}}}" for number in range(2, 20))])
    notes = fill(text, NAMES, escape=" or use --literal").notes
    assert [note.partition(" ")[0] for note in notes] == [
        "{q1}",
        "{q2}",
        "{q3}",
        "{q4}",
        "{q5}",
        "14",
    ]
    assert notes[-1] == "14 more were not replaced; --dry-run shows their notes"
    assert fill(text, NAMES).notes[-1] == "14 more were not replaced", "--dry-run is for cells"
    assert len(fill(text, NAMES, all_notes=True).notes) == 19
    many = "\n".join(f"{{q{number}}}" for number in range(1500))
    most = fill(many, NAMES, all_notes=True).notes
    assert (len(most), most[-1]) == (1001, "500 more were not replaced")
    assert (
        fill("{q1} {q2} {q3} {q4} {q5} {q6}", NAMES).notes[-1].startswith("1 more was not replaced")
    )


def test_first_notes_are_shown_beside_much_json() -> None:
    text = "{nmae} " + '{"k": {"v": {name}}} ' * 1000 + "{f(a)} " * 50
    missing, refused = fill(text, NAMES).notes
    assert missing.startswith("{nmae} was not replaced: nmae is not defined")
    assert refused.startswith(
        "{f(a)} was not replaced: it calls f; the functions that are called are"
    )


# --- properties

relaxed = settings(deadline=None)  # a busy machine is no failure
terms = st.sampled_from(["alpha", "beta", "i", "x1", "_p", "é", "for", "in", "f", "rf", "lambda"])
symbols = st.sampled_from([*"{}[]()\"'\\$^_.,:;=-+*!|<>%#&~ \n\t0123", "{{", "}}", '"""', "\\frac"])
soup = st.lists(terms | symbols | st.characters(), max_size=40).map("".join)
jsons = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(terms, inner, max_size=3),
    max_leaves=10,
).map(lambda value: json.dumps(value, indent=1))
latex = st.builds("\\frac{{{}}}{{{}}}_{{{}}}".format, terms, terms, terms)
code = st.builds('{{{}: {} for {} in f"{{{}}}"}}'.format, terms, terms, terms, terms)
braces = st.builds("{{{}}}".format, terms)
heavy = st.lists(soup | jsons | latex | code | braces, max_size=6).map("".join)
# Names that no text above can spell, so that nothing in it is a reference.
foreign = st.dictionaries(st.integers(0, 99).map("NAME_{}".format), st.text(), max_size=4)


@relaxed
@given(heavy, foreign)
def test_text_without_a_known_name_passes_byte_for_byte(text: str, names: dict[str, str]) -> None:
    filled = fill(text, names)
    assert filled.text == text
    assert filled.used == ()


@relaxed
@given(st.lists(st.tuples(heavy, st.sampled_from(["one", "two"])), max_size=5), heavy, heavy)
def test_values_are_never_scanned_again(pieces: list[tuple[str, str]], one: str, two: str) -> None:
    # A space and a line end keep what precedes from making LaTeX or an f-string of the reference.
    names = {"one": one + "{two}{{one}}", "two": two + "{one}"}
    template = "".join(f"{only_text(text)}\n {{{name}}}" for text, name in pieces)
    expected = "".join(f"{only_text(text)}\n {names[name]}" for text, name in pieces)
    assert fill(template, names).text == expected


def only_text(text: str) -> str:
    """Drop what may open something that ends only in a later piece."""
    for opener in ("{", "[", '"""', "'''", "\\"):
        text = text.replace(opener, "")
    return text


plain = st.text(st.characters(exclude_characters="{}\\$^_'\"fFrR["), max_size=20)
references = st.sampled_from(
    ["{name}", '{d["k"]}', "{xs[-1]}", "{obj.attr.deep}", "{name.upper()}"]
)
literals = st.sampled_from(["{{name}}", "{0}", "{}", '{"k": 1}', r"\frac{a}{b}", "{ a }", 'f"{a}"'])


@relaxed
@given(st.lists(plain | references | literals))
def test_output_is_the_join_of_its_segments(segments: list[str]) -> None:
    # A space apart, as a segment may change what the next one is: `_` or a second brace.
    joined = " ".join(segments)
    assert text_of(joined) == " ".join(text_of(segment) for segment in segments)


hostile = st.sampled_from(
    ["{x", "{invalid", "{invalid.prop", "{f(", "{xs[", "]", ")", "}", ".", "name", "__class__", "-"]
)


@relaxed
@given(st.lists(hostile | symbols | terms | st.characters(), max_size=30).map("".join))
def test_nothing_but_prompt_error_is_raised(text: str) -> None:
    with suppress(PromptError):
        assert isinstance(fill(text, NAMES), Filled)


PIECES = r"""{ } {x {x' {x"{x' {x[ {x( {x. x_{ x^{ _{ \a{ \a[ \a{} $a_{ $ f" f"{ f"{f"} f"\"""\ ```
{x:, \ a{ {x['{x["' {'"{'" {x:{ {x:{x} {x!r: {x+{ {(x)} {x+x} {len( {q
{x.a.a.a.a.a.a.a.a.a.a.a.a} {x[x[x[x[x[x[x[x[x[x[x]]]]]]]]]]}"""


@pytest.mark.parametrize("piece", [*PIECES.split(), "{nmae} ", "{x} ", "{x '{x' "])
def test_time_grows_with_the_length_only(piece: str) -> None:
    text = (piece * 100_000)[:100_000]
    start = time.perf_counter()
    with suppress(PromptError):
        fill(text, {**NAMES, "x": "value"})
    assert time.perf_counter() - start < 5  # a quadratic scan takes a minute and more


# --- values as text


class Colour(str, Enum):  # noqa: UP042 - the older spelling prints differently
    RED = "red"


class Point(BaseModel):
    """A class with a source."""

    x: int = 1


@dataclass
class Pair:
    left: int
    right: str


def documented() -> int:
    """Return one."""
    return 1


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("as {it} is\n", "as {it} is\n"),
        (Colour.RED, "red"),
        (1.5, "1.5"),
        (None, "None"),
        (b"\x00a", "b'\\x00a'"),
        (Path("a/b"), str(Path("a/b"))),
        ({"b": 1, "a": [2]}, "{'b': 1, 'a': [2]}"),
        ((1,), "(1,)"),
        (Pair(1, "r"), "Pair(left=1, right='r')"),
        (Point(), "Point(x=1)"),
        (len, "<built-in function len>"),
        (int, "<class 'int'>"),
    ],
)
def test_to_text(value: Any, text: str) -> None:
    assert "".join([to_text(value)]) == text


def test_long_containers_are_packed() -> None:
    lines = to_text(list(range(1000))).splitlines()
    assert len(lines) < 60
    assert max(map(len, lines)) <= 100


def test_reply_is_its_text() -> None:
    reply = make_reply("answer\n" * 100, usage=Usage(7, 3))
    names = {"reply": reply, "replies": [reply, reply]}
    assert type(fill("{reply}", names).text) is str
    assert fill("{reply}", names).text == reply
    assert (
        fill("{len(reply)} {reply[:3].upper()} {reply.usage.prompt_tokens}", names).text
        == "700 ANS 7"
    )
    # Not the repr, which is shortened.
    assert ast.literal_eval(fill("{replies}", names).text) == [reply, reply]
    assert ast.literal_eval(fill("{reply!r}", names).text) == reply


def test_functions_and_classes_become_their_source() -> None:
    assert to_text(documented) == 'def documented() -> int:\n    """Return one."""\n    return 1'
    assert to_text(Unreadable().__str__).startswith("def __str__(self) -> str:\n    raise")
    assert to_text(Pair) == "@dataclass\nclass Pair:\n    left: int\n    right: str"
    assert "lambda: 1" in to_text(lambda: 1)  # the line it stands in


@pytest.fixture
def cells() -> Iterator[dict[str, Any]]:
    """Run cells as IPython does: in ``__main__``, with their source in linecache only."""
    invalid = "class Cell(:\n"
    first = "class Cell:\n    old = 1\n"
    second = (
        "import enum\n\n@(lambda c: c)\nclass Cell:\n    x = 1\n\ny = 2\ndef g():\n    return y\n"
    )
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, source in enumerate((first, second, invalid)):
        key = f"<cell {number}>"
        linecache.cache[key] = (len(source), None, source.splitlines(keepends=True), key)
        if source is not invalid:
            exec(compile(source, key, "exec"), names)
    yield names
    for number in range(3):
        del linecache.cache[f"<cell {number}>"]


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{t}", "TABLE"),
        ("See {t}?", "See\nTABLE\n?"),
        ("{t}. {t} !\n", "TABLE\n.\nTABLE\n!\n"),
        ("{t}{t} {name}", "TABLE\nTABLE\nAda"),
        ("\n  {t}  \nEnd", "\n  TABLE  \nEnd"),
        ("<b>{t}</b>", "<b>\nTABLE\n</b>"),
        ("{name} {t}\n{t}", "Ada\nTABLE\nTABLE"),
        ("{t.to_string(index=False)} a", " a\n 1\na"),
        ("{empty}Is {t.shape} or {lines}?", "Is (1, 1) or one\ntwo?"),
    ],
)
def test_lines_of_a_value_are_its_own(template: str, text: str) -> None:
    values = {"t": pd.DataFrame({"a": [1]}), "name": "Ada", "lines": "one\ntwo", "empty": ""}
    table = "DataFrame, 1 row × 1 column\n   a\n0  1"
    assert fill(template, values).text == text.replace("TABLE", table)


def test_source_of_notebook_cells(cells: dict[str, Any]) -> None:
    assert to_text(cells["g"]) == "def g():\n    return y"
    assert to_text(cells["Cell"]) == "@(lambda c: c)\nclass Cell:\n    x = 1"
    exec("class Lost: pass\ndef lost(): pass", cells)
    assert to_text(cells["Lost"]) == "<class '__main__.Lost'>"
    assert to_text(cells["lost"]).startswith("<function lost at ")


# --- tables and arrays


def test_small_frame_is_shown_whole() -> None:
    frame = pd.DataFrame({"n": [1, 2], "s": ["x", "y"]})
    assert to_text(frame) == "DataFrame, 2 rows × 2 columns\n   n  s\n0  1  x\n1  2  y"


def test_large_frame_is_cut_in_every_direction() -> None:
    frame = pd.DataFrame({f"c{n}": range(150) for n in range(100)})
    frame["c99"] = "long " * 100
    title, *lines = to_text(frame).splitlines()
    assert title == "DataFrame, 150 rows × 100 columns"
    assert len(lines) <= 22
    assert max(map(len, lines)) < 250
    assert "149" in lines[-1]
    assert lines[-1].endswith("...")


def test_frame_subclass_and_empty_frame() -> None:
    class Special(pd.DataFrame):
        pass

    assert to_text(Special({"a": [1]})).startswith("Special, 1 row × 1 column\n")
    assert to_text(pd.DataFrame()).startswith("DataFrame, 0 rows × 0 columns\n")


def test_series() -> None:
    assert to_text(pd.Series([1, 2], name="n")) == "Series 'n', 2 values, int64\n0  1\n1  2"
    assert to_text(pd.Series([], dtype="int64")) == "Series, 0 values, int64"
    title, *lines = to_text(pd.Series(["long " * 100] * 50)).splitlines()
    assert title.startswith("Series, 50 values, ")
    assert len(lines) <= 21
    assert max(map(len, lines)) < 80


def test_frame_in_a_prompt() -> None:
    names = {"df": pd.DataFrame({"a": range(30), "b": 2})}
    assert "30 rows × 2 columns" in fill("Look: {df}", names).text
    assert "2 rows × 1 column" in fill('{df[["a"]].head(2)}', names).text
    assert fill('{df.loc[3, "a"]} {df.a.sum()} {df.shape[0]}', names).text == "3 435 30"
    with pytest.raises(PromptError, match=r"^\{df\[\"c\"\]\}: KeyError: 'c'\. The columns are "):
        fill('{df["c"]}', names)


def test_texts_and_labels_become_lists() -> None:
    texts = pd.Series(["x" * 61, "y"])
    names = {"texts": texts, "many": pd.Index([f"t{number}" for number in range(101)])}
    assert to_text(np.array(["a", 3, None], dtype=object)) == "['a', 3, None]"
    assert to_text(pd.array([1, None], dtype="Int64")) == "[1, <NA>]"
    assert to_text(pd.MultiIndex.from_product([["a"], [1, 2]])) == "[('a', 1), ('a', 2)]"
    assert to_text(pd.period_range("2020", periods=1)).startswith("PeriodIndex(['2020-01-01'")
    filled = fill("{texts.unique()} {many}", names)
    assert filled.notes == (
        "{texts.unique()} is sent with texts cut at 60 characters. To send all of it:"
        " {texts.unique().tolist()}",
        "{many} is sent without 81 of 101 values. To send all of it: {many.to_list()}",
    )
    assert filled.text.startswith(f"['{'x' * 57}...', 'y']\nIndex, shape (101,), ")


def test_arrays() -> None:
    assert to_text(np.arange(3)) == f"ndarray, shape (3,), {np.arange(3).dtype}\n[0 1 2]"
    title, *lines = to_text(np.zeros((1000, 50))).splitlines()
    assert title == "ndarray, shape (1000, 50), float64; the first values:"
    assert len(lines) == 6
    assert len(to_text(np.zeros((9, 9, 9, 9)))) < 400
    assert to_text(np.float64(1.5)) == to_text(np.array(1.5)) == "1.5"


def test_tensor_is_known_by_its_name() -> None:
    class Tensor:
        shape = (2,)
        dtype = "torch.float32"

        def __str__(self) -> str:
            return "tensor([1., 2.])"

    Tensor.__module__ = "torch"
    assert to_text(Tensor()) == "Tensor, shape (2,), torch.float32\ntensor([1., 2.])"


def test_nothing_heavy_is_imported() -> None:
    heavy_modules = {"pandas", "numpy", "torch", "IPython", "pydantic"}
    script = f"import sys, llm_magic.prompts.template; sys.exit(bool({heavy_modules} & set(sys.modules)))"
    root = Path(__file__).parents[3]
    assert subprocess.run([sys.executable, "-c", script], cwd=root, check=False).returncode == 0
