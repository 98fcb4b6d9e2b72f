"""What a cell shows of an answer: the words as they come, and one muted line about them.

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
from llm_magic.types import Chunk, ModelInfo, Reply

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

# Shorter waits need no "thinking" line that flickers away again.
_SILENCE_S = 0.3
# Indented JSON that is longer is shown as it came.
_MAX_INDENTED = 500_000


class _Pieces:
    """A text that grows by pieces; `+=` on an attribute would copy all of it for each of them."""

    __slots__ = ("_parts", "add")

    def __init__(self) -> None:
        self._parts: list[str] = []
        self.add = self._parts.append

    def __str__(self) -> str:
        if len(self._parts) > 1:
            self._parts[:] = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""

    def pop(self) -> str:
        """Return the text and start again without one."""
        text = str(self)
        self._parts.clear()
        return text


class AnswerView:
    """Shows an answer while it is produced; subclasses decide how."""

    def __init__(self, model: str, size: int | None) -> None:
        self._model, self._size = model, size
        self._said, self._thought = _Pieces(), _Pieces()
        # Whether there is more than white space.
        self._has_text = self._has_reasoning = False

    @property
    def _text(self) -> str:
        return str(self._said)

    @property
    def _reasoning(self) -> str:
        return str(self._thought)

    def note(self, notes: tuple[str, ...]) -> None:
        """Tell something about the prompt, before the answer."""
        write_notes(notes)

    def take(self, chunk: Chunk) -> None:
        """Take in the next piece; several may come before `tick` shows them."""
        if chunk.reasoning_ended:
            self._thought.add(self._said.pop())
            self._has_reasoning, self._has_text = self._has_reasoning or self._has_text, False
        if chunk.text:
            self._said.add(chunk.text)
            self._has_text = self._has_text or not chunk.text.isspace()
        if chunk.reasoning:
            self._thought.add(chunk.reasoning)
            self._has_reasoning = self._has_reasoning or not chunk.reasoning.isspace()

    def tick(self) -> None:
        """Show what was taken, if it is time to; called after that, and while nothing comes."""

    def rest(self) -> float:
        """Return for how many seconds nothing that comes would be shown."""
        return 0.0

    def finish(self, reply: Reply) -> None:
        """Show the answer as it is at the end."""

    def leave(self) -> None:
        """Called where there is no answer: what said that one is waited for goes."""


class PlainView(AnswerView):
    """Streams to stdout: for terminals, logs and ``--plain``."""

    def __init__(self, model: str, size: int | None, *, footer: bool) -> None:
        super().__init__(model, size)
        self._footer = footer

        self._unwritten: list[str] = []
        self._visible = VisibleStream()
        self._has_begun = False

    def take(self, chunk: Chunk) -> None:
        """Take in the next piece."""
        super().take(chunk)
        if chunk.notice:
            self._unwritten.append(f"[{chunk.notice}]\n")
        if chunk.reasoning_ended:
            # What was written cannot be taken back.
            self._unwritten.append("\n[that was reasoning]\n")
        self._unwritten.append(chunk.text)

    def tick(self) -> None:
        """Write; the kernel's own buffer joins small writes, a terminal's keeps a line."""
        text = self._visible.feed("".join(self._unwritten))
        self._unwritten.clear()
        if not text:
            return
        write(text)
        if not self._has_begun or sys.stdout.isatty():
            self._has_begun = bool(self._text)
            sys.stdout.flush()

    def rest(self) -> float:
        """Rest once the first word is there."""
        return PERIOD_S if self._has_begun else 0.0

    def finish(self, reply: Reply) -> None:
        """End the line and add the footer."""
        self.tick()
        write(self._visible.flush())
        if self._text and not self._text.endswith("\n"):
            write("\n")
        label = ending(reply)
        if self._footer and reply.reasoning:
            write(f"[{reasoning_line(reply.reasoning)}]\n")
        if self._footer:
            write(f"[{footer(reply, self._size)}]\n")
        elif label:
            write(f"[{label}]\n")
        sys.stdout.flush()


class PlainJsonView(PlainView):
    """Waits for all of an answer, to check and to indent it."""

    def take(self, chunk: Chunk) -> None:
        """Take in the next piece."""
        AnswerView.take(self, chunk)
        if chunk.notice:
            self._unwritten.append(f"[{chunk.notice}]\n")

    def finish(self, reply: Reply) -> None:
        """Write it, and what is wrong with it."""
        text, problem = _pretty_json(self._text.strip())
        self._unwritten.append(f"{text}\n" if text else "")
        self._unwritten.append(f"[{problem}]\n" if problem else "")
        self._said.pop()
        super().finish(reply)


class RichView(AnswerView):
    """Shows HTML in a notebook, replaced as the answer grows, with a text form beside it."""

    def __init__(
        self, model: str, size: int | None, *, form: str, show_footer: bool, area: LiveArea
    ) -> None:
        super().__init__(model, size)
        self._form, self._show_footer = form, show_footer
        self._area = area
        self._markdown = IncrementalMarkdown()
        self._began = time.monotonic()
        self._notice = ""
        self._is_new = self._has_begun = self._has_words = self._is_prepared = False

    def take(self, chunk: Chunk) -> None:
        """Take in the next piece."""
        super().take(chunk)
        self._is_new = True
        self._notice = chunk.notice or ("" if chunk.text or chunk.reasoning else self._notice)

    def tick(self) -> None:
        """Draw the first word at once and later ones when it is time; tell that it is at work."""
        is_first = not self._has_begun and self._has_text
        if is_first or self._has_begun or self._has_reasoning:
            if self._is_new and self._area.live and (is_first or self._area.due):
                self._draw()
            return
        self._prepare()
        waited = time.monotonic() - self._began
        if (waited > _SILENCE_S or self._notice) and self._area.due:
            text = f"{self._model} · {self._notice or 'thinking'} … {waited:.0f} s"
            self._area.show({"text/plain": text, "text/html": muted(text)})

    def _prepare(self) -> None:
        """Import what the first word is shown with while it is waited for: some 60 ms, once."""
        if not self._is_prepared:
            self._is_prepared = True
            self._html("word")

    def rest(self) -> float:
        """Rest until the next update, once there are words."""
        return self._area.wait if self._has_words else 0.0

    def _draw(self) -> None:
        self._is_new, self._has_words = False, True
        self._has_begun = self._has_text
        self._area.draw(self._bundle)

    def _bundle(self) -> dict[str, str]:
        thoughts = reasoning_line(self._reasoning) if self._has_reasoning else ""
        # They can be unfolded when the answer is whole: every update would fold them again.
        html = muted(thoughts) if thoughts else ""
        if self._has_begun:
            # As `finish` shows it, so that the same text is not rendered twice.
            html += self._html(self._text.strip())
        if self._area.is_shown and not self._area.only_text:
            return {"text/html": html}
        # For frontends without HTML, which show no updates.
        return {"text/plain": self._text.strip() or thoughts, "text/html": html}

    def _html(self, text: str) -> str:
        if self._form in {"text", "json"}:
            return answer_html(text, self._form)
        return self._markdown.render(text)

    def finish(self, reply: Reply) -> None:
        """Draw the whole answer and the footer, once more and for good."""
        text = self._text.strip()
        problem = ""
        if self._form == "json":
            text, problem = _pretty_json(text)
        below = footer(reply, self._size) if self._show_footer else ending(reply)
        lines = [line for line in (problem, below) if line]
        plain = "\n\n".join([text, *lines]) if lines else text
        answer = self._html(text)
        body = thoughts_html(self._reasoning) + answer + "".join(map(muted, lines))
        self._area.show({"text/plain": plain, "text/html": body})
        self._has_words = True

    def leave(self) -> None:
        """Take back the line that said that it is at work."""
        if not self._has_words:
            self._area.clear()


def thoughts_html(reasoning: str) -> str:
    """Return the reasoning of a model, folded, or nothing; no more trusted than its answer."""
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
    info: ModelInfo,
    values: dict[str, Any],
    live: bool,
    area: LiveArea | None = None,
) -> AnswerView:
    """Return the view for the options of ``%%llm`` in this frontend.

    `area` is what shows something already, such as the load that the cell waited for: the answer
    replaces it.
    """
    area = area or LiveArea(live=live)
    show_footer, form = not values["quiet"], values["format"] or "markdown"
    size = info.local_size
    is_plain = values["plain"] or not is_notebook(shell)
    if is_plain:
        area.clear()
    if is_plain:
        plain = PlainJsonView if form == "json" else PlainView
        return plain(info.name, size, footer=show_footer)
    return RichView(info.name, size, form=form, show_footer=show_footer, area=area)


def write_notes(notes: tuple[str, ...]) -> None:
    """Write what a prompt has that was left as it is, or the like."""
    for text in notes:
        write(f"Note: {text}\n")
