"""``%llm_explain``: the exception, its cell and its values reach the model, secrets do not."""

from __future__ import annotations

import pytest

from llm_magic.config.redaction import MASK
from tests.kernels import Kernel

_SENT = "backend.requests[-1].messages[-1].content"


def explain(k: Kernel, line: str = "", answer: str = "It divides by zero.") -> str:
    """Explain the last exception, and return what the model was sent."""
    k.ok(f"backend.will(*whole_answer({answer!r}))")
    k.ok(f"%llm_explain {line}")
    sent: str = k.value(_SENT)
    return sent


def test_the_traceback_the_cell_and_the_values_are_sent(scripted: Kernel) -> None:
    scripted.run("towns = {'Paris': 2}\ncount = 0\nper_town = towns['Paris'] / count")
    sent = explain(scripted)
    label = sent.partition("The cell, ")[2].partition(":")[0]
    assert label.startswith("In[")
    assert "per_town = towns['Paris'] / count" in sent
    assert f'File "{label}", line 3' in sent
    assert "ZeroDivisionError: division by zero" in sent
    assert "towns: {'Paris': 2}\ncount: 0\n" in sent
    assert "ipykernel" not in sent
    assert "IPython" not in sent


def test_explanation_streams_and_is_stored(scripted: Kernel) -> None:
    scripted.run("1 / 0")
    scripted.ok("backend.will(*whole_answer('It divides ', 'by **zero**.'))")
    scripted.ok("x = 1")
    ran = scripted.ok("%llm_explain -o why")
    label = scripted.value(_SENT).partition("The cell, ")[2].partition(":")[0]
    assert ran.text.startswith(f"Note: the last error is the ZeroDivisionError in cell {label}.\n")
    assert "by <strong>zero</strong>." in ran.html
    assert scripted.value("why.text") == "It divides by **zero**."


def test_dry_run_shows_messages_and_sends_nothing(scripted: Kernel) -> None:
    scripted.run("count = 0\n1 / count")
    requests = scripted.value("len(backend.requests)")
    shown = scripted.ok("%llm_explain --dry-run").text
    assert scripted.value("len(backend.requests)") == requests
    sent = explain(scripted)
    for line in (*sent.splitlines(), "system", "nothing was sent"):
        assert line in shown


def test_code_requests_corrected_cell_and_offers_it(scripted: Kernel) -> None:
    scripted.run("%time x = 1 / 0")
    scripted.ok(
        "backend.will(*whole_answer('Not by zero.\\n```python\\n', '%time x = 1 / 1\\n', '```\\n'))"
    )
    ran = scripted.ok("%llm_explain -f code")
    assert "```python\n%time x = 1 / 0\n```" in scripted.value(_SENT)
    assert "the whole corrected cell" in scripted.value(_SENT)
    assert [p["text"] for p in ran.payload if p["source"] == "set_next_input"] == [
        "%time x = 1 / 1"
    ]


def test_a_chat_goes_on_about_it(scripted: Kernel) -> None:
    scripted.run("1 / 0")
    explain(scripted, "-c debug")
    scripted.ok("%llm -c debug And in other languages?")
    roles = scripted.value("[m.role for m in backend.requests[-1].messages]")
    assert roles == ["system", "user", "assistant", "user"]
    assert "ZeroDivisionError" in scripted.value("backend.requests[-1].messages[1].content")


def test_secrets_are_neither_sent_nor_shown(scripted: Kernel) -> None:
    scripted.ok("import os; os.environ['SERVICE_TOKEN'] = 'tulips-in-may'")
    scripted.run(
        "password = 'hunter2-hunter2'\n"
        "account = {'town': 'Paris', 'api_key': 'plain-words-only'}\n"
        "raise ValueError(f'no {password} {account} https://bob:pass1234@host/ '"
        " + os.environ['SERVICE_TOKEN'])"
    )
    sent = explain(scripted)
    shown = scripted.ok("%llm_explain --dry-run")
    for secret in ("hunter2", "plain-words", "pass1234", "tulips"):
        assert secret not in sent + shown.text + shown.html
    assert f"password: {MASK}" in sent
    assert "'town': 'Paris'" in sent
    scripted.ok("backend.will(*whole_answer('```python\\npassword = 1\\n```'))")
    assert "a secret that was not sent" in scripted.ok("%llm_explain -f code").text


def test_explain_sends_values_of_notebook_function(scripted: Kernel) -> None:
    scripted.ok("def share(part, whole):\n    return part / whole")
    scripted.run("parts = [1, 2]\nshare(parts, 3)")
    sent = explain(scripted)
    assert "share(parts, 3)" in sent.partition("The traceback")[0]
    assert "parts: [1, 2]\n" in sent
    assert "part: [1, 2]\nwhole: 3\n" in sent


def test_explain_sends_values_of_code_in_cell_magic(scripted: Kernel) -> None:
    scripted.run("%%time\ndays = 0\n7 / days")
    sent = explain(scripted)
    assert "```python\n%%time\ndays = 0\n7 / days\n```" in sent
    assert "days: 0\n" in sent


def test_explain_sends_code_of_run_script(scripted: Kernel) -> None:
    scripted.ok("open('script.py', 'w').write('total = 0\\nprint(5 / total)\\n')")
    scripted.run("%run script.py")
    sent = explain(scripted)
    assert 'script.py", line 2' in sent
    assert "total: 0\n" in sent
    assert "IPython" not in sent


