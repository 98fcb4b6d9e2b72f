"""What reaches the model of a cell or a line, and how its answer is shown."""

from __future__ import annotations

import json
import re
import time

import pytest

from tests.kernels import Kernel


def sent(k: Kernel) -> list[tuple[str, str]]:
    """Return the messages of the last call."""
    messages: list[tuple[str, str]] = k.value(
        "[(m.role, m.content) for m in backend.requests[-1].messages]"
    )
    return messages


@pytest.mark.parametrize(
    ("line", "prompt"),
    [
        ("What's the capital of France? It's Paris.", "What's the capital of France? It's Paris."),
        ('-t 0 Don\'t say "no".', 'Don\'t say "no".'),
        ("-t 0 -- -5 is what?", "-5 is what?"),
        # In IPython, a line that ends like this one opens the help for `France`.
        ("What is the capital of France?", "What is the capital of France?"),
        ("--quiet a  b -t", "a  b -t"),
        ("-- a  b -t 0", "a  b -t 0"),
        (r"Is C:\new a folder, or $HOME?", r"Is C:\new a folder, or $HOME?"),
        ("--stop 'a b' hello", "hello"),
    ],
)
def test_a_line_is_options_and_then_the_prompt_as_it_is(
    scripted: Kernel, line: str, prompt: str
) -> None:
    scripted.ok(f"%llm {line}")
    assert sent(scripted) == [("user", prompt)]


def test_options_after_the_prompt_are_reported(scripted: Kernel) -> None:
    calls = scripted.value("len(backend.requests)")
    ran = scripted.run("%llm Hello -t 0.2")
    assert (ran.ename, ran.error) == (
        "OptionError",
        "-t 0.2 follows the prompt. Write options before the prompt: %llm -t 0.2 PROMPT."
        " To send it as text: %llm -- PROMPT",
    )
    assert scripted.run("x = %llm Hello --dry-run").ename == "OptionError"
    assert scripted.value("len(backend.requests)") == calls
    for option in ("", "--dry-run "):
        ran = scripted.ok(f"%llm {option}What is tail -c 5")
        assert ran.text.startswith(
            "Note: -c 5 is sent as part of the prompt. Write options before the prompt:"
            f" %llm {option}-c 5 PROMPT.\n"
        )
    assert sent(scripted) == [("user", "What is tail -c 5")]
    assert "Note" not in scripted.ok("%llm -- What is tail -c 5").text


def test_options_below_the_first_line_are_reported(scripted: Kernel) -> None:
    ran = scripted.ok("%%llm -t 0\n-o ans --seed 3\nName a color.")
    assert ran.text.startswith(
        "Note: -o ans --seed 3 is sent as part of the prompt. To use options, write them on the first"
        " line: %%llm -o ans --seed 3.\n"
    )
    assert sent(scripted) == [("user", "-o ans --seed 3\nName a color.")]
    for text in ("- a list\n- of two", "-5 degrees", "---\ntitle: x", "--unknown"):
        assert "Note" not in scripted.ok(f"%%llm\n{text}").text


def test_a_cell_is_the_prompt_as_it_is(scripted: Kernel) -> None:
    prompt = '  It\'s   {nothing} $HOME %llm\n\n\tλ 🦊 \\n {"a": {}}\n# the end'
    scripted.ok(f"%%llm --literal\n{prompt}\n")
    assert sent(scripted) == [("user", prompt)]


def test_values_are_filled_in_unless_literal(scripted: Kernel) -> None:
    scripted.ok("name, d = 'Ada {who}', {'k': [1, 2]}")
    scripted.ok("%%llm -s 'You are {name}.'\nHello {name}, {d['k'][1]} {{name}}.")
    assert sent(scripted) == [
        ("system", "You are Ada {who}."),
        ("user", "Hello Ada {who}, 2 {name}."),
    ]
    scripted.ok("%%llm --literal -s 'You are {name}.'\nHello {name}.")
    assert sent(scripted) == [("system", "You are {name}."), ("user", "Hello {name}.")]
    scripted.ok("%llm Hello {name}!")
    assert sent(scripted) == [("user", "Hello Ada {who}!")]


def test_values_are_filled_in_options(scripted: Kernel) -> None:
    scripted.ok("t, name, spoken, stops = 0.25, 'tiny', 'a b', {'end': '-END'}")
    for cell in (
        "%%llm -t {t} -m $name\nHi",
        "%llm -t {t} -m $name Hi",
        "%llm -t{t} --model={name} Hi",
    ):
        scripted.ok(cell)
        call = "backend.requests[-1]"
        assert scripted.value(f"({call}.name, {call}.config.temperature)") == ("tiny", 0.25)
    scripted.ok(
        "for n in (1, 2):\n    %llm --seed {n} -p known={n * 2} -c {spoken} --stop {stops['end']} Hi"
    )
    config = "backend.requests[-1].config"
    assert scripted.value(f"({config}.seed, {config}.stop, dict({config}.extra))") == (
        2, ("-END",), {"known": 4},
    )  # fmt: skip
    assert "a b   2" in scripted.ok("%llm_chats").text
    assert scripted.ok("%llm_reset {spoken}").text == "Deleted: a b."
    assert "0.7 → 0.25" in scripted.ok("%llm_config temperature={t}").text
    assert "0.25 → 0.5" in scripted.ok("%llm_config -t {t * 2}").text
    scripted.ok("%llm_config --reset")
    assert "tiny" in scripted.ok("%llm_use {name}").text
    # JSON, and a text in braces that names nothing here.
    scripted.ok("""%llm -p known='{"a": {}}' --stop {end} Hi""")
    assert scripted.value(f"{config}.stop") == ("{end}",)


