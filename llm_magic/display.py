"""What a cell shows: a live answer, a load's progress, and one muted line about each.

Only the main thread displays. Model text reaches HTML through `llm_magic.markdown` alone.
"""

from __future__ import annotations

import html
import json
import sys
import time
import uuid
from typing import TYPE_CHECKING, Any

from llm_magic.tables import NO_MATH
from llm_magic.types import Chunk, ModelInfo, Progress, Reply
from llm_magic.words import ending, footer, reasoning_line

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

# A frontend re-parses all of an output at every update, and each costs the kernel two blocking
# flushes: at most 20 a second, and fewer where one is slow.
_PERIOD_S = 0.05
_COST_FACTOR = 10
# Shorter waits need no "thinking" line that flickers away again.
_SILENCE_S = 0.3
_MUTED = "color: var(--jp-ui-font-color2, #757575); font-size: 0.85em;"


class LiveArea:
    """One place in the output that is shown once and then replaced, on one display id."""

    def __init__(self, *, live: bool) -> None:
        self.live = live
        self._id = uuid.uuid4().hex
        self._shown = False
        self._next = 0.0

    @property
    def due(self) -> bool:
        """Whether enough time has passed for another update."""
        return self.live and time.monotonic() >= self._next

    def show(self, bundle: dict[str, str]) -> None:
        """Display or replace; the next update waits in proportion to what this one cost."""
        from IPython.display import display

        began = time.monotonic()
        options: dict[str, Any] = {"raw": True}
        if self.live:
            options |= {"display_id": self._id, "update": self._shown}
        display(bundle, **options)  # type: ignore[no-untyped-call]
        self._shown = True
        now = time.monotonic()
        self._next = now + max(_PERIOD_S, _COST_FACTOR * (now - began))


class AnswerView:
    """Shows an answer while it is produced; subclasses decide how."""

    def __init__(self, model: str, size: int | None) -> None:
        self._model, self._size = model, size
        self._text = self._reasoning = ""

    def note(self, notes: tuple[str, ...]) -> None:
        """Tell something about the prompt, before the answer."""
        for text in notes:
            _write(f"Note: {text}\n")

    def take(self, chunk: Chunk) -> None:
        """Take in the next piece."""
        if chunk.thought:
            self._reasoning, self._text = self._reasoning + self._text, ""
        self._text += chunk.text
        self._reasoning += chunk.reasoning

    def tick(self) -> None:
        """Called while nothing arrives."""

    def finish(self, reply: Reply) -> None:
        """Show the answer as it is at the end."""


class PlainView(AnswerView):
    """Streams to stdout: for terminals, logs and ``--plain``."""

    def __init__(self, model: str, size: int | None, *, footer: bool) -> None:
        super().__init__(model, size)
        self._footer = footer

    def take(self, chunk: Chunk) -> None:
        """Write at once; the kernel's own buffer joins small writes, a terminal's keeps a line."""
        first = not self._text and bool(chunk.text)
        super().take(chunk)
        if chunk.notice:
            _write(f"[{chunk.notice}]\n")
        if chunk.thought:
            # What was written cannot be taken back.
            _write("\n[that was reasoning]\n")
        sys.stdout.write(chunk.text)
        if first or sys.stdout.isatty():
            sys.stdout.flush()

    def finish(self, reply: Reply) -> None:
        """End the line and add the footer."""
        if self._text and not self._text.endswith("\n"):
            _write("\n")
        label = ending(reply)
        if self._footer and reply.reasoning:
            _write(f"[{reasoning_line(reply.reasoning)}]\n")
        if self._footer:
            _write(f"[{footer(reply, self._size)}]\n")
        elif label:
            _write(f"[{label}]\n")
        sys.stdout.flush()


