"""Typed answers in the cells of a real kernel: what is named, what is shown, what is stored."""

from __future__ import annotations

import re

import pytest

from tests.kernels import Kernel

_SETUP = """import dataclasses, enum, json, pathlib, pickle, re
import pandas as pd
from pydantic import BaseModel
from llm_magic.types import Chunk, Usage
from tests.scripted import Hang, Pause
class Person(BaseModel):
    name: str
    age: int = 0
@dataclasses.dataclass
class Point:
    x: int
    y: int
class Color(enum.Enum):
    RED = "red"
    GREEN = "green"
def will(*texts, finish="stop", **last):
    backend.will(*texts, Chunk(finish_reason=finish, usage=Usage(7, len(texts)), **last))
def sent():
    return backend.requests[-1].messages[-1].content
def structure():
    found = backend.requests[-1].config.structure
    return None if found is None else (found.kind, found.source)
ADA = '{"name": "Ada", "age": 36}'
labels = ["red", "green"]
schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
"""


@pytest.fixture(scope="module")
def k(scripted: Kernel) -> Kernel:
    scripted.ok(_SETUP)
    return scripted


@pytest.mark.parametrize(
    ("options", "answer", "value"),
    [
        ("--schema Person", '{"name": "Ada", "age": 36}', "Person(name='Ada', age=36)"),
        ("--schema={Person}", '{"name": "Ada"}', "Person(name='Ada', age=0)"),
        ("--schema list[Person]", '[{"name": "Ada"}]', "[Person(name='Ada', age=0)]"),
        ("--schema dict[str, list[Point]]", '{"a": [{"x": 1, "y": 2}]}', "{'a': [Point(x=1, y=2)]}"),
        ("--schema 'Person | None'", "null", "None"),
        ("--schema Point", '{"x": 1, "y": 2}', "Point(x=1, y=2)"),
        ("--schema Color", '"red"', "<Color.RED: 'red'>"),
        ("--schema int", "12", "12"),
        ("--schema schema", '{"n": 3}', "{'n': 3}"),
        ("--schema $schema", '{"n": 3}', "{'n': 3}"),
        ('--schema {"type": "integer"}', "3", "3"),
        ("--schema 'name, age int, tags list'", '{"name": "A", "age": 1, "tags": []}',
         "{'name': 'A', 'age': 1, 'tags': []}"),
        ("--choice red,green,blue", "blue", "'blue'"),
        ('--choice "very good, bad"', "very good", "'very good'"),
        ('--choice ["a, b", "c"]', "a, b", "'a, b'"),
        ("--choice labels", "green", "'green'"),
        ("--choice labels[:2]", "green", "'green'"),
        ("--choice [label.upper() for label in labels]", "GREEN", "'GREEN'"),
        ("--choice {labels}", "green", "'green'"),
        ("--choice Color", "green", "<Color.GREEN: 'green'>"),
        (r"--regex \d{2}-[a-z]{1,3}", "12-ab", "'12-ab'"),
        (r'--regex "\d+ (km|miles)"', "12 km", "'12 km'"),
    ],
)  # fmt: skip
def test_output_has_the_value(k: Kernel, options: str, answer: str, value: str) -> None:
    k.ok(f"will({answer!r})")
    k.ok(f"%%llm {options} -o out\nWhich?")
    assert k.value("repr(out)") == value
    assert k.value("repr(llm.last.value)") == value
    assert k.value("llm.last.text") == answer


def test_files_name_schemas_and_grammars(k: Kernel) -> None:
    k.ok("_ = pathlib.Path('number.json').write_text(json.dumps(schema))")
    k.ok("_ = pathlib.Path('as.lark').write_text('start: /a+/')\nwill('{\"n\": 1}')\nwill('aa')")
    k.ok("%%llm --schema number.json -o out\nWhich?")
    assert k.value("out") == {"n": 1}
    k.ok("%%llm --grammar as.lark -o out\nWhich?")
    assert (k.value("out"), k.value("structure()")) == ("aa", ("grammar", "start: /a+/"))
    assert k.value("sent()") == "Which?"