def test_the_local_variables_of_the_caller_are_filled_in(scripted: Kernel) -> None:
    """They hide the notebook's, and each function has its own, as in Python."""
    scripted.ok("q, word = 'the global q', 'the global word'")
    scripted.ok(
        """
def ask(q, t=0.5):
    x = %llm -t {t} -s "About {q}" Hello {q}, {word}
    return x

def outer(q):
    word = "enclosing"
    def inner(n):
        x = %llm {q} {word} {n}
    inner(1)

def of_the_notebook():
    global q
    q = "set"
    %llm {q}

def listed(qs):
    return [get_ipython().run_line_magic("llm", "{one} of {len(qs)}") for one in qs]

class Chat:
    word = "in a class"
    %llm {q}, {word}
    def ask(self, q):
        %llm {q}, {word}
"""
    )
    assert sent(scripted) == [("user", "the global q, in a class")]
    scripted.ok("reply = ask('local')")
    assert sent(scripted) == [("system", "About local"), ("user", "Hello local, the global word")]
    assert scripted.value("backend.requests[-1].config.temperature") == 0.5
    for cell, prompt in (
        ("outer('of outer')", "of outer enclosing 1"),
        ("of_the_notebook()", "set"),
        ("replies = listed(['a', 'b'])", "b of 2"),
        ("x = [get_ipython().run_line_magic('llm', '{one}') for one in 'xy']", "y"),
        ("Chat().ask('in a method')", "in a method, the global word"),
        ("%llm {q}", "set"),
        ("%%llm\n{q}", "set"),
    ):
        assert "Note" not in scripted.ok(cell).text
        assert sent(scripted) == [("user", prompt)]
    ran = scripted.ok("def wrong(price):\n    %llm Is {pric} high?\nwrong(3)")
    assert 'pric is not defined. Did you mean "price"?' in ran.text


def test_each_row_of_a_table_is_filled_in(scripted: Kernel) -> None:
    calls = scripted.value("len(backend.requests)")
    scripted.ok(
        """
import pandas as pd
def label(row):
    x = %llm --quiet Label {row['a']}
    return str(x)
labels = pd.DataFrame({"a": ["one", "two"]}).apply(label, axis=1)
"""
    )
    prompts = f"[r.messages[-1].content for r in backend.requests[{calls}:]]"
    assert scripted.value(prompts) == ["Label one", "Label two"]


def test_a_wrong_reference_in_an_option_is_an_error(scripted: Kernel) -> None:
    scripted.ok("temp, evil, calls = 'hot', '--all', len(backend.requests)")
    for line, error in (
        ("%llm -t {tmp} Hi", '{tmp} is not defined in this notebook. Did you mean "temp"?'),
        (
            "%llm -t {xyzzy} Hi",
            "{xyzzy} is not defined in this notebook. Assign a value to it first.",
        ),
        ("%llm -t {temp} Hi", "temperature=hot is not a number. It must be 0 to 2."),
        ("%llm -t {temp['x']} Hi", "{temp['x']}: TypeError"),
        ("%llm_unload {evil}", "The value of {evil} starts with -, like an option."),
        ("%llm_load x -b openai --key-env {evil}", "--key-env takes the name of an"),
    ):
        ran = scripted.run(line)
        assert (ran.status, len(ran.traceback), error in ran.error) == ("error", 1, True), ran.error
    assert scripted.value("(calls == len(backend.requests), llm.status().active_model)") == (
        True,
        "tiny",
    )


def test_an_unknown_name_is_left_as_it_is_with_a_note(scripted: Kernel) -> None:
    scripted.ok("animal = 'fox'")
    ran = scripted.ok("%%llm\nDescribe the {anmal} here.")
    assert sent(scripted) == [("user", "Describe the {anmal} here.")]
    assert ran.text.startswith("Note: {anmal} was not replaced: anmal is not defined. Did you mean")
    # It must not be missed above an answer.
    assert '4px solid #d9822b;">Note: {anmal} was not' in ran.html


def test_expressions_are_filled_in_everywhere(scripted: Kernel) -> None:
    scripted.ok("price, xs = 2.5, [3, 1, 2]")
    scripted.ok("%%llm -s 'At most {max(xs)}, {price * 2:.2f}.'\nOf {len(xs)}: {xs[0] + 1}.")
    assert sent(scripted) == [("system", "At most 3, 5.00."), ("user", "Of 3: 4.")]
    scripted.ok("%llm -c expressions Sorted: {sorted(xs)}")
    assert sent(scripted)[-1] == ("user", "Sorted: [1, 2, 3]")


@pytest.mark.parametrize("options", ["", "--dry-run", "-c pasted", "-c pasted --dry-run"])
def test_braces_in_pasted_text_run_nothing(scripted: Kernel, options: str) -> None:
    scripted.ok("import os; kept = [1]; ran = []; touch = ran.append")
    prompt = "See {os.system('exit 7')}, {kept.clear()}, {touch(1)}, {os.environ}."
    answer = scripted.ok(f"%%llm {options}\n{prompt}")
    assert scripted.value("(kept, ran)") == ([1], [])
    notes = [line for line in answer.text.splitlines() if line.startswith("Note: ")]
    assert len(notes) == 4
    assert notes[0] == (
        "Note: {os.system('exit 7')} was not replaced: it calls .system() of the module os."
        " Assign it to a variable first, and refer to that."
    )
    if "--dry-run" not in options:
        assert sent(scripted)[-1] == ("user", prompt)


def test_dry_run_has_the_notes_of_a_run(scripted: Kernel) -> None:
    scripted.ok("animal = 'fox'")
    cell = "\nDescribe the {anmal} and {animal.__class__} here."
    dry, ran = (scripted.ok(f"%%llm {option}{cell}").text for option in ("--dry-run", ""))
    notes = [
        [line for line in text.splitlines() if line.startswith("Note:")] for text in (dry, ran)
    ]
    assert notes[0] == notes[1]
    assert len(notes[0]) == 2


