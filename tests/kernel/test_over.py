"""``%%llm --over DATA`` in the cells of a real kernel: shapes, the table, failures, samples, jobs, ■."""

from __future__ import annotations

import time

import pytest

from tests.kernels import Kernel, within_a_second

_SETUP = """import pandas as pd
from llm_magic.errors import GenerationFailed
from llm_magic.types import Chunk, Usage
from tests import interrupt_points
from tests.scripted import Hang, Pause, at_release
def frame():
    texts = ['good tea', None, '<b>bad</b> tea', 'a cup']
    return pd.DataFrame({'text': texts, 'stars': [5, 1, 2, 3]}, index=[5, 7, 9, 11])
df = frame()
"""


@pytest.fixture(scope="module")
def k(scripted: Kernel) -> Kernel:
    scripted.ok(_SETUP)
    return scripted


def sent(k: Kernel, since: int = 0) -> list[str]:
    """Return the last message of each request."""
    found: list[str] = k.value(f"[r.messages[-1].content for r in backend.requests[{since}:]]")
    return found


def test_output_has_the_shape_of_the_data(k: Kernel) -> None:
    ran = k.ok("%%llm --over df -o out -s Brief. -t 0\nWhich? {text} {stars}")
    assert sent(k) == ["Which? good tea 5", "Which? <b>bad</b> tea 2", "Which? a cup 3"]
    assert k.value("[(m.role, m.content) for m in backend.requests[0].messages][0]") == (
        "system", "Brief.",
    )  # fmt: skip
    assert k.value("(list(out.columns), list(out.index), list(df.columns))") == (
        ["text", "stars", "answer"], [5, 7, 9, 11], ["text", "stars"],
    )  # fmt: skip
    assert k.value("out.answer.isna().tolist()") == [False, True, False, False]
    assert "out: a new table of 4 rows (3 answers), with the column answer" in ran.text
    k.ok("%%llm --over df[df.stars < 3] -o df['label']\n{index}: {text}")
    assert k.value("df.label.fillna('').tolist()") == ["", "", "9: <b>bad</b> tea", ""]
    k.ok('%%llm --over df["text"] -o df.label\n{item}')
    assert k.value("df.label.fillna('').tolist()") == ["good tea", "", "<b>bad</b> tea", "a cup"]
    k.ok("%%llm --over ['a', 'b'] -o out\n{item}?")
    assert k.value("[one.text for one in out]") == ["a?", "b?"]
    k.ok("named = {'x': 'a', 'y': ' '}\n%llm --over {named} -o out {item}!")
    assert k.value("{key: one and one.text for key, one in out.items()}") == {"x": "a!", "y": None}
    k.ok("%%llm --over (n for n in 'ab') -o out --quiet\n{item}")
    assert k.value("[one.text for one in out]") == ["a", "b"]
    k.ok("mapped = %llm --over range(2) say {item}")
    assert k.value("(type(mapped).__name__, [one.text for one in mapped])") == (
        "Mapped", ["say 0", "say 1"],
    )  # fmt: skip
    k.ok("import polars as pl\nwords = pl.DataFrame({'word': ['a', 'b']})")
    k.ok('%%llm --over words -o words["answer"]\nsay {word}')
    assert k.value("words['answer'].to_list()") == ["say a", "say b"]
    ran = k.ok("%%llm --over df.rename(columns={'text': 'my text'})\n{my text}")
    assert [line.split() for line in ran.text.splitlines()[:3]] == [
        ["index", "my", "text", "answer"],
        ["5", "good", "tea", "good", "tea"],
        ["7", "not", "sent:", "a", "value", "is", "missing"],
    ]
    k.ok("df = frame()")


