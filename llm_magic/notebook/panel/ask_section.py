"""The prompt box of a panel: ask, watch the answer grow, stop it, take it along."""

from __future__ import annotations

import html
import uuid
from concurrent.futures import wait
from functools import lru_cache
from typing import TYPE_CHECKING

import ipywidgets as widgets

from llm_magic.errors import ModelNotLoaded, OptionError
from llm_magic.notebook.display.answer_view import answer_html, thoughts_html
from llm_magic.notebook.display.incremental_markdown import IncrementalMarkdown
from llm_magic.notebook.display.live_output import muted
from llm_magic.notebook.display.markdown import code_blocks
from llm_magic.notebook.display.messages import footer
from llm_magic.notebook.display.tables import NO_MATH
from llm_magic.notebook.frontend import reach_busy_kernels
from llm_magic.notebook.panel.as_magic import ask_cell
from llm_magic.notebook.panel.controls import CopyText, PromptBox
from llm_magic.session.jobs import Job
from llm_magic.session.requests import Request

if TYPE_CHECKING:
    from llm_magic.notebook.panel import ControlPanel

CHAT = "panel"
# Longer conversations stay in the session; a page need not carry all of them.
_SHOWN_TURNS = 30


class AskSection:
    """One question at a time, in a conversation or alone."""

    def __init__(self, panel: ControlPanel) -> None:
        self._panel = panel
        self._job: Job | None = None
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
        buttons = widgets.Box([self.send, self.stop, self.chat, self.clear])
        buttons.add_class("llm-buttons")
        said = widgets.VBox([self.turns, self.answer])
        said.add_class("llm-scroll")
        title = widgets.HTML("<h3>Prompt</h3>")
        return widgets.VBox([title, self.prompt, buttons, self.note, said, self.take])

    # -- what the user does -------------------------------------------------------------------

    def ask(self, text: str) -> None:
        """Send a prompt."""
        self._panel.act(lambda: self._ask(text))

    def _ask(self, text: str) -> str:
        if self._job is not None and not self._job.done:
            raise OptionError("An answer is being written. Stop it first.")
        if not text.strip():
            raise OptionError("The prompt is empty.")
        if self._panel.session.status().status in {"Loading", "Configuring"}:
            raise ModelNotLoaded("The model is getting ready. Send it when it is.")
        chat = CHAT if self.chat.value else None
        request = Request(text, chat=chat, key=uuid.uuid4().hex)
        self._job = self._panel.session.begin(request)
        if chat is not None:
            self.prompt.value = ""
        return ask_cell(text, chat)

    def _stop(self) -> None:
        if self._job is not None and not self._job.done:
            self._job.stop()
        else:
            self._panel.session.interrupt()

    def _clear(self) -> str | None:
        job, self._job = self._job, None
        if job is not None and job.future is not None and not job.done:
            # Or what it leaves would be the first turn of the next conversation.
            job.stop()
            wait([job.future], timeout=1)
        known = {chat.name for chat in self._panel.session.chats.all()}
        if CHAT not in known:
            return None
        self._panel.session.reset(CHAT)
        return f"%llm_reset {CHAT}"

    # -- what is shown ------------------------------------------------------------------------

    def draw(self) -> None:
        """Show the answer as far as it is."""
        session, job = self._panel.session, self._job
        own = job is not None and not job.done
        # The answers first: the job of one that is seen is in the list by then, and still is.
        answering, jobs = session.answering, session.jobs.all
        # Those of cells have their own stop, in the list of jobs.
        listed = {one.draft for one in jobs if one.screen is not None}
        elsewhere = any(draft not in listed for draft in answering) and not own
        self.send.disabled = own
        self.stop.disabled = not (own or elsewhere)
        begun = {one.draft for one in jobs}
        in_cell = any(draft not in begun for draft in answering)
        self.stop.tooltip = _stop_hint(in_cell)
        self.clear.layout.display = "" if self.chat.value else "none"
        self.note.value = muted(_stop_hint(in_cell)) if elsewhere else self._counter()
        self._draw_turns()
        self._draw_answer(job)

    def _counter(self) -> str:
        """Return how much of the context the conversation has taken."""
        job = self._job
        if not self.chat.value or job is None or job.reply is None:
            return ""
        if job.draft.call.request.chat is None:
            return ""
        prompt, said = job.reply.usage.prompt_tokens, job.reply.usage.completion_tokens
        if prompt is None or said is None:
            return ""
        context = job.draft.call.loaded_model.info.context_length
        of = f" of {context:,} ({(prompt + said) / context:.0%})" if context else ""
        return muted(f"{prompt + said:,} tokens of context used{of}")

    def _draw_turns(self) -> None:
        chats = self._panel.session.chats.all()
        chat = next((one for one in chats if one.name == CHAT), None)
        # What a cell has made stale is not sent any more: it would look like what was.
        turns = chat.fresh[-_SHOWN_TURNS:] if chat and self.chat.value else ()
        job = self._job
        if job is not None and turns and turns[-1].answer.content == job.draft.text:
            # It stands below, with its footer.
            turns = turns[:-1]
        self.turns.value = "".join(
            _turn(turn.question.content, turn.answer.content) for turn in turns
        )

    def _draw_answer(self, job: Job | None) -> None:
        if job is None:
            self.answer.value = self.take.value = self.take.code = ""
            return
        seen = (
            job, job.state, job.reply is None, job.notice, len(job.draft.text),
            len(job.draft.reasoning),
        )  # fmt: skip
        if seen == self._drawn:
            return
        self._drawn = seen
        text, reasoning = job.draft.text, job.draft.reasoning
        question = job.draft.call.messages[-1].content
        asked = _asked(question)
        thoughts = thoughts_html(reasoning)
        answer = self._markdown.render(text.lstrip()) if text.strip() else ""
        self.answer.value = (
            f'{asked}<div class="llm-turn">{thoughts}{answer}{muted(_below(job))}</div>'
        )
        if job.done:
            blocks = code_blocks(text)
            self.take.value = text.strip()
            self.take.code = blocks[0].code.rstrip("\n") if blocks else ""
            if job.error is not None:
                self._panel.show_error(job.error)
        else:
            self.take.value = self.take.code = ""

    def disable(self) -> None:
        """Let nothing be sent any more."""
        for button in (self.send, self.stop, self.clear):
            button.disabled = True


@lru_cache(maxsize=_SHOWN_TURNS)
def _turn(question: str, answer: str) -> str:
    """Return a turn that is over; all of them come again with every word of the next."""
    return f'{_asked(question)}<div class="llm-turn">{answer_html(answer, "markdown")}</div>'


def _asked(question: str) -> str:
    """Return a question as it was asked: its formulas are for the model to read."""
    inner = f'<div class="llm-turn llm-asked">{html.escape(question)}</div>'
    return f'<div class="{NO_MATH}">{inner}</div>'


def _below(job: Job) -> str:
    if job.reply is not None and job.done:
        return footer(job.reply, job.draft.call.loaded_model.info.local_size)
    return job.notice or ("…" if job.state == "running" else "thinking …")


def _stop_hint(in_cell: bool) -> str:
    """Return what stops an answer; a cell's only where the kernel takes a click meanwhile."""
    if not in_cell:
        return "An answer is being written: Stop ends it."
    if reach_busy_kernels():
        return "A cell is answering: Stop ends it."
    return "A cell is answering: ■ in the toolbar stops it."
