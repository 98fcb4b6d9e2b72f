"""The prompt of a panel: send it, show the answer while it grows, stop it, copy it."""

from __future__ import annotations

import html
import uuid
from functools import lru_cache
from typing import TYPE_CHECKING

import ipywidgets as widgets

from llm_magic.errors import OptionError
from llm_magic.notebook.display.answer_view import answer_html, reasoning_html
from llm_magic.notebook.display.live_output import muted, noticed
from llm_magic.notebook.display.markdown import IncrementalMarkdown
from llm_magic.notebook.display.messages import (
    CONTEXT_FULL,
    activity,
    ending_notes,
    footer,
    incomplete_label,
    not_loaded_note,
    shown_name,
)
from llm_magic.notebook.display.tables import NO_MATH
from llm_magic.notebook.frontend import reach_busy_kernels
from llm_magic.notebook.panel.as_magic import ask_cell, config_line
from llm_magic.notebook.panel.controls import (
    LONG_WAIT_S,
    Conversation,
    CopyText,
    MessageLine,
    PromptBox,
    QueueNotice,
)
from llm_magic.prompts.template import fill
from llm_magic.session.requests import Request
from llm_magic.text import sentence
from llm_magic.text.code_blocks import code_blocks

if TYPE_CHECKING:
    from llm_magic.notebook.panel import ControlPanel
    from llm_magic.session.chats import Chat, Turn
    from llm_magic.session.response import Response

CHAT = "panel"
# The label at the control of the limit.
_LIMIT = "max new tokens"
# Longer conversations stay in the session.
_SHOWN_TURNS = 30


