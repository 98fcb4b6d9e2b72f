"""``%llm``, ``%%llm`` and ``%llm_explain``: send a prompt and show the answer."""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import functools
import inspect
import keyword
import numbers
import os
import re
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

from IPython.core.error import UsageError
from IPython.core.magic import magics_class

from llm_magic.errors import (
    Interrupted,
    InvalidReply,
    LLMMagicException,
    OptionError,
    PromptError,
    shown_error,
)
from llm_magic.notebook.frontend import running_cell
from llm_magic.notebook.magics.base import SessionMagics, line_cell_magic
from llm_magic.notebook.magics.help import missing_magic, suggest_magic
from llm_magic.notebook.magics.traitlets_config import declare
from llm_magic.session.response import Response

if TYPE_CHECKING:
    from IPython.core.interactiveshell import ExecutionResult, InteractiveShell

    from llm_magic.notebook.arguments.parser import Parsed
    from llm_magic.notebook.display.answer_view import RichView
    from llm_magic.notebook.display.background_output import BackgroundOutput
    from llm_magic.notebook.display.code_cells import CodeCells
    from llm_magic.notebook.display.live_output import LiveArea
    from llm_magic.notebook.display.tables import Table
    from llm_magic.notebook.magics.over import Output
    from llm_magic.prompts.explain_error import Cell
    from llm_magic.prompts.template import Filled
    from llm_magic.session import Session
    from llm_magic.session.chats import Context
    from llm_magic.session.jobs import Job
    from llm_magic.session.map.mapped import Mapped
    from llm_magic.session.map.run import MapRun
    from llm_magic.session.requests import Request
    from llm_magic.types import Reply

# Names that IPython reads or sets: a Reply there breaks the notebook or is overwritten.
_IPYTHON_NAMES = re.compile(r"In|Out|get_ipython|exit|quit|_(?:i{1,3}|ih|oh|dh|i?\d+)?|_{2,3}")

# Magics that are typed like commands. Others have the names of common variables: page, store, config.
_COMMANDS = frozenset(("cd", "conda", "history", "ls", "pip", "pwd", "run", "time", "who", "whos"))
# What IPython removes from the lines of a cell.
_INPUT_PROMPT = re.compile(r">>>|\.\.\.|(?:\[\w+\] )?In \[\d+\]:")
# Values of the user that -o replaces.
_REPLACED = (str, bytes, numbers.Number, list, tuple, dict, set, frozenset)
_MAX_TURNS = 50  # whose footers are updated
V = TypeVar("V")
# The names in the statement that IPython makes of ``%llm …`` or ``%%llm``.
_STATEMENT = ("get_ipython", "run_line_magic")