def test_notes_name_the_syntax_that_is_not_supported(scripted: Kernel) -> None:
    scripted.ok("xs = [1]")
    prompt = "See {xs=}, {len(xs}, {[x for x in xs]} and {xs[0] if xs else 0}."
    expected = [
        "Note: {xs=} was not replaced: it ends with =; write xs={xs}.",
        "Note: {len(xs} was not replaced: it has a bracket that is not closed.",
        "Note: {[x for x in xs]} was not replaced: it contains a list comprehension. Assign it to a"
        " variable first, and refer to that.",
        'Note: {xs[0] if xs else 0} was not replaced: it contains "if" and "else". Assign it to a'
        " variable first, and refer to that.",
    ]
    for option in ("", "--dry-run"):
        assert scripted.ok(f"%%llm {option}\n{prompt}").text.splitlines()[:4] == expected
    scripted.ok(f"%%llm\n{prompt}")
    assert sent(scripted) == [("user", prompt)]
    code = "```python\nprint(f'{xs} {ys}', {'a': ys})\n```\n\\frac{a}{b} {\"k\": [{}]}"
    assert "Note" not in scripted.ok(f"%%llm --dry-run\n{code}").text


def test_misspelled_key_suggests_the_near_one(scripted: Kernel) -> None:
    scripted.ok("row = {'price': 1}")
    for option in ("", "--dry-run"):
        ran = scripted.run(f"%%llm {option}\nIs {{row['prise']}} much?")
        assert ran.ename == "PromptError"
        assert ran.error.startswith("{row['prise']}: KeyError: 'prise'. Did you mean \"price\"?")


TABLES = """import numpy as np, pandas as pd, polars as pl
towns = pd.DataFrame({"town": ["Oslo", "Rome"], "size": [1, 3], "text": ["x" * 61, "y"]})
wide = pd.DataFrame({f"c{i}": range(21) for i in range(25)})
column, numbers, polars = pd.Series(range(21)), np.arange(101), pl.DataFrame({"a": range(50)})
many, town = [0] * 200_001, "Rome\""""


def notes_of(k: Kernel, prompt: str) -> list[str]:
    """Return the notes of a real run, which are those of a dry run, without their full stops."""
    dry, ran = (k.ok(f"%%llm {option}\n{prompt}").text for option in ("--dry-run", ""))
    notes = [
        [line.removeprefix("Note: ") for line in text.splitlines() if line.startswith("Note: ")]
        for text in (dry, ran)
    ]
    assert notes[0] == notes[1]
    assert all(note.endswith((".", "?")) for note in notes[0])
    return [note.removesuffix(".") for note in notes[0]]


def test_columns_are_joined_and_made_lists(scripted: Kernel) -> None:
    scripted.ok(f"{TABLES}\nwords = pl.Series(['a', 'b'])")
    for code, text in (
        ("', '.join(towns.columns)", "town, size, text"),
        ("', '.join(towns['town'])", "Oslo, Rome"),
        ("', '.join(towns['town'].unique())", "Oslo, Rome"),
        ("', '.join(words)", "a, b"),
        ("list(towns.columns)", "['town', 'size', 'text']"),
        ("tuple(towns['size'])", "(1, 3)"),
        ("sorted(set(towns['town']))", "['Oslo', 'Rome']"),
        ("any(towns['size'] > 2)", "True"),
        ("towns['town'].unique()", "['Oslo', 'Rome']"),
        ("towns.columns", "['town', 'size', 'text']"),
        ("towns.index", "RangeIndex(start=0, stop=2, step=1)"),
    ):
        assert notes_of(scripted, f"{{{code}}}") == []
        assert sent(scripted) == [("user", text)]
    for code, advice in (
        ("towns.query('size > 1')", 'Write a condition instead, such as df[df["price"] > 10]'),
        (
            "towns.sample(1)",
            "Write random_state=0, so that a run sends the rows that its dry run shows",
        ),
        ("pd.Timestamp('2026')", 'Compare with a text instead, such as df["day"] > "2026-01-31"'),
    ):
        [note] = notes_of(scripted, f"{{{code}}}")
        assert note.endswith(advice)
    [note] = notes_of(scripted, "{towns.info()}")
    assert note.endswith("Insert .dtypes or .describe() instead")


def test_notes_name_braces_that_are_nearly_references(scripted: Kernel) -> None:
    scripted.ok("import pandas as pd\nprice, gdp = 9.5, pd.DataFrame({'GDP per head': [1]})")
    for prompt, better in (
        ("Look at {gdp.head() and tell me the mean.", "{gdp.head()}"),
        ("Here are the {gdp.head()) rows.", "{gdp.head()}"),
        ("Is {price :.2f} high?", "{price:.2f}"),
        ("Is {price: ,.2f} high?", "{price:,.2f}"),
        ("The {gdp.GDP per head} is", '{gdp["GDP per head"]}'),
        ("Is it {price{", "{price}"),
        ("All {len gdp} rows", "{len(gdp)}"),
        ("All {len(gdp)rows} here", "{len(gdp)} rows"),
    ):
        [note] = notes_of(scripted, prompt)
        assert note.endswith(f"; write {better}")
        assert sent(scripted) == [("user", prompt)]
    assert notes_of(scripted, better) == []
    assert notes_of(scripted, "{len(x) for x in gdp} {price rows}") == []