def test_table_shows_what_failed_was_cut_or_is_missing(k: Kernel) -> None:
    k.ok("backend.will('half', GenerationFailed('It <i>broke</i>.'))")
    k.ok("backend.will('no', Chunk(finish_reason='length', usage=Usage(5, 2)))")
    ran = k.ok("%%llm --over df\n{text}")
    lines = [" ".join(line.split()) for line in ran.text.splitlines()]
    assert lines[:-1] == [
        "index text answer",
        "5 good tea failed: It <i>broke</i>.",
        "7 not sent: a value is missing",
        "9 <b>bad</b> tea no · cut off at 2 tokens",
        "11 a cup a cup",
        "1 row failed: It <i>broke</i>. Example: row 5 (text: good tea)",
        "1 answer cut off: row 9. --max-new-tokens is the limit.",
        "1 row not sent, because a value is missing: row 7",
        "With --save FILE, --retry-failed sends only the failed rows again.",
        "llm.last_mapped: 4 rows, 2 answers; -o NAME stores them in a variable",
    ]
    assert lines[-1].startswith(
        "tiny · 3 of 4 rows · 1 failed · 1 cut · 1 missing · 12 → 4 tokens · "
    )
    assert "<b>" not in ran.html
    assert "<i>" not in ran.html
    ran = k.ok("%%llm --over range(40)\n{item}")
    assert "… and 30 more rows" in ran.text
    k.ok("backend.will(GenerationFailed('It broke.'))")
    stopped = k.run("%%llm --over df -o out --on-error stop\n{text}")
    message = "It broke. This is the error of row 5."
    assert (stopped.ename, stopped.error) == ("GenerationFailed", message)
    assert k.value("len(out)") == 4


def test_table_with_a_column_answer_keeps_it(k: Kernel) -> None:
    k.ok("two = pd.DataFrame({'city': ['Lima', 'Oslo'], 'answer': ['old', 'old']})")
    ran = k.ok("%%llm --over two -o res\n{city} {answer}")
    # The table is headed as it is stored.
    assert ran.text.splitlines()[0].split() == ["index", "city", "answer", "answer_2"]
    assert "with the column answer_2, because the data has a column answer" in ran.text
    assert k.value("list(res.answer_2)") == ["Lima old", "Oslo old"]
    assert k.value("list(res.answer)") == ["old", "old"]
    ran = k.ok("%%llm --over two -o two['reply']\n{city}")
    assert ran.text.splitlines()[0].split() == ["index", "city", "reply"]
    k.ok("%%llm --over res -o res2\n{city}")
    assert k.value("list(res2.columns)") == ["city", "answer", "answer_2", "answer_3"]
    assert k.value("list(llm.last_mapped.frame('answer').columns)") == [
        "city",
        "answer",
        "answer_2",
    ]


def test_rows_with_the_same_label_are_named_by_their_position(k: Kernel) -> None:
    k.ok("twice = pd.DataFrame({'t': ['a', None, '']}, index=[5, 5, 7])")
    k.ok("backend.will(GenerationFailed('It broke.'))")
    ran = k.ok("%%llm --over twice\nSay {t}")
    assert "Example: row 5 at position 0 (t: a)" in ran.text
    assert "a value is missing: rows 5 at position 1, 7 at position 2\n" in ran.text


def test_data_without_rows_stores_no_answers(k: Kernel) -> None:
    before = len(sent(k))
    ran = k.ok("%%llm --over df[df.stars > 9] -o none\n{text}")
    assert "none: a new table of 0 rows, with the column answer\n" in ran.text
    assert k.value("(len(none), list(none.columns))") == (0, ["text", "stars", "answer"])
    k.ok("%%llm --over [] -o none\n{item}")
    assert k.value("none") == []
    k.ok("one = frame()")
    k.ok("%%llm --over one[one.stars > 9] -o one['x']\n{text}")
    assert k.value("one.x.isna().tolist()") == [True] * 4
    for options in ("", "-o none --sample 2", "-o none --dry-run"):
        assert "there are no rows." in k.run(f"%%llm --over [] {options}\n{{item}}").error
    assert len(sent(k)) == before


