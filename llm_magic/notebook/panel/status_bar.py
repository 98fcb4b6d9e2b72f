"""The status line of the panel: state, model, memory and speed, accessible to screen readers."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

import psutil

from llm_magic.backends.base import LAST_ANSWER
from llm_magic.notebook.display.messages import model_line, shortened, shown_name
from llm_magic.text import human_bytes

if TYPE_CHECKING:
    from llm_magic.backends.manager import Status
    from llm_magic.session import Session
    from llm_magic.session.response import Response
    from llm_magic.types import Reply

_REASON_CHARACTERS = 80


def status_html(session: Session) -> str:
    """Return the status line as HTML."""
    status = session.status()
    answering = session.answering
    is_free = status.status in {"Ready", "Inactive", "Failed"}
    state = "Answering" if answering and is_free else status.status
    failure = status.backend_details.get(LAST_ANSWER, "")
    mark = "incomplete" if failure and state == "Ready" else state
    # Screen readers announce the state, not the figures, which change continuously.
    announced = f'<span role="status"><span class="llm-state llm-{mark}">{state}</span>'
    active = status.active
    # The active one may have been loaded while another one answers.
    busy = tuple(dict.fromkeys(one.model for one in answering)) if active else ()
    is_other = bool(busy) and busy != (status.active_model,)
    about = model_line(active) if active else _hint(status, answering)
    shown = ", ".join(map(shown_name, busy)) if is_other else about
    announced += f" <span>{html.escape(shown)}</span></span>"
    last = session.last if session.last and session.last.model == status.active_model else None
    parts = [announced, *([_muted(f"active: {about}")] if is_other else []), _memory(status)]
    if failure and not answering:
        parts.append(_muted(f"{LAST_ANSWER} {shortened(failure, _REASON_CHARACTERS)}"))
    else:
        parts.append(_speed(answering, last))
    others = [info.name for info in status.models if info is not active and info.name not in busy]
    if others:
        parts.append(_muted(f"also loaded: {', '.join(others)}"))
    return f'<div class="llm-status">{"".join(parts)}</div>'


def _hint(status: Status, answering: tuple[Response, ...]) -> str:
    """Return what the name of the state does not show."""
    if status.status in {"Loading", "Configuring"}:
        return ""
    if answering:
        return f"{shown_name(answering[-1].model)} finishes its answer · no model loaded"
    # The whole error is shown at its controls, with what to do in the panel.
    failed = status.last_error if status.status == "Failed" else None
    reason = f": {shortened(failed, _REASON_CHARACTERS)}" if failed else ""
    return f"no model loaded{reason}"


def _memory(status: Status) -> str:
    """Return bars and figures of the used memory, of the machine and its devices."""
    machine = psutil.virtual_memory()
    used = status.memory.process if status.memory else psutil.Process().memory_info().rss
    free, total = machine.available, machine.total
    text = f"this process {human_bytes(used)}, {human_bytes(free)} free of {human_bytes(total)}"
    bars = [_bar("Memory", (total - free) / total, text)]
    for name, free, total in status.memory.gpu_memory if status.memory else ():
        text = f"{human_bytes(free)} free of {human_bytes(total)} on {name}"
        bars.append(_bar(name, 1 - free / total, text))
    return "".join(bars)


def _bar(name: str, share: float, text: str) -> str:
    label = html.escape(f"{name}: {text}")
    return (
        f'<span><meter min="0" max="1" high="0.9" value="{share:.3f}" aria-label="{label}"></meter>'
        f'<span class="llm-quiet">{html.escape(text)}</span></span>'
    )


def _speed(responses: tuple[Response, ...], last: Reply | None) -> str:
    """Return the speed of the running answer, else of the last one."""
    timing = responses[-1].timing if responses else last.timing if last else None
    if timing is None or timing.tokens_per_s is None:
        return ""
    when = "now" if responses else "last answer"
    return _muted(f"{timing.tokens_per_s:.1f} tokens/s {when}")


def _muted(text: str) -> str:
    return f'<span class="llm-quiet">{html.escape(text)}</span>'
