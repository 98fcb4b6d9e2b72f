"""The magics: each parses its line, calls the session, and shows the result."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

from llm_magic.config.commands import use_magics
from llm_magic.errors import OptionError
from llm_magic.notebook import cell_interrupts
from llm_magic.notebook.arguments import matcher
from llm_magic.notebook.display.call_line import CallLines
from llm_magic.notebook.frontend import running_cell, serve_outputs, stop_serving_outputs
from llm_magic.notebook.magics.ask import LLMMagics
from llm_magic.notebook.magics.base import SessionMagics
from llm_magic.notebook.magics.chats import ChatMagics
from llm_magic.notebook.magics.doctor import DoctorMagics
from llm_magic.notebook.magics.help import HelpMagics
from llm_magic.notebook.magics.jobs import JobMagics
from llm_magic.notebook.magics.models import ModelMagics
from llm_magic.notebook.magics.panel import PanelMagics
from llm_magic.session.jobs import without_view

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from IPython.core.interactiveshell import InteractiveShell

    from llm_magic.session import Session

GROUPS: tuple[type[SessionMagics], ...] = (
    LLMMagics,
    JobMagics,
    DoctorMagics,
    HelpMagics,
    ModelMagics,
    ChatMagics,
    PanelMagics,
)

_QUESTION = re.compile(r"^((?:[^=%#]+=)?\s*%llm(?:_explain)?\s.*\?)$")


def _ask_not_help(lines: list[str]) -> list[str]:
    """Keep IPython from opening help for ``%llm What is this?`` as it does for ``this?``.

    So too for ``%llm_explain``.
    """
    return [_QUESTION.sub(r"\1 ", line) for line in lines]


def _accept_no_body(lines: list[str]) -> list[str]:
    """Add an empty line below a lone ``%%llm -h`` or ``%%llm_explain``.

    IPython does not pass it to the magic without that.
    """
    is_magic = re.match(r"%%llm(_explain)?(?![\w?])", lines[0] if lines else "")
    if not is_magic or "".join(lines[1:]).strip():
        return lines
    return [lines[0].rstrip("\n") + "\n", "\n"]


# IPython does not call it to find out whether the input of a terminal is complete.
_accept_no_body.has_side_effects = True  # type: ignore[attr-defined]
_TRANSFORMERS = (_ask_not_help, _accept_no_body)


def register(shell: InteractiveShell, session: Session) -> None:
    """Register magics, completion and the display of replies; close the session at exit.

    What was registered before is removed, and its session is closed unless it is the same one.
    """
    before = unregister(shell, keep=session)
    try:
        groups = [group(shell, session) for group in GROUPS]
        shell.register_magics(*groups)
    except OptionError:
        # An invalid value in ipython_config.py must not leave a part of the extension registered.
        unregister(shell)
        raise
    use_magics(True)
    session.is_configured = True
    for magics in groups:
        for event, callback in _callbacks(magics):
            shell.events.register(event, callback)
        if isinstance(magics, PanelMagics):
            magics.take_panel(before)
    matcher.register(shell, session)
    shell.input_transformers_cleanup.extend(_TRANSFORMERS)
    cell_interrupts.start(shell, session)
    for mime_type, kind, show in _DISPLAYED:
        _formatter(shell, mime_type).for_type_by_name(*kind, show)
    session.cells.current = functools.partial(running_cell, shell)
    session.progress_view = CallLines(groups[0])
    serve_outputs(shell, functools.partial(_send_again, groups))


def unregister(shell: InteractiveShell, *, keep: Session | None = None) -> Sequence[SessionMagics]:
    """Undo `register` and close the session, unless it is the one to `keep`.

    Returns what was registered.
    """
    use_magics(False)
    matcher.unregister(shell)
    cell_interrupts.stop(shell)
    stop_serving_outputs(shell)
    if _ask_not_help in shell.input_transformers_cleanup:
        for transformer in _TRANSFORMERS:
            shell.input_transformers_cleanup.remove(transformer)
    registered = [m for m in shell.configurables if isinstance(m, SessionMagics)]
    for magics in registered:
        shell.configurables.remove(magics)
        for event, callback in _callbacks(magics):
            # Not registered where an invalid value in ipython_config.py ended `register`.
            with contextlib.suppress(ValueError):
                shell.events.unregister(event, callback)
        # IPython has no public API to remove a magic.
        for table in shell.magics_manager.magics.values():
            for name in [n for n, f in table.items() if getattr(f, "__self__", None) is magics]:
                del table[name]
    for session in {magics.session for magics in registered}:
        session.cells.current = lambda: None
        session.progress_view = without_view
        if session is not keep:
            session.close()
    for mime_type, kind, _show in _DISPLAYED:
        _formatter(shell, mime_type).pop(".".join(kind), None)
    return registered


def _callbacks(magics: SessionMagics) -> Iterator[tuple[str, Callable[..., object]]]:
    """Yield the methods that IPython calls before and after each cell."""
    if isinstance(magics, ChatMagics):
        yield "pre_run_cell", magics.before_cell
    if isinstance(magics, LLMMagics):
        yield "pre_run_cell", magics.before_cell
        yield "post_run_cell", magics.after_cell


def _send_again(registered: Sequence[SessionMagics], display_ids: Iterable[str]) -> None:
    """Send the outputs with these ids once more, as they are now."""
    ids = set(display_ids)
    for area in [area for magics in registered for area in magics.areas]:
        if area.is_shown and area.display_id in ids:
            area.send_again()


def _formatter(shell: InteractiveShell, mime_type: str) -> Any:
    return cast(Any, shell.display_formatter).formatters[mime_type]


def _reply_html(reply: Any) -> str:
    from llm_magic.notebook.display import answer_view, live_output, messages

    reasoning = answer_view.reasoning_html(reply.reasoning)
    answer = answer_view.answer_html(reply.text, "markdown")
    return reasoning + answer + live_output.muted(messages.footer(reply))


def _usage_html(usage: Any) -> str:
    from llm_magic.notebook.display import messages

    return messages.usage_table(usage)._repr_html_()


def _usage_text(usage: Any, printer: Any, _cycle: bool) -> None:
    from llm_magic.notebook.display import messages

    printer.text(repr(messages.usage_table(usage) if len(printer.stack) == 1 else usage))


# How IPython displays values of this package; the classes are imported when there are values of them.
_DISPLAYED: tuple[tuple[str, tuple[str, str], Callable[..., Any]], ...] = (
    ("text/html", ("llm_magic.types", "Reply"), _reply_html),
    ("text/html", ("llm_magic.session.usage", "SessionUsage"), _usage_html),
    ("text/plain", ("llm_magic.session.usage", "SessionUsage"), _usage_text),
)
