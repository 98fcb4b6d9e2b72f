"""An output of a cell that is updated in place, and the progress of a load, which is shown there.

Only the main thread displays.
"""

from __future__ import annotations

import html
import math
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self

from IPython.core.getipython import get_ipython

from llm_magic.notebook.display.tables import MATH, NO_MATH, escaped
from llm_magic.text import visible
from llm_magic.types import Progress

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from llm_magic.session.jobs import Job

# A frontend redraws a whole output at each update: at most 20 updates a second, and fewer where one is
# slow in the kernel (two blocking flushes), takes the GIL from the model, or is large for the page or
# the network. Separate outputs for finished parts would avoid that, but only `clear_output` removes
# outputs, and it removes everything else that the cell has shown.
PERIOD_S = 0.05
_SHARE_OF_TIME = 0.1
# Of the CPU time of the main thread. The thread of ipykernel that sends needs half as much again, and the
# model waits for both, and again for what they leave of its caches.
_SHARE_OF_CPU = 0.004
_LONGEST_FOR_MODEL_S = 0.25  # longer waits save nothing: the cost of new text stays the same
_BYTES_PER_S = 150_000  # about a third of the time of a browser, as measured
# A browser needs as long to typeset a formula as for this much other HTML (measured: 2 ms each).
_FORMULA_BYTES = 1000
_CLEAR_LINE = "\r\x1b[K"  # of a terminal
# JupyterLab removes styles with var() from the outputs of a notebook that it does not trust yet.
MUTED = "opacity: 0.7; font-size: 0.85em;"


class LiveArea:
    """An output with a display id, which is shown once and then updated."""

    only_text = False

    def __init__(self, *, live: bool) -> None:
        """With `live` false, only the end is to be shown."""
        self.live = live
        self.is_shown = False
        # Whether more follows: then its id is saved with it, so that a page that is loaded again, which
        # has the saved outputs and no ids, can go on with its updates.
        self._is_open = False
        self._bundle: dict[str, str] = {}
        self.display_id = uuid.uuid4().hex
        self._next = 0.0 if live else math.inf
        self._cost = 0.0

    @property
    def wait(self) -> float:
        """The seconds until the next update is due."""
        return self._next - time.monotonic()

    def show(self, plain: str, page: str, *, more: bool = False) -> None:
        """Display text and HTML, or replace what is displayed; the same again sends nothing.

        `more` follows where this is not the end.
        """
        bundle = mime_bundle(plain, page)
        if (bundle, more) != (self._bundle, self._is_open):
            self.draw(lambda: bundle, more=more)

    def send_again(self) -> None:
        """Send what is displayed once more, from the cell that runs now."""
        self._publish(self._bundle, {"display_id": self.display_id, "update": True})

    def clear(self) -> None:
        """Replace what is displayed, if anything, with nothing."""
        if self.is_shown:
            self.show("", "")

    def draw(self, make: Callable[[], dict[str, str]], *, more: bool = True) -> None:
        """Display the bundle of `make`; the next update waits in proportion to the cost of this one.

        `more` follows where this is not the end.
        """
        self._is_open = more
        began, cpu = time.monotonic(), time.thread_time()
        bundle = self._bundle = make()
        options = {"display_id": self.display_id, "update": self.is_shown} if self.live else {}
        self._publish(bundle, options)
        self.is_shown = True
        now = time.monotonic()
        for_model = min((time.thread_time() - cpu) / _SHARE_OF_CPU, _LONGEST_FOR_MODEL_S)
        cost = max((now - began) / _SHARE_OF_TIME, for_model)
        # The smaller of the last two: imports make the first update, or the first code block, slow.
        lasting, self._cost = min(cost, self._cost), cost
        page = bundle["text/html"]
        size = len(page.encode()) + page.count(MATH) * _FORMULA_BYTES
        if self.live:
            self._next = now + max(PERIOD_S, lasting, size / _BYTES_PER_S)

    def _publish(self, bundle: dict[str, str], options: dict[str, Any]) -> None:
        from IPython.display import display

        display(bundle, raw=True, metadata=self._metadata, **options)  # type: ignore[no-untyped-call]

    @property
    def _metadata(self) -> dict[str, Any]:
        """What is saved beside the output; the extension of JupyterLab reads it."""
        is_continued = self.live and self._is_open
        return {"llm_magic": {"display_id": self.display_id}} if is_continued else {}


def mime_bundle(plain: str, page: str) -> dict[str, str]:
    """Return text, without control characters that a terminal executes, and HTML as a MIME bundle."""
    return {"text/plain": visible(plain), "text/html": page}


def write(text: str) -> None:
    """Write text to stdout without control characters that a terminal executes."""
    sys.stdout.write(visible(text))


