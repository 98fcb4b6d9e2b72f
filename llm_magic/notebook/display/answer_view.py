"""Draws a response in its cell: the text while it is generated, then one muted line about it.

Only the main thread displays. Model text reaches HTML through `llm_magic.notebook.display.markdown` alone.
"""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any

from llm_magic.notebook.display.incremental_markdown import IncrementalMarkdown
from llm_magic.notebook.display.live_output import PERIOD_S, LiveArea, is_notebook, muted, write
from llm_magic.notebook.display.messages import ending, footer, reasoning_line
from llm_magic.text.surrogates import replace_surrogates
from llm_magic.text.terminal import VisibleStream

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from llm_magic.session.response import Response
    from llm_magic.types import Reply

# Shorter waits need no "thinking" line that flickers away again.
_SILENCE_S = 0.3
# Indented JSON that is longer is shown as it came.
_MAX_INDENTED = 500_000


class AnswerView:
    """Draws a response while it is generated; subclasses decide how."""

    def __init__(self, response: Response) -> None:
        self.response = response

    def note(self, notes: tuple[str, ...]) -> None:
        """Show notes about the prompt, before the answer."""
        write_notes(notes)

    def draw(self) -> None:
        """Show what is new, if it is time for that; called again and again."""

    def pause(self) -> float:
        """Return for how many seconds nothing new would be drawn."""
        return 0.0

    def finish(self) -> None:
        """Show the answer as it is at the end."""

    def leave(self) -> None:
        """Clear what was shown while the answer was waited for; called where there is none."""


class PlainView(AnswerView):
    """Streams to stdout: for terminals, logs and ``--plain``."""

    def __init__(self, response: Response, *, footer: bool) -> None:
        super().__init__(response)
        self._footer = footer
        self._visible = VisibleStream()
        # How much of the response is written: characters, notices, and texts that became reasoning.
        self._written = self._notices = self._restarts = 0

    def draw(self) -> None:
        """Write; the kernel's own buffer joins small writes, a terminal's keeps a line."""
        is_first = not self._written
        text = self._visible.feed(self._new_notices() + self._new_text())
        if not text:
            return
        write(text)
        if is_first or sys.stdout.isatty():
            sys.stdout.flush()

    def _new_notices(self) -> str:
        notices = self.response.notices[self._notices :]
        self._notices += len(notices)
        return "".join(f"[{notice}]\n" for notice in notices)

    def _new_text(self) -> str:
        restarts, text = _text(self.response)
        label = ""
        if restarts != self._restarts:
            # What was written cannot be taken back.
            label = "\n[that was reasoning]\n" if self._written else ""
            self._restarts, self._written = restarts, 0
        new, self._written = text[self._written :], len(text)
        return label + new

    def pause(self) -> float:
        """Return the time between two writes, once the first word is there."""
        return PERIOD_S if self._written else 0.0

    def finish(self) -> None:
        """End the line and add the footer."""
        self.draw()
        write(self._visible.flush())
        if self._written and not self.response.text.endswith("\n"):
            write("\n")
        reply = _reply(self.response)
        label = ending(reply)
        if self._footer and reply.reasoning:
            write(f"[{reasoning_line(reply.reasoning)}]\n")
        if self._footer:
            write(f"[{footer(reply, self.response.info.local_size)}]\n")
        elif label:
            write(f"[{label}]\n")
        sys.stdout.flush()


class PlainJsonView(PlainView):
    """Waits for all of an answer, to check and to indent it."""

    def _new_text(self) -> str:
        return ""

    def finish(self) -> None:
        """Write it, and what is wrong with it."""
        text, problem = _pretty_json(self.response.text.strip())
        write(self._visible.feed(self._new_notices()))
        write(f"{text}\n" if text else "")
        write(f"[{problem}]\n" if problem else "")
        super().finish()