class RichView(AnswerView):
    """Shows HTML in a notebook, replaced as the answer grows, with a text form beside it."""

    def __init__(
        self, model: str, size: int | None, *, form: str, show_footer: bool, live: bool
    ) -> None:
        super().__init__(model, size)
        self._form, self._show_footer = form, show_footer
        self._area = LiveArea(live=live)
        self._began = time.monotonic()
        self._notice = ""
        self._drawn = ("", "")

    def take(self, chunk: Chunk) -> None:
        """Draw the first token at once, later ones when an update is due."""
        first = not self._text.strip() and bool(chunk.text.strip())
        super().take(chunk)
        self._notice = chunk.notice or ("" if chunk.text or chunk.reasoning else self._notice)
        if (first and self._area.live) or (self._has_words and self._area.due):
            self._draw()

    @property
    def _has_words(self) -> bool:
        return bool(self._text.strip() or self._reasoning.strip())

    def tick(self) -> None:
        """Show that it is at work, and what has not been drawn yet."""
        if self._has_words:
            if self._drawn != (self._text, self._reasoning) and self._area.due:
                self._draw()
            return
        waited = time.monotonic() - self._began
        if (waited > _SILENCE_S or self._notice) and self._area.due:
            text = f"{self._model} · {self._notice or 'thinking'} … {waited:.0f} s"
            self._area.show({"text/plain": text, "text/html": muted(text)})

    def _draw(self) -> None:
        self._drawn = (self._text, self._reasoning)
        body = answer_html(self._text, self._form) if self._text.strip() else ""
        plain = self._text if self._text.strip() else reasoning_line(self._reasoning)
        self._area.show({"text/plain": plain, "text/html": thoughts_html(self._reasoning) + body})

    def finish(self, reply: Reply) -> None:
        """Draw the whole answer and the footer, once more and for good."""
        text = self._text.strip()
        problem = ""
        if self._form == "json":
            text, problem = _pretty_json(text)
        below = footer(reply, self._size) if self._show_footer else ending(reply)
        lines = [line for line in (problem, below) if line]
        plain = "\n\n".join([text, *lines]) if lines else text
        answer = answer_html(text, self._form)
        body = thoughts_html(self._reasoning) + answer + "".join(map(muted, lines))
        self._area.show({"text/plain": plain, "text/html": body})


def thoughts_html(reasoning: str) -> str:
    """Return the reasoning of a model, folded, or nothing; no more trusted than its answer."""
    if not reasoning.strip():
        return ""
    from llm_magic import markdown

    return markdown.folded(reasoning_line(reasoning), reasoning.strip())


def answer_html(text: str, form: str) -> str:
    """Return model text as HTML that can run no script and fetches nothing."""
    from llm_magic import markdown

    if form == "text":
        return markdown.escape_pre(text)
    if form == "json":
        return markdown.render_code(text, "json")
    return markdown.render(text)


def _pretty_json(text: str) -> tuple[str, str]:
    from llm_magic import markdown

    problem = ""
    # All of it first: to Markdown, indented JSON can look like a block of code.
    for inner in (text, *(block.code for block in markdown.code_blocks(text)[:1])):
        try:
            return json.dumps(json.loads(inner), indent=2, ensure_ascii=False), ""
        except ValueError as error:
            problem = f"This is not valid JSON: {error}"
    return text, problem


def view(
    shell: InteractiveShell, info: ModelInfo, values: dict[str, Any], live: bool
) -> AnswerView:
    """Return the view for the options of ``%%llm`` in this frontend."""
    show_footer, form = not values["quiet"], values["format"] or "markdown"
    # What a server's model takes is not taken from this machine, or not known to be.
    size = info.size if not info.server else None
    if form == "raw":
        return PlainView(info.name, size, footer=False)
    if values["plain"] or not is_notebook(shell):
        return PlainView(info.name, size, footer=show_footer)
    return RichView(info.name, size, form=form, show_footer=show_footer, live=live)


def is_notebook(shell: InteractiveShell) -> bool:
    """Return whether a frontend that shows HTML may be listening."""
    return getattr(shell, "kernel", None) is not None


def muted(text: str) -> str:
    """Return one small grey line of HTML."""
    style = f"{_MUTED} margin-top: 0.4em;"
    return f'<div class="{NO_MATH}" style="{style}">{html.escape(text)}</div>'


class LoadView:
    """Shows how far a load is: a bar in a notebook, nothing until the end elsewhere."""

    def __init__(self, shell: InteractiveShell, *, live: bool) -> None:
        self._rich = is_notebook(shell)
        self._area = LiveArea(live=live)
        self._began = time.monotonic()

    def progress(self, model: str, progress: Progress | None) -> None:
        """Show a stage; called about ten times a second."""
        if not self._rich or progress is None or not self._area.due:
            return
        waited = time.monotonic() - self._began
        detail = f" ({progress.detail})" if progress.detail else ""
        text = f"Loading {model}: {progress.stage}{detail} … {waited:.0f} s"
        share = "" if progress.share is None else f' value="{progress.share:.3f}"'
        bar = (
            f'<progress max="1"{share} aria-label="{html.escape(text)}"'
            ' style="width: 16em; vertical-align: middle; margin-right: 0.8em"></progress>'
        )
        body = f'<div class="{NO_MATH}">{bar}{html.escape(text)}</div>'
        self._area.show({"text/plain": text, "text/html": body})

    def finish(self, lines: list[str]) -> None:
        """Replace the bar with what there is to say."""
        if not self._rich:
            _write("\n".join(lines) + "\n")
            return
        first, *rest = lines
        said = f'<div class="{NO_MATH}">{html.escape(first)}</div>'
        body = said + "".join(map(muted, rest))
        self._area.show({"text/plain": "\n".join(lines), "text/html": body})


def _write(text: str) -> None:
    sys.stdout.write(text)
