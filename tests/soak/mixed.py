"""Mixed work on one kernel for some time: answers, faults, threads, jobs, loads, chats, interrupts.

What the kernel holds at the start, after every action ran once, must be what it holds at the end.
"""

from __future__ import annotations

import queue
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.fault_server import CHAT
from tests.kernels import Ran
from tests.soak.cells import KINDS, Kind
from tests.soak.interrupts import MAX_LINES, MODELS, Attack, lost_text, plain, report
from tests.wire import (
    SSE,
    Cut,
    Head,
    Pause,
    Raw,
    Reset,
    Send,
    Step,
    delta,
    error_answer,
    html_answer,
    json_answer,
    sse,
    sse_words,
)

_TASKS = (
    "[t.get_coro().__qualname__ for t in __import__('gc').get_objects()"
    " if type(t) is asyncio.Task and not t.done() and 'llm_magic' in repr(t.get_coro())]"
)
_QUESTION = Kind("faulty", "%%llm -m remote\nGo on.", "view")
# The servers keep connections open for the next answers.
_SPARE_FILES = 12
_SPARE_MB = 100


def faults() -> dict[str, list[Step]]:
    """Return what a server can do to an answer; each ends by itself within a second or two."""
    half = sse(delta("", role="assistant"), delta("half"), done=False)
    return {
        "cut": [*half, Cut()],
        "reset": [*half, Reset()],
        "silence": [*half, Pause(0.3), *sse(delta(" whole", finish="stop"))[1:]],
        "no end": half,
        "half an event": [Head(200, SSE), Send(b'data: {"choices": [{"delta"'), Cut()],
        "no JSON": sse(delta("half"), b"{nonsense", done=False),
        "an error inside": sse(delta("half"), {"error": {"message": "out of memory"}}, done=False),
        "no HTTP": [Raw(b"\x16\x03\x01 nonsense\r\n\r\n"), Cut()],
        "busy": error_answer(503, "busy", headers={"Retry-After": "0"}),
        "too many": error_answer(429, "slow down", headers={"Retry-After": "0"}),
        "refused": error_answer(400, "no such thing"),
        "a page": html_answer(502),
        "a list": json_answer(200, []),
        "closed": [Cut()],
        "whole": sse_words("All", " is", " well."),
    }


@dataclass(frozen=True)
class Held:
    """What the kernel holds when nothing runs."""

    threads: Counter[str]
    tasks: tuple[str, ...]
    os_threads: int
    files: int
    rss_mb: float

    def __str__(self) -> str:
        return (
            f"{self.threads.total()} Python threads, {self.os_threads} threads, {len(self.tasks)} tasks,"
            f" {self.files} files, RSS {self.rss_mb:.0f} MB"
        )