def test_a_syntax_error_shows_its_line(scripted: Kernel) -> None:
    scripted.run("x = 1\ny = (2 +\nprint(x")
    sent = explain(scripted)
    assert "y = (2 +" in sent.partition("The traceback")[0]
    assert "SyntaxError: " in sent
    assert "site-packages" not in sent


def test_explain_sends_exception_groups_and_causes(scripted: Kernel) -> None:
    scripted.run(
        "def work(n):\n    raise ValueError(f'number {n}')\n"
        "errors = []\n"
        "for n in (1, 2):\n"
        "    try: work(n)\n"
        "    except ValueError as e: errors.append(e)\n"
        "raise ExceptionGroup('both', errors) from KeyError('first cause')"
    )
    sent = explain(scripted)
    for text in (
        "ExceptionGroup: both",
        "number 1",
        "number 2",
        "KeyError: 'first cause'",
        "n: 2",
    ):
        assert text in sent


def test_a_repr_that_hangs_or_raises_is_never_called(scripted: Kernel) -> None:
    scripted.run(
        "import time\n"
        "class Bad:\n"
        "    def __init__(self): self.size = 7\n"
        "    def __repr__(self): time.sleep(1000)\n"
        "    def __getattr__(self, name): raise RuntimeError(name)\n"
        "    @property\n"
        "    def __class__(self): raise SystemExit\n"
        "bad = Bad()\n"
        "bad + 1"
    )
    assert "bad: Bad object with size=7" in explain(scripted)


def test_without_an_exception_it_is_one_line(scripted: Kernel) -> None:
    scripted.ok(
        "import sys; kept = {n: vars(sys).pop(n) for n in list(vars(sys)) if n[:5] == 'last_'}"
    )
    assert scripted.ok("%llm_explain").text == "No exception has been raised in this kernel yet."
    scripted.ok("vars(sys).update(kept)")


def test_an_error_of_our_own_needs_no_model(scripted: Kernel) -> None:
    scripted.run("%%llm -t 9\nHello")
    requests = scripted.value("len(backend.requests)")
    assert (
        scripted.ok("%llm_explain").text
        == "OptionError: temperature=9 is out of range. It must be 0 to 2."
    )
    assert scripted.value("len(backend.requests)") == requests


def test_what_keeps_it_from_explaining_does_not_take_its_place(scripted: Kernel) -> None:
    scripted.run("numbers = [1, 2]\nnumbers[5]")
    assert scripted.run("%llm_explain --format pdf").ename == "OptionError"
    assert scripted.run("%llm_explain -m nobody").ename == "ModelNotLoaded"
    assert "IndexError" in explain(scripted)


def test_an_interrupt_keeps_the_question(scripted: Kernel) -> None:
    scripted.run("numbers = [1, 2]\nnumbers[5]")
    scripted.ok("from tests.scripted import Hang\nbackend.will('It is', Hang())")
    cell = scripted.send("%llm_explain")
    scripted.wait_for_output(cell, "It is")
    scripted.interrupt()
    assert scripted.wait(cell).ename == "Interrupted"
    assert "IndexError" in explain(scripted)


@pytest.mark.parametrize("line", ["", "--dry-run", "-m nobody"])
def test_explain_holds_no_references(scripted: Kernel, line: str) -> None:
    scripted.ok(
        "import gc, weakref\n"
        "class Big: pass\n"
        "def fails():\n    big = Big(); fails.seen = weakref.ref(big); big.nothing"
    )
    scripted.run("fails()")
    scripted.run(f"%llm_explain {line}")
    scripted.run("1 / 0")
    assert scripted.value("(gc.collect(), fails.seen())[1]") is None


def test_no_hook_is_installed(scripted: Kernel) -> None:
    explain(scripted)
    assert scripted.value("get_ipython().custom_exceptions") == ()
    assert scripted.value("'llm_magic' in __import__('sys').excepthook.__module__") is False


def test_a_real_model_explains(loaded: Kernel) -> None:
    loaded.run("count = 0\n1 / count")
    loaded.ok("%llm_explain -t 0 --max-new-tokens 12 --quiet -o why")
    assert loaded.value("why.usage.completion_tokens") > 0
    assert loaded.value("'ZeroDivisionError' in why.messages[-1].content")


def test_a_mistyped_magic_does_not_take_the_place_of_the_error(scripted: Kernel) -> None:
    scripted.run("{'a': 1}['b']")
    for line in ("%llm_explian", "%%llm_expain\nWhy?", "%%llm_stop\n1"):
        assert "not found" in scripted.run(line).text
    assert "KeyError: 'b'" in explain(scripted)
    scripted.ok("%%llm_explain")
    scripted.run("%no_magic_of_ours")
    assert "UsageError" in explain(scripted)


def test_a_cell_is_a_question_about_the_error(scripted: Kernel) -> None:
    scripted.run("prices = {'a': 1}\nprices['b']")
    scripted.ok("backend.will(*whole_answer('Because.'))\nname = 'prices'")
    scripted.ok("%llm_explain -t 0 why is {name} empty?")
    assert "Answer this question first: why is prices empty?" in scripted.value(_SENT)
    assert scripted.ok("reply = %llm_explain why?").payload == []
    assert "Answer this question first: why?" in scripted.value(_SENT)
    scripted.ok("%%llm_explain -t 0\nWhat is in {name}?\nAnd {nothing}?")
    sent = scripted.value(_SENT)
    assert "Answer this question first: What is in prices?\nAnd {nothing}?" in sent
    assert "KeyError: 'b'" in sent