def test_notes_name_what_a_table_lacks_and_how_to_send_all_of_it(scripted: Kernel) -> None:
    scripted.ok(TABLES)
    whole = "To send all of it:"
    assert notes_of(scripted, "{towns} {wide} {column} {numbers}") == [
        f"{{towns}} is sent with texts cut at 60 characters. {whole} {{towns.to_csv()}}",
        f"{{wide}} is sent without 1 of 21 rows and 5 of 25 columns. {whole} {{wide.to_csv()}}",
        f"{{column}} is sent without 1 of 21 values. {whole} {{column.to_list()}}",
        f"{{numbers}} is sent without 81 of 101 values. {whole} {{numbers.tolist()}}",
    ]
    short = "is sent in the short form that its library prints."
    assert notes_of(scripted, "{polars} {wide!s} {column + 1}") == [
        f"{{polars}} {short} {whole} {{polars.write_csv()}}",
        f"{{wide!s}} {short} {whole} {{wide.to_csv()}}",
        f"{{column + 1}} is sent without 1 of 21 values. {whole} {{(column + 1).to_list()}}",
    ]
    # The labels of a column are sent, too, and each value beside its own.
    scripted.ok(
        "counts = pd.Series(range(30), pd.Index([f't{i}' for i in range(30)], name='town'))"
    )
    assert notes_of(scripted, "{counts}") == [
        f"{{counts}} is sent without 10 of 30 values. {whole} {{counts.to_csv()}}"
    ]
    title, head, *lines = sent(scripted)[0][1].splitlines()
    assert (title, head.strip()) == ("Series, 30 values, int64", "town")
    assert [line.split() for line in lines] == [
        [f"t{number}", f"{number}"] if number != 10 else ["...", ".."]
        for number in (*range(11), *range(20, 30))
    ]
    part = "To send a part of it:"
    scripted.ok(
        "big, small = pd.DataFrame(np.ones((300, 41))), pd.DataFrame(np.ones((300, 9)))\n"
        "matrix = np.ones((200, 200))"
    )
    assert notes_of(scripted, "{big} {big.tail(150)} {matrix} {matrix.reshape(4, 100, 100)}") == [
        f"{{big}} is sent without 280 of 300 rows and 21 of 41 columns. {part} {{big.iloc[:20, :2]}}",
        "{big.tail(150)} is sent without 50 of 150 rows and 21 of 41 columns. "
        f"{whole} {{big.tail(150).to_csv()}}",
        f"{{matrix}} is sent without 39,964 of 40,000 values. {part} {{matrix[:20].tolist()}}",
        "{matrix.reshape(4, 100, 100)} is sent without 39,992 of 40,000 values",
    ]
    scripted.ok("named = big.add_prefix('c ')")
    [note] = notes_of(scripted, "{named}")
    assert note.endswith(f'{part} {{named[["c 0", "c 1"]].head(20)}}')
    for selected in ('named[["c 0", "c 1"]].head(20)', "big.iloc[:20, :2]"):
        assert notes_of(scripted, f"{{{selected}}}") == []
    complete = "{wide.to_csv()} {(column + 1).to_list()} {polars.write_csv()} {wide.head(2)['c1']}"
    assert notes_of(scripted, complete) == []
    assert "c24\n0,0" in sent(scripted)[0][1]
    for rows in ("head(90)", "tail(90)", "iloc[:90, :5]", "iloc[5:95, 0]", "loc[5:94]"):
        assert notes_of(scripted, f"{{small.{rows}}}") == []
        assert len(sent(scripted)[0][1].splitlines()) > 90
    [note] = notes_of(scripted, "{many}")
    assert note.endswith(
        "it would make more than 200,000 elements in its text. Insert a part of it, such as [:100]"
        " of a list or text, or .head(100) of a table"
    )


def test_notes_suggest_what_was_meant(scripted: Kernel) -> None:
    scripted.ok(TABLES)
    notes = notes_of(
        scripted, "Of {towns[size].mean()}, {towners}, {1/0} and {towns.head(1):markdown}."
    )
    assert [note.partition("}")[0] for note in notes] == [
        "{towns[size].mean()", "{towners", "{1/0", "{towns.head(1):markdown",
    ]  # fmt: skip
    assert notes[0].endswith('Write {towns["size"].mean()}')
    assert notes[1].endswith('Did you mean "towns"?')
    assert notes[2].endswith("it contains no variable")
    assert notes[3].endswith(
        'it has the format spec "markdown", which Python does not support; write'
        " {towns.head(1).to_markdown()}"
    )
    [note] = notes_of(scripted, "All {citys} {towns:csv}")[1:]
    assert note.endswith("; write {towns.to_csv()}")
    assert notes_of(scripted, "a {town:red} b {1,3} c {2-4} d {2}") == []


def test_labels_of_a_row_are_attributes(scripted: Kernel) -> None:
    scripted.ok(
        f"{TABLES}\nmeans = towns.groupby('town')['size'].mean()\n"
        "for _, row in towns.iterrows():\n"
        "    %llm {row.town} {row.name} {row.size} {means.Rome:.2f} {towns.iloc[0].town.upper()}"
    )
    # As in Python, `name` and `size` are attributes of the row itself.
    assert sent(scripted) == [("user", "Rome 1 3 3.00 OSLO")]


def test_missing_value_as_a_prompt_is_named(scripted: Kernel) -> None:
    scripted.ok(f"{TABLES}\ntowns.loc[1, 'town'] = None")
    ran = scripted.run("towns['town'].apply(lambda town: llm.generate(town))")
    assert (ran.ename, ran.error) == (
        "OptionError",
        "The prompt is nan, a missing value. Omit such rows first, for example with .dropna().",
    )


def test_failed_reference_shows_how_to_send_the_braces(scripted: Kernel) -> None:
    scripted.ok(TABLES)
    unchanged = "To send the braces unchanged, write {{towns[town]}}"
    reason = "{towns[town]}: KeyError: 'Rome'. For the key, write [\"town\"]."
    ran = scripted.run("%%llm\nOf {towns[town]}.")
    assert (ran.ename, ran.error) == ("PromptError", f"{reason} {unchanged} or use --literal.")
    # It has no --literal.
    ran = scripted.run("%llm_config system='Of {towns[town]}.'")
    assert (ran.ename, ran.error) == ("PromptError", f"{reason} {unchanged}.")


