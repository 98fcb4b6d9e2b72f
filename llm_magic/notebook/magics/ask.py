"""``%llm``, ``%%llm`` and ``%llm_explain``: send a prompt and show the answer."""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import functools
import inspect
import keyword
import os
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from IPython.core.magic import magics_class

from llm_magic.errors import (
    Interrupted,
    InvalidReply,
    LLMMagicException,
    OptionError,
    PromptError,
)
from llm_magic.notebook.arguments import parser
from llm_magic.notebook.magics.base import SessionMagics, line_cell_magic, line_magic
from llm_magic.notebook.magics.traitlets_config import declare
from llm_magic.session.response import Response

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from llm_magic.notebook.arguments.parser import Parsed
    from llm_magic.notebook.display.code_cells import CodeCells
    from llm_magic.notebook.display.tables import Table
    from llm_magic.prompts.explain_error import Cell
    from llm_magic.prompts.template import Filled
    from llm_magic.session import Session
    from llm_magic.session.requests import Request
    from llm_magic.types import Reply

# Names that IPython reads or sets: a Reply there breaks the notebook or is overwritten.
_IPYTHON_NAMES = re.compile(r"In|Out|get_ipython|exit|quit|_(?:i{1,3}|ih|oh|dh|i?\d+)?|_{2,3}")


# Where the last reply is, by whether the notebook has `llm`.
_LAST = {True: "llm.last", False: "llm.last (from llm_magic import llm)"}
V = TypeVar("V")
# The names in the statement that IPython makes of ``%llm …`` or ``%%llm``.
_STATEMENT = ("get_ipython", "run_line_magic")


