"""Interrupts at random moments of random cells, and what must hold after each of them."""

from __future__ import annotations

import contextlib
import queue
import random
import re
import time
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fault_server import FaultServer
from tests.kernels import Kernel, Ran, kernel, within_a_second
from tests.local_models import parrot
from tests.ollama_server import OllamaServer
from tests.soak.cells import KINDS, Kind

MODELS = ("local", "remote", "ollama")
MAX_LINES = 6
# Between two words of the servers, and until they list their models.
_PACE_S = 0.02
_WORDS = " ".join(f"w{number}" for number in range(50))
_COLORS = re.compile(r"\x1b\[[0-9;]*m")
_HELPERS = '''
import asyncio, sys
from llm_magic import llm

def forget():
    if any(model.name == "spare" for model in llm.status().models):
        llm.unload("spare")

def probe():
    """Return what the last cell left, and note the last answer for the next time."""
    global noted
    last, error = llm.last, getattr(sys, "last_value", None)
    reply = getattr(error, "reply", None)
    found = {
        "new": last is not noted,
        "text": last.text if last else "",
        "ended": last.finish_reason if last else "",
        "reply": None if reply is None else reply.text,
    }
    noted = last
    return found

noted = None
'''


@dataclass
class Try:
    """One interrupted cell and what was wrong with it."""

    kind: str
    model: str
    how: str
    delay: float
    status: str = "?"
    ename: str = ""
    lines: int = 0
    # From the interrupt to the idle kernel, where the cell ran when the interrupt was sent.
    seconds: float | None = None
    traceback: str = ""
    problems: list[str] = field(default_factory=list)

    @property
    def is_own(self) -> bool:
        """Whether the interrupt was raised in a line of the cell, and not below it."""
        return self.ename == "KeyboardInterrupt" and "File " not in self.traceback

    def __str__(self) -> str:
        took = "not begun" if self.seconds is None else f"{self.seconds:.3f} s"
        head = (
            f"{self.kind} on {self.model}, {self.how} after {self.delay * 1000:.1f} ms:"
            f" {self.status} {self.ename} ({self.lines} lines, {took})"
        )
        return "\n".join([head, *(f"  {problem}" for problem in self.problems)])


