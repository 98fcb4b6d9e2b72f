"""A place in a cell's output that is shown once and then replaced, and the load that is shown there.

Only the main thread displays.
"""

from __future__ import annotations

import html
import sys
import time
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llm_magic.notebook.display.markdown import display_cost
from llm_magic.notebook.display.tables import NO_MATH
from llm_magic.text.terminal import visible
from llm_magic.types import Progress

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

# A frontend draws all of an output again at every update: at most 20 a second; fewer where one takes
# the kernel long (two blocking flushes), would be felt by a model that is bound by the GIL, or is a
# lot for the page or the network. Areas of their own for what is closed would spare the page that,
# but only `clear_output` gets rid of them, and it takes along whatever else a cell has shown.
PERIOD_S = 0.05
_SHARE_OF_TIME = 0.1
_SHARE_OF_CPU = 0.015
_LONGEST_FOR_MODEL_S = 0.25  # new words cost what they cost, however seldom they are drawn
_BYTES_PER_S = 150_000  # a third of the time of a browser, as far as we measured
_MUTED = "color: var(--jp-ui-font-color2, #757575); font-size: 0.85em;"


class LiveArea:
    """One place in the output that is shown once and then replaced, on one display id."""

    only_text = False

    def __init__(self, *, live: bool) -> None:
        self.live = live
        self.is_shown = False
        self._id = uuid.uuid4().hex
        self._next = self._cost = 0.0

    @property
    def due(self) -> bool:
        """Whether enough time has passed for another update."""
        return self.live and self.wait <= 0

    @property
    def wait(self) -> float:
        """How many seconds are left until then."""
        return self._next - time.monotonic()

    def show(self, bundle: dict[str, str]) -> None:
        """Display or replace."""
        self.draw(lambda: bundle)

    def clear(self) -> None:
        """Show nothing any more, where something is shown."""
        if self.is_shown:
            self.show({"text/plain": "", "text/html": ""})

    def draw(self, make: Callable[[], dict[str, str]]) -> None:
        """Make, display or replace; the next update waits in proportion to what this one cost."""
        began, cpu = time.monotonic(), time.thread_time()
        bundle = make()
        self._publish(
            displayed(bundle),
            {"display_id": self._id, "update": self.is_shown} if self.live else {},
        )
        self.is_shown = True
        now = time.monotonic()
        for_model = min((time.thread_time() - cpu) / _SHARE_OF_CPU, _LONGEST_FOR_MODEL_S)
        cost = max((now - began) / _SHARE_OF_TIME, for_model)
        # The smaller of two in a row: what is imported for the first word or the first block of
        # code is no reason to fall asleep.
        lasting, self._cost = min(cost, self._cost), cost
        self._next = now + max(PERIOD_S, lasting, display_cost(bundle["text/html"]) / _BYTES_PER_S)

    def _publish(self, bundle: dict[str, str], options: dict[str, Any]) -> None:
        from IPython.display import display

        display(bundle, raw=True, **options)  # type: ignore[no-untyped-call]


def displayed(bundle: dict[str, str]) -> dict[str, str]:
    """Return a bundle with a text form that a terminal only displays."""
    return {kind: visible(t) if kind == "text/plain" else t for kind, t in bundle.items()}


def write(text: str) -> None:
    """Write text to stdout, in a form that a terminal only displays."""
    sys.stdout.write(visible(text))


def is_notebook(shell: InteractiveShell) -> bool:
    """Return whether a frontend that shows HTML may be listening."""
    return getattr(shell, "kernel", None) is not None


def muted(text: str) -> str:
    """Return one small grey line of HTML."""
    style = f"{_MUTED} margin-top: 0.4em;"
    return f'<div class="{NO_MATH}" style="{style}">{html.escape(visible(text))}</div>'


class LoadView:
    """Shows how far a load is: a bar in a notebook, nothing until the end elsewhere."""

    def __init__(self, shell: InteractiveShell, *, live: bool) -> None:
        self._rich = is_notebook(shell)
        self.area = LiveArea(live=live)
        self._began = time.monotonic()
        self._has_line = False

    def waiting(self, model: str, progress: Progress | None) -> None:
        """Show that a cell waits for a load, as `progress` does; elsewhere in one line."""
        if self._rich:
            self.progress(model, progress or Progress("waiting"))
        elif not self._has_line:
            self._has_line = True
            sys.stdout.write(f"Loading {model} …\n")
            sys.stdout.flush()

    def progress(self, model: str, progress: Progress | None) -> None:
        """Show a stage; called about ten times a second."""
        if not self._rich or progress is None or not self.area.due:
            return
        waited = time.monotonic() - self._began
        detail = f" ({progress.detail})" if progress.detail else ""
        text = visible(f"Loading {model}: {progress.stage}{detail} … {waited:.0f} s")
        share = "" if progress.share is None else f' value="{progress.share:.3f}"'
        bar = (
            f'<progress max="1"{share} aria-label="{html.escape(text)}"'
            ' style="width: 16em; vertical-align: middle; margin-right: 0.8em"></progress>'
        )
        body = f'<div class="{NO_MATH}">{bar}{html.escape(text)}</div>'
        self.area.show({"text/plain": text, "text/html": body})

    def finish(self, lines: list[str]) -> None:
        """Replace the bar with what there is to say."""
        if not self._rich:
            write("\n".join(lines) + "\n")
            return
        first, *rest = map(visible, lines)
        said = f'<div class="{NO_MATH}">{html.escape(first)}</div>'
        body = said + "".join(map(muted, rest))
        self.area.show({"text/plain": "\n".join(lines), "text/html": body})