def test_a_lambda_is_inserted_without_its_statement(scripted: Kernel) -> None:
    scripted.ok("grow, fs = lambda x: x + 1, [lambda a: (a,\n  'λ'), lambda b: -b]")
    scripted.ok("%%llm\n{grow} | {fs[0]} | {fs[1]}")
    assert sent(scripted) == [("user", "lambda x: x + 1 |\nlambda a: (a,\n  'λ')\n| lambda b: -b")]


def test_literal_evaluates_nothing_and_shows_no_notes(scripted: Kernel) -> None:
    scripted.ok("xs = [1]")
    ran = scripted.ok("%%llm --literal\n{len(xs)} {xs.clear()} {nothing}")
    assert sent(scripted) == [("user", "{len(xs)} {xs.clear()} {nothing}")]
    assert "Note" not in ran.text


def test_results_of_cells_are_filled_in(scripted: Kernel) -> None:
    scripted.run("[1, 2]")
    number = scripted.value("max(Out)")
    scripted.ok(f"%%llm\nOf {{len(Out[{number}])}}: {{Out[{number}]}}")
    assert sent(scripted) == [("user", "Of 2: [1, 2]")]


def test_names_of_the_shell_itself_are_no_values(scripted: Kernel) -> None:
    scripted.ok("%%llm --literal\nx")
    scripted.ok("%%llm\nWhat does {exit} do, and {get_ipython}?")
    assert sent(scripted) == [("user", "What does {exit} do, and {get_ipython}?")]


def test_dry_run_shows_the_messages_and_calls_nothing(scripted: Kernel) -> None:
    scripted.ok("%llm before")
    calls = scripted.value("len(backend.requests)")
    ran = scripted.ok("%%llm --dry-run -s 'Be brief.' -t 0.5\nOne two\n  three <b>")
    assert [o["type"] for o in ran.outputs] == ["execute_result"]
    assert ran.text.splitlines() == [
        "system  Be brief.",
        "user    One two",
        "          three <b>",
        "",
        "tiny · 6 tokens · under 0.1% of 8,192 · nothing was sent",
        "max_new_tokens 512, temperature 0.5, top_p 0.9, top_k 50, repetition_penalty 1.15",
    ]
    assert "monospace" in ran.html
    assert ">One two\n  three &lt;b&gt;</td>" in ran.html
    assert scripted.value("len(backend.requests)") == calls
    assert scripted.value("llm.last.messages[-1].content") == "before"


def test_dry_run_shows_what_a_chat_would_send_and_what_is_cut(scripted: Kernel) -> None:
    scripted.ok("%llm -c dry -s 'Be brief.' One", cell_id="dry-1")
    scripted.ok("%llm -c dry Two", cell_id="dry-2")
    scripted.ok("backend.context = 6")
    ran = scripted.ok("%%llm -c dry --trim --dry-run\nThree {qqqq}", cell_id="dry-3")
    assert ran.text.splitlines()[:8] == [
        "Note: {qqqq} was not replaced: qqqq is not defined.",
        "Note: The context leaves 2 tokens for the answer, fewer than max_new_tokens=512.",
        "system    Be brief.",
        "not sent  2 oldest turns dropped (--trim)",
        "            One",
        "            Two",
        "user      Three {qqqq}",
        "",
    ]
    ran = scripted.ok("%%llm -c dry --dry-run\nThree four", cell_id="dry-3")
    assert ran.text.startswith(
        "Note: The prompt has 8 tokens, but tiny reads at most 6. Shorten it by at least 3."
        " Chat 'dry' has 2 turns above it: --trim drops the oldest, and %llm_reset dry deletes all.\n"
        "system     Be brief.\n"
        "user       One\n"
        "assistant  One\n"
    )
    scripted.ok("backend.context = 8192")


def test_dry_run_without_a_model_shows_the_messages(scripted: Kernel) -> None:
    scripted.ok("%llm_unload\nanimal = 'fox'")
    try:
        ran = scripted.ok("%%llm --dry-run -s 'Be brief.' -t 0.5\nDescribe the {animal}, {nobody}.")
        assert ran.text.splitlines()[:5] == [
            "Note: {nobody} was not replaced: nobody is not defined.",
            "system  Be brief.",
            "user    Describe the fox, {nobody}.",
            "",
            "no model is loaded: tokens are not counted · nothing was sent",
        ]
        assert "temperature 0.5" in ran.text
        # No turn of the chat begins.
        for _ in range(2):
            assert scripted.ok("%llm -c early --dry-run Hello").text.startswith("user  Hello\n")
        assert scripted.run("%llm --dry-run -m nobody Hello").ename == "ModelNotLoaded"
        assert scripted.run("%llm --dry-run --trim Hello").ename == "OptionError"
    finally:
        scripted.ok("%llm_load tiny")


def test_limit_beyond_the_context_is_a_note(scripted: Kernel) -> None:
    note = (
        "Note: max_new_tokens 100,000 is more than the context of tiny (8,192 tokens): no answer can be"
        " that long.\n"
    )
    assert scripted.ok("%llm --max-new-tokens 100000 Hello").text.startswith(f"{note}Hello\n")
    job = scripted.ok("job = %llm --bg --max-new-tokens 100000 Hello\njob.result()")
    assert note in job.text
    assert "Note" not in scripted.ok("%llm --max-new-tokens 8000 Hello").text


def test_footer_shows_the_stop_strings(scripted: Kernel) -> None:
    ran = scripted.ok("%llm --stop END --stop 'a\\nb' Hello END there")
    assert ran.text.splitlines()[0] == "Hello"
    assert ran.text.endswith(r' · stop "END" "a\nb"')
    assert "stop" not in scripted.ok("%llm Hello").text