class Attack:
    """Interrupts cells of one kernel that has a local model and two servers."""

    def __init__(self, k: Kernel, server: FaultServer, folder: Path, seed: int) -> None:
        self.k, self.server, self._folder = k, server, folder
        self._random = random.Random(seed)
        self._durations: dict[tuple[str, str], float] = {}
        self.tries: list[Try] = []

    def attempt(self) -> Try:
        """Interrupt one cell, and check everything afterwards."""
        kind, model = self._random.choice(KINDS), self._random.choice(MODELS)
        how = self._random.choice(["SIGINT", "interrupt_request"])
        done = Try(kind.name, model, how, self._delay(kind, model))
        self._before(kind, model)
        ran = self._interrupted(self._filled(kind.code, model), done)
        if ran is not None:
            self._check(kind, ran, done)
        self._end_jobs(kind)
        self._check_next(model, done)
        self.tries.append(done)
        return done

    def uninterrupted(self, kind: Kind, model: str) -> list[str]:
        """Run one cell to its end; returns what is wrong."""
        self._before(kind, model)
        self.k.value("probe()")
        ran = self.k.ok(self._filled(kind.code, model))
        found = self.k.value("probe()")
        self._end_jobs(kind)
        problems = lost_text(kind, ran, found) if kind.answers else []
        return [f"{kind.name} on {model}: {problem}" for problem in problems]

    def filled(self, name: str) -> str:
        """Return the code of a kind of cell."""
        return self._filled(next(kind for kind in KINDS if kind.name == name).code, MODELS[0])

    def _before(self, kind: Kind, model: str) -> None:
        if before := self._filled(kind.before, model):
            self.k.ok(before)

    def _filled(self, code: str, model: str) -> str:
        server = f"-b openai --base-url {self.server.url}"
        load = f"'big', backend='openai', base_url='{self.server.url}'"
        names = {"folder": str(self._folder), "spare": f"big {server}", "load": load,
                 "url": self.server.url, "model": model, "prompt": _WORDS}  # fmt: skip
        return re.sub(r"\{(\w+)\}", lambda match: names[match[1]], code)

    def _delay(self, kind: Kind, model: str) -> float:
        """Return a moment: in the first 25 ms, in the first second, or near the end."""
        which = self._random.choice(["begin", "middle", "end"])
        if which == "begin":
            return self._random.uniform(0, 0.025)
        if which == "middle":
            return self._random.uniform(0, 1)
        return max(0.0, self._whole(kind, model) + self._random.uniform(-0.05, 0.02))

    def _whole(self, kind: Kind, model: str) -> float:
        """Return how long the cell takes if it is not interrupted, measured once."""
        if (kind.name, model) not in self._durations:
            self._before(kind, model)
            ran = self.k.ok(self._filled(kind.code, model))
            self._durations[kind.name, model] = ran.seconds
            self._end_jobs(kind)
        return self._durations[kind.name, model]

    def _interrupted(self, code: str, done: Try) -> Ran | None:
        self.k.value("probe()")
        cell = self.k.send(code)
        self.k.receive(done.delay)
        # The kernel repeats the input when the cell starts.
        started = self.k.state(cell).messages >= 2
        finished = bool(self.k.state(cell).finished)
        pressed = time.monotonic()
        self._press(done.how)
        try:
            ran = self.k.wait(cell, timeout=60)
        except (AssertionError, queue.Empty) as stuck:
            done.problems.append(f"stuck: {type(stuck).__name__} {str(stuck)[:2000]}")
            return None
        done.status, done.ename = ran.status, ran.ename
        lines = plain(ran.traceback)
        done.traceback, done.lines = "\n".join(lines), len(lines)
        if started and not finished:
            done.seconds = ran.finished - pressed
        return ran

    def _press(self, how: str) -> None:
        if how == "SIGINT":
            self.k.interrupt()
            return
        client = self.k.client
        request = client.session.msg("interrupt_request", content={})
        client.control_channel.send(request)
        # Or it would reach the next cell.
        while client.get_control_msg(timeout=60)["parent_header"]["msg_id"] != request["msg_id"]:
            pass

    def _check(self, kind: Kind, ran: Ran, done: Try) -> None:
        if done.seconds is not None and done.seconds > within_a_second():
            done.problems.append(f"ended {done.seconds:.2f} s after the interrupt")
        if ran.status == "error" and not (ran.ename == "Interrupted" or done.is_own):
            done.problems.append(f"it ended with {ran.ename}: {ran.error}\n{done.traceback}")
        elif done.lines > MAX_LINES:
            done.problems.append(f"{done.lines} lines\n{done.traceback}")
        if "Traceback" in ran.text.replace(done.traceback, ""):
            done.problems.append(f"a traceback in the output: {ran.text}")
        found = self.k.value("probe()")
        # `gather` ends with the first of its answers that ends.
        if not kind.in_background and not self._is_closed():
            done.problems.append("an answer is still open")
        if kind.answers:
            done.problems += lost_text(kind, ran, found)

    def _is_closed(self) -> bool:
        """Return whether no answer is open, at once or within the grace time of an interrupt."""
        end = time.monotonic() + within_a_second()
        while self.k.value("len(llm.answering)"):
            if time.monotonic() > end:
                return False
        return True

    def _end_jobs(self, kind: Kind) -> None:
        if kind.in_background:
            self.k.ok("%llm_stop")

    def _check_next(self, model: str, done: Try) -> None:
        """See that the next cell works, at once."""
        try:
            ran = self.k.run(f"%llm --plain -m {model} --max-new-tokens 2 go on", timeout=60)
        except (AssertionError, queue.Empty) as stuck:
            done.problems.append(f"the next cell is stuck: {stuck}")
            return
        if ran.status != "ok" or ran.seconds > 2 * within_a_second():
            done.problems.append(f"the next cell: {ran.status}, {ran.seconds:.2f} s: {ran.text}")


