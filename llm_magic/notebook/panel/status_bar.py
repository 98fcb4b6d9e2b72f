"""The status line of a panel: state, model, memory, speed; as HTML for screen readers, too."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

import psutil

from llm_magic.notebook.display.messages import model_line
from llm_magic.text.formatting import human_bytes

if TYPE_CHECKING:
    from llm_magic.backends.manager import Status
    from llm_magic.session import Session
    from llm_magic.session.requests import Draft
    from llm_magic.types import Reply


def status_html(session: Session) -> str:
    """Return the status line."""
    status = session.status()
    answering = session.answering
    state = "Answering" if answering and status.status == "Ready" else status.status
    # Only the words that change with the state are read aloud, not figures that change all the time.
    said = (
        f'<span role="status" aria-live="polite"><span class="llm-state llm-{state}">{state}</span>'
    )
    active = next((info for info in status.models if info.name == status.active_model), None)
    said += f" <span>{html.escape(model_line(active) if active else _hint(status))}</span></span>"
    parts = [said, _memory(status), _speed(answering, session.last)]
    others = [info.name for info in status.models if info is not active]
    if others:
        parts.append(_quiet(f"also loaded: {', '.join(others)}"))
    return f'<div class="llm-status">{"".join(parts)}</div>'


def _hint(status: Status) -> str:
    if status.status in {"Loading", "Configuring"}:
        return "getting ready"
    return "nothing is loaded"


def _memory(status: Status) -> str:
    """Return how much memory is taken, as a bar with its figures."""
    machine = psutil.virtual_memory()
    held = status.memory.process if status.memory else psutil.Process().memory_info().rss
    free, total = machine.available, machine.total
    words = f"this process {human_bytes(held)}, {human_bytes(free)} free of {human_bytes(total)}"
    bars = [_bar("Memory", (total - free) / total, words)]
    for name, free, total in status.memory.gpu_memory if status.memory else ():
        words = f"{human_bytes(free)} free of {human_bytes(total)} on {name}"
        bars.append(_bar(name, 1 - free / total, words))
    return "".join(bars)


def _bar(name: str, share: float, words: str) -> str:
    label = html.escape(f"{name}: {words}")
    return (
        f'<span><meter min="0" max="1" high="0.9" value="{share:.3f}" aria-label="{label}"></meter>'
        f'<span class="llm-quiet">{html.escape(words)}</span></span>'
    )


def _speed(drafts: tuple[Draft, ...], last: Reply | None) -> str:
    """Return the speed of the answer in the making, else of the last one."""
    timing = drafts[-1].timing() if drafts else last.timing if last else None
    if timing is None or timing.tokens_per_s is None:
        return ""
    when = "now" if drafts else "last answer"
    return _quiet(f"{timing.tokens_per_s:.1f} tokens/s {when}")


def _quiet(text: str) -> str:
    return f'<span class="llm-quiet">{html.escape(text)}</span>'