class AskSection:
    """One prompt at a time, in a conversation or alone."""

    def __init__(self, panel: ControlPanel) -> None:
        self._panel = panel
        self._response: Response | None = None
        # The notes about the prompt of the response, and about the system prompt.
        self._notes: tuple[str, ...] = ()
        self._system_notes: tuple[str, ...] = ()
        self._drawn: object = None
        # The last answer before that of the response, with its HTML: it is shown until that has words.
        self._earlier: tuple[Response, str] | None = None
        # The lines below the answers of this panel in the conversation, by the keys of their turns.
        self._footers: dict[str | None, str] = {}
        # The magic of the response.
        self._magic = ""
        # Whether the error is that an answer is being written: it is true until that ends.
        self._is_refused = False
        self._markdown = IncrementalMarkdown()
        self.system = widgets.Textarea(
            description="System prompt", placeholder="none", rows=2, continuous_update=False
        ).add_class("llm-wide")
        self.prompt = PromptBox(
            self.ask,
            panel.between_cells,
            lambda: panel.is_loading_in_cell,
            label="Prompt",
            placeholder="Ask the model …",
            hint="Ctrl+Enter sends. {name} inserts the value of a variable.",
        )
        self.stop = widgets.Button(description="Stop")
        # A chat may exist already: a cell has started it, or a panel that was closed.
        self.chat = widgets.Checkbox(
            value=self._chat() is not None, description="Keep the conversation", indent=False
        )
        self.clear = widgets.Button(description="Clear")
        self.note = widgets.HTML()
        self.turns = widgets.HTMLMath()
        self.answer = widgets.HTMLMath()
        self.conversation = Conversation()
        self.take = CopyText(shown=False)
        self.message = MessageLine()
        self.box = self._assembled()
        self.system.observe(lambda change: self._system_changed(change["new"]), "value")
        self.stop.on_click(lambda _button: panel.act(self._stop, self.message.show))
        self.clear.on_click(lambda _button: panel.act(self._clear, self.message.show))
        self.chat.observe(lambda _change: panel.request_draw(), "value")

    def _assembled(self) -> widgets.VBox:
        buttons = widgets.Box([self.stop, self.chat, self.clear]).add_class("llm-buttons")
        shown = [self.turns, self.answer, self.conversation]
        conversation = widgets.VBox(shown).add_class("llm-scroll")
        title = widgets.HTML("<h3>Prompt</h3>")
        system = widgets.Box([self.system]).add_class("llm-fields")
        above = [title, system, self.prompt, buttons, self.message, QueueNotice(), self.note]
        return widgets.VBox([*above, conversation, self.take]).add_class("llm-section")

    # -- what the user does -------------------------------------------------------------------

    def ask(self, text: str) -> bool:
        """Send a prompt; returns whether it was accepted."""
        self._is_refused = False
        return self._panel.act(lambda: self._ask(text), self.message.show)

    def _ask(self, text: str) -> str:
        if self._response is not None and not self._response.done:
            self._is_refused = True
            raise OptionError("An answer is being written. Stop it first.")
        if not text.strip():
            raise OptionError("The prompt is empty.")
        self._panel.settings.check()
        chat = CHAT if self.chat.value else None
        filled = fill(text, self._panel.names(text))
        request = Request(filled.text, chat=chat, key=uuid.uuid4().hex)
        response = self._panel.session.ask(request, background=True)
        if self._response is not None and self._response.has_reply:
            self._earlier = self._response, self._exchange(self._response)
        failed = self._panel.loading.not_loaded
        answers = (not_loaded_note(failed, response.model),) if failed else ()
        notes = (*answers, *filled.notes, *response.prepared.notes)
        self._response, self._notes = response, notes
        self._magic = ask_cell(text, chat)
        return self._magic

    def _system_changed(self, text: str) -> None:
        def act() -> None:
            self._panel.act(lambda: self._set_system(text), self.message.show)

        if "{" in text and not self._panel.is_drawing:
            self._panel.between_cells(act)
        else:
            act()

    def _set_system(self, text: str) -> str:
        filled = fill(text, self._panel.names(text))
        self._panel.session.generation.update(system=filled.text or None)
        self._system_notes = filled.notes
        return config_line({"system": text if text.strip() else None})

    def _stop(self) -> None:
        if self._response is not None and not self._response.done:
            self._response.cancel()
        else:
            self._panel.session.interrupt()

    def _clear(self) -> str | None:
        response, self._response, self._earlier = self._response, None, None
        if response is not None and not response.done:
            # Otherwise its turn would be the first one of the next conversation.
            response.cancel()
            response.wait(timeout=1)
        if self._chat() is None:
            return None
        self._panel.session.reset(CHAT)
        return f"%llm_reset {CHAT}"

    def _chat(self) -> Chat | None:
        """Return the conversation, None before its first turn."""
        return next((one for one in self._panel.session.chats.all() if one.name == CHAT), None)

    # -- what is shown ------------------------------------------------------------------------

    @property
    def is_waiting(self) -> bool:
        """Whether no text of the answer has arrived, so that the seconds of the wait are shown."""
        response = self._response
        return response is not None and not response.done and not response.has_text

    def draw(self) -> None:
        """Show the answer so far."""
        response, answering = self._response, self._panel.session.answering
        own = response is not None and not response.done
        if self._is_refused and not own:
            self._is_refused = False
            self.message.show("")
        # Jobs of cells have their own stop buttons, in the list of jobs.
        elsewhere = any(one.view is None for one in answering) and not own
        self.system.value = self._panel.session.generation.system or ""
        self.prompt.disabled = self.conversation.busy = own
        self.stop.disabled = not (own or elsewhere)
        in_cell = any(one.number is None for one in answering)
        self.stop.tooltip = _stop_hint(in_cell)
        self.clear.layout.display = "" if self.chat.value else "none"
        chat = self._chat()
        # Without stale turns: they are not sent.
        turns = chat.fresh[-_SHOWN_TURNS:] if chat and self.chat.value else ()
        index = _index(turns, response)
        if index == len(turns) - 1:
            # The answer is shown below the turns, with its footer.
            turns = turns[:-1]
        elif index is not None:
            # A cell has continued the conversation: the answer is shown above that turn, with the others.
            response = None
        note = muted(_stop_hint(in_cell)) if elsewhere else self._counter(response)
        self.note.value = _notes_html(self._system_notes) + note
        keys = {turn.key for turn in turns}
        if chat is None:
            self._footers.clear()
        shown = [_turn(turn, self._footers.get(turn.key, "")) for turn in turns]
        self.turns.value = "".join(shown) + self._earlier_html(response, keys)
        self._draw_answer(response)

    def _counter(self, response: Response | None) -> str:
        """Return how much of the context the conversation has taken."""
        if not self.chat.value or response is None or response.reply is None:
            return ""
        if response.prepared.request.chat is None:
            return ""
        if response.model != self._panel.session.status().active_model:
            # Of another context, or of none.
            return ""
        usage, context = response.reply.usage, response.info.context_length
        if usage.prompt_tokens is None or usage.completion_tokens is None:
            return ""
        used = usage.prompt_tokens + usage.completion_tokens
        of = f" of {context:,} ({used / context:.0%})" if context else ""
        return muted(f"{used:,} tokens of context used{of}")

    def _earlier_html(self, response: Response | None, turns: set[str]) -> str:
        """Return the answer before that of the response, until that has words or if it fails."""
        if self._earlier is None or response is None:
            return ""
        earlier, shown = self._earlier
        is_replaced = _has_words(response) and response.state != "failed"
        return "" if is_replaced or earlier.prepared.request.key in turns else shown

    def _draw_answer(self, response: Response | None) -> None:
        if response is None:
            self.answer.value = self.take.code = ""
            self._drawn = None
            return
        waited = int(response.seconds) if self.is_waiting else 0
        state = response.state
        seen = (response, state, response.revision, waited)
        if seen == self._drawn:
            return
        self._drawn = seen
        if state == "failed":
            self._draw_failure(response)
        else:
            self._draw_text(response)

    def _draw_failure(self, response: Response) -> None:
        """Show the error, and what was generated before; a prompt without an answer returns to its box."""
        assert response.error is not None
        if response.has_reply:
            self._draw_text(response)
        else:
            self.answer.value = ""
            self.take.code = _first_code(self._earlier[0]) if self._earlier is not None else ""
            self.prompt.restore()
        self._panel.withdraw(self._magic)
        # If the load that it waited for has failed, that error is shown at its own controls.
        self._panel.show_error(response.error, self.message.show, beside=True)

    def _draw_text(self, response: Response) -> None:
        self.answer.value = self._exchange(response)
        self.take.code = _first_code(response) if response.done else ""
        if response.done and response.prepared.request.chat is not None:
            self._footers[response.prepared.request.key] = _below(response)

    def _exchange(self, response: Response) -> str:
        """Return the prompt and the answer of the response, which may still grow, as HTML."""
        text, reasoning = response.text, reasoning_html(response.reasoning)
        answer = self._markdown.render(text.lstrip()) if text.strip() else ""
        notes = ending_notes(response, "Send the prompt again.") if response.done else []
        below = (noticed(*notes) if notes else "") + muted(_below(response))
        inner = f"{_notes_html(self._notes)}{reasoning}{answer}{below}"
        return _question(response.prompt) + _answer(inner, text.strip() if response.done else "")


