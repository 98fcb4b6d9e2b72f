"""Jobs on the screen: an answer streams into the cell that began it while other cells run.

Here, and nowhere else, another thread than the main one displays. The alternatives were measured on
ipykernel 6.31, 7.3 and 7.4, with a cell that blocks and one under ``%%capture`` run after it: callbacks
on the kernel's own loop draw nothing until both have ended, and on 6.31 under the wrong cell;
``display()`` from a thread is captured by the second. A message that carries the header of the cell
that began the job, sent through the kernel's own IOPub thread (which takes messages from any
thread), is drawn at once and under the right cell everywhere.
"""

from __future__ import annotations

import asyncio
import html
import queue
import threading
import time
from typing import TYPE_CHECKING, Any, cast

from llm_magic.notebook.display.answer_view import RichView, view
from llm_magic.notebook.display.live_output import LiveArea, LoadView, displayed, is_notebook
from llm_magic.notebook.display.messages import error_line
from llm_magic.notebook.display.tables import NO_MATH
from llm_magic.notebook.frontend import running_cell
from llm_magic.session.thread_bridge import Backlog
from llm_magic.types import Chunk

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from llm_magic.session.jobs import Job
    from llm_magic.types import ModelInfo

# How often a job that says nothing shows that it is at work.
_TICK_S = 0.5
# Where answers are shown once, the cell has ended by then: it is never shown in the cell itself on
# a fast machine and after it on a slow one.
_AFTER_CELL_S = 0.3
_CLOSE_S = 1.0
# How often a paused answer checks whether its backlog was displayed.
_FULL_S = 0.02


class CellArea(LiveArea):
    """A place under the cell that runs now, in which any thread may show something later."""

    def __init__(self, shell: InteractiveShell, *, live: bool, plain: bool) -> None:
        super().__init__(live=live)
        self._publisher = cast(Any, shell.display_pub)
        self._parent = dict(self._publisher.parent_header)
        self.only_text = plain
        self.trouble = ""

    def _publish(self, bundle: dict[str, str], options: dict[str, Any]) -> None:
        if self.trouble:
            text = f"{bundle['text/plain']}\n\n{self.trouble}".strip()
            page = bundle["text/html"] + _alarm(self.trouble)
            bundle = displayed({"text/plain": text, "text/html": page})
        if self.only_text:
            bundle = {"text/plain": bundle["text/plain"]}
        if threading.current_thread() is threading.main_thread():
            super()._publish(bundle, options)
            return
        kind = "update_display_data" if options.get("update") else "display_data"
        transient = {"display_id": options["display_id"]} if options else {}
        self._publisher.session.send(
            self._publisher.pub_socket,
            kind,
            {"data": bundle, "metadata": {}, "transient": transient},
            parent=self._parent,
            ident=self._publisher.topic,
        )


class JobScreen:
    """Shows one job under its cell; where there is none, only when somebody waits for it."""

    def __init__(
        self, shell: InteractiveShell, info: ModelInfo, values: dict[str, Any], live: bool
    ) -> None:
        self._shell, self._info, self._values, self._live = shell, info, values, live
        cell = running_cell(shell)
        self.cell_id = cell.id if cell is not None else ""
        self.run_id = cell.run if cell is not None else ""
        self._inbox: queue.SimpleQueue[Chunk | None] = queue.SimpleQueue()
        self._backlog = Backlog()
        self._thread: threading.Thread | None = None
        self._began = time.monotonic()
        self._area: CellArea | None = None
        # A publisher that captures has no way to a cell.
        if is_notebook(shell) and hasattr(shell.display_pub, "pub_socket"):
            self._area = CellArea(shell, live=live, plain=values["plain"])
            self._view = self._cell_view(self._area)

    def _cell_view(self, area: CellArea) -> RichView:
        form, info = self._values["format"] or "markdown", self._info
        footer = not self._values["quiet"]
        return RichView(info.name, info.local_size, form=form, show_footer=footer, area=area)

    def replaces(self, job: Job) -> bool:
        """Return whether a job was begun by this cell when it ran before: its output is gone."""
        other = job.screen
        return (
            isinstance(other, JobScreen)
            and bool(self.cell_id)
            and (other.cell_id, other.run_id == self.run_id) == (self.cell_id, False)
        )

    def begins(self, job: Job, notes: tuple[str, ...] = ()) -> None:
        """Show the job from now on; called in its cell."""
        if self._area is None:
            line = f"Job {job.id} · {job.model} · %llm_wait {job.id} shows its answer."
            LoadView(self._shell, live=False).finish([*notes, line])
            return
        self._view.note(notes)
        assert job.future is not None
        self._view.take(Chunk(notice=f"job {job.id}"))
        self._view.tick()
        job.future.add_done_callback(lambda _future: self._inbox.put(None))
        self._thread = threading.Thread(
            target=self._show, args=(job, self._area), name=f"llm_magic-job-{job.id}", daemon=True
        )
        self._thread.start()

    async def take(self, chunk: Chunk) -> None:
        """Take the next chunk, which another thread displays; waits while too many are unread."""
        if self._area is None:
            return
        self._inbox.put(chunk)
        if self._backlog.is_full(self._inbox.qsize(), chunk):
            while self._thread is not None and self._thread.is_alive():
                if self._inbox.empty():
                    break
                await asyncio.sleep(_FULL_S)

    def _show(self, job: Job, area: CellArea) -> None:
        while True:
            try:
                chunk = self._inbox.get(timeout=_TICK_S)
            except queue.Empty:
                self._view.tick()
                continue
            if chunk is None:
                break
            self._view.take(chunk)
            self._view.tick()
        if not self._live:
            time.sleep(max(0.0, self._began + _AFTER_CELL_S - time.monotonic()))
        self._finish(job, area)

    def _finish(self, job: Job, area: CellArea) -> None:
        assert job.reply is not None
        area.trouble = error_line(job.error) if job.error is not None else ""
        if area.trouble and not job.reply.text.strip():
            area.show({"text/plain": "", "text/html": ""})
        else:
            self._view.finish(job.reply)

    def again(self, job: Job) -> None:
        """Show how the job ended: under its own cell, where that can be drawn over; else here.

        nbclient drops what comes for a cell that has ended, but an update that the running cell
        sends reaches the other one's output.
        """
        self.close()
        if self._live and self._area is not None:
            self._finish(job, self._area)
        elif job.reply is not None and job.reply.text:
            here = view(self._shell, self._info, self._values, self._live)
            here.take(Chunk(text=job.reply.text, reasoning=job.reply.reasoning))
            here.finish(job.reply)

    def close(self) -> None:
        """Wait until the end of the job has been shown."""
        if self._thread is not None:
            self._thread.join(timeout=_CLOSE_S)


def _alarm(text: str) -> str:
    """Return one line of HTML that says what went wrong."""
    style = "color: var(--jp-error-color1, #d32f2f);"
    return f'<div class="{NO_MATH}" style="{style}">{html.escape(text)}</div>'