def test_column_is_set_in_the_rows_of_the_data_or_not_at_all(k: Kernel) -> None:
    k.ok("twice = pd.DataFrame({'t': ['b', 'c', 'a', 'd'], 'n': [1, 2, 3, 4]}, index=[0, 1, 0, 1])")
    k.ok("import polars as pl\npol = pl.DataFrame({'t': ['b', 'c', 'a'], 'n': [1, 2, 3]})")
    k.ok("one = twice.set_axis([0, 1, 2, 3])")
    k.ok("same = pd.DataFrame({'t': ['b', 'a']}, index=[5, 5])")
    before = len(sent(k))
    advice = "Run twice = twice.reset_index(drop=True), and make the data from it."
    order = "in their order, and has no index to match them. To store a new table, write -o NAME."
    for cell, message in {
        '--over twice.sort_values("t") -o twice["x"]': advice,
        '--over twice["t"].sort_values() -o twice["x"]': advice,
        '--over twice[twice["n"] > 2] -o twice["x"]': advice,
        '--over same.sort_values("t") -o same["x"]': "same.reset_index(drop=True)",
        '--over one.iloc[[0,0,1]] -o one["x"]': "the index of the data has duplicates",
        '--over one.set_axis([1,2,3,9]) -o one["x"]': "a row 9, which one does not have.",
        '--over one.sort_values("t").reset_index(drop=True) -o one["x"]': "have the values of other rows",
        '--over one["t"].sort_values().reset_index(drop=True) -o one["x"]': "Do not reset its index.",
        '--over pol.sort("t") -o pol["x"]': f"the data is not the rows of pol {order}",
        '--over pol.head(2) -o pol["x"]': "pol has 3 rows, and the data has 2 rows. To store",
        '--over sorted(one["t"]) -o one["x"]': f"the data is not the rows of one {order}",
        '--over pl.DataFrame({"t":["a","b","c","d"]}) -o one["x"]': order,
    }.items():
        assert message in k.run(f"%%llm {cell}\n{{item}}").error, cell
    assert len(sent(k)) == before
    for data in (
        "twice",
        "twice.copy()",
        'twice["t"]',
        "twice.to_dict('records')",
        "list(twice.t)",
    ):
        k.ok(f'%%llm --over {data} -o twice["x"]\n{{item}}')
        assert k.value("len(twice.pop('x'))") == 4, data
    k.ok('%%llm --over twice["t"] -o twice["x"]\n{item}')
    assert k.value("bool((twice.x == twice.t).all())") is True
    k.ok('%%llm --over one.sort_values("t") -o one["x"]\n{t}')
    assert k.value("bool((one.x == one.t).all())") is True
    k.ok('%%llm --over one.t.str.upper()[[2, 0]] -o one["y"]\n{item}')
    assert k.value("one.y.fillna('').tolist()") == ["B", "", "A", ""]
    k.ok('%%llm --over pol.select("t") -o pol["x"]\n{t}')
    assert k.value("pol['x'].to_list()") == ["b", "c", "a"]


def test_lists_are_set_in_the_rows_of_the_data(k: Kernel) -> None:
    k.ok("import polars as pl\nfrom tests.scripted import whole_answer")
    k.ok("tagged = pd.DataFrame({'t': list('abcd')})\npol = pl.DataFrame({'t': ['a', 'b']})")

    def set_column(data: str, output: str, answers: str) -> None:
        k.ok(f"for answer in {answers}.split(): backend.will(*whole_answer(answer))")
        k.ok(f"%%llm --over {data} --schema list[float|int] --workers 1 -o {output}\n{{t}}?")

    for data, answers, expected in (
        ("tagged.iloc[[2,0]]", "[4] [1]", ["[1]", "", "[4]", ""]),
        # The column exists now.
        ("tagged[1:3]", "[2,3] [5,6]", ["[1]", "[2, 3]", "[5, 6]", ""]),
        ("tagged[2:]", "[7] [8]", ["[1]", "[2, 3]", "[7]", "[8]"]),
        ("tagged[3:]", "[9,0]", ["[1]", "[2, 3]", "[7]", "[9, 0]"]),
    ):
        set_column(data, 'tagged["x"]', repr(answers))
        assert k.value("tagged.x.fillna('').map(str).tolist()") == expected
    set_column("pol", 'pol["x"]', "'[1] [2.5]'")
    assert k.value("pol['x'].to_list()") == [[1.0], [2.5]]


