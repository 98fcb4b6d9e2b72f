"""Real Jupyter kernels for tests: start one, run cells, read what they show, interrupt them.

with kernel() as k:
    ran = k.run("%llm_status")
    cell = k.send("%%llm\\nCount to ten.")
    k.wait_for_output(cell, "two")
    k.interrupt()
    stopped = k.wait(cell)
"""

from __future__ import annotations

import ast
import contextlib
import html
import os
import queue
import re
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from jupyter_client.manager import KernelManager
from jupyter_client.provisioning.local_provisioner import LocalProvisioner

from tests.until import until

ROOT = Path(__file__).resolve().parent.parent
# Other ipykernel versions, put there by scripts/install-kernels.
OTHER_KERNELS = ROOT / ".kernels"
# The size of the small model in bfloat16, without or with a packed copy of its head.
SIZE = r"(?:269|326) MB"
# Settings of the person who runs the tests, which would change what is tested.
_SETTINGS = ("LLM_", "DEFAULT_LLM_", "DEFAULT_MODEL_", "LOCAL_MODELS_", "PYTHONPATH")
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    # OpenMP's threads spin while they wait: on a busy machine that makes a token take a second.
    "OMP_WAIT_POLICY": "PASSIVE",
}
# Run when the kernel starts; an expression, so that it leaves no name behind.
_STARTUP = """__import__("faulthandler").register(
    __import__("signal").SIGUSR1, open(__import__("os").environ["IPYTHONDIR"] + "/stacks", "w")
)
"""


@dataclass
class Ran:
    """What came of a cell, or what has come until now; times are of `time.monotonic`."""

    status: str = "?"
    outputs: list[dict[str, Any]] = field(default_factory=list)
    # Everything shown, in the order of arrival: when, what kind of message, its text.
    arrivals: list[tuple[float, str, str]] = field(default_factory=list)
    updates: int = 0
    # What the kernel broadcast for it, and how much that was on the wire.
    messages: int = 0
    bytes: int = 0
    error: str = ""
    ename: str = ""
    traceback: list[str] = field(default_factory=list)
    sent: float = 0.0
    finished: float = 0.0
    payload: list[dict[str, Any]] = field(default_factory=list)
    # The content of the reply, which nbclient makes its exceptions of.
    reply: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """How long it took, from sending it to the idle kernel."""
        return self.finished - self.sent

    @property
    def text(self) -> str:
        """Everything shown, as plain text; live outputs as they are at the end."""
        return "".join(
            output["text"] if output["type"] == "stream" else output["data"].get("text/plain", "")
            for output in self.outputs
        )

    @property
    def html(self) -> str:
        """Everything shown, as HTML where it has that form."""
        return "".join(o["data"].get("text/html", "") for o in self.outputs if "data" in o)


def within_a_second() -> float:
    """Return the seconds that one second may take on a machine where others work, too.

    Whether it is one is not measured here: that takes a quiet machine.
    """
    return max(5.0, 2.5 * os.getloadavg()[0] / (os.cpu_count() or 1))


