"""Draws a response in its cell: the text while it is generated, then one muted line about it.

Only the main thread displays. Model text reaches HTML through `llm_magic.notebook.display.markdown` alone.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from llm_magic.errors import InvalidReply
from llm_magic.notebook.display import markdown, token_shades
from llm_magic.notebook.display.live_output import (
    MUTED,
    PERIOD_S,
    LiveArea,
    TerminalLine,
    dimmed,
    is_notebook,
    mime_bundle,
    muted,
    noticed,
    progress_html,
    write,
)
from llm_magic.notebook.display.messages import (
    activity,
    ending,
    ending_notes,
    footer,
    outside_json_line,
    reasoning_line,
    shown_name,
    shown_tokens,
)
from llm_magic.notebook.display.value_tables import value_table
from llm_magic.text import VisibleStream, around_json, replace_surrogates, sentence

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from llm_magic.session.chats import Context
    from llm_magic.session.response import Response

# During shorter waits a line about the wait would only flicker.
_SILENCE_S = 0.3
# From then on, a wait is shown with its seconds.
_LONG_WAIT_S = 3.0
# If its indented form is longer, JSON is shown as it was received.
_MAX_INDENTED = 500_000


class PlainView:
    """Streams to stdout, for terminals, logs and ``--plain``; JSON and values are written at the end."""

    def __init__(self, response: Response, *, form: str, show_footer: bool) -> None:
        self._response, self._form, self._show_footer = response, form, show_footer
        self._visible = VisibleStream()
        # How much of the response is written: characters, notices, and texts that became reasoning.
        self._written = self._notices = self._restarts = 0
        self._line, self._began = TerminalLine(), time.monotonic()
        self._was_queued = False

    def draw(self) -> None:
        """Write what is new; the kernel's buffer joins small writes, a terminal's keeps a line."""
        is_first = not self._written
        notices = self._response.notices[self._notices :]
        self._notices += len(notices)
        if self._response.is_queued and not self._was_queued:
            notices = [activity(self._response), *notices]
        self._was_queued = self._response.is_queued
        text = "".join(f"[{notice}]\n" for notice in notices)
        if self._form not in {"json", "value"}:
            text += self._new_text()
        text = self._visible.feed(text)
        if not text:
            self._show_wait()
            return
        self._line.clear()
        write(text)
        if is_first or sys.stdout.isatty():
            sys.stdout.flush()

    def _show_wait(self) -> None:
        """Show in a terminal what the model does, until the first word is written."""
        response, waited = self._response, time.monotonic() - self._began
        if not self._written and waited > _SILENCE_S:
            what = response.amount if response.has_text else activity(response)
            self._line.show(f"{response.model} · {what} … {waited:.0f} s")

    def _new_text(self) -> str:
        response = self._response
        restarts, text = response.restarts, response.text
        while restarts != response.restarts:
            # Another thread made reasoning of the text in between.
            restarts, text = response.restarts, response.text
        label = ""
        if restarts != self._restarts:
            # What was written cannot be taken back.
            label = "\n[end of reasoning]\n" if self._written else ""
            label = f"\n[invalid: {response.retry} Second try:]\n" if response.retry else label
            self._restarts, self._written = restarts, 0
        new, self._written = text[self._written :], len(text)
        return label + new

    def pause(self) -> float:
        """Return the time between two writes, once the first word is written."""
        return PERIOD_S if self._written else 0.0

    def finish(self) -> None:
        """End the line and write the lines below the answer."""
        self.draw()
        self._line.clear()
        text, lines = _whole(self._response, self._form, self._show_footer)
        write(self._visible.flush())
        if self._form in {"json", "value"}:
            write(f"{text}\n" if text else "")
        elif self._written and not self._response.text.endswith("\n"):
            write("\n")
        if self._show_footer and self._response.has_reasoning:
            lines.insert(-1, reasoning_line(self._response.reasoning))
        write("".join(f"Note: {note}\n" for note in ending_notes(self._response)))
        sys.stdout.write("".join(f"{dimmed(f'[{line}]')}\n" for line in lines))
        sys.stdout.flush()

    def clear(self) -> None:
        """Clear the line that showed the wait."""
        self._line.clear()


class RichView:
    """Shows HTML in a notebook, replaced while the answer grows, with a text form beside it."""

    def __init__(
        self, response: Response, *, form: str, show_footer: bool, area: LiveArea, label: str = ""
    ) -> None:
        """`label` names a background response: it is shown at once, and until the answer has ended."""
        self._response, self._form, self._show_footer = response, form, show_footer
        self._area, self._label = area, label
        self._html: Callable[[str], str] = markdown.IncrementalMarkdown().render
        if form == "value":
            self._html = self._value_html
        elif form in {"text", "json", "tokens"}:
            self._html = functools.partial(answer_html, form=form)
        self._began = time.monotonic()
        # The revision of the response that is shown.
        self._revision = -1
        self._waiting = ""
        self._has_text = self._has_words = False

    def draw(self) -> None:
        """Draw the first word at once and later ones when it is time; until then, show the wait."""
        response, area = self._response, self._area
        if response.has_text or response.has_reasoning or self._has_words:
            is_due = area.wait <= 0 or (area.live and response.has_text and not self._has_text)
            if is_due and response.revision != self._revision:
                self._revision, self._has_words = response.revision, True
                self._has_text = response.has_text
                area.draw(self._bundle)
            return
        # Imports what the first word is shown with, while it is waited for: some 60 ms, once.
        self._html("word")
        waited = time.monotonic() - self._began
        if (waited > _SILENCE_S or response.notice or self._label) and area.wait <= 0:
            label = [f"{self._label}: no answer yet"] if self._label else []
            text = " · ".join([response.model, *label, activity(response)])
            text += f" … {waited:.0f} s" if waited >= _LONG_WAIT_S else ""
            if text != self._waiting:
                self._waiting = text
                share = response.progress.share if response.progress is not None else None
                page = muted(text) if share is None else progress_html(text, share, MUTED)
                area.show(text, page, more=True)

    def _value_html(self, text: str) -> str:
        """Return the value of a typed answer as a table, or `text` where it has none."""
        table = value_table(self._response) if self._response.has_text else None
        return table._repr_html_() if table is not None else answer_html(text, "text")

    def pause(self) -> float:
        """Return the time until the next update, once there are words."""
        return self._area.wait if self._has_words else 0.0

    def _bundle(self) -> dict[str, str]:
        response = self._response
        text, line = response.text.strip(), ""
        if response.retry and not text:
            line = f"invalid: {response.retry} Second try …"
        elif response.has_reasoning:
            line = reasoning_line(response.reasoning) if text else activity(response)
        # Not as an element that can be unfolded, because each update would fold it again.
        html = muted(line) if line else ""
        if text:
            # As `finish` shows it, so that the same text is not rendered twice.
            html += self._html(text)
        if text or self._label:
            # True at any time: a notebook that is saved now, before the kernel dies, keeps it.
            state = f"{self._label or shown_name(response.model)}: incomplete so far"
            stored_in = response.prepared.request.stored_in
            state += f" · when complete: {stored_in}, unless the kernel restarts"
            html += muted(state)
            text = f"{text or line}\n\n{state}"
        if self._area.is_shown and not self._area.only_text:
            return {"text/html": html}
        # For frontends without HTML, which show no updates.
        return mime_bundle(text or line, html)

    def finish(self, context: Context | None = None) -> None:
        """Draw the complete answer and the lines below it, again if the `context` of its turn changed."""
        text, lines = _whole(self._response, self._form, self._show_footer, context)
        body = reasoning_html(self._response.reasoning) if self._response.has_reasoning else ""
        notes = ending_notes(self._response)
        body += (
            self._answer_html(text)
            + (noticed(*notes) if notes else "")
            + "".join(map(muted, lines))
        )
        self._area.show("\n\n".join([text, *notes, *lines]), body)
        self._has_words = True

    def _answer_html(self, text: str) -> str:
        """Return the complete answer, with its tokens where their probabilities were requested."""
        response = self._response
        tokens = shown_tokens(response)
        if not tokens or not (self._form == "tokens" or response.prepared.request.answer_type):
            return self._html(text)
        shades = token_shades.shaded(tokens, response.text.strip())
        # Below a value, which is a table.
        return shades if shades and self._form == "tokens" else self._html(text) + shades

    def clear(self) -> None:
        """Clear the line that showed the wait, where there is no answer."""
        if not self._has_words:
            self._area.clear()


AnswerView = PlainView | RichView


def _whole(
    response: Response, form: str, show_footer: bool, context: Context | None = None
) -> tuple[str, list[str]]:
    """Return the text of a response that has ended, and the lines to show below it."""
    reply, prepared = response.reply, response.prepared
    assert reply is not None, "it has ended"
    text, lines = response.text.strip(), []
    if form == "json":
        # The response of any other answer fails, and its error is shown.
        with contextlib.suppress(InvalidReply):
            text = replace_surrogates(_indented(reply.json()) or text)
            if show_footer and (outside := around_json(reply)):
                lines = [outside_json_line(outside)]
    if form == "value" and (table := value_table(response)) is not None:
        text = repr(table)
    if show_footer:
        turn = (context or prepared.context) if response.is_turn else None
        below = footer(reply, response.info, prepared.session_system, turn, prepared.config.stop)
    else:
        below = ending(reply)
    return text, [*lines, *([below] if below else [])]


def reasoning_html(reasoning: str) -> str:
    """Return the reasoning of a model as folded HTML, which is safe as that of an answer, or nothing."""
    if not reasoning.strip():
        return ""
    return markdown.collapsed(reasoning_line(reasoning), reasoning.strip())


def answer_html(text: str, form: str) -> str:
    """Return model text as HTML that can run no script and fetches nothing."""
    if form in {"text", "tokens"} or (form == "json" and text[:1] not in {"{", "["}):
        # The highlighting of JSON shows each letter of another text as an error.
        return markdown.escape_pre(text)
    if form == "json":
        return markdown.render_code(text, "json")
    return markdown.render(text)


def _indented(value: Any) -> str:
    """Return a value as indented JSON, or nothing where that would be very long.

    Two million brackets can become gigabytes of indentation.
    """
    pieces, left = [], _MAX_INDENTED
    for piece in json.JSONEncoder(indent=2, ensure_ascii=False).iterencode(value):
        pieces.append(piece)
        left -= len(piece)
        if left < 0:
            return ""
    return "".join(pieces)


def view(
    shell: InteractiveShell, response: Response, values: Mapping[str, Any], area: LiveArea
) -> AnswerView:
    """Return the view of a response for the options of ``%%llm`` in this frontend.

    `area` may show something already, such as the load that the cell waited for: the answer replaces it.
    """
    show_footer, form = not values["quiet"], form_of(response, values)
    if not values["plain"] and is_notebook(shell):
        return RichView(response, form=form, show_footer=show_footer, area=area)
    area.clear()
    return PlainView(response, form=form, show_footer=show_footer)


def form_of(response: Response, values: Mapping[str, Any]) -> str:
    """Return the form in which an answer is shown: that of ``-f``, or the one of its options."""
    answer_type = response.prepared.request.answer_type
    if answer_type is None:
        is_shaded = response.prepared.config.logprobs is not None
        return values["format"] or ("tokens" if is_shaded else "markdown")
    return "text" if answer_type.structure.kind in {"regex", "grammar"} else "value"


def show_notes(shell: InteractiveShell, notes: Iterable[str], *, plain: bool = False) -> None:
    """Show notes about a prompt, such as a reference that was not filled in; `plain` writes to stdout."""
    lines = [f"Note: {sentence(text)}" for text in notes]
    if plain or not is_notebook(shell):
        write("".join(f"{line}\n" for line in lines))
    elif lines:
        area = LiveArea(live=False)
        area.show("".join(f"{line}\n" for line in lines), noticed(*lines))