class TerminalLine:
    """A line of a terminal that is replaced; does nothing where stdout is no terminal."""

    def __init__(self) -> None:
        self._text = ""

    def show(self, text: str) -> None:
        """Show a text in the line."""
        if text == self._text or not sys.stdout.isatty():
            return
        self._text = text
        columns = shutil.get_terminal_size().columns
        sys.stdout.write(f"{_CLEAR_LINE}{visible(text)[: columns - 1]}")
        sys.stdout.flush()

    def clear(self) -> None:
        """Remove the line, so that the next text starts there."""
        if self._text:
            self._text = ""
            sys.stdout.write(_CLEAR_LINE)


def dimmed(text: str) -> str:
    """Return a line for stdout: dimmed in a terminal, without control characters that it executes."""
    text, shell = visible(text), get_ipython()
    has_colors = shell is None or shell.colors.lower() != "nocolor"
    return f"\x1b[2m{text}\x1b[22m" if has_colors and sys.stdout.isatty() else text


def is_notebook(shell: InteractiveShell) -> bool:
    """Return whether the shell runs in a kernel, whose frontends show HTML."""
    return getattr(shell, "kernel", None) is not None


def muted(text: str) -> str:
    """Return one small gray line of HTML, which breaks no option."""
    style = f"{MUTED} margin-top: 0.4em;"
    return f'<div class="{NO_MATH}" style="{style}">{escaped(text)}</div>'


def noticed(*lines: str) -> str:
    """Return lines of HTML that a reader must not miss, in the colors of any theme."""
    style = "margin-top: 0.6em; padding: 0.1em 0.6em; border-left: 4px solid #d9822b;"
    text = "<br>".join(html.escape(visible(line)) for line in lines)
    return f'<div class="{NO_MATH}" style="{style}">{text}</div>'


def progress_html(text: str, share: float | None, style: str = "") -> str:
    """Return a progress bar with a line of text beside it; None where the share is unknown."""
    value = "" if share is None else f' value="{share:.3f}"'
    label = html.escape(visible(text))
    bar = (
        f'<progress max="1"{value} aria-label="{label}"'
        ' style="width: 16em; vertical-align: middle; margin-right: 0.8em"></progress>'
    )
    return f'<div class="{NO_MATH}" style="{style}">{bar}{label}</div>'


class JobsView:
    """Shows the jobs that a cell waits for, in a line that is updated.

    The end of its ``with`` block clears what must not stay.
    """

    def __init__(self, area: LiveArea, jobs: Sequence[Job], hint: str = "") -> None:
        self._area, self._jobs, self._hint = area, jobs, hint
        self._began = time.monotonic()
        self._line = TerminalLine()

    def draw(self) -> None:
        """Show the first job that runs; called about ten times a second."""
        from llm_magic.notebook.display.messages import waiting_line

        text = waiting_line(self._jobs, time.monotonic() - self._began)
        if not text:
            return
        self._line.show(text)
        if self._area.wait <= 0:
            self._area.show(f"{text}{self._hint}", muted(f"{text}{self._hint}"), more=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        """Remove the line in a terminal, which the next output would continue, and at an error all."""
        self._line.clear()
        if error is not None:
            # Or a saved notebook shows a wait that never ends.
            self._area.clear()


class LoadView:
    """Shows the progress of a load: a bar in a notebook, a line in a terminal; elsewhere the result.

    The end of its ``with`` block clears what must not stay.
    """

    def __init__(self, shell: InteractiveShell, area: LiveArea) -> None:
        self._is_notebook = is_notebook(shell)
        self._area = area
        self._began = time.monotonic()
        self._line = TerminalLine()
        self._has_line = False

    def waiting(self, model: str, progress: Progress | None) -> None:
        """Show that a cell waits for a load: a bar in a notebook, elsewhere one line."""
        if self._is_notebook or sys.stdout.isatty():
            self.progress(model, progress or Progress("waiting"))
        elif not self._has_line:
            self._has_line = True
            sys.stdout.write(f"Loading {model} …\n")
            sys.stdout.flush()

    def progress(self, model: str, progress: Progress | None) -> None:
        """Show the stage of a load; called about ten times a second."""
        if progress is None:
            return
        waited = time.monotonic() - self._began
        detail = f" ({progress.detail})" if progress.detail else ""
        text = visible(f"Loading {model}: {progress.stage}{detail} … {waited:.0f} s")
        if not self._is_notebook:
            self._line.show(text)
        elif self._area.wait <= 0:
            self._area.show(text, progress_html(text, progress.share), more=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        """Remove the line in a terminal, which the next output would continue, and at an error the bar."""
        self._line.clear()
        if error is not None:
            # Or a saved notebook shows a load that never ends.
            self._area.clear()

    def finish(self, lines: list[str], *, more: bool = False) -> None:
        """Replace the bar with the result, or with what is shown until `more` follows."""
        if not self._is_notebook:
            write("\n".join(lines) + "\n")
            return
        first, *others = map(visible, lines)
        body = f'<div class="{NO_MATH}">{html.escape(first)}</div>' + "".join(map(muted, others))
        self._area.show("\n".join(lines), body, more=more)