def test_wrong_cell_sends_nothing(k: Kernel) -> None:
    k.ok("towns = ['Rome', 'Oslo']\nsized = pd.DataFrame({'pop': [1, 3]})")
    before = len(sent(k))
    for cell, message in {
        "--over dff\n{text}": '--over dff: dff is not defined. Did you mean "df"?',
        "--over df.foo\n{text}": "--over df.foo: AttributeError: 'DataFrame' object has no attribute",
        "--over df[\n{text}": "--over df[ is not a Python expression.",
        "--over sized[sized.pop > 2]\n{item}": 'sized.pop is a method; the column is sized["pop"].',
        "--over df --retries 2\n{text}": 'has no option --retries. Did you mean "--retry-failed"?',
        "--over df --choices a,b\n{text}": 'has no option --choices. Did you mean "--choice"?',
        "--over []\n{item}": "--over []: there are no rows.",
        "--over 5\n{item}": "Data of type int has no rows. Use a list",
        "--over df\n{txet}": 'txet is not defined. Did you mean "text"?',
        "--over df\n\n": "The prompt is empty. Write it",
        "--over df -c a\n{text}": "-c continues a chat, but the rows of --over are independent",
        "--over df -f json\n{text}": "-f shows one answer, and --over shows a table.",
        "--over df --literal\n{text}": "--literal would send the same prompt for each row.",
        "--over df --bg --dry-run\n{text}": "--dry-run sends nothing, so --bg has no effect.",
        "--over df --bg --sample 2\n{text}": "--sample ends with its cell, so --bg has no effect.",
        "--over df --bg -o df['x']\n{text}": '--bg returns before there are answers for df["x"].',
        "--over df -o dff['x']\n{text}": '-o dff["x"]: dff is not defined. Did you mean "df"?',
        "--over df -o df\n{text}": 'Choose another name, or write -o df["answer"] to set a column',
        "--over df -o df.stars\n{text}": '-o df["stars"] would replace the column stars of df. Choose',
        "--over towns -o towns\n{item}": "-o towns would replace the data of --over towns. Choose",
        "--over towns[:1] -o towns\n{item}": "would replace the data of --over towns[:1].",
        "--over df -o k.x\n{text}": '-o k["x"]: k is not defined.',
        "--over df -n 2\n{text}": "To send a prompt for each row of your data, use --over DATA.",
        "--over [1] -o df['x']\n{item}": '-o df["x"]: df has 4 rows, and the data has 1 row.',
        "--over iter('ab') --sample 1\n{item}": "--sample would use up the first rows",
        "--over df --sample x\n{text}": "sample='x' is not a number of at least 1.",
        "--over df --rate fast\n{text}": "rate='fast' is not a rate.",
        "--over df --on-error skip\n{text}": "--on-error skip is invalid. Use keep or stop.",
        "--over df --on dff\n{text}": '--on dff: dff is not defined. Did you mean "df"?',
        "--over df --on df\n{text}": "A DataFrame has no workers. Use an executor,",
        "--workers 2\nHello": "--workers needs --over DATA",
    }.items():
        wrong = k.run(f"%%llm {cell}")
        assert message in wrong.error, cell
    k.ok("open('rows.csv', 'w').close()")
    assert "It is a file. Read it first" in k.run("%%llm --over rows.csv\n{item}").error
    assert len(sent(k)) == before


def test_sample_is_spread_and_estimates_all_rows(k: Kernel) -> None:
    before = len(sent(k))
    ran = k.ok("%%llm --over range(1000) --sample 3 -o out\nNumber {item}.")
    assert sent(k, before) == ["Number 0.", "Number 500.", "Number 999."]
    assert "999    999   Number 999." in ran.text
    assert "All 1,000 rows: about 7,000 prompt tokens, 2,000 generated tokens, " in ran.text
    assert "remove --sample and run the cell again" in ran.text
    assert "\nout: a list of 3 answers\ntiny · sample: 3 of 1,000 rows · " in ran.text
    assert k.value("[one.text for one in out]") == ["Number 0.", "Number 500.", "Number 999."]
    ran = k.ok("%%llm --over df --sample 2 -o df['label']\n{text}")
    assert (
        'df["label"] is unchanged: a sample sets no column.\nllm.last_mapped: 2 answers\n'
        "tiny · sample: 2 of 4 rows · "
    ) in ran.text
    assert k.value("[one.text for one in llm.last_mapped]") == ["good tea", "a cup"]
    assert k.value("list(df.columns)") == ["text", "stars"]