def _index(turns: tuple[Turn, ...], response: Response | None) -> int | None:
    """Return which turn a response has become, None for none of them."""
    if response is None:
        return None
    key = response.prepared.request.key
    return next((index for index, turn in enumerate(turns) if turn.key == key), None)


def _has_words(response: Response) -> bool:
    return response.has_text or response.has_reasoning


def _first_code(response: Response) -> str:
    """Return the first block of code of an answer, or nothing."""
    blocks = code_blocks(response.text)
    return blocks[0].code.rstrip("\n") if blocks else ""


@lru_cache(maxsize=_SHOWN_TURNS)
def _turn(turn: Turn, below: str) -> str:
    """Return a turn as HTML; each update of the next answer shows all of them again.

    `below` is the line below its answer, nothing if this panel has not shown it.
    """
    limit = CONTEXT_FULL if turn.context_full else _LIMIT
    label = incomplete_label(turn.finish_reason, limit=limit)
    line = below or " · ".join(filter(None, (shown_name(turn.model), label)))
    answer = turn.answer.content
    inner = answer_html(answer, "markdown") + (muted(line) if line else "")
    return _question(turn.question.content) + _answer(inner, answer.strip())


def _answer(inner: str, source: str) -> str:
    """Return an answer as HTML, with the text that its button copies, if there is one yet."""
    copied = f' data-source="{html.escape(source)}"' if source else ""
    return f'<div class="llm-turn llm-answer"{copied}>{inner}</div>'


def _question(question: str) -> str:
    """Return a prompt as HTML; its formulas are not typeset."""
    inner = f'<div class="llm-turn llm-question">{html.escape(question)}</div>'
    return f'<div class="{NO_MATH}">{inner}</div>'


def _notes_html(notes: tuple[str, ...]) -> str:
    return "".join(muted(f"Note: {sentence(note)}") for note in notes)


def _below(response: Response) -> str:
    if response.reply is not None:
        system = response.prepared.session_system
        return footer(response.reply, response.info, system, limit=_LIMIT)
    model = shown_name(response.model)
    if response.has_text:
        return f"{model} …"
    waited = response.seconds
    seconds = f" {waited:.0f} s" if waited >= LONG_WAIT_S else ""
    return f"{model} · {activity(response)} …{seconds}"


def _stop_hint(in_cell: bool) -> str:
    """Return what stops an answer; a button only if the kernel handles a click during a cell."""
    if not in_cell:
        return "An answer is being written: Stop ends it."
    if reach_busy_kernels():
        return "A cell is answering: Stop ends it."
    return "A cell is answering: ■ in the toolbar stops it."
