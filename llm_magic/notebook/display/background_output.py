"""Output of background jobs: each streams into the cell that started it while others run.

Only here does another thread than the main one display. These alternatives were measured on ipykernel
6.31, 7.3 and 7.4, with a cell that blocks and then one under ``%%capture``: callbacks on the kernel's
loop draw nothing until both have ended, and on 6.31 under the wrong cell; the second cell captures the
``display()`` of a thread. A message with the header of the first cell, sent through the kernel's IOPub
thread, which accepts messages from any thread, is drawn at once and under the right cell everywhere.
"""

from __future__ import annotations

import functools
import html
import threading
import time
from typing import TYPE_CHECKING, Any, cast

from llm_magic.notebook.display.answer_view import PlainView, RichView, form_of, show_notes, view
from llm_magic.notebook.display.live_output import (
    LiveArea,
    LoadView,
    is_notebook,
    mime_bundle,
    write,
)
from llm_magic.notebook.display.map_view import MapView
from llm_magic.notebook.display.messages import error_line, loading_line, ready_lines
from llm_magic.notebook.display.tables import NO_MATH
from llm_magic.notebook.frontend import running_cell
from llm_magic.session.response import Response

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from IPython.core.interactiveshell import ExecutionResult, InteractiveShell

    from llm_magic.backends.manager import LoadResult
    from llm_magic.session import Session
    from llm_magic.session.jobs import Job

# An answer that is shown only once is not shown before its cell has ended, so that saved notebooks do
# not depend on the speed of the machine.
_AFTER_CELL_S = 0.3
# Until the thread that draws a job has drawn its end. It takes milliseconds, but on a busy machine the
# first drawing imports for seconds, and nbclient would save the output without the end.
_CLOSE_S = 15.0
_ERROR = "color: var(--jp-error-color1, #d32f2f);"


class CellArea(LiveArea):
    """An area under the cell that runs now, which any thread may update later."""

    def __init__(self, shell: InteractiveShell, *, live: bool, plain: bool) -> None:
        super().__init__(live=live)
        self._publisher = cast(Any, shell.display_pub)
        self._parent = dict(self._publisher.parent_header)
        self.only_text = plain
        self.error_text = ""

    def _publish(self, bundle: dict[str, str], options: dict[str, Any]) -> None:
        if self.error_text:
            text = f"{bundle['text/plain']}\n\n{self.error_text}".strip()
            line = f'<div class="{NO_MATH}" style="{_ERROR}">{html.escape(self.error_text)}</div>'
            bundle = mime_bundle(text, bundle["text/html"] + line)
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
            {"data": bundle, "metadata": self._metadata, "transient": transient},
            parent=self._parent,
            ident=self._publisher.topic,
        )


def can_update_later(shell: InteractiveShell) -> bool:
    """Return whether an output of the running cell can be updated when the cell has ended."""
    # A publisher that captures cannot send to a cell.
    return is_notebook(shell) and hasattr(shell.display_pub, "pub_socket")