def test_dry_run_shows_the_messages_of_the_first_row_with_all_values(k: Kernel) -> None:
    before = len(sent(k))
    ran = k.ok(
        "%%llm --over df[df.stars < 5] --dry-run -s 'In {df.shape[0]} words.'\nWhich? {text}"
    )
    assert "These are the messages of row 9. The data has 3 rows." in ran.text
    lines = [line.split(maxsplit=1) for line in ran.text.splitlines()]
    assert ["system", "In 4 words."] in lines
    assert ["user", "Which? <b>bad</b> tea"] in lines
    assert len(sent(k)) == before


def test_dry_run_counts_the_rows_with_missing_values(k: Kernel) -> None:
    note = "1 row will not be sent, because a value is missing: row 7. The answer is None there."
    assert note in k.ok("%%llm --over df --dry-run\n{text} {stars}").text
    assert "a value is missing" not in k.ok("%%llm --over df --dry-run\n{stars}").text
    k.ok("odd = [None, ' '] * 4 + ['a', float('nan')]")
    ran = k.ok("%%llm --over odd --dry-run\nAbout {item}")
    assert "messages of row 8. The data has 10 rows." in ran.text
    assert (
        "9 rows will not be sent, because a value is missing: rows 0, 1, 2, 3, 4 and 4 more."
    ) in ran.text
    k.ok("class City:\n    def __init__(self, name): self.name = name")
    ran = k.ok("%%llm --over [City('Rome'), City(None)] --dry-run\nAbout {item.name}")
    assert "1 row will not be sent, because a value is missing: row 1." in ran.text
    k.ok("words = iter('abc')")
    k.ok("%%llm --over words --dry-run\n{item}")
    assert k.value("list(words)") == ["b", "c"]


def test_answers_without_a_variable_are_named(k: Kernel) -> None:
    ran = k.ok("%%llm --over ['a', 'b']\nsay {item}")
    assert "\nllm.last_mapped: 2 answers; -o NAME stores them in a variable\n" in ran.text
    assert k.value("[one.text for one in llm.last_mapped]") == ["say a", "say b"]
    for cell in ("%%llm --over ['a'] -o out\n{item}", "mapped = %llm --over ['a'] {item}"):
        assert "last_mapped" not in k.ok(cell).text
    # The names of the notebook are not kept in memory.
    k.ok("import weakref\nclass Large: pass\nlarge = Large()\ngone = weakref.ref(large)")
    k.ok("%%llm --over ['a']\n{item}")
    k.ok("import gc\ndel large")
    assert k.value("(gc.collect(), gone() is None)[1]") is True


def test_template_without_columns_suggests_item(k: Kernel) -> None:
    failed = k.run("%%llm --over ['Rome', 'Oslo']\nWhere is {place}?")
    assert failed.error == (
        "{place} was not replaced: place is not defined. The rows have no columns: write {item} for the"
        " value of a row. To send braces unchanged, double them."
    )


def test_data_is_an_expression_with_a_quoted_text(k: Kernel) -> None:
    before = len(sent(k))
    k.ok("%%llm --over 'a b'.split() -o out\n{item}?")
    k.ok('%llm --over "c d".split()[1:] -o out {item}!')
    k.ok("%%llm --over='e f'.split(' ')\n{item}")
    assert sent(k, before) == ["a?", "b?", "d!", "e", "f"]