def test_value_is_shown_as_table(k: Kernel) -> None:
    k.ok("""will('{"name": "<b>Ada</b>", "age": 36, "tags": ["a", "b"], "at": {"x": 1}}')""")
    ran = k.ok("%%llm --quiet --schema 'name, age int, tags list'\nWho?")
    assert [line.split(None, 1) for line in ran.text.splitlines()] == [
        ["name", "<b>Ada</b>"], ["age", "36"], ["tags", "a, b"], ["at", '{"x": 1}'],
    ]  # fmt: skip
    assert "<b>" not in ran.html
    assert "&lt;b&gt;Ada&lt;/b&gt;</td>" in ran.html
    k.ok("""will('[{"name": "Ada", "age": 36}, {"name": "Bo"}]')""")
    ran = k.ok("%%llm --quiet --schema list[Person]\nWho?")
    assert [line.split() for line in ran.text.splitlines()] == [
        ["name", "age"], ["Ada", "36"], ["Bo"],
    ]  # fmt: skip
    k.ok("will(ADA)")
    ran = k.ok("%%llm --plain --quiet --schema Person\nWho?")
    assert ran.text == "name  Ada\nage   36\n"
    k.ok("will('green', probabilities=(('green', 0.75), ('red', 0.25)))")
    ran = k.ok("%%llm --quiet --choice Color -o out\nWhich?")
    assert ran.text == "green  0.750\nred    0.250"
    assert k.value("dict(llm.last.probabilities)") == {"green": 0.75, "red": 0.25}


def test_fields_appear_when_they_are_complete(k: Kernel) -> None:
    k.ok("go = Hang()")
    k.ok("""will('{"name": "Ada", "age": 3', go, '6}')""")
    cell = k.send("%%llm --schema Person\nWho?")
    k.wait_for_output(cell, "Ada")
    shown = k.state(cell).html
    k.interrupt()
    assert k.wait(cell).ename == "Interrupted"
    assert ">Ada</td>" in shown
    assert ">age</td>" not in shown


def test_invalid_answer_fails_the_cell_and_keeps_the_text(k: Kernel) -> None:
    k.ok("out = 'before'\nwill('{\"name\": 3}')")
    ran = k.run("%%llm --schema Person -o out\nWho?")
    assert (ran.status, ran.ename) == ("error", "InvalidReply")
    assert ran.error == (
        "The answer does not fit Person: name: Input should be a valid string. For a second try after an"
        " invalid answer, add --schema-by prompt. The text is in llm.last. out keeps its previous value."
    )
    assert k.value("(out, llm.last.text, llm.last.value)") == ("before", '{"name": 3}', None)
    assert '{"name": 3}' in ran.text
    k.ok("will('{\"name\": \"A', finish='length')")
    ran = k.run("%%llm --schema Person -o out\nWho?")
    assert ran.error.startswith(
        "The answer does not fit Person: it is not complete. It was cut off at the token limit: use a"
        " higher --max-new-tokens. The text is in llm.last."
    )


def test_invalid_answer_gets_a_second_try_and_the_footer_reports_it(k: Kernel) -> None:
    k.ok("will('Ada!')\nwill(ADA)")
    ran = k.ok("%%llm --schema Person --schema-by prompt -o out\nWho?")
    assert k.value("(out.age, structure())") == (36, None)
    assert (
        "second try (invalid at first: it is not JSON: there is no object or array in it)"
        in ran.text
    )
    assert ran.text.startswith("name  Ada\nage   36")
    k.ok("will('{}')")
    ran = k.ok("%%llm --schema schema --schema-by prompt\nWho?")
    assert "Only that the answer is JSON was checked." in ran.text
    k.ok("will('Ada!')\nwill(ADA)")
    ran = k.ok("%%llm --plain --schema Person --schema-by prompt\nWho?")
    assert ran.text.startswith("name  Ada\nage   36\n")