def test_error_of_a_long_prompt_names_the_long_reference(scripted: Kernel) -> None:
    scripted.ok(
        "from llm_magic.errors import PromptTooLong\nlong, short = 'word ' * 99, 'x'\n"
        "def fail(tokens=None):\n"
        "    error = PromptTooLong('The prompt is too long.')\n"
        "    error.tokens = tokens\n"
        "    backend.will(error)\n"
    )
    scripted.ok("fail(1000)")
    ran = scripted.run("%%llm\nAbout {short} {long}")
    assert ran.error == (
        "The prompt is too long. {long} takes 98% of the prompt (about 984 tokens): insert a part of"
        " the value."
    )
    scripted.ok("fail()")
    ran = scripted.run("%llm Again {long}")
    assert ran.error.endswith(". {long} takes 99% of the prompt: insert a part of the value.")
    scripted.ok("fail()")
    assert scripted.run("%llm Only {short} and some words").error == "The prompt is too long."
    scripted.ok("%llm -c talk One")
    scripted.ok("fail()")
    ran = scripted.run("%llm -c talk {long}")
    assert "Chat 'talk' has 1 turn above it: --trim" in ran.error
    assert ran.error.endswith("insert a part of the value.")
    scripted.ok("for _ in range(2): fail()")
    ran = scripted.run("%llm -c talk --trim Short")
    assert ran.error == "The prompt is too long. Even without the 1 turn above it, it is too long."
    scripted.ok("backend.context = 60")
    try:
        ran = scripted.ok("%llm --dry-run {long}")
        assert "{long} takes 100% of the prompt (about 99 tokens)" in ran.text
    finally:
        scripted.ok("backend.context = 8192")


def test_numbers_have_commas_and_units_are_singular(scripted: Kernel) -> None:
    scripted.ok("import pandas as pd; row = pd.DataFrame({'a': [1]}); words = 'word ' * 1200")
    assert "→ 1,201 tokens" in scripted.ok("%%llm\n{words}").text
    scripted.ok("%%llm\n{row} {row['a']}")
    assert sent(scripted) == [
        ("user", "DataFrame, 1 row × 1 column\n   a\n0  1\nSeries 'a', 1 value, int64\n0  1")
    ]
    scripted.ok("%%llm --bg\n{words}\n")
    scripted.ok("llm.jobs.all[-1].result();")
    assert "1,201" in scripted.ok("%llm_jobs").text
    assert "8,192 ctx" in scripted.ok("%llm_status").text
    # A model in this process costs nothing.
    assert "cost" not in scripted.ok("%llm_usage").text


def test_output_variable_is_set_and_left_alone_without_a_reply(scripted: Kernel) -> None:
    scripted.ok("%%llm -o answer\nOne two")
    assert scripted.value("(str(answer), answer.text, answer.model)") == (
        "One two",
        "One two",
        "tiny",
    )
    assert scripted.value("(answer.usage.prompt_tokens, answer.usage.completion_tokens)") == (7, 2)
    assert scripted.run("%%llm -o answer -m nobody\nThree").status == "error"
    assert scripted.value("answer.text") == "One two"
    assert scripted.run("%%llm -o 2x\nThree").ename == "OptionError"


def test_format_text_shows_the_letters(scripted: Kernel) -> None:
    ran = scripted.ok("%%llm -f text --quiet\n# No *heading* <b>")
    assert ran.html.startswith("<pre")
    assert "# No *heading* &lt;b&gt;" in ran.html
    assert "<h1" in scripted.ok("%%llm --quiet\n# A *heading*").html


def test_format_json_stores_the_value_and_fails_for_anything_else(scripted: Kernel) -> None:
    ran = scripted.ok('%%llm -f json --quiet -o data\n{"a": [1, {"b": null}]}')
    assert ran.text == json.dumps({"a": [1, {"b": None}]}, indent=2)
    assert scripted.value("data") == {"a": [1, {"b": None}]}
    fenced = scripted.ok(
        '%%llm -f json --quiet -o data\nHere:\n```json\n{"a": 1}\n```\nThat is all.'
    )
    assert fenced.text == '{\n  "a": 1\n}'
    assert scripted.value("data") == {"a": 1}
    bad = scripted.run("%%llm -f json --quiet -o data\n{'a': 1}")
    assert bad.ename == "InvalidReply"
    assert bad.error.startswith(
        "The answer is not valid JSON: a key in double quotes is missing (line 1, character 2)."
    )
    assert bad.error.endswith(" The text is in llm.last. data keeps its previous value.")
    assert len(bad.traceback) == 1
    new = scripted.run("%%llm -f json --quiet -o unset\n{'a': 1}")
    assert new.error.endswith(" The text is in llm.last. unset was not set.")
    assert scripted.ok(
        "try: llm.last.json()\nexcept ValueError as error: print(error)"
    ).text.startswith("The answer is not valid JSON")
    # The answer is shown as it is, above the error.
    assert bad.text.startswith("{'a': 1}")
    assert scripted.value("(llm.last.text, data)") == ("{'a': 1}", {"a": 1})
    assert scripted.run("llm.last.json()").ename == "InvalidReply"


def test_advice_for_json_that_was_cut_is_only_given_where_json_starts(scripted: Kernel) -> None:
    for answer, is_cut in (("It is '4'", False), ("[1, 2", True), ("Here: {'a", True)):
        text = answer.replace("'", '"')
        scripted.ok(f"backend.will(*whole_answer({text!r}, finish='length'))")
        advice = "use a higher --max-new-tokens" in scripted.run("%llm -f json List.").error
        assert advice is is_cut, answer
        assert ("--max-new-tokens" in scripted.run("llm.last.json()").error) is is_cut