def test_progress_fills_in_order_at_most_four_times_a_second(k: Kernel) -> None:
    k.ok("hang = Hang()\nat_release(hang.go.set)")
    k.ok(
        "for n in range(12):\n"
        "    backend.will(Pause(0.1) if n < 11 else hang, *whole_answer(f'<u>{n}</u>'))"
    )
    cell = k.send("%%llm --over range(12) -o out\n{item}")
    k.wait_for_output(cell, "of 12 rows · ")
    k.wait_for_output(cell, "s left")
    k.release()
    state = k.state(cell)
    assert [kind for _, kind, text in state.arrivals if "0 of 12 rows\nindex" in text] == []
    assert "incomplete so far · when complete: out, unless the kernel restarts" in state.text
    assert "<progress" in state.html
    ran = k.wait(cell)
    assert "<u>" not in ran.html
    assert "&lt;u&gt;" in ran.html
    assert ran.updates <= 4 * ran.seconds + 2
    shown = [text for _, kind, text in ran.arrivals if "left" in text]
    rows = [[int(line.split()[0]) for line in text.splitlines()[2:-1]] for text in shown]
    assert rows
    assert all(one == list(range(one[0], one[0] + len(one))) for one in rows if one)


def test_interrupt_keeps_what_is_finished(k: Kernel) -> None:
    k.ok("backend.will(*whole_answer('one')); backend.will(Hang())")
    cell = k.send("%%llm --over df -o out\n{text}")
    k.wait_for_output(cell, "1 of 4 rows")
    began = time.monotonic()
    k.interrupt()
    ran = k.wait(cell)
    assert time.monotonic() - began < within_a_second()
    assert ran.ename == "Interrupted"
    assert ran.error == (
        "Stopped after 1 of 4 rows. They are kept: the same call goes on from there. llm.last_mapped has"
        " their answers."
    )
    assert "out: a new table of 4 rows (1 answer), with the column answer\n" in ran.text
    assert "2 rows without an answer. Run the cell again to go on with them." in ran.text
    assert "incomplete so far" not in ran.text
    assert k.value("out.answer.fillna('').tolist()") == ["one", "", "", ""]
    before = len(sent(k))
    ran = k.ok("%%llm --over df -o out\n{text}")
    assert sent(k, before) == ["<b>bad</b> tea", "a cup"]
    assert "3 of 4 rows · 1 missing · 1 cached" in ran.text
    assert k.value("out.answer.fillna('').tolist()") == ["one", "", "<b>bad</b> tea", "a cup"]


def test_rows_that_are_written_together_show_that_they_live(k: Kernel) -> None:
    k.ok("for _ in range(3): backend.will('a', ' b', Hang())")
    cell = k.send("%%llm --over df -o out --max-new-tokens 40 --workers 3\n{text}")
    k.wait_for_output(cell, "0 of 4 rows · 3 being written · 6 tokens · ")
    k.wait_for_output(cell, "s left · 1 missing")
    shown = k.state(cell)
    assert "s left · 1 missing\n" in shown.text
    assert 'value="0' in shown.html
    k.interrupt()
    ran = k.wait(cell)
    assert ran.error == "Stopped before an answer was complete. Incomplete answers are not kept."
    assert "out: a new table of 4 rows (0 answers), with" in ran.text
    assert "3 rows without an answer." in ran.text
    assert "tiny · 0 of 4 rows · 1 missing · " in ran.text


def test_saving_to_the_name_of_a_table_has_a_note(k: Kernel) -> None:
    shown = k.ok("%%llm --over df --save table.csv --dry-run\nAbout {text}").text
    assert (
        "Note: --save table.csv writes JSON lines, not a table. Write --save table.jsonl;" in shown
    )
    shown = k.ok("%%llm --over df --save table.jsonl --dry-run\nAbout {text}").text
    assert "writes JSON lines" not in shown


def test_saved_rows_are_not_sent_again(k: Kernel) -> None:
    cell = "%%llm --over df --save rows.jsonl -o out\nAbout {text}"
    k.ok("backend.will(GenerationFailed('It broke.'))")
    ran = k.ok(cell)
    assert "To send the failed rows again, add --retry-failed and run the cell again." in ran.text
    before = len(sent(k))
    ran = k.ok(cell)
    assert "1 row failed: It broke." in ran.text
    assert "3 cached" in ran.text
    assert sent(k, before) == []
    k.ok("df.loc[11, 'text'] = 'two cups'")
    k.ok(cell.replace("--save", "--retry-failed --save"))
    assert sent(k, before) == ["About good tea", "About two cups"]
    assert k.value("out.answer.fillna('').tolist()") == [
        "About good tea", "", "About <b>bad</b> tea", "About two cups",
    ]  # fmt: skip
    assert "retry_failed needs save" in k.run("%%llm --over df --retry-failed\n{text}").error
    k.ok("df = frame()")