@dataclass
class Soak:
    """Runs random actions, and collects what is wrong."""

    attack: Attack
    seed: int
    problems: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        """Make the actions random by the seed."""
        self.k, self.server = self.attack.k, self.attack.server
        self._random = random.Random(self.seed)
        self._actions: dict[str, Callable[[], None]] = {
            "cell": self._cell,
            "fault": self._fault,
            "threads": self._threads,
            "gather": self._gather,
            "job": self._job,
            "loads": self._loads,
            "chat": self._chat,
            "interrupt": self._interrupt,
        }

    def run(self, seconds: float) -> tuple[Held, Held]:
        """Do every action once, then random ones; returns what was held before and after these."""
        for action in self._actions:
            self._do(action)
        before = self._held()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._do(self._random.choice(list(self._actions)))
        after = self._held()
        self._compare(before, after)
        return before, after

    def _do(self, action: str) -> None:
        self.counts[action] += 1
        try:
            self._actions[action]()
        except (AssertionError, queue.Empty) as stuck:
            self.problems.append(f"{action}: {type(stuck).__name__}: {str(stuck)[:2000]}")

    # -- actions ------------------------------------------------------------------------------

    def _cell(self) -> None:
        kind, model = self._random.choice(KINDS), self._random.choice(MODELS)
        self.problems += self.attack.uninterrupted(kind, model)

    def _fault(self) -> None:
        name, script = self._random.choice(list(faults().items()))
        self.server.will(CHAT, *script)
        self.k.value("probe()")
        ran = self.k.run(_QUESTION.code, timeout=30)
        found = self.k.value("probe()")
        # A server that just stops leaves an answer with a note.
        ends = {"stop", "truncated"} if "ended early; incomplete" in ran.text else {"stop"}
        problems = lost_text(_QUESTION, ran, found, ends)
        self.problems += [f"fault {name}: {problem}" for problem in [*_long(ran), *problems]]

    def _threads(self) -> None:
        count = self._random.randint(2, 6)
        self.k.ok(
            "from concurrent.futures import ThreadPoolExecutor\n"
            f"with ThreadPoolExecutor({count}) as pool:\n"
            f"    models = {MODELS!r} * 2\n"
            "    ask = lambda model: llm.generate('one two three', model=model, max_new_tokens=20)\n"
            f"    texts = [reply.text for reply in pool.map(ask, models[:{count}])]\n"
            "assert all(texts), texts"
        )

    def _gather(self) -> None:
        count = self._random.randint(2, 8)
        self.k.ok(
            f"replies = await asyncio.gather(*(llm.agenerate('number %d' % n, model='remote')"
            f" for n in range({count})))\n"
            f"assert [r.text for r in replies] == ['number %d' % n for n in range({count})]"
        )

    def _job(self) -> None:
        model = self._random.choice(MODELS)
        begun = self.k.ok(
            f"%%llm --bg -o job -m {model} --max-new-tokens 60\none two three four five"
        )
        other = self._random.choice(["%llm_status", "%llm_jobs", f"%llm -m {model} hello", "pass"])
        self.k.ok(other)
        self.k.ok(self._random.choice(["%llm_wait", "%llm_stop"]), timeout=60)
        self.k.ok(
            "from llm_magic.errors import Interrupted\n"
            "try:\n    job.result(timeout=60)\nexcept (Exception, Interrupted): pass\n"
            "while not job.view.is_shown: await asyncio.sleep(0.01)"
        )
        text = self.k.value("job.text").strip()
        if text not in begun.text:
            self.problems.append(f"job on {model}: shown {begun.text!r}, kept {text!r}")

    def _loads(self) -> None:
        self.k.ok("forget()")
        ran = self.k.ok(self.attack.filled(self._random.choice(["load local", "load server"])))
        assert "ready in" in ran.text, ran.text
        self.k.ok("%llm -m spare --max-new-tokens 5 hello")
        self.k.ok("%llm_unload spare")

    def _chat(self) -> None:
        if self._random.random() < 0.2:
            self.k.ok("%llm_reset --all")
        name = self._random.choice(["one", "two"])
        self.k.ok(f"%%llm -c {name} --trim -m remote\nTurn {self.counts['chat']}.")
        self.k.ok("%llm_chats")

    def _interrupt(self) -> None:
        done = self.attack.attempt()
        if done.problems:
            self.problems.append(str(done))

    # -- what is held -------------------------------------------------------------------------

    def _held(self) -> Held:
        """Return what is held once that stays the same for a while."""
        self.k.ok("%llm_stop\nforget()\n%llm_reset --all\nimport gc; gc.collect()")
        found = self._look()
        for _ in range(20):
            time.sleep(0.5)
            before, found = found, self._look()
            if (before.threads, before.tasks, before.files) == (
                found.threads, found.tasks, found.files,
            ):  # fmt: skip
                break
        return found

    def _look(self) -> Held:
        threads = Counter(self.k.threads())
        tasks = tuple(sorted(self.k.value(_TASKS)))
        process = self.k.process
        rss = process.memory_info().rss / 2**20
        return Held(threads, tasks, process.num_threads(), process.num_fds(), rss)

    def _compare(self, before: Held, after: Held) -> None:
        if more := after.threads - before.threads:
            self.problems.append(f"threads that are left: {dict(more)}")
        if more := Counter(after.tasks) - Counter(before.tasks):
            self.problems.append(f"tasks that are left: {dict(more)}")
        if after.files > before.files + _SPARE_FILES:
            self.problems.append(f"files: {before.files}, then {after.files}")
        if after.rss_mb > before.rss_mb + _SPARE_MB:
            self.problems.append(f"RSS: {before.rss_mb:.0f} MB, then {after.rss_mb:.0f} MB")

    def report(self, held: tuple[Held, Held], version: str) -> str:
        """Return the figures of the run."""
        before, after = held
        done = ", ".join(f"{count} {action}" for action, count in sorted(self.counts.items()))
        return "\n".join(
            [
                report(self.attack.tries, version),
                f"actions: {done}",
                f"before: {before}",
                f"after:  {after}",
                f"problems: {len(self.problems)}",
                *self.problems,
            ]
        )


def _long(ran: Ran) -> list[str]:
    lines = plain(ran.traceback)
    return [f"{len(lines)} lines of traceback: {ran.text}"] if len(lines) > MAX_LINES else []