class BackgroundOutput:
    """Shows a background job under its cell or, if that is impossible, under ``%llm_wait``."""

    def __init__(
        self, shell: InteractiveShell, job: Job, values: dict[str, Any], live: bool
    ) -> None:
        self._shell, self.job, self._values, self._live = shell, job, values, live
        cell = running_cell(shell)
        # Since IPython 9, `execution_count` is the number of the next cell.
        self.origin = f"cell [{len(shell.user_ns['In']) - 1}]"
        self.cell_id = cell.id if cell is not None else ""
        self.run_id = cell.run if cell is not None else ""
        self._thread: threading.Thread | None = None
        self._began = time.monotonic()
        self.area: CellArea | None = None
        if can_update_later(shell):
            self.area = CellArea(shell, live=live, plain=values["plain"])
            self.view = self._view(self.area, f"job {job.number}")

    def _view(self, area: LiveArea, label: str = "") -> PlainView | RichView | MapView:
        """Return the view of the job in an output: with its `label` if that is updated later."""
        job, values = self.job, self._values
        show_footer = not values["quiet"]
        if not isinstance(job, Response):
            is_page = bool(label) or (is_notebook(self._shell) and not values["plain"])
            stored_in = self._stored_in
            return MapView(
                job,
                area if is_page else None,
                show_footer=show_footer,
                stored_in=stored_in,
                label=label,
            )
        if not label:
            return view(self._shell, job, values, area)
        form = form_of(job, values)
        return RichView(job, form=form, show_footer=show_footer, area=area, label=label)

    @property
    def _stored_in(self) -> str:
        """The expression for the answers of a map."""
        name = self._values["output"] or f'llm.jobs.find("{self.job.number}")'
        return f"{name}.{'mapped' if self.job.state in {'failed', 'stopped'} else 'result()'}"

    def _map_lines(self) -> list[str]:
        """Return where the answers of a map are."""
        job = self.job
        if isinstance(job, Response):
            return []
        return [f"{self._stored_in}: {job.mapped.amount}"]

    def _finish_view(self, view: PlainView | RichView | MapView) -> None:
        if isinstance(view, MapView):
            view.finish(self._map_lines())
        else:
            view.finish()

    def replaces(self, job: Job) -> bool:
        """Return whether an earlier run of this cell started a job, whose output is removed now."""
        other = job.view
        return (
            isinstance(other, BackgroundOutput)
            and bool(self.cell_id)
            and (other.cell_id, other.run_id == self.run_id) == (self.cell_id, False)
        )

    def start(self, notes: tuple[str, ...] = ()) -> None:
        """Show the job from now on; called in its cell."""
        number, model = self.job.number, self.job.model
        if self.area is None:
            line = f"Job {number} · {model} · %llm_wait {number} shows its answer."
            LoadView(self._shell, LiveArea(live=False)).finish([*notes, line])
            _show_with_next_cell(
                self._shell, lambda: self.job.done, lambda _failed: self._end_lines()
            )
            return
        show_notes(self._shell, notes, plain=bool(self._values["plain"]))
        self.view.draw()
        self._thread = threading.Thread(
            target=self._run, args=(self.area,), name=f"llm_magic-job-{number}", daemon=True
        )
        self._thread.start()

    def _end_lines(self) -> list[str]:
        """Return how the job ended, unless a cell has shown that."""
        job = self.job
        if job.is_awaited or job.state == "stopped":
            return []
        name = f"Job {job.number} · {job.model}"
        if job.failure:
            return [f"{name} · failed: {job.failure}"]
        shows = " · ".join([*self._map_lines(), f"%llm_wait {job.number} shows its answer."])
        return [f"{name} · {job.state} · {shows}"]

    @property
    def is_shown(self) -> bool:
        """Whether the end of the job is shown in its cell."""
        return self._thread is not None and not self._thread.is_alive()

    def _run(self, area: CellArea) -> None:
        job, pause = self.job, self.view.pause
        for _ in job.updates(pause) if isinstance(job, Response) else job.until_end(pause):
            self.view.draw()
        if not self._live:
            time.sleep(max(0.0, self._began + _AFTER_CELL_S - time.monotonic()))
        self._finish(area)

    def _finish(self, area: CellArea) -> None:
        job = self.job
        area.error_text = error_line(job.error) if job.error is not None else ""
        if area.error_text and isinstance(job, Response) and not job.text.strip():
            area.show("", "")
        else:
            self._finish_view(self.view)

    def update(self) -> bool:
        """Send how the job ended to its own cell once more; returns False where that is impossible.

        nbclient drops messages for a cell that has ended, but an update from the running cell reaches
        the output of the other one.
        """
        self.close()
        if not self._live or self.area is None:
            return False
        self.area.send_again()
        return True

    def show_again(self, heading: str = "") -> None:
        """Show how the job ended: under its own cell if that output can be updated, else here.

        Here, the heading is above it: the answers of other jobs are beside it.
        """
        if not self.update() and (not isinstance(self.job, Response) or self.job.text):
            if heading:
                LiveArea(live=False).show(heading, f"<b>{heading}</b>")
            self._finish_view(self._view(LiveArea(live=self._live)))

    def close(self) -> None:
        """Wait until the end of the job has been shown."""
        if self._thread is not None:
            self._thread.join(timeout=_CLOSE_S)


def show_load(
    shell: InteractiveShell, session: Session, model: str, future: Future[LoadResult]
) -> LiveArea:
    """Show that a load runs in the background, and replace that with how it ends; returns the output.

    Where answers are shown only once, the end is shown below it; in a terminal, with the next cell.
    """
    is_live, in_place = session.settings.stream == "on", can_update_later(shell)
    area = CellArea(shell, live=is_live, plain=False) if in_place else LiveArea(live=False)
    view = LoadView(shell, area)
    view.finish([loading_line(model)], more=True)
    load_end = functools.partial(_load_end, session, model, future)
    if not isinstance(area, CellArea):

        def unseen(failed: str) -> list[str]:
            """Return the end, unless %llm_stop has shown it, or an error that a cell `failed` with."""
            lines, error = load_end()
            return [] if future.cancelled() else lines or [error] * (error != failed)

        _show_with_next_cell(shell, future.done, unseen)
        return area

    is_drawn = threading.Event()

    def finish(*_: object) -> None:
        lines, area.error_text = load_end()
        if lines:
            view.finish(lines)
        else:
            area.show("", "")
        is_drawn.set()

    def send_again(_result: object) -> None:
        """Reach nbclient, which drops messages for a cell that has ended."""
        if future.done():
            shell.events.unregister("post_run_cell", send_again)
            # The thread that ended the load may still draw that.
            is_drawn.wait(_CLOSE_S)
            area.send_again()

    if is_live:
        future.add_done_callback(finish)
        shell.events.register("post_run_cell", send_again)
    else:
        future.add_done_callback(lambda _: threading.Timer(_AFTER_CELL_S, finish).start())
    return area


def _load_end(session: Session, model: str, future: Future[LoadResult]) -> tuple[list[str], str]:
    """Return the lines of a load that has ended, or no lines and the error that it failed with."""
    if future.cancelled():
        return [f"Stopped loading {model}."], ""
    if (error := future.exception()) is not None:
        return [], error_line(error)
    return ready_lines(future.result(), session.jobs.running, session.generation.values), ""


def _show_with_next_cell(
    shell: InteractiveShell, is_done: Callable[[], bool], lines: Callable[[str], list[str]]
) -> None:
    """Write lines about what has ended below the output of the next cell, once.

    `lines` gets the error of that cell: it may have shown how it ended.
    """

    def write_lines(cell: ExecutionResult) -> None:
        if not is_done():
            return
        shell.events.unregister("post_run_cell", write_lines)
        error = cell.error_in_exec
        write("".join(f"{line}\n" for line in lines(error_line(error) if error else "")))

    shell.events.register("post_run_cell", write_lines)