@magics_class
class LLMMagics(SessionMagics):
    """Sends prompts to the models of this kernel; its traits are the generation settings."""

    def __init__(self, shell: InteractiveShell, session: Session) -> None:
        changed: dict[str, object] = {}
        if shell.config.get("LLMMagics"):
            # c.LLMMagics.temperature = 0.2 in ipython_config.py
            declare(type(self))
            changed = {
                name: getattr(session.generation, name) for name in session.generation.changed
            }
        super().__init__(shell, session)
        # The variables that -o has set.
        self._outputs: set[str] = set()
        if changed:
            # The user changed them before %reload_ext.
            session.generation.update(**changed)

    @classmethod
    def class_traits(cls, **metadata: Any) -> dict[str, Any]:
        """Return the traits, with one for each generation setting.

        They are declared at the first call: loading the extension must not import pydantic.
        """
        declare(cls)
        return super().class_traits(**metadata)

    @line_cell_magic
    def llm(self, line: str, cell: str | None = None) -> Table | Reply | Response | None:
        """Send a prompt to the active model and stream the answer into the cell."""
        if cell is None:
            args = parser.parse_with_prompt("llm", line, self.notebook_names)
        else:
            args = parser.parse_with_cell("llm", line, cell, self.notebook_names)
        if args["output"] is not None:
            self._check_output(args)
        if args["replace"] and args["format"] != "code":
            raise OptionError("--replace requires -f code.")
        if args["bg"]:
            return self._unless_shown(self._answer_in_background(args))
        return self._answer(*self._request(args), args)

    def _request(self, args: Parsed) -> tuple[Request, tuple[str, ...]]:
        """Return the request with the notebook's values filled in, and notes about the prompt."""
        from llm_magic.session.requests import Request

        prompt, system, is_dry_run = args.prompt, args["system"], bool(args["dry_run"])
        notes, longest = args.notes, ("", 0)
        if not args["literal"] and "{" in f"{prompt}{system}":
            names = self.notebook_names(f"{prompt} {system}")
            filled = self._filled(prompt, names, all_notes=is_dry_run)
            prompt, notes, longest = filled.text, notes + filled.notes, filled.longest
            if system is not None:
                filled = self._filled(system, names, all_notes=is_dry_run)
                system, notes = filled.text, tuple(dict.fromkeys(notes + filled.notes))
        chat, key = args["chat"], None
        if chat is not None:
            from llm_magic.notebook.display.messages import context_notes

            cells = self.session.cells
            key = cells.key(chat, args.prompt, peek=is_dry_run)
            context = self.session.chats.context(chat, key, system)
            in_terminal = cells.current() is None
            notes += context_notes(context, by_text=not self.cell_id, in_terminal=in_terminal)
        trim, options, as_json = bool(args["trim"]), args.options, args["format"] == "json"
        request = Request(
            prompt, args["model"], system, chat, key, options, trim, self.began, as_json,
            longest_reference=longest,
            stored_in=self._stored_in(args),
        )  # fmt: skip
        return request, notes

    def _stored_in(self, args: Parsed) -> str:
        """Return what messages call the reply: the variable of ``-o``, else the last one."""
        output = args["output"] if args["format"] != "json" else None
        return output or _LAST["llm" in self.shell.user_ns]

    def _filled(self, text: str, names: Mapping[str, Any], *, all_notes: bool) -> Filled:
        """Return a text with its references filled in; jobs in them are waited for first.

        Raises `PromptError` with the error of a job that failed.
        """
        from llm_magic.prompts import template

        fill = functools.partial(template.fill, all_notes=all_notes, escape=" or use --literal")
        filled = fill(text, names)
        found = re.findall(r"\w+", " ".join(filled.used))
        values = ((word, names.get(word)) for word in dict.fromkeys(found))
        named = [(w, v) for w, v in values if isinstance(v, Response) and v.number is not None]
        jobs = [job for _, job in named]
        if any(not job.done for job in jobs):
            self.wait_for_jobs(jobs)
            filled = fill(text, names)
        notes = dict.fromkeys(filled.notes)
        for word, job in named:
            job.is_awaited = True
            if job.failure:
                raise PromptError(f"{{{word}}}: job {job.number} failed: {job.failure}")
            if job.state == "stopped":
                notes[f"job {job.number} was stopped: its incomplete answer is inserted"] = None
        return dataclasses.replace(filled, notes=tuple(notes))

    def _answer(
        self, request: Request, notes: tuple[str, ...], args: Parsed
    ) -> Table | Reply | None:
        """Send a request and show the answer as the options of the line require."""
        from llm_magic.notebook.display import answer_view, live_output, messages

        area = live_output.LiveArea(live=self.live)
        if self.session.is_loading_in_background:
            self.show_load(area)
        if args["dry_run"]:
            area.clear()
            dry = self.session.dry_run(request)
            answer_view.write_notes((*notes, *filter(None, (dry.problem,))))
            return messages.dry_run_table(dry)
        response = self.session.ask(request)
        view = answer_view.view(self.shell, response, args, area)
        try:
            with response:
                if notes := (*notes, *response.prepared.notes):
                    answer_view.write_notes(notes)
                view.draw()
                for _ in response.updates(view.pause):
                    view.draw()
        finally:
            if response.has_reply:
                if args["output"] is not None:
                    # First: the variable is set even if displaying the answer fails.
                    self._store(response, args)
                view.finish()
            else:
                view.clear()
        reply = response.result()
        if args["format"] == "code":
            self._code_cells.offer(reply, self.cell_id, replace=bool(args.get("replace")))
        return self._unless_shown(reply)

    def _store(self, response: Response, args: Parsed) -> None:
        """Set the variable of ``-o``, unless the answer should be JSON and is not."""
        reply, name = response.reply, args["output"]
        assert reply is not None, "it has ended"
        if isinstance(response.error, InvalidReply):
            if name in self.shell.user_ns:
                response.error.append(f"{name} keeps its previous value.")
            return
        # An answer that was stopped fails for another reason.
        with contextlib.suppress(InvalidReply):
            value = reply.json() if args["format"] == "json" else reply
            self._set_output(name, value)

    def _check_output(self, args: Parsed) -> None:
        """Check the name after ``-o``, and note which value of the user it replaces."""
        from llm_magic.types import Reply

        name = args["output"]
        _check_variable(name)
        value = self.shell.user_ns.get(name)
        if name in self._outputs or isinstance(value, (Reply, Response)):
            return
        if value is not None:
            args.notes += (f"-o {name} replaces the {type(value).__name__} in {name}.",)
        elif hasattr(builtins, name):
            args.notes += (f"-o {name} hides the built-in {name}. To restore it, run: del {name}",)

    def _set_output(self, name: str, value: object) -> None:
        self.shell.user_ns[name] = value
        self._outputs.add(name)

    def _unless_shown(self, value: V) -> V | None:
        """Return the value of the magic, or None where it is all of its statement.

        IPython displays the value of such a statement, and the answer is shown already.
        """
        frame = inspect.currentframe()
        while frame is not None and frame.f_globals is not self.shell.user_global_ns:
            frame = frame.f_back
        # ``x = %llm …`` also stores a name, and a function that calls the magic has another name.
        if frame is None or frame.f_code.co_name != "<module>":
            return value
        return None if len(frame.f_code.co_names) == len(_STATEMENT) else value

    @functools.cached_property
    def _code_cells(self) -> CodeCells:
        from llm_magic.notebook.display.code_cells import CodeCells

        return CodeCells(self.shell)

    def _answer_in_background(self, args: Parsed) -> Response:
        """Start a job that its cell displays, and return it at once."""
        from llm_magic.notebook.display.background_output import BackgroundOutput

        if args["dry_run"]:
            raise OptionError("--dry-run sends nothing, so --bg has no effect. Remove one of them.")
        if args["format"] == "code":
            raise OptionError(
                "--bg returns before the code is complete, so -f code cannot create a cell. Remove one"
                " of them."
            )
        request, notes = self._request(args)
        response = self.session.ask(request, background=True)
        output = response.view = BackgroundOutput(self.shell, response, args, self.live)
        for other in self.session.jobs.running:
            if output.replaces(other):
                other.cancel()
                notes += (f"stopped job {other.number}, which this cell started earlier.",)
        if args["output"] is not None:
            self._set_output(args["output"], response)
        output.start((*notes, *response.prepared.notes))
        return response

    # -- %llm_explain -------------------------------------------------------------------------

    @line_magic
    def llm_explain(self, line: str) -> Table | Reply | None:
        """Explain the last exception: its cause and a fix."""
        from llm_magic.notebook.display.tables import Table
        from llm_magic.prompts import explain_error

        error = explain_error.last_error()
        with _explaining(error):
            args = self.parse("llm_explain", line)
            if args["output"] is not None:
                self._check_output(args)
            if error is None:
                return Table(("",), [], "No exception has been raised in this kernel yet.")
            if isinstance(error, LLMMagicException):
                # Its message already has the cause and the fix.
                return Table(("",), [], f"{type(error).__name__}: {error}")
            return self._answer(*self._question(error, args), args)

    def _question(self, error: BaseException, args: Parsed) -> tuple[Request, tuple[str, ...]]:
        """Return the request about an exception without secrets, and notes about the answer."""
        from llm_magic.config.redaction import MASK, Redactor
        from llm_magic.prompts import explain_error
        from llm_magic.session.requests import Request

        redactor = Redactor(os.environ, self.session.keys.secrets())
        names, hidden = self.shell.user_ns, self.shell.user_ns_hidden
        failed = explain_error.failure(error, self._find_cell, names, redactor, hidden)
        as_code, chat, key = args["format"] == "code", args["chat"], None
        if chat is not None:
            key = self.session.cells.key(chat, peek=bool(args["dry_run"]))
        missing = {
            MASK: f"{MASK} in the corrected cell replaces a secret that was not sent.",
            explain_error.CUT: "The cell is too long to send: the corrected cell lacks its middle.",
        }
        sent = failed.cell.source if as_code and failed.cell is not None else ""
        notes = args.notes + tuple(note for mark, note in missing.items() if mark in sent)
        prompt, system = explain_error.question(failed, fix=as_code), explain_error.SYSTEM
        as_json = args["format"] == "json"
        request = Request(
            prompt, args["model"], system, chat, key, args.options, False, self.began, as_json,
            stored_in=self._stored_in(args),
        )  # fmt: skip
        return request, notes

    def _find_cell(self, filename: str) -> Cell | None:
        """Return the cell that runs under a file name, as the user typed it if possible."""
        import linecache

        from llm_magic.prompts.explain_error import Cell

        named = self.shell.compile.format_code_name(filename)
        if named is None:
            return None
        label = named[1]
        source = "".join(linecache.getlines(filename))
        number = label.removeprefix("In[").removesuffix("]")
        history = self.shell.history_manager
        typed = history.input_hist_raw if history is not None else []
        if number.isdecimal() and 0 < int(number) < len(typed):
            raw = typed[int(number)]
            # Some cells are not counted, so the number may belong to another cell.
            if self.shell.input_transformer_manager.transform_cell(raw) == source:
                return Cell(label, raw)
        return Cell(label, source)


def _check_variable(name: str) -> None:
    """Raise `OptionError` if ``-o`` cannot store a value in a variable of this name."""
    if not name.isidentifier() or keyword.iskeyword(name):
        plain = " Use a plain name, such as answer, and assign its value in Python."
        advice = plain if "[" in name or "." in name else ""
        raise OptionError(f"-o {name}: this is not a valid variable name.{advice}")
    if name.startswith("__") or _IPYTHON_NAMES.fullmatch(name):
        raise OptionError(f"-o {name}: Python or IPython uses this name. Choose another.")


@contextlib.contextmanager
def _explaining(error: BaseException | None) -> Iterator[None]:
    """Store the explained error in an error that is raised here, so that it can be explained again."""
    try:
        yield
    except KeyboardInterrupt:
        stopped = Interrupted("Stopped.")
        stopped.explaining = error
        raise stopped from None
    except LLMMagicException as own:
        own.explaining = error
        raise