@magics_class
class LLMMagics(SessionMagics):
    """Sends prompts to the models of this kernel; its traits are the generation settings."""

    def __init__(self, shell: InteractiveShell, session: Session) -> None:
        changed: dict[str, object] = {}
        if shell.config.get("LLMMagics") and not session.is_configured:
            # c.LLMMagics.temperature = 0.2 in ipython_config.py
            declare(type(self))
            changed = {
                name: getattr(session.generation, name) for name in session.generation.changed
            }
        super().__init__(shell, session)
        # The variables that -o has set, and the columns of --over, as they are written.
        self._outputs: set[str] = set()
        # The last exception before the running cell.
        self._last_error: BaseException | None = None
        # By chat and key, the latest turns, whose footers show what is stale.
        self._turns: dict[tuple[str, str], tuple[RichView, Context]] = {}
        # The turns that are answered in the background.
        self._background_turns: list[BackgroundOutput] = []
        if changed:
            # Python code changed them before %load_ext.
            session.generation.update(**changed)

    @classmethod
    def class_traits(cls, **metadata: Any) -> dict[str, Any]:
        """Return the traits, with one for each generation setting.

        They are declared at the first call: loading the extension must not import pydantic.
        """
        declare(cls)
        return super().class_traits(**metadata)

    @line_cell_magic
    def llm(
        self, line: str, cell: str | None = None
    ) -> Table | Reply | Response | Mapped | MapRun | None:
        """Send a prompt to the active model and stream the answer into the cell."""
        from llm_magic.notebook.arguments import parser
        from llm_magic.notebook.magics import over

        if cell is None:
            args = parser.parse_with_prompt("llm", line, self.notebook_names)
        else:
            args = parser.parse_with_cell("llm", line, cell, self.notebook_names)
            args.notes += self._changed_by_ipython(cell)
        over.check(args)
        if args["over"] is not None:
            result = self._map(args)
            return result if args["dry_run"] else self._unless_shown(result)
        if args["output"] is not None:
            self._check_output(args)
        if args["replace"] and args["format"] != "code":
            raise OptionError("--replace requires -f code.")
        if args["bg"]:
            return self._unless_shown(self._answer_in_background(args))
        return self._answer(*self._request(args), args)

    def _changed_by_ipython(self, cell: str) -> tuple[str, ...]:
        """Return a note if IPython has removed what looks like input prompts from the cell."""
        typed = [line.strip() for line in self._typed_cell().splitlines() if line.strip()]
        received = [line.strip() for line in cell.splitlines() if line.strip()]
        is_same = not typed or not typed[0].startswith("%%") or typed[1:] == received
        if is_same or not any(map(_INPUT_PROMPT.match, typed)):
            return ()
        return (
            "IPython removed the input prompts (such as >>> and ...) from this cell: the text is sent"
            " without them. To send them, put the text into a variable, and write {variable}.",
        )

    def _typed_cell(self) -> str:
        """Return the running cell as the user typed it, or an empty string."""
        running, history = running_cell(self.shell), self.shell.history_manager
        if running is not None:
            return running.text
        typed = history.input_hist_raw if history is not None else [""]
        return str(typed[-1])

    def _request(self, args: Parsed) -> tuple[Request, tuple[str, ...]]:
        """Return the request with the notebook's values filled in, and notes about the prompt."""
        from llm_magic.session.requests import Request, type_of

        prompt, system, is_dry_run = args.prompt, args["system"], bool(args["dry_run"])
        notes, longest = args.notes + self._load_notes(args), ("", 0)
        if not args["literal"] and "{" in f"{prompt}{system}":
            names = self.notebook_names(f"{prompt} {system}")
            filled = self._filled(prompt, names, all_notes=is_dry_run)
            prompt, notes, longest = filled.text, notes + filled.notes, filled.longest
            if system is not None:
                filled = self._filled(system, names, all_notes=is_dry_run)
                system, notes = filled.text, tuple(dict.fromkeys(notes + filled.notes))
        notes += self._system_notes(args)
        chat, key = args["chat"], None
        if chat is not None:
            key = self.session.cells.key(chat, args.prompt, peek=is_dry_run)
            notes += self._chat_notes(chat, key, system, is_dry_run=is_dry_run)
        trim, options, as_json = bool(args["trim"]), args.options, args["format"] == "json"
        request = Request(
            prompt, args["model"], system, chat, key, options, trim, self.began, as_json,
            answer_type=type_of(self._named_types(args)),
            longest_reference=longest,
            stored_in=self._stored_in(args),
        )  # fmt: skip
        return request, notes

    def _named_types(self, args: Parsed) -> dict[str, Any]:
        """Return what the options name as the type of the answer, by their names."""
        from llm_magic.notebook.arguments.magic_options import TYPE_OPTIONS

        given = {one.dest: args[one.dest] for one in TYPE_OPTIONS if args[one.dest] is not None}
        if not given:
            return {}
        from llm_magic.notebook.magics.answer_types import named_types

        names = self.notebook_names(" ".join(given.values()))
        return named_types(given, args["format"], names)

    def _system_notes(self, args: Parsed) -> tuple[str, ...]:
        """Return a note if the system prompt is the name of a variable with a text."""
        name = args["system"] or ""
        if not name.isidentifier() or not isinstance(self.notebook_names(name).get(name), str):
            return ()
        return (
            f"-s {name} sends the word. To send the value of the variable, write -s {{{name}}}.",
        )

    def _load_notes(self, args: Parsed) -> tuple[str, ...]:
        """Return a note if ``%llm_load --bg`` failed, which its cell shows, and another model answers."""
        failed = self.session.discard_failed_load()
        if not failed:
            return ()
        from llm_magic.notebook.display.messages import not_loaded_note

        answers = args["model"] or self.session.status().active_model
        return (not_loaded_note(failed, answers),)

    def _chat_notes(
        self, chat: str, key: str, system: str | None, *, is_dry_run: bool
    ) -> tuple[str, ...]:
        """Return the notes about a chat that precede an answer."""
        from llm_magic.notebook.display import messages

        context, notes = self.session.chats.context(chat, key, system), []
        running = self.session.earlier_turns(chat, key)
        if running and is_dry_run:
            notes.append(messages.running_note(running, chat))
        if is_dry_run or not running:
            # Otherwise they follow the answer: what is sent depends on the turns that run.
            notes += messages.chat_notes(context)
        if not self.cell_id:
            in_terminal = self.session.cells.current() is None
            notes.append(messages.same_text_note(context, in_terminal=in_terminal))
        return tuple(filter(None, notes))

    def _stored_in(self, args: Parsed) -> str:
        """Return what messages call the reply: the variable of ``-o``, else the last one."""
        from llm_magic.notebook.arguments.magic_options import TYPE_OPTIONS

        output = args["output"]
        if output and args.get("bg"):
            # The variable has the job.
            return f"{output}.text"
        if args["format"] == "json" or any(args.get(one.dest) for one in TYPE_OPTIONS):
            output = None
        return output or self._in_python("last")

    def _in_python(self, name: str) -> str:
        """Return how messages name an attribute of `llm`, which the notebook may not have."""
        has_llm = "llm" in self.shell.user_ns
        return f"llm.{name}{'' if has_llm else ' (from llm_magic import llm)'}"

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
            how = {"stopped": "was stopped", "incomplete": "ended early"}.get(job.state)
            if how is not None:
                notes[f"job {job.number} {how}: its incomplete answer is inserted"] = None
        return dataclasses.replace(filled, notes=tuple(notes))

    def _answer(
        self, request: Request, notes: tuple[str, ...], args: Parsed
    ) -> Table | Reply | None:
        """Send a request and show the answer as the options of the line require."""
        from llm_magic.notebook.display import answer_view, messages

        plain = bool(args["plain"])
        show_notes = functools.partial(answer_view.show_notes, self.shell, plain=plain)
        area = self.live_area()
        self.show_load(area)
        if args["dry_run"]:
            area.clear()
            dry = self.session.dry_run(request)
            show_notes((*notes, *filter(None, (dry.problem,))))
            return messages.dry_run_table(dry)
        response = self.session.ask(request)
        view = answer_view.view(self.shell, response, args, area)
        try:
            with response:
                if notes := (*notes, *response.prepared.notes):
                    show_notes(notes)
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
        if isinstance(view, answer_view.RichView):
            self._note_turn(response, view)
        reply = response.result()
        if args["format"] == "code":
            self._code_cells.offer(reply, self.cell_id, replace=bool(args.get("replace")))
        return self._unless_shown(reply)

    # -- %%llm --over -------------------------------------------------------------------------

    def _map(self, args: Parsed) -> Table | Mapped | MapRun:
        """Send the prompt for each row of the data, and show and store the answers."""
        from llm_magic.notebook.display import answer_view, messages
        from llm_magic.notebook.magics import over

        names = self.notebook_names(f"{args['over']} {args.prompt}")
        # A variable gets no answers then, so that the cells below it run.
        is_stored = args["output"] is not None and not (args["dry_run"] or args["sample"])
        data = over.data_of(args["over"], names, may_be_empty=is_stored)
        output = self._map_output(args, data)
        types = self._named_types(args)
        about, notes = over.options(args, names, types), args.notes + self._load_notes(args)
        notes += over.save_notes(args)
        plain, is_dry_run = bool(args["plain"]), bool(args["dry_run"])
        if args["system"] is not None:
            filled = self._filled(args["system"], names, all_notes=is_dry_run)
            about["system"], notes = filled.text, notes + filled.notes + self._system_notes(args)
        area = self.live_area()
        self.show_load(area)
        if is_dry_run:
            area.clear()
            dry, dry_notes = over.dry_run(self.session, args.prompt, data, about)
            answer_view.show_notes(self.shell, notes + dry_notes, plain=plain)
            return messages.dry_run_table(dry)
        run = self.session.start_map(args.prompt, data, **about)
        over.check_column(output, run)
        notes += run.notes
        if args["bg"]:
            area.clear()
            self.session.jobs.add(run)
            run.start_in_background()
            self._show_job(run, args, notes)
            return run
        answer_view.show_notes(self.shell, notes, plain=plain)
        self._run_map(run, data, output, args, area)
        return run.mapped

    def _map_output(self, args: Parsed, data: object) -> Output | None:
        """Return where the answers are stored; raises `OptionError` if that is impossible."""
        from llm_magic.notebook.magics import over

        if args["sample"] is not None:
            over.check_sample(data)
        if args["output"] is None:
            return None
        output = over.output_of(args["output"])
        if output.column is None:
            self._check_output(args)
            over.check_not_source(args["over"], output.name)
        elif args["bg"]:
            raise OptionError(
                f"--bg returns before there are answers for {output}. Write -o NAME, which stores the job."
            )
        else:
            output.check(data, self.shell.user_ns, is_ours=str(output) in self._outputs)
        return output

    def _run_map(
        self, run: MapRun, data: object, output: Output | None, args: Parsed, area: LiveArea
    ) -> None:
        """Send the rows; show and store what there is, however it ends."""
        from llm_magic.notebook.display.live_output import is_notebook
        from llm_magic.notebook.display.map_view import MapView
        from llm_magic.notebook.magics import over

        is_plain = bool(args["plain"]) or not is_notebook(self.shell)
        shown_in = None if is_plain else area
        if is_plain:
            area.clear()
        footer, stored_in = not args["quiet"], str(output or "")
        column = output.column if output is not None else None
        view = MapView(run, shown_in, show_footer=footer, stored_in=stored_in, column=column)
        try:
            with run:
                view.draw()
                for _ in run.updates(view.pause):
                    view.draw()
        finally:
            # ``mapped = %llm --over …`` needs no other name.
            is_alone = not args["quiet"] and self._unless_shown(run) is None
            last = self._in_python("last_mapped") if output or is_alone else ""
            stored = over.stored(run, data, output, self.shell.user_ns, last)
            lines = (*over.advice(run, args), *stored)
            view.finish(lines)
            if output is not None and not (run.is_sample and output.column is not None):
                self._outputs.add(str(output))
        run.result()

    def _note_turn(self, response: Response, view: RichView) -> None:
        """Store the view of a turn whose footer can be updated."""
        context = response.prepared.context
        if context is None:
            return
        self._turns.pop((context.chat, context.key), None)
        if response.error is None and self.live:
            self._turns[context.chat, context.key] = view, context
        for key in list(self._turns)[:-_MAX_TURNS]:
            del self._turns[key]

    def before_cell(self, _info: object) -> None:
        """Note the last exception, which a magic that does not exist must not replace.

        Threads can request answers again, which `%llm_stop` stopped in the cell before.
        """
        self._last_error = shown_error()
        self._note_background_turns()
        # Outside of ipykernel, nothing else ends the effect of %llm_stop.
        self.session.resume_threads()

    def after_cell(self, result: ExecutionResult) -> None:
        """Update the footers of turns that became stale, or above turns that have run again.

        Where the cell called a magic that does not exist, suggest one.
        """
        before, self._last_error = self._last_error, None
        error = result.error_in_exec
        if isinstance(error, UsageError) and (missing := missing_magic(error)):
            # %llm_explain explains the exception before it.
            cast(Any, error).explaining = before
            suggest_magic(missing)
        self._note_background_turns()
        for key, (view, context) in list(self._turns.items()):
            now = self.session.chats.updated(context)
            if now is None:
                del self._turns[key]
            elif now != context:
                self._turns[key] = view, now
                view.finish(now)

    def _note_background_turns(self) -> None:
        """Store the views of the turns that were answered in the background and are shown."""
        if not self._background_turns:
            return
        from llm_magic.notebook.display.answer_view import RichView

        for output in [one for one in self._background_turns if one.is_shown]:
            self._background_turns.remove(output)
            if isinstance(output.job, Response) and isinstance(output.view, RichView):
                self._note_turn(output.job, output.view)

    def _store(self, response: Response, args: Parsed) -> None:
        """Set the variable of ``-o``, unless the answer should be JSON and is not."""
        reply, name = response.reply, args["output"]
        assert reply is not None, "it has ended"
        if isinstance(response.error, InvalidReply):
            is_set = name in self.shell.user_ns
            response.error.append(
                f"{name} {'keeps its previous value' if is_set else 'was not set'}."
            )
            return
        if response.prepared.request.answer_type is not None:
            if response.state == "done":
                self._set_output(name, reply.value)
            return
        # An answer that was stopped fails for another reason.
        with contextlib.suppress(InvalidReply):
            value = reply.json() if args["format"] == "json" else reply
            self._set_output(name, value)

    def _check_output(self, args: Parsed) -> None:
        """Check the name after ``-o``, and note which value of the user it replaces.

        Raises `OptionError` for a value that may be hard to make again, such as a DataFrame.
        """
        from llm_magic.types import Reply

        name = args["output"]
        _check_variable(name)
        value = self.shell.user_ns.get(name)
        if name in self._outputs or isinstance(value, (Reply, Response)):
            return
        if value is not None and not isinstance(value, _REPLACED):
            advice = f"Store the answer in another variable, or first run: del {name}"
            if args["over"] is not None:
                advice = f'Choose another name, or write -o {name}["answer"] to set a column of it.'
            raise OptionError(
                f"-o {name} would replace the {type(value).__name__} in {name}. {advice}"
            )
        if value is not None:
            args.notes += (f"-o {name} replaces the {type(value).__name__} in {name}.",)
        elif hasattr(builtins, name):
            args.notes += (f"-o {name} hides the built-in {name}. Run del {name} to restore it.",)
        elif name not in self.shell.user_ns and name in self._magic_names():
            args.notes += (f"-o {name} hides the magic {name}: write %{name}, with its %.",)

    def _magic_names(self) -> Collection[str]:
        """Return the magics that people write without their %, which a variable of the name would hide."""
        magics: Mapping[str, Collection[str]] = self.shell.magics_manager.magics
        ours = {name for name in magics["line"] if name.startswith("llm")}
        return _COMMANDS | ours if self.shell.automagic else ()

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
        if args["dry_run"]:
            raise OptionError("--dry-run sends nothing, so --bg has no effect. Remove one of them.")
        if args["format"] == "code":
            raise OptionError(
                "--bg returns before the code is complete, so -f code cannot create a cell. Remove one"
                " of them."
            )
        request, notes = self._request(args)
        response = self.session.ask(request, background=True)
        self._show_job(response, args, notes + response.prepared.notes)
        return response

    def _show_job(self, job: Job, args: Parsed, notes: tuple[str, ...]) -> None:
        """Show a job in this cell from now on; an earlier one of this cell is stopped."""
        from llm_magic.notebook.display.background_output import BackgroundOutput

        output = job.view = BackgroundOutput(self.shell, job, args, self.live)
        if output.area is not None:
            self.areas.append(output.area)
            if args["chat"] is not None and self.live:
                self._background_turns.append(output)
        for other in self.session.jobs.running:
            if output.replaces(other):
                other.cancel()
                notes += (f"stopped job {other.number}, which this cell started earlier.",)
        if args["output"] is not None:
            self._set_output(args["output"], job)
        output.start(notes)

    # -- %llm_explain -------------------------------------------------------------------------

    @line_cell_magic
    def llm_explain(self, line: str, cell: str | None = None) -> Table | Reply | None:
        """Explain the last exception: its cause and a fix, or answer a question about it."""
        from llm_magic.notebook.arguments import parser
        from llm_magic.notebook.display.tables import Table
        from llm_magic.prompts import explain_error

        error = explain_error.last_error()
        with _explaining(error):
            args = (
                parser.parse_with_prompt("llm_explain", line, self.notebook_names)
                if cell is None
                else parser.parse_with_cell("llm_explain", line, cell, self.notebook_names)
            )
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
        as_code = args["format"] == "code"
        missing = {
            MASK: f"{MASK} in the corrected cell replaces a secret that was not sent.",
            explain_error.CUT: "The cell is too long to send: the corrected cell lacks its middle.",
        }
        sent = failed.cell.source if as_code and failed.cell is not None else ""
        where = f" in cell {failed.cell.label}" if failed.cell is not None else ""
        named = f"the last error is the {type(error).__name__}{where}."
        notes = (
            named,
            *args.notes,
            *self._load_notes(args),
            *(note for mark, note in missing.items() if mark in sent),
        )
        system, all_notes = explain_error.SYSTEM, bool(args["dry_run"])
        filled = self._filled(args.prompt, self.notebook_names(args.prompt), all_notes=all_notes)
        notes += filled.notes
        prompt = explain_error.question(failed, fix=as_code, requested=filled.text.strip())
        request = Request(
            prompt, args["model"], system, args["chat"], options=args.options, started=self.began,
            as_json=args["format"] == "json", stored_in=self._stored_in(args),
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


def _name_advice(name: str) -> str:
    """Return what to write instead of a name that is not valid, or an empty string."""
    plain = re.sub(r"\W+", "_", name).strip("_")
    if reference := re.search(r"\{(\w+)\}", name):
        return f" To store an answer for each {reference[1]}: answers[{reference[1]}] = %llm …"
    if "[" in name or "." in name:
        return " Use a plain name, such as answer, and assign its value in Python."
    is_name = plain.isidentifier() and not keyword.iskeyword(plain)
    return f" Did you mean {plain}?" if is_name else ""


def _check_variable(name: str) -> None:
    """Raise `OptionError` if ``-o`` cannot store a value in a variable of this name."""
    if keyword.iskeyword(name):
        raise OptionError(f"-o {name}: {name} is a keyword of Python. Choose another name.")
    if not name.isidentifier():
        raise OptionError(f"-o {name}: this is not a valid variable name.{_name_advice(name)}")
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