def test_format_json_shows_what_is_not_json(scripted: Kernel) -> None:
    ran = scripted.ok('%%llm -f json -o data\nHere <b>:\n```json\n{"a": 1}\n```\nThat is all.')
    line = "Text outside the JSON: Here <b>: That is all."
    assert ran.text.splitlines()[3:5] == ["", line]
    assert "Here &lt;b&gt;: That is all." in ran.html
    assert (
        f"[{line}]"
        in scripted.ok(
            "%llm -f json --plain Here <b>: {'a': [1]} That is all.".replace("'", '"')
        ).text
    )
    for answer in (
        '{"a": [1]}',
        '```json\n{"a": 1}\n```',
        '"is {a} text"',
        " [1]\n",
        "```\n4\n```",
    ):
        assert "outside the JSON" not in scripted.ok(f"%%llm -f json --literal\n{answer}").text
    # Not as JSON, whose highlighting shows each letter as an error.
    assert "no json here" in scripted.run("%llm -f json no json here").html


def test_plain_and_quiet_write_only_the_answer_to_stdout(scripted: Kernel) -> None:
    ran = scripted.ok("%%llm --plain --quiet\n**bold** <b>")
    assert {o["type"] for o in ran.outputs} == {"stream"}
    assert ran.text == "**bold** <b>\n"


def test_output_that_replaces_a_value_of_the_user_is_noted_once(scripted: Kernel) -> None:
    scripted.ok("table, rows, empty = {'a': 1}, [1], None")
    notes = {
        "%%llm -o table\nHi": "-o table replaces the dict in table.",
        "%llm -o rows -f json [1]": "-o rows replaces the list in rows.",
        "%llm -o sorted Hi": "-o sorted hides the built-in sorted. Run del sorted to restore it.",
        "%llm -o history Hi": "-o history hides the magic history: write %history, with its %.",
    }
    for cell, note in notes.items():
        dry = cell.replace(" -o", " --dry-run -o")
        assert [scripted.ok(code).text.split("\n")[0] for code in (dry, cell)] == [
            f"Note: {note}"
        ] * 2
        assert "Note" not in scripted.ok(cell).text
    for name in ("empty", "fresh", "table"):
        assert "Note" not in scripted.ok(f"%llm -o {name} Hi").text
    scripted.ok("copy = llm.generate('Hi'); del sorted")
    assert "Note" not in scripted.ok("%llm -o copy Hi").text
    scripted.ok("number = 42")
    assert "-o number replaces the int in number." in scripted.ok("%llm --bg -o number Hi").text


def test_output_does_not_replace_what_is_hard_to_make_again(scripted: Kernel) -> None:
    scripted.ok(
        "import json as module, numpy as np, pandas as pd\nclass Kind: pass\ndef function(): pass\n"
        "df = pd.DataFrame({'price': [1]}); series = df.price; array = np.array([1]); own = Kind()"
    )
    before = scripted.value("len(backend.requests)")
    for name, kind in (
        ("df", "DataFrame"), ("series", "Series"), ("array", "ndarray"), ("function", "function"),
        ("Kind", "type"), ("module", "module"), ("own", "Kind"),
    ):  # fmt: skip
        wrong = scripted.run(f"%%llm -o {name}\nHi")
        assert (wrong.ename, wrong.error, len(wrong.traceback)) == (
            "OptionError",
            f"-o {name} would replace the {kind} in {name}. Store the answer in another variable, or"
            f" first run: del {name}",
            1,
        )
    for line in ("--bg -o df", "-o df -f json", "-o df --dry-run"):
        assert "would replace the DataFrame" in scripted.run(f"%llm {line} Hi").error
    assert scripted.value("len(backend.requests)") == before
    scripted.ok("del df\n%llm -o df Hi")
    scripted.ok("df = [df]\n%llm -o df Again")
    assert scripted.value("df.text") == "Again"


def test_errors_name_the_variable_with_the_answer(scripted: Kernel) -> None:
    scripted.ok("from llm_magic.errors import IncompleteReply\nsession = llm; del llm")
    imported = "llm.last (from llm_magic import llm)"
    try:
        for options, where in (("-o part", "part"), ("", imported), ("-o part -f json", imported)):
            scripted.ok("backend.will('half', IncompleteReply('Cut.'))")
            ran = scripted.run(f"%llm {options} Hi")
            assert ran.error == f"Cut. The received part is in {where}."
        assert scripted.value("part.text") == "half"
        assert scripted.run("%llm -f json no json").error.endswith(f" The text is in {imported}.")
        scripted.ok("from tests.scripted import Hang")
        for options, where in (("-o part", "part"), ("", imported)):
            scripted.ok("backend.will('some', ' words', Hang())")
            cell = scripted.send(f"%llm {options} Hi")
            scripted.wait_for_output(cell, "some words")
            scripted.interrupt()
            ran = scripted.wait(cell)
            assert ran.error == f"Stopped after 2 tokens; the answer so far is in {where}."
    finally:
        scripted.ok("llm = session")