def plain(traceback: list[str]) -> list[str]:
    """Return the lines of a traceback as they are shown, without colors."""
    return _COLORS.sub("", "\n".join(traceback)).strip("\n").splitlines()


def lost_text(
    kind: Kind, ran: Ran, found: dict[str, Any], ends: Collection[str] = ("stop", "length")
) -> list[str]:
    """Return what is wrong with the text that was kept; `ends` are the good ends of an answer."""
    text: str = found["text"] if found["new"] else ""
    shown = _shown(kind, ran)
    problems = []
    if ran.status == "ok" and (not found["new"] or found["ended"] not in ends):
        problems.append(f"it ended well with an answer that is not whole: {found}")
    if ran.status == "error" and found["new"] and found["reply"] != text:
        problems.append(f"the error has the reply {found['reply']!r}, llm.last has {text!r}")
    if shown is not None and shown != text.strip():
        problems.append(f"shown: {shown!r}, kept: {text!r}")
    return problems


def _shown(kind: Kind, ran: Ran) -> str | None:
    """Return the text of the answer on the screen; None where there is no answer to be shown."""
    if kind.shown == "none":
        return None
    if kind.shown == "stdout":
        text = "".join(o["text"] for o in ran.outputs if o.get("name") == "stdout")
        return re.sub(r"(?m)^\[[^\]\n]*\]\n", "", text).strip()
    drawn = [output["data"] for output in ran.outputs if "data" in output]
    whole = str(drawn[0].get("text/plain", "")) if drawn else ""
    # The footer, or the line that was shown while the first word was waited for.
    text = re.sub(r"(?s)(^|\n+)\w+ · [^\n]*$", "", whole).strip()
    # The note below an answer whose server just stopped.
    return re.sub(
        r"(^|\n\n)\S+ (did not send the end of the|sent no) answer\. [^\n]*$", "", text
    ).strip()


def report(tries: list[Try], version: str) -> str:
    """Return the figures of a run."""
    slow = [t for t in tries if t.seconds is not None and t.seconds > 1]
    errors = [t for t in tries if t.status == "error"]
    lines = dict(sorted(Counter(t.lines for t in errors).items()))
    seconds = sorted(t.seconds for t in tries if t.seconds is not None)
    return "\n".join(
        [
            f"ipykernel {version}: {len(tries)} interrupts, {len(seconds)} of them in a running cell;"
            f" {len(errors)} cells ended with an error",
            f"lines of traceback: {lines}; raised in a line of the cell itself:"
            f" {sum(t.is_own for t in tries)}",
            f"from the interrupt to the idle kernel: median {_at(seconds, 0.5)}, 99 %"
            f" {_at(seconds, 0.99)}, slowest {_at(seconds, 1)}",
            *(f"slower than 1 s: {t}" for t in slow),
            f"tries with a problem: {sum(bool(t.problems) for t in tries)}",
        ]
    )


def _at(seconds: list[float], part: float) -> str:
    return f"{seconds[min(len(seconds) - 1, int(part * len(seconds)))]:.3f} s" if seconds else "-"


@contextlib.contextmanager
def attack(folder: Path, seed: int, ipykernel: str | None = None) -> Iterator[Attack]:
    """Start two servers and a kernel that has a model on each of them, and a local one."""
    with FaultServer() as server, OllamaServer() as ollama:
        parrot(folder, "abcdefghij ", ends=False, max_position_embeddings=4096)
        server.pace = ollama.pace = _PACE_S
        with kernel(ipykernel, OLLAMA_BASE_URL=ollama.url) as k:
            k.ok(f"%load_ext llm_magic\n{_HELPERS}")
            k.ok(f"%llm_load {folder} --name local")
            k.ok(f"%llm_load tiny -b openai --base-url {server.url} --keep --name remote")
            k.ok("%llm_load llama3.2 -b ollama --keep --name ollama")
            yield Attack(k, server, folder, seed)