class Kernel:
    """A running kernel, spoken to as a frontend does."""

    def __init__(self, manager: KernelManager, *, misses_messages: bool = False) -> None:
        """`misses_messages`: this version may not read a message."""
        self.manager = manager
        self._misses_messages = misses_messages
        self.client = manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)
        assert isinstance(manager.provisioner, LocalProvisioner)
        self.process = psutil.Process(manager.provisioner.pid)
        self._cells: dict[str, Ran] = {}
        self._displays: dict[str, dict[str, Any]] = {}

    def send(
        self,
        code: str,
        cell_id: str | None = None,
        *,
        asks: bool = False,
        deleted: Sequence[str] = (),
    ) -> str:
        """Send a cell and return at once with its message id; `asks` allows it to ask for input.

        `deleted` are the ids of cells that are gone since the last one was sent.
        """
        content = {
            "code": code, "silent": False, "store_history": True, "user_expressions": {},
            "allow_stdin": asks, "stop_on_error": True,
        }  # fmt: skip
        metadata: dict[str, Any] = {"cellId": cell_id} if cell_id else {}
        metadata |= {"deletedCells": list(deleted)} if deleted else {}
        message = self.client.session.msg("execute_request", content, metadata=metadata)
        message_id = str(message["header"]["msg_id"])
        self._cells[message_id] = Ran(sent=time.monotonic())
        self.client.shell_channel.send(message)
        return message_id

    def wait(self, message_id: str, timeout: float = 120) -> Ran:
        """Collect everything of a cell until the kernel is idle again."""
        deadline = time.monotonic() + timeout
        ran = self._cells[message_id]
        while not ran.finished:
            self._take(deadline)
        ran.reply = self._reply(message_id, deadline)
        ran.status, ran.payload = ran.reply["status"], ran.reply.get("payload", [])
        del self._cells[message_id]
        return ran

    def run(self, code: str, timeout: float = 120, cell_id: str | None = None) -> Ran:
        """Run a cell to its end."""
        ran = self.wait(self.send(code, cell_id), timeout)
        while ran.status == "aborted":
            # ipykernel drops what arrives in the moment after a cell that failed, and runs nothing of it.
            ran = self.wait(self.send(code, cell_id), timeout)
        return ran

    def ok(self, code: str, timeout: float = 120, cell_id: str | None = None) -> Ran:
        """Run a cell that must not fail."""
        ran = self.run(code, timeout, cell_id)
        assert ran.status == "ok", f"{ran.ename}: {ran.error}\n{ran.text}"
        return ran

    def value(self, expression: str) -> Any:
        """Evaluate an expression whose repr is a Python literal."""
        outputs = self.ok(f"print(repr({expression}))").outputs
        return ast.literal_eval("".join(o["text"] for o in outputs if o["name"] == "stdout"))

    def wait_for_output(self, message_id: str, word: str = "", timeout: float = 60) -> float:
        """Wait until a running cell shows something with `word` in it; returns the time of that."""
        deadline = time.monotonic() + timeout
        ran = self._cells[message_id]
        seen = 0
        while True:
            for when, _kind, text in ran.arrivals[seen:]:
                if word in text:
                    return when
            seen = len(ran.arrivals)
            assert not ran.finished, f"the cell ended without showing {word!r}: {ran.text}"
            self._take(deadline)

    def wait_for_announcement(self, message_id: str, timeout: float = 60) -> float:
        """Wait for `tests.interrupt_points.announce` in a running cell; returns the time of that."""
        file = Path(self.process.environ()["IPYTHONDIR"], message_id)
        until(file.exists, "nothing was announced", within=timeout)
        return time.monotonic()

    def receive(self, seconds: float = 0.5) -> None:
        """Receive what is shown within some seconds, also under cells that have ended."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                self._sort(self.client.get_iopub_msg(timeout=left))

    def state(self, message_id: str) -> Ran:
        """Return what has come of a cell until now."""
        return self._cells[message_id]

    def interrupt(self) -> None:
        """Press ■."""
        self.manager.interrupt_kernel()

    def release(self) -> None:
        """Let the kernel call what `tests.scripted.at_release` was given, also while a cell runs."""
        self.process.send_signal(signal.SIGUSR2)

    def complete(self, code: str) -> list[str]:
        """Press Tab at the end of `code`; returns the whole words that are offered."""
        content = self._reply(self.client.complete(code), time.monotonic() + 30)
        start = content["cursor_start"]
        assert content["cursor_end"] == len(code) or not content["matches"]
        typed = code[:start].rpartition(" ")[2]
        return [typed + match for match in content["matches"]]

    def completed(self, code: str) -> list[str]:
        """Press Tab at the | in `code`; returns what it reads with each of the choices."""
        before, _, after = code.partition("|")
        reply = self.client.complete(before + after, len(before))
        content = self._reply(reply, time.monotonic() + 30)
        start, end = content["cursor_start"], content["cursor_end"]
        return [f"{before[:start]}{m}{(before + after)[end:]}" for m in content["matches"]]

    def help(self, name: str) -> str:
        """Return what ``NAME?`` opens, as plain text."""
        page = self.ok(f"{name}?").payload[0]
        assert page["source"] == "page"
        return str(page["data"]["text/plain"])

    def threads(self) -> list[str]:
        """Return the names of the Python threads."""
        names: list[str] = self.value("[t.name for t in __import__('threading').enumerate()]")
        return sorted(names)

    def _take(self, deadline: float) -> None:
        """Receive one message of the kernel's broadcast, and add it to the cell it belongs to."""
        message: dict[str, Any] | None = None
        while message is None:
            assert self.manager.is_alive(), "the kernel died"
            if time.monotonic() > deadline:
                raise AssertionError(f"the cell did not end in time\n{self._stacks()}")
            with contextlib.suppress(queue.Empty):
                message = self.client.get_iopub_msg(timeout=1)
            if message is None and self._misses_messages:
                self._connect_again()
        self._sort(message)

    def _connect_again(self) -> None:
        """Let the kernel read what its shell socket has: a new connection wakes it, another message does not.

        ipykernel 7.3 loses the event of a message that comes while a reply is sent.
        """
        other = self.manager.blocking_client()
        other.start_channels(shell=True, iopub=False, stdin=False, hb=False, control=False)
        time.sleep(0.2)
        other.stop_channels()

    def _sort(self, message: dict[str, Any]) -> None:
        ran = self._cells.get(message["parent_header"].get("msg_id", ""))
        if ran is not None:
            ran.messages += 1
            ran.bytes += self._size(message)
        if message["msg_type"] == "update_display_data":
            self._update(ran, message["content"])
        elif ran is not None:
            self._collect(ran, message)

    def _size(self, message: dict[str, Any]) -> int:
        parts = ("header", "parent_header", "metadata", "content")
        return sum(len(self.client.session.pack(message[part])) for part in parts)

    def _reply(self, message_id: str, deadline: float) -> dict[str, Any]:
        while True:
            assert time.monotonic() < deadline, f"there is no reply\n{self._stacks()}"
            try:
                message = self.client.get_shell_msg(timeout=1)
            except queue.Empty:
                if self._misses_messages:
                    self._connect_again()
                continue
            if message["parent_header"].get("msg_id") == message_id:
                content: dict[str, Any] = message["content"]
                return content

    def _collect(self, ran: Ran, message: dict[str, Any]) -> None:
        kind, content = message["msg_type"], message["content"]
        shown = ""
        if kind == "status" and content["execution_state"] == "idle":
            ran.finished = time.monotonic()
        elif kind == "stream":
            shown = content["text"]
            ran.outputs.append({"type": "stream", "name": content["name"], "text": shown})
        elif kind in {"display_data", "execute_result"}:
            shown = _plain_text(content["data"])
            output = {"type": kind, "data": content["data"]}
            ran.outputs.append(output)
            if display_id := content.get("transient", {}).get("display_id"):
                self._displays[display_id] = output
        elif kind == "error":
            ran.ename, ran.error = content["ename"], content["evalue"]
            ran.traceback = content["traceback"]
            shown = "\n".join(ran.traceback)
            ran.outputs.append({"type": "stream", "name": "error", "text": shown})
        if shown:
            ran.arrivals.append((time.monotonic(), kind, shown))

    def _update(self, ran: Ran | None, content: dict[str, Any]) -> None:
        """Replace an output by its display id, as frontends do, for any cell."""
        self._displays[content["transient"]["display_id"]]["data"] = content["data"]
        if ran is not None:
            ran.updates += 1
            shown = _plain_text(content["data"])
            ran.arrivals.append((time.monotonic(), "update_display_data", shown))

    def _stacks(self) -> str:
        """Return where all threads of the kernel are, by the signal that `_STARTUP` listens to."""
        self.process.send_signal(signal.SIGUSR1)
        time.sleep(1)
        return Path(self.process.environ()["IPYTHONDIR"], "stacks").read_text("utf-8")

    def close(self) -> None:
        """Shut the kernel down as a frontend does."""
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=False)


