"""The magics in IPython in a terminal: no HTML, no widgets, lines that fit, Ctrl+C."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pexpect  # type: ignore[import-untyped]
import pytest

from tests.kernels import ROOT

_PROMPT = r"In \[\d+\]: $"
_WIDTH = 90
_SCRIPTED = (
    "from llm_magic.notebook.magics import register",
    "from llm_magic.session import Session",
    "from llm_magic.errors import ModelNotFound",
    "from llm_magic.types import Progress",
    "from tests.scripted import Hang, ScriptedBackend, at_release, whole_answer",
    "backend = ScriptedBackend()",
    "llm = Session(create=lambda _name: backend)",
    "register(get_ipython(), llm)",
)


class Terminal:
    """IPython in a pseudo-terminal."""

    def __init__(self, folder: Path) -> None:
        environment = {
            **os.environ, "IPYTHONDIR": str(folder), "PYTHONPATH": str(ROOT), "TERM": "xterm",
            "NO_COLOR": "1",
        }  # fmt: skip
        self.process = pexpect.spawn(
            sys.executable,
            ["-m", "IPython", "--simple-prompt", "--no-banner", "--HistoryManager.enabled=False"],
            env=environment, cwd=str(folder), encoding="utf-8", dimensions=(40, _WIDTH), timeout=60,
        )  # fmt: skip
        self.process.expect(_PROMPT)

    def send(self, *lines: str) -> None:
        """Type a cell; a cell magic ends with two empty lines."""
        for line in (*lines, "", "") if lines[0].startswith("%%") else lines:
            self.process.sendline(line)

    def read(self) -> str:
        """Return what the running cell writes until its end."""
        self.process.expect(_PROMPT)
        return str(self.process.before).replace("\r\n", "\n").strip()

    def read_on(self, shown: str) -> str:
        """Call what `at_release` was given once the running cell shows something; returns what it writes."""
        self.process.expect(shown)
        before = f"{self.process.before}{self.process.after}"
        self.process.kill(signal.SIGUSR2)
        return f"{before}{self.read()}".replace("\r\n", "\n").partition("\n")[2].strip()

    def run(self, *lines: str) -> str:
        """Run a cell and return what it has written."""
        self.send(*lines)
        # The first line is the one that was typed.
        return self.read().partition("\n")[2].strip()


@pytest.fixture(scope="module")
def terminal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminal]:
    """Return a terminal with a scripted model."""
    made = Terminal(tmp_path_factory.mktemp("terminal"))
    for line in _SCRIPTED:
        made.run(line)
    made.run("%llm_load tiny")
    yield made
    made.process.close(force=True)


def fits(text: str) -> bool:
    return max(map(len, text.splitlines())) <= _WIDTH


def test_panel_names_the_help_and_help_lists_the_magics(terminal: Terminal) -> None:
    panel, listed = terminal.run("%llm_panel"), terminal.run("%llm_help")
    assert panel == "The panel needs a notebook. Run %llm_help to list magics that do the same."
    assert "%llm_config" in listed
    assert "A magic with -h" in listed
    assert "<" not in listed
    assert fits(listed)
    assert "Make a loaded model the active one" in terminal.run("%llm_help use")


def test_tables_fit_the_terminal(terminal: Terminal) -> None:
    terminal.run('%llm_config system="' + "Answer in a few words. " * 12 + '"')
    for line in ("%llm_config", "%llm_status", "%llm --dry-run Why?", "%llm_use", "%llm_models"):
        shown = terminal.run(line)
        assert fits(shown), shown
        assert "<td" not in shown
    assert terminal.run("%llm_config temperature=0.2").endswith("temperature  0.7 → 0.2")
    assert "temperature=9 is out of range. It must be 0 to 2." in terminal.run(
        "%llm_config temperature 9"
    )
    terminal.run("%llm_config --reset")


def test_answer_streams_below_a_line_that_shows_the_wait(terminal: Terminal) -> None:
    terminal.run("hang = Hang(); at_release(hang.go.set)")
    terminal.run("backend.will(hang, *whole_answer('Hello', ' **world**'))")
    terminal.send("%%llm", "Greet.")
    shown = terminal.read_on("waiting for the first token … ")
    waited, _, answer = shown.rpartition("\r\x1b[K")
    assert "tiny · waiting for the first token … " in waited
    assert re.fullmatch(r"Hello \*\*world\*\*\n\x1b\[2m\[tiny · .*tokens/s.*\]\x1b\[22m", answer)
    assert "<" not in shown


def test_rows_have_one_line_that_is_replaced_by_their_table(terminal: Terminal) -> None:
    terminal.run("hang = Hang(); at_release(hang.go.set)")
    terminal.run("backend.will(*whole_answer('No. 0')); backend.will(*whole_answer('No. 1'))")
    terminal.run("backend.will(hang, *whole_answer('No. 2'))")
    terminal.send("%%llm --over ['a', 'b', 'c'] -o out", "About {item}?")
    shown = terminal.read_on("rows/s")
    live, _, table = shown.partition("\r\x1b[K")[2].rpartition("\r\x1b[K")
    assert live.startswith("tiny · 0 of 3 rows\r")
    assert "\n" not in live
    assert "rows/s" in live
    lines = table.splitlines()
    assert lines[:4] == [
        "index  item  answer", "0      a     No. 0", "1      b     No. 1", "2      c     No. 2",
    ]  # fmt: skip
    assert lines[4] == "\x1b[2m[out: a list of 3 answers]\x1b[22m"
    assert re.fullmatch(r"\x1b\[2m\[tiny · 3 of 3 rows · .*tokens/s\]\x1b\[22m", lines[5])
    terminal.run("backend.will(*whole_answer('x')); backend.will(Hang())")
    terminal.send("%%llm --over ['a', 'b']", "About {item}?")
    terminal.process.expect("1 of 2 rows")
    terminal.process.sendintr()
    stopped = terminal.read()
    assert "Note: 1 row without an answer." in stopped
    assert "Interrupted\x1b[0m: Stopped after 1 of 2 rows." in stopped


def test_ctrl_c_keeps_the_partial_answer(terminal: Terminal) -> None:
    terminal.run("backend.will('partial', Hang())")
    terminal.send("%llm Wait.")
    terminal.process.expect("partial")
    terminal.process.sendintr()
    stopped = terminal.read()
    assert "Interrupted\x1b[0m: Stopped after 1 token" in stopped
    assert "Traceback" not in stopped
    assert "'partial'" in terminal.run("llm.last.text")


def test_one_ctrl_c_ends_a_queued_prompt(terminal: Terminal) -> None:
    terminal.run("from llm_magic.types import Chunk")
    terminal.run("backend.will(Chunk(queued=True), Hang())")
    terminal.send("%llm Wait.")
    terminal.process.expect("queued")
    terminal.process.sendintr()
    assert "Interrupted\x1b[0m: Stopped before the first word." in terminal.read()


def test_terminal_without_colors_gets_no_escape_codes(terminal: Terminal) -> None:
    terminal.run("%colors nocolor")
    shown = terminal.run("%llm Hello") + terminal.run("%llm -t 9 Hello")
    terminal.run("%colors linux")
    assert "[tiny · " in shown
    assert "OptionError: temperature=9" in shown
    assert "\x1b" not in shown


def test_load_shows_its_progress_and_error_in_one_line(terminal: Terminal) -> None:
    terminal.run("backend.reports['load'] = [Progress('reading the weights', 0.5)]")
    terminal.run("hang = backend.hang('load')")
    terminal.send("%llm_load big --keep")
    terminal.process.expect("Loading big: reading the weights … [1-9]")
    terminal.process.sendintr()
    assert "Interrupted" in terminal.read()
    terminal.run("backend.trouble['load'] = ModelNotFound('There is no big.')")
    failed = terminal.run("%llm_load big --keep")
    line = "\x1b[31mModelNotFound\x1b[0m: There is no big. tiny is still active."
    assert failed.rpartition("\x1b[K")[2] == line
    terminal.run("backend.trouble.clear()")
    loaded = terminal.run("%llm_load big --keep")
    assert loaded.rpartition("\x1b[K")[2].startswith("big · local cpu bf16 · 269 MB")
    assert "active  tiny" in terminal.run("%llm_use tiny")


def test_background_answer_is_shown_by_wait(terminal: Terminal) -> None:
    assert "%llm_wait 1 shows its answer." in terminal.run("%llm --bg Hello there")
    terminal.run(finished := "while llm.jobs.running: __import__('time').sleep(0.01)")
    shown = terminal.run("%llm_wait")
    assert shown.startswith("Hello there\n")
    assert "1    done   tiny" in shown
    assert fits(terminal.run("%llm_jobs"))
    terminal.run("%llm --bg One")
    terminal.run("%llm --bg Two")
    terminal.run(finished)
    shown = terminal.run("%llm_wait 2 3")
    assert shown.startswith("Job 2\nOne\n")
    assert "\nJob 3\nTwo\n" in shown
    terminal.run("%llm -c zoo Hello")
    assert "zoo   1" in terminal.run("%llm_chats")
    assert "1     Hello   Hello" in terminal.run("%llm_chats zoo")


def test_end_of_background_work_is_shown_with_the_next_cell(terminal: Terminal) -> None:
    terminal.run(
        "hang = Hang(); backend.will(hang, *whole_answer('Yes')); load = backend.hang('load')"
    )
    terminal.run("%llm --bg -o job Well?")
    terminal.run("%llm_load org/second --bg --keep")
    assert terminal.run("print('working')") == "working"
    shown = terminal.run("import time; load.go.set(); hang.go.set()")
    shown += terminal.run("while llm.loading or not job.done: time.sleep(0.01)")
    shown += terminal.run("0")
    finished = re.findall(r"Job \d+ · tiny · done · %llm_wait \d+ shows its answer\.", shown)
    assert len(finished) == 1, shown
    assert shown.count("second · local cpu bf16 · 269 MB · 8,192 ctx · ready in ") == 1
    assert terminal.run("print('quiet')") == "quiet"
    terminal.run("backend.trouble['load'] = ModelNotFound('There is no third.')")
    shown = terminal.run("%llm_load org/third --bg --keep") + terminal.run("%llm_wait")
    assert shown.count("There is no third.") == 1
    assert terminal.run("print('quiet')") == "quiet"
    terminal.run("backend.trouble.clear()")
    terminal.run("%llm_unload second")
    assert "active  tiny" in terminal.run("%llm_use tiny")


def test_a_wait_for_jobs_is_one_line_that_is_removed(terminal: Terminal) -> None:
    terminal.run("hang = Hang(); backend.will('one', hang, *whole_answer(' two'))")
    terminal.run("%%llm --bg -o job", "Count.")
    terminal.run("while not job.text: __import__('time').sleep(0.01)")
    for line in ("%llm_unload", "%llm_wait"):
        terminal.send(line)
        terminal.process.expect(r"Waiting for job \d+ \(running, 1 token\)")
        terminal.process.sendintr()
        assert "continues" in terminal.read()
    terminal.run("import threading; threading.Timer(0.5, hang.go.set).start()")
    shown = terminal.run("%llm_unload")
    assert shown.rpartition("\x1b[K")[2].startswith("Unloaded tiny"), shown
    terminal.run("%llm_load tiny")


def test_exit_names_what_it_stops(terminal: Terminal) -> None:
    """The last test of the module: it ends the shared terminal."""
    terminal.run("backend.will('one', Hang())")
    terminal.run("%%llm --bg -o job", "Count.")
    terminal.run("while not job.text: __import__('time').sleep(0.01)")
    terminal.run("waiting = backend.hang('check')")
    terminal.run("%llm_load org/other --bg")
    number = terminal.run("print(job.number)")
    terminal.send("exit")
    terminal.process.expect(pexpect.EOF)
    lines = str(terminal.process.before).replace("\r", "").splitlines()
    assert lines[-2].endswith("Stopped loading org/other.")
    assert lines[-1] == f"Stopped job {number} (tiny) after 1 token."
