"""The status line of the panel: state, model, memory and speed, accessible to screen readers."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

import psutil

from llm_magic.notebook.display.messages import model_line
from llm_magic.text import human_bytes

if TYPE_CHECKING:
    from llm_magic.backends.manager import Status
    from llm_magic.session import Session
    from llm_magic.session.response import Response
    from llm_magic.types import Reply


def status_html(session: Session) -> str:
    """Return the status line as HTML."""
    status = session.status()
    answering = session.answering
    state = "Answering" if answering and status.status == "Ready" else status.status
    # Screen readers announce the state, not the figures, which change continuously.
    announced = f'<span role="status"><span class="llm-state llm-{state}">{state}</span>'
    active = status.active
    announced += (
        f" <span>{html.escape(model_line(active) if active else _hint(status))}</span></span>"
    )
    parts = [announced, _memory(status), _speed(answering, session.last)]
    others = [info.name for info in status.models if info is not active]
    if others:
        parts.append(_muted(f"also loaded: {', '.join(others)}"))
    return f'<div class="llm-status">{"".join(parts)}</div>'


def _hint(status: Status) -> str:
    if status.status in {"Loading", "Configuring"}:
        return "loading the model"
    return "no model loaded"


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
