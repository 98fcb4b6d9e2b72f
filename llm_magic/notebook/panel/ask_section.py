"""The prompt of a panel: send it, show the answer while it grows, stop it, copy it."""

from __future__ import annotations

import html
import uuid
from functools import lru_cache
from typing import TYPE_CHECKING

import ipywidgets as widgets

from llm_magic.errors import ModelNotLoaded, OptionError
from llm_magic.notebook.display.answer_view import answer_html, reasoning_html
from llm_magic.notebook.display.code_cells import code_blocks
from llm_magic.notebook.display.live_output import muted
from llm_magic.notebook.display.markdown import IncrementalMarkdown
from llm_magic.notebook.display.messages import activity, footer
from llm_magic.notebook.display.tables import NO_MATH
from llm_magic.notebook.frontend import reach_busy_kernels
from llm_magic.notebook.panel.as_magic import ask_cell
from llm_magic.notebook.panel.controls import CopyText, PromptBox
from llm_magic.session.requests import Request

if TYPE_CHECKING:
    from llm_magic.notebook.panel import ControlPanel
    from llm_magic.session.response import Response

CHAT = "panel"
# Longer conversations stay in the session.
_SHOWN_TURNS = 30


class AskSection:
    """One prompt at a time, in a conversation or alone."""

    def __init__(self, panel: ControlPanel) -> None:
        self._panel = panel
        self._response: Response | None = None
        self._drawn: object = None
        self._markdown = IncrementalMarkdown()
        self.prompt = PromptBox(
            self.ask, label="Prompt", placeholder="Ask the model … (Ctrl+Enter sends)"
        )
        self.send = widgets.Button(
            description="Send", button_style="primary", tooltip="Send (Ctrl+Enter)"
        )
        self.stop = widgets.Button(description="Stop")
        self.chat = widgets.Checkbox(description="Keep the conversation", indent=False)
        self.clear = widgets.Button(description="Clear")
        self.note = widgets.HTML()
        self.turns = widgets.HTMLMath()
        self.answer = widgets.HTMLMath()
        self.take = CopyText(label="Copy answer", shown=False)
        self.box = self._assembled()
        self.send.on_click(lambda _button: self.ask(self.prompt.value))
        self.stop.on_click(lambda _button: panel.act(self._stop))
        self.clear.on_click(lambda _button: panel.act(self._clear))
        self.chat.observe(lambda _change: panel.request_draw(), "value")

    def _assembled(self) -> widgets.VBox:
        controls = [self.send, self.stop, self.chat, self.clear]
        buttons = widgets.Box(controls).add_class("llm-buttons")
        conversation = widgets.VBox([self.turns, self.answer]).add_class("llm-scroll")
        title = widgets.HTML("<h3>Prompt</h3>")
        return widgets.VBox([title, self.prompt, buttons, self.note, conversation, self.take])

    # -- what the user does -------------------------------------------------------------------

    def ask(self, text: str) -> None:
        """Send a prompt."""
        self._panel.act(lambda: self._ask(text))

    def _ask(self, text: str) -> str:
        if self._response is not None and not self._response.done:
            raise OptionError("An answer is being written. Stop it first.")
        if not text.strip():
            raise OptionError("The prompt is empty.")
        if self._panel.session.status().status in {"Loading", "Configuring"}:
            raise ModelNotLoaded("The model is getting ready. Send it when it is.")
        chat = CHAT if self.chat.value else None
        request = Request(text, chat=chat, key=uuid.uuid4().hex)
        self._response = self._panel.session.ask(request, background=True)
        if chat is not None:
            self.prompt.value = ""
        return ask_cell(text, chat)

    def _stop(self) -> None:
        if self._response is not None and not self._response.done:
            self._response.cancel()
        else:
            self._panel.session.interrupt()

    def _clear(self) -> str | None:
        response, self._response = self._response, None
        if response is not None and not response.done:
            # Otherwise its turn would be the first one of the next conversation.
            response.cancel()
            response.wait(timeout=1)
        known = {chat.name for chat in self._panel.session.chats.all()}
        if CHAT not in known:
            return None
        self._panel.session.reset(CHAT)
        return f"%llm_reset {CHAT}"

    # -- what is shown ------------------------------------------------------------------------

    def draw(self) -> None:
        """Show the answer so far."""
        response, answering = self._response, self._panel.session.answering
        own = response is not None and not response.done
        # Jobs of cells have their own stop buttons, in the list of jobs.
        elsewhere = any(one.view is None for one in answering) and not own
        self.send.disabled = own
        self.stop.disabled = not (own or elsewhere)
        in_cell = any(one.number is None for one in answering)
        self.stop.tooltip = _stop_hint(in_cell)
        self.clear.layout.display = "" if self.chat.value else "none"
        self.note.value = muted(_stop_hint(in_cell)) if elsewhere else self._counter()
        self._draw_turns()
        self._draw_answer(response)

    def _counter(self) -> str:
        """Return how much of the context the conversation has taken."""
        response = self._response
        if not self.chat.value or response is None or response.reply is None:
            return ""
        if response.prepared.request.chat is None:
            return ""
        usage, context = response.reply.usage, response.info.context_length
        if usage.prompt_tokens is None or usage.completion_tokens is None:
            return ""
        used = usage.prompt_tokens + usage.completion_tokens
        of = f" of {context:,} ({used / context:.0%})" if context else ""
        return muted(f"{used:,} tokens of context used{of}")

    def _draw_turns(self) -> None:
        chats = self._panel.session.chats.all()
        chat = next((one for one in chats if one.name == CHAT), None)
        # Without stale turns: they are not sent.
        turns = chat.fresh[-_SHOWN_TURNS:] if chat and self.chat.value else ()
        response = self._response
        if response is not None and turns and turns[-1].answer.content == response.text:
            # It is shown below, with its footer.
            turns = turns[:-1]
        self.turns.value = "".join(
            _turn(turn.question.content, turn.answer.content) for turn in turns
        )

    def _draw_answer(self, response: Response | None) -> None:
        if response is None:
            self.answer.value = self.take.value = self.take.code = ""
            return
        seen = (response, response.state, response.revision)
        if seen == self._drawn:
            return
        self._drawn = seen
        text, reasoning = response.text, reasoning_html(response.reasoning)
        answer = self._markdown.render(text.lstrip()) if text.strip() else ""
        self.answer.value = (
            f"{_question(response.prompt)}"
            f'<div class="llm-turn">{reasoning}{answer}{muted(_below(response))}</div>'
        )
        if response.done:
            blocks = code_blocks(text)
            self.take.value = text.strip()
            self.take.code = blocks[0].code.rstrip("\n") if blocks else ""
            if response.error is not None:
                self._panel.show_error(response.error)
        else:
            self.take.value = self.take.code = ""


@lru_cache(maxsize=_SHOWN_TURNS)
def _turn(question: str, answer: str) -> str:
    """Return a turn as HTML; each update of the next answer shows all of them again."""
    return f'{_question(question)}<div class="llm-turn">{answer_html(answer, "markdown")}</div>'


def _question(question: str) -> str:
    """Return a prompt as HTML; its formulas are not typeset."""
    inner = f'<div class="llm-turn llm-question">{html.escape(question)}</div>'
    return f'<div class="{NO_MATH}">{inner}</div>'


def _below(response: Response) -> str:
    if response.reply is not None:
        system = response.prepared.session_system
        return footer(response.reply, response.info.local_size, system)
    return "…" if response.has_text else f"{activity(response)} …"


def _stop_hint(in_cell: bool) -> str:
    """Return what stops an answer; a button only if the kernel handles a click during a cell."""
    if not in_cell:
        return "An answer is being written: Stop ends it."
    if reach_busy_kernels():
        return "A cell is answering: Stop ends it."
    return "A cell is answering: ■ in the toolbar stops it."