class RichView(AnswerView):
    """Shows HTML in a notebook, replaced while the answer grows, with a text form beside it."""

    def __init__(
        self, response: Response, *, form: str, show_footer: bool, area: LiveArea, label: str = ""
    ) -> None:
        """`label` is shown at once, until the first word."""
        super().__init__(response)
        self._label = label
        self._form, self._show_footer = form, show_footer
        self._area = area
        self._markdown = IncrementalMarkdown()
        self._began = time.monotonic()
        # The revision of the response that is shown.
        self._revision = -1
        self._status = ""
        self._has_text = self._has_words = self._is_prepared = False

    def draw(self) -> None:
        """Draw the first word at once and later ones when it is time; until then, show the wait."""
        response, area = self.response, self._area
        if response.has_text or response.has_reasoning or self._has_words:
            is_first = response.has_text and not self._has_text
            if area.live and (is_first or area.due) and response.revision != self._revision:
                self._revision, self._has_words = response.revision, True
                self._has_text = response.has_text
                area.draw(self._bundle)
            return
        self._prepare()
        waited = time.monotonic() - self._began
        what = response.notice or self._label
        if (waited > _SILENCE_S or what) and area.due:
            text = f"{response.model} · {what or 'thinking'} … {waited:.0f} s"
            if text != self._status:
                self._status = text
                area.show({"text/plain": text, "text/html": muted(text)})

    def _prepare(self) -> None:
        """Import what the first word is shown with while it is waited for: some 60 ms, once."""
        if not self._is_prepared:
            self._is_prepared = True
            self._html("word")

    def pause(self) -> float:
        """Return the time until the next update, once there are words."""
        return self._area.wait if self._has_words else 0.0

    def _bundle(self) -> dict[str, str]:
        response = self.response
        line = reasoning_line(response.reasoning) if response.has_reasoning else ""
        # It can be unfolded when the answer is whole: every update would fold it again.
        html, text = muted(line) if line else "", response.text.strip()
        if text:
            # As `finish` shows it, so that the same text is not rendered twice.
            html += self._html(text)
        if self._area.is_shown and not self._area.only_text:
            return {"text/html": html}
        # For frontends without HTML, which show no updates.
        return {"text/plain": text or line, "text/html": html}

    def _html(self, text: str) -> str:
        if self._form in {"text", "json"}:
            return answer_html(text, self._form)
        return self._markdown.render(text)

    def finish(self) -> None:
        """Draw the whole answer and the footer."""
        reply, text = _reply(self.response), self.response.text.strip()
        problem = ""
        if self._form == "json":
            text, problem = _pretty_json(text)
        size = self.response.info.local_size
        below = footer(reply, size) if self._show_footer else ending(reply)
        lines = [line for line in (problem, below) if line]
        plain = "\n\n".join([text, *lines]) if lines else text
        answer = self._html(text)
        body = reasoning_html(self.response.reasoning) + answer + "".join(map(muted, lines))
        self._area.show({"text/plain": plain, "text/html": body})
        self._has_words = True

    def leave(self) -> None:
        """Clear the line that showed the wait."""
        if not self._has_words:
            self._area.clear()


def _text(response: Response) -> tuple[int, str]:
    """Return how often the text of a response became reasoning, and the text since then."""
    while True:
        restarts, text = response.restarts, response.text
        if restarts == response.restarts:
            return restarts, text


def _reply(response: Response) -> Reply:
    assert response.reply is not None, "it has ended"
    return response.reply


def reasoning_html(reasoning: str) -> str:
    """Return the reasoning of a model as folded HTML, which is safe as that of an answer, or nothing."""
    if not reasoning.strip():
        return ""
    from llm_magic.notebook.display import markdown

    return markdown.collapsed(reasoning_line(reasoning), reasoning.strip())


def answer_html(text: str, form: str) -> str:
    """Return model text as HTML that can run no script and fetches nothing."""
    from llm_magic.notebook.display import markdown

    if form == "text":
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


def _pretty_json(text: str) -> tuple[str, str]:
    from llm_magic.notebook.display import markdown

    problem = ""
    # All of it first: to Markdown, indented JSON can look like a block of code.
    for inner in (text, *(block.code for block in markdown.code_blocks(text)[:1])):
        try:
            return replace_surrogates(_indented(json.loads(inner)) or inner), ""
        except RecursionError:
            problem = "This JSON is nested too deeply."
        except ValueError as error:
            problem = f"This is not valid JSON: {error}"
    return text, problem


def view(
    shell: InteractiveShell,
    response: Response,
    values: dict[str, Any],
    live: bool,
    area: LiveArea | None = None,
) -> AnswerView:
    """Return the view of a response for the options of ``%%llm`` in this frontend.

    `area` shows something already, such as the load that the cell waited for: the answer replaces it.
    """
    area = area or LiveArea(live=live)
    show_footer, form = not values["quiet"], values["format"] or "markdown"
    if not values["plain"] and is_notebook(shell):
        return RichView(response, form=form, show_footer=show_footer, area=area)
    area.clear()
    plain = PlainJsonView if form == "json" else PlainView
    return plain(response, footer=show_footer)


def write_notes(notes: tuple[str, ...]) -> None:
    """Write what a prompt has that was left as it is, or the like."""
    for text in notes:
        write(f"Note: {text}\n")
