"""Output of background responses: each streams into the cell that started it while others run.

Only here does another thread than the main one display. These alternatives were measured on ipykernel
6.31, 7.3 and 7.4, with a cell that blocks and then one under ``%%capture``: callbacks on the kernel's
loop draw nothing until both have ended, and on 6.31 under the wrong cell; the second cell captures the
``display()`` of a thread. A message with the header of the first cell, sent through the kernel's IOPub
thread, which accepts messages from any thread, is drawn at once and under the right cell everywhere.
"""

from __future__ import annotations

import html
import threading
import time
from typing import TYPE_CHECKING, Any, cast

from llm_magic.notebook.display.answer_view import RichView, view, write_notes
from llm_magic.notebook.display.live_output import LiveArea, LoadView, is_notebook, mime_bundle
from llm_magic.notebook.display.messages import error_line
from llm_magic.notebook.display.tables import NO_MATH
from llm_magic.notebook.frontend import running_cell

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from llm_magic.session.response import Response

# An answer that is shown only once is not shown before its cell has ended, so that saved notebooks do
# not depend on the speed of the machine.
_AFTER_CELL_S = 0.3
_CLOSE_S = 1.0
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
            {"data": bundle, "metadata": {}, "transient": transient},
            parent=self._parent,
            ident=self._publisher.topic,
        )


class BackgroundOutput:
    """Shows a background response under its cell or, if that is impossible, under ``%llm_wait``."""

    def __init__(
        self, shell: InteractiveShell, response: Response, values: dict[str, Any], live: bool
    ) -> None:
        self._shell, self._response, self._values, self._live = shell, response, values, live
        cell = running_cell(shell)
        self.cell_id = cell.id if cell is not None else ""
        self.run_id = cell.run if cell is not None else ""
        self._thread: threading.Thread | None = None
        self._began = time.monotonic()
        self._area: CellArea | None = None
        # A publisher that captures cannot send to a cell.
        if is_notebook(shell) and hasattr(shell.display_pub, "pub_socket"):
            self._area = CellArea(shell, live=live, plain=values["plain"])
            self._view = RichView(
                response,
                form=values["format"] or "markdown",
                show_footer=not values["quiet"],
                area=self._area,
                label=f"job {response.number}",
            )

    def replaces(self, job: Response) -> bool:
        """Return whether an earlier run of this cell started a job, whose output is removed now."""
        other = job.view
        return (
            isinstance(other, BackgroundOutput)
            and bool(self.cell_id)
            and (other.cell_id, other.run_id == self.run_id) == (self.cell_id, False)
        )

    def start(self, notes: tuple[str, ...] = ()) -> None:
        """Show the response from now on; called in its cell."""
        number, model = self._response.number, self._response.model
        if self._area is None:
            line = f"Job {number} · {model} · %llm_wait {number} shows its answer."
            LoadView(self._shell, LiveArea(live=False)).finish([*notes, line])
            return
        write_notes(notes)
        self._view.draw()
        self._thread = threading.Thread(
            target=self._run, args=(self._area,), name=f"llm_magic-job-{number}", daemon=True
        )
        self._thread.start()

    def _run(self, area: CellArea) -> None:
        for _ in self._response.updates(self._view.pause):
            self._view.draw()
        if not self._live:
            time.sleep(max(0.0, self._began + _AFTER_CELL_S - time.monotonic()))
        self._finish(area)

    def _finish(self, area: CellArea) -> None:
        response = self._response
        area.error_text = error_line(response.error) if response.error is not None else ""
        if area.error_text and not response.text.strip():
            area.show("", "")
        else:
            self._view.finish()

    def show_again(self) -> None:
        """Show how the response ended: under its own cell if that output can be updated, else here.

        nbclient drops messages for a cell that has ended, but an update from the running cell reaches
        the output of the other one.
        """
        self.close()
        if self._live and self._area is not None:
            self._area.send_again()
        elif self._response.text:
            area = LiveArea(live=self._live)
            view(self._shell, self._response, self._values, area).finish()

    def close(self) -> None:
        """Wait until the end of the response has been shown."""
        if self._thread is not None:
            self._thread.join(timeout=_CLOSE_S)