def test_error_in_the_code_of_the_user_shows_its_lines(scripted: Kernel) -> None:
    scripted.ok("def ask(question):\n    x = 9\n    return llm.generate(question, temperature=x)")
    asking = "Cell In[{n}], line 3, in ask: return llm.generate(question, temperature=x)"
    number = scripted.value("len(In) - 2")
    cells = {
        "for question in 'ab':\n    ask(question)": ["line 2: ask(question)", asking],
        "ask('a')": ["line 1: ask('a')", asking],
        "x = 1\nllm.generate('a', temperature=9)": ["line 2: llm.generate('a', temperature=9)"],
        "async def wait():\n    await llm.agenerate('a', temperature=9)\nawait wait()": [
            "line 3: await wait()",
            "line 2, in wait: await llm.agenerate('a', temperature=9)",
        ],
        # Threads and frames of libraries are not shown; recursion is shown once.
        "from concurrent.futures import ThreadPoolExecutor\nlist(ThreadPoolExecutor(1).map(ask, 'a'))": [
            "line 2: list(ThreadPoolExecutor(1).map(ask, 'a'))",
            asking,
        ],
        "def deep(n):\n    return deep(n - 1) if n else ask('a')\ndeep(30)": [
            "line 3: deep(30)",
            "line 2, in deep: return deep(n - 1) if n else ask('a')",
            asking,
        ],
        # One line, and magics, need none.
        "llm.generate('a', temperature=9)": [],
        "for n in 'ab':\n    %llm -t 9 {n}": [],
    }
    for code, expected in cells.items():
        ran = scripted.run(code)
        assert (ran.status, ran.ename) == ("error", "OptionError")
        first, *lines = ran.traceback
        assert first == f"\x1b[31mOptionError\x1b[0m: {ran.error}"
        assert len(lines) == len(expected)
        for line, end in zip(lines, expected, strict=True):
            assert line.startswith("  Cell In[")
            assert line.endswith(end.format(n=number)), line


def test_tables_are_combined_in_the_prompt(scripted: Kernel) -> None:
    scripted.ok(
        "import pandas as pd\n"
        "sales = pd.DataFrame({'city': ['Lima', 'Oslo', 'Lima'], 'price': [1.5, 2.0, 3.0],"
        " 'day': pd.to_datetime(['2026-01-01', '2026-01-01', '2026-01-03'])})\n"
        "cities = pd.DataFrame({'city': ['Lima', 'Oslo'], 'country': ['Peru', 'Norway']})\n"
        "many = pd.DataFrame({'city': ['Lima'] * 2000, 'n': range(2000)})\n"
        "wide = pd.DataFrame({f'column_{n}': range(3) for n in range(30)})"
    )
    text = scripted.ok(
        "%%llm --dry-run\n{sales.merge(cities, on='city').country.tolist()} and"
        " {sales.pivot_table(index='city', values='price').price.tolist()} and"
        " {sales.resample('D', on='day').price.sum().tolist()}"
    ).text
    assert "['Peru', 'Norway', 'Peru'] and [2.25, 2.0] and [3.5, 0.0, 3.0]" in text
    for code, note in {
        "many.merge(many, on='city')": "it would make more than 1,000,000 cells. Assign it to a variable",
        "sales.join(cities)": "Assign it first, result = ….join(…), and write {result}",
        "sales.agg({'price': 'mean'})": "it contains braces, as those of a dict or a set. Assign it",
    }.items():
        assert note in scripted.ok(f"%%llm --dry-run\n{{{code}}}").text
    wrong = scripted.run('%llm {sales.loc[0, "prise"]}').error
    assert wrong.startswith('{sales.loc[0, "prise"]}: KeyError: \'prise\'. Did you mean "price"?')
    # What goes on beyond the right edge fades out.
    assert "mask-image" in scripted.ok("%llm --dry-run {wide}").html
    assert "mask-image" not in scripted.ok("%llm --dry-run Hello").html


def test_text_that_ipython_changes_has_a_note(scripted: Kernel) -> None:
    note = (
        "Note: IPython removed the input prompts (such as >>> and ...) from this cell: the text is"
        " sent without them. To send them, put the text into a variable, and write {variable}.\n"
    )
    for cell, is_sent in {
        "%%llm\n>>> x = 1\n>>> x\n1": "x = 1\nx\n1",
        "\n%%llm -t 0\nIn [1]: x = 1": "x = 1",
    }.items():
        assert scripted.ok(cell).text.startswith(note), cell
        assert scripted.value("backend.requests[-1].messages[-1].content") == is_sent
    scripted.ok("session = '>>> x = 1'")
    for cell in (
        "%%llm\nWhat does this do? {session}",
        "%%llm\nIt goes on ...\n... and on   \n",
        "get_ipython().run_cell_magic('llm', '', 'a\\nb')",
    ):
        assert "Note" not in scripted.ok(cell).text, cell


def test_time_to_the_first_token_is_without_the_load_of_the_cell(scripted: Kernel) -> None:
    scripted.ok("from tests.scripted import at_release\nhang = backend.hang('load')")
    scripted.ok("at_release(hang.go.set)")
    cell = scripted.send("%llm_load slow --bg\n%llm -o reply Hello\n%llm -o later Hello")
    scripted.wait_for_output(cell, "Loading slow")
    time.sleep(1)
    scripted.release()
    ran = scripted.wait(cell)
    loads = re.findall(r"first after (\d+\.\d+) s and (\d+\.\d) s for the load", ran.text)
    assert len(loads) == 1
    first, load = scripted.value("(reply.timing.first_token_s, reply.timing.load_s)")
    assert first >= load >= 1
    shown = [float(seconds) for seconds in loads[0]]
    assert shown == pytest.approx([first - load, load], abs=0.06)
    assert scripted.value("later.timing.load_s") == 0
    scripted.ok("backend.trouble.clear()\n%llm_load tiny")


def test_system_prompt_that_names_a_variable_has_a_note(scripted: Kernel) -> None:
    scripted.ok("sys_p = 'You are a pirate.'; number = 3")
    note = "Note: -s sys_p sends the word. To send the value of the variable, write -s {sys_p}."
    for line in ("-s sys_p", "-s sys_p --dry-run", "-s sys_p --over [1]"):
        assert note in scripted.ok(f"%%llm {line}\nHello {{item}}").text.splitlines(), line
    for line in ("-s {sys_p}", "-s number", "-s pirate", "-s 'You are sys_p'"):
        assert "sends the word" not in scripted.ok(f"%%llm {line}\nHello").text, line