def test_job_fills_in_while_other_cells_run(k: Kernel) -> None:
    k.ok("hang = Hang(); backend.will(*whole_answer('one')); backend.will(hang)")
    cell = k.ok("%%llm --over df --bg -o job\n{text}")
    number = k.value("job.number")
    k.ok("import time\nwhile not job.progress.done or not job.progress.missing: time.sleep(0.01)")
    assert f"job {number}: incomplete so far" in cell.text
    assert "when complete: job.result(), unless the kernel restarts" in cell.text
    assert "result() returns the answers" in k.run("job.text").error
    jobs = k.ok("%llm_jobs job").text
    assert "running" in jobs
    assert "1 of 4 rows" in jobs
    waited = k.ok("%llm_wait job --timeout 0.3").text
    assert f"Stopped waiting; job {number} continues." in waited
    assert "3 of 4 rows" not in waited
    k.ok("hang.go.set()")
    assert "done" in k.ok("%llm_wait job").text
    # The output of the first cell has its end.
    k.ok("while not job.view.is_shown: time.sleep(0.01)")
    assert "\njob.result(): 4 rows, 3 answers\ntiny · 3 of 4 rows" in cell.text
    assert k.value("list(job.mapped.frame().answer.fillna(''))") == ["one", "", "", "a cup"]
    k.ok("hang = Hang(); backend.will(hang)")
    k.ok("%%llm --over df --bg -o job\n{text}")
    number = k.value("(job.number, hang.reached.wait(30))[0]")
    assert f"Stopped job {number} (tiny) after 0 of 4 rows." in k.ok("%llm_stop").text
    assert k.value("(job.state, len(job.mapped.pending))") == ("stopped", 4)
    # The error of the data is that of the job.
    k.ok("def rows():\n    yield 'a'\n    raise OSError('the file is gone')")
    k.ok("%%llm --over rows() --bg -o job\n{item}")
    assert k.run("%llm_wait job").error == "the file is gone"
    assert "failed" in k.ok("%llm_jobs job").text
    assert k.value("len(job.mapped)") == 1


def test_completion_offers_what_has_rows(k: Kernel) -> None:
    offered = k.complete("%%llm --over ")
    assert {"df", "named", "words"} <= set(offered)
    assert not {"k", "pd", "frame", "backend"} & set(offered)
    assert k.complete("%%llm --over df --on-error ") == ["keep", "stop"]
    assert "--retry-failed" in k.complete("%%llm --over df --")
    first = "%%llm --over df.head(2) -o out\nWhich"
    assert k.completed(f"{first} {{te|}}?") == [f"{first} {{text}}?"]


def test_output_that_is_saved_once_has_the_end_only(k: Kernel) -> None:
    k.ok("from tests.scripted import settings")
    k.ok("again = Session(settings(stream='off'), create=lambda _name: backend)")
    k.ok("register(get_ipython(), again)\nagain.load('tiny')")
    ran = k.ok("%%llm --over ['a', 'b']\n{item}")
    assert ran.updates == 0
    assert ran.text.startswith(
        "index  item  answer\n0      a     a\n1      b     b\n"
        "llm.last_mapped: 2 answers; -o NAME stores them in a variable\ntiny · 2 of 2 rows"
    )
    ran = k.ok("%%llm --over ['a'] --plain\n{item}")
    assert ran.outputs[0]["type"] == "stream"
    hint = "[llm.last_mapped: 1 answer; -o NAME stores them in a variable]"
    table = "index  item  answer\n0      a     a\n"
    assert ran.text.startswith(f"{table}{hint}\n[tiny · 1 of 1 row")
    assert k.ok("%%llm --over ['a'] --plain --quiet\n{item}").text == table