def test_dry_run_shows_the_schema_and_how_it_is_enforced(k: Kernel) -> None:
    ran = k.ok("%%llm --dry-run --schema Person\nWho?")
    assert "Answer only with JSON that fits this schema: {" in ran.text
    assert "schema  Person · enforced by constrained decoding" in ran.text
    ran = k.ok("%%llm --dry-run --choice red,green --schema-by prompt\nWho?")
    assert "choice  requested in the prompt, and checked" in ran.text
    ran = k.ok("%%llm --dry-run --choice red,green\nWhat?")
    assert re.search(r"choice  enforced by constrained decoding\n +red, green", ran.text)
    ran = k.ok("%%llm --dry-run --over ['a'] --schema Person\n{item}")
    assert "enforced by constrained decoding" in ran.text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--schema Persn", '--schema Persn: Persn is not defined. Did you mean "Person"?'),
        ("--schema list[Persn]", "--schema list[Persn]: NameError: name 'Persn' is not defined."),
        ("--schema 'name, age years'", "'age years': there is no type 'years'. Use str, int,"),
        ("--schema missing.json", "missing.json cannot be read: No such file or directory."),
        ("--schema will", "A value of type function is not a type of answers. Use a class"),
        ('--schema Literal["red"]', "is not defined. Run: from typing import Literal"),
        ('--schema ["red","green"]', "For one of several labels, use --choice."),
        ("--choice red", "--choice red: red is not defined."),
        ("--choice red", " Write labels with commas between them: --choice red,green."),
        ("--choice red,", "A label is empty."),
        ("--choice red,red", "The label red is named twice. Name each label once."),
        ("--choice schema", "A value of type dict has no labels. Use a list, an Enum"),
        ("--choice red, green", 'Put a value with spaces in quotes: --choice "red, green".'),
        ("--schema name, age int", 'Put a value with spaces in quotes: --schema "name, age int".'),
        ("--schema Person Who", "Put the prompt below the first line"),
        ("--regex (", "The pattern is invalid: missing ), unterminated subpattern"),
        ("--grammar missing.lark", "missing.lark cannot be read"),
        ("--schema-by prompt", "--schema-by needs --schema TYPE."),
        ("--schema Person --choice a,b", "An answer has one type. Remove --schema or --choice."),
        ("--schema Person -f json", "-f has no effect on a value, which --schema requires."),
        ("--schema Person --schema-by magic", "--schema-by"),
        ("--choices a,b", 'has no option --choices. Did you mean "--choice"?'),
        ("--over df --choices a,b", 'has no option --choices. Did you mean "--choice"?'),
    ],
)
def test_wrong_type_sends_nothing(k: Kernel, line: str, message: str) -> None:
    before = k.value("len(backend.requests)")
    ran = k.run(f"%%llm {line}\nWho?")
    assert ran.ename == "OptionError"
    assert message in ran.error
    assert k.value("len(backend.requests)") == before


def test_map_gives_one_column_a_field(k: Kernel) -> None:
    k.ok("df = pd.DataFrame({'name': ['x', 'y', 'z']}, index=[3, 5, 7])")
    k.ok("""will('{"name": "Ada", "age": 1}')\nwill('{"name": "Bo"}')\nwill('no')""")
    ran = k.ok("%%llm --over df -o out --schema Person\n{name}?")
    assert k.value("(list(out.columns), list(out.index))") == (
        ["name", "name_answer", "age"], [3, 5, 7],
    )  # fmt: skip
    assert k.value("[tuple(row) for row in out.fillna('').itertuples(index=False)]") == [
        ("x", "Ada", 1.0), ("y", "Bo", 0.0), ("z", "", ""),
    ]  # fmt: skip
    stored = "out: a new table of 3 rows (2 values), with a column for each field: name_answer, age"
    assert stored in ran.text
    assert "1 row failed: The answer does not fit Person: it is not JSON" in ran.text
    assert ran.text.splitlines()[0].split() == ["index", "name", "name_answer", "age"]
    ran = k.run("%%llm --over df -o df['person'] --schema Person\n{name}?")
    assert '-o df["person"]: Person has the fields name, age, and this is one column.' in ran.error


