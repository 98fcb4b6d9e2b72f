"""The magics: each parses its line, calls the session, and shows the result."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from IPython.core.error import UsageError

from llm_magic.errors import OptionError, did_you_mean
from llm_magic.notebook import cell_interrupts
from llm_magic.notebook.arguments.magic_options import MAGICS
from llm_magic.notebook.frontend import running_cell
from llm_magic.notebook.magics.ask import LLMMagics
from llm_magic.notebook.magics.base import SessionMagics
from llm_magic.notebook.magics.chats import ChatMagics
from llm_magic.notebook.magics.doctor import DoctorMagics
from llm_magic.notebook.magics.help import HelpMagics
from llm_magic.notebook.magics.jobs import JobMagics
from llm_magic.notebook.magics.models import ModelMagics
from llm_magic.notebook.magics.panel import PanelMagics

if TYPE_CHECKING:
    from collections.abc import Sequence

    from IPython.core.interactiveshell import ExecutionResult, InteractiveShell

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

_NO_MAGIC = re.compile(r"`(?P<prefix>%%?)(?P<name>\w*lm\w*)` not found\.$", re.IGNORECASE)
# In names as short as llm, two swapped or doubled letters are a third of the name: %%lmm.
_SIMILAR = 0.65
_QUESTION = re.compile(r"^((?:[^=%#]+=)?\s*%llm\s.*\?)$")


def _ask_not_help(lines: list[str]) -> list[str]:
    """Keep IPython from opening help for ``%llm What is this?`` as it does for ``this?``."""
    return [_QUESTION.sub(r"\1 ", line) for line in lines]


def _accept_no_body(lines: list[str]) -> list[str]:
    """Add an empty line below a lone ``%%llm -h``, which IPython does not pass to the magic without it."""
    if not re.match(r"%%llm(?![\w?])", lines[0] if lines else "") or "".join(lines[1:]).strip():
        return lines
    return [lines[0].rstrip("\n") + "\n", "\n"]


# IPython does not call it to find out whether the input of a terminal is complete.
_accept_no_body.has_side_effects = True  # type: ignore[attr-defined]
_TRANSFORMERS = (_ask_not_help, _accept_no_body)


def _suggest_magic(result: ExecutionResult) -> None:
    """Write how to correct the cell, below the error of IPython about a magic that does not exist."""
    error = result.error_in_exec
    found = _NO_MAGIC.search(str(error)) if isinstance(error, UsageError) else None
    if found is None:
        return
    name, prefix = found["name"], found["prefix"]
    known = MAGICS if prefix == "%" else ("llm",)
    if prefix == "%%" and name in known:
        advice = (
            "%%llm must be the first line of the cell: write nothing above it, not even a comment."
        )
    else:
        advice = did_you_mean(name, known, prefix=prefix, similar=_SIMILAR).strip()
    if advice:
        sys.stderr.write(f"{advice}\n")


def register(shell: InteractiveShell, session: Session) -> None:
    """Register magics, completion and the display of replies; close the session at exit.

    What was registered before is removed, and its session is closed unless it is the same one.
    """
    from llm_magic.notebook.arguments import completer

    before = unregister(shell, keep=session)
    try:
        groups = [group(shell, session) for group in GROUPS]
        shell.register_magics(*groups)
    except OptionError:
        # An invalid value in ipython_config.py must not leave a part of the extension registered.
        unregister(shell)
        raise
    for magics in groups:
        if isinstance(magics, ChatMagics):
            shell.events.register("pre_run_cell", magics.before_cell)
        if isinstance(magics, PanelMagics):
            magics.take_panels(before)
    completer.register(shell, session)
    shell.input_transformers_cleanup.extend(_TRANSFORMERS)
    shell.events.register("post_run_cell", _suggest_magic)
    cell_interrupts.start(shell)
    for mime_type, kind, show in _DISPLAYED:
        _formatter(shell, mime_type).for_type_by_name(*kind, show)
    session.cells.current = functools.partial(running_cell, shell)


def unregister(shell: InteractiveShell, *, keep: Session | None = None) -> Sequence[SessionMagics]:
    """Undo `register` and close the session, unless it is the one to `keep`.

    Returns what was registered.
    """
    from llm_magic.notebook.arguments import completer

    completer.unregister(shell)
    cell_interrupts.stop(shell)
    if _ask_not_help in shell.input_transformers_cleanup:
        for transformer in _TRANSFORMERS:
            shell.input_transformers_cleanup.remove(transformer)
        shell.events.unregister("post_run_cell", _suggest_magic)
    registered = [m for m in shell.configurables if isinstance(m, SessionMagics)]
    for magics in registered:
        shell.configurables.remove(magics)
        if isinstance(magics, ChatMagics):
            shell.events.unregister("pre_run_cell", magics.before_cell)
        # IPython has no public API to remove a magic.
        for table in shell.magics_manager.magics.values():
            for name in [n for n, f in table.items() if getattr(f, "__self__", None) is magics]:
                del table[name]
    for session in {magics.session for magics in registered}:
        session.cells.current = lambda: None
        if session is not keep:
            session.close()
    for mime_type, kind, _show in _DISPLAYED:
        _formatter(shell, mime_type).pop(".".join(kind), None)
    return registered


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