def _plain_text(data: dict[str, str]) -> str:
    """Return an output as text; an answer that is being written comes as HTML alone."""
    if "text/plain" in data:
        return data["text/plain"]
    return html.unescape(re.sub(r"<[^>]*>", "", data.get("text/html", "")))


@contextlib.contextmanager
def kernel(
    ipykernel: str | None = None,
    cwd: Path | None = None,
    packages: Path | None = None,
    **environment: str,
) -> Iterator[Kernel]:
    """Start a kernel with extra environment; `packages` is a folder with more installed packages."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_SETTINGS) or name == "LLM_MAGIC_CACHE_DIR"
    }
    with tempfile.TemporaryDirectory(prefix="llm_magic-kernel-") as folder:
        env = {**inherited, **_ENVIRONMENT, "IPYTHONDIR": folder, **environment}
        startup = Path(folder, "profile_default", "startup")
        startup.mkdir(parents=True)
        (startup / "stacks.py").write_text(_STARTUP)
        # This checkout is what is tested, whatever is installed. Other versions of its requirements
        # come from the PYTHONPATH of scripts/test-versions.
        paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        if packages is not None:
            paths.append(str(packages))
        if ipykernel:
            other = OTHER_KERNELS / ipykernel
            assert other.is_dir(), f"{other} is missing: type scripts/install-kernels"
            paths.insert(0, str(other))
        env["PYTHONPATH"] = os.pathsep.join(paths)
        # Sockets in files: ports are chosen before they are taken, and two runs may choose the same.
        manager = KernelManager(transport="ipc", connection_file=f"{folder}/kernel.json")
        manager.start_kernel(env=env, cwd=str(cwd or folder))
        # https://github.com/ipython/ipykernel/pull/1529: sending a reply loses the wake-up for a message
        # that arrives at that moment.
        running = Kernel(manager, misses_messages=(ipykernel or "").startswith("7.3"))
        try:
            yield running
        finally:
            running.close()