def test_map_gives_labels_and_their_confidence(k: Kernel) -> None:
    k.ok("df = pd.DataFrame({'text': ['x', 'y']})")
    k.ok("will('red', probabilities=(('red', 0.9), ('green', 0.1)))\nwill('green')")
    ran = k.ok("%%llm --over df -o df['label'] --choice Color\n{text}?")
    assert k.value("list(df.label)") == ["red", "green"]
    assert "red (0.90)" in ran.text
    k.ok("will('red', probabilities=(('red', 0.9), ('green', 0.1)))\nwill('green')")
    k.ok("mapped = llm.map('{text}?', df[['text']], choice=Color)")
    assert k.value("mapped.frame('label', 'confidence').fillna(0).values.tolist()") == [
        ["x", "red", 0.9], ["y", "green", 0],
    ]  # fmt: skip
    assert k.value("[one.value.name for one in mapped]") == ["RED", "GREEN"]
    k.ok("will('1')\nwill('2')")
    k.ok("%%llm --over ['a', 'b'] -o out --schema int\n{item}")
    assert k.value("out") == [1, 2]


def test_map_gives_invalid_rows_a_second_try_and_saves_probabilities(k: Kernel) -> None:
    k.ok("will('Ada!')\nwill(ADA)\nwill(ADA)")
    cell = "%%llm --over ['a', 'b'] -o out --schema Person --schema-by prompt --workers 1\n{item}"
    ran = k.ok(cell)
    assert k.value("[one.age for one in out]") == [36, 36]
    assert "1 at the second try" in ran.text
    k.ok("will('red', probabilities=(('red', 0.9), ('green', 0.1)))")
    k.ok("%%llm --over ['a'] -o out --choice labels --save rows.jsonl\n{item}")
    k.ok("again = llm.map('{item}', ['a'], choice=labels, save='rows.jsonl')")
    assert k.value("(again.progress.cached, dict(again[0].probabilities))") == (
        1, {"red": 0.9, "green": 0.1},
    )  # fmt: skip
    k.ok("will('a')\nother = llm.map('{item}', ['a'], choice='a,b', save='rows.jsonl')")
    assert k.value("(other.progress.cached, other[0].value)") == (0, "a")


def test_reply_with_value_is_pickled(k: Kernel) -> None:
    k.ok("will(ADA)\nreply = llm.generate('Who?', schema=Person)")
    k.ok("again = pickle.loads(pickle.dumps(reply))")
    assert k.value("(again == reply, again.value == reply.value, again.value.age)") == (
        True, True, 36,
    )  # fmt: skip


def test_job_has_the_value(k: Kernel) -> None:
    k.ok("will(ADA)")
    ran = k.ok("%%llm --bg --schema Person -o job\nWho?")
    assert k.value("job.result(10).value.age") == 36
    k.ok("%llm_wait")
    k.ok("while not job.view.is_shown: __import__('time').sleep(0.01)")
    assert [line.split() for line in ran.text.splitlines()[:2]] == [
        ["name", "Ada"], ["age", "36"],
    ]  # fmt: skip
    k.ok("will('no')")
    k.ok("%%llm --bg --schema Person -o job\nWho?")
    ran = k.run("job.result(10)")
    assert (ran.ename, "does not fit Person" in ran.error) == ("InvalidReply", True)


def test_text_of_a_pattern_streams_to_stdout(k: Kernel) -> None:
    k.ok("will('12', '-ab')")
    ran = k.ok(r"%%llm --plain --quiet --regex \d+-\w+" + "\nWhich?")
    assert ran.text == "12-ab\n"


def test_stopped_answer_leaves_the_variable(k: Kernel) -> None:
    k.ok("out = 'before'\ngo = Hang()")
    k.ok("""will('{"name": "Ada"', go)""")
    cell = k.send("%%llm --schema Person -o out\nWho?")
    k.wait_for_output(cell, "incomplete so far")
    k.interrupt()
    assert k.wait(cell).ename == "Interrupted"
    assert k.value("out") == "before"
