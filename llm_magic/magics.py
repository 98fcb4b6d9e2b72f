"""The magics: parse a line, call the session, show what came of it."""

from __future__ import annotations

import atexit
import functools
import keyword
import re
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar, cast

from IPython.core.magic import Magics, magics_class, no_var_expand
from IPython.core.magic import line_cell_magic as _line_cell_magic
from IPython.core.magic import line_magic as _line_magic

from llm_magic import arguments, catalog
from llm_magic.errors import Interrupted, MissingDependency, OptionError

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from llm_magic.arguments import Parsed
    from llm_magic.calls import Request
    from llm_magic.panel import ControlPanel
    from llm_magic.session import Session
    from llm_magic.tables import Table

F = TypeVar("F", bound=Callable[..., Any])


def _magic(function: F) -> F:
    """Give a magic its help, and turn an interrupt outside a wait into our own short error."""

    @functools.wraps(function)
    def guarded(self: LLMMagics, *args: Any) -> Any:
        try:
            return function(self, *args)
        except KeyboardInterrupt:
            raise Interrupted("Stopped.") from None

    # IPython asks an object for its `getdoc` before it looks at the docstring: the help is made
    # from the option table when somebody asks, not when the extension is loaded.
    guarded.getdoc = functools.partial(catalog.help_text, function.__name__)  # type: ignore[attr-defined]
    return guarded  # type: ignore[return-value]


def line_magic(function: F) -> F:
    """Register a line magic whose line is not expanded by IPython."""
    return cast(F, _line_magic(no_var_expand(_magic(function))))


def line_cell_magic(function: F) -> F:
    """Register a magic for one line and for a cell, not expanded by IPython."""
    return cast(F, _line_cell_magic(no_var_expand(_magic(function))))


@magics_class
class LLMMagics(Magics):
    """Language models in this kernel."""

    shell: InteractiveShell

    def __init__(self, shell: InteractiveShell, session: Session) -> None:
        super().__init__(shell)
        self.session = session
        self._panels: dict[str | None, ControlPanel] = {}

    @line_magic
    def llm_load(self, line: str) -> None:
        """Load a model into this kernel and make it the active one."""
        from llm_magic import display, words

        args = arguments.parse("llm_load", line)
        model, name, keep = args["model"], args["name"], bool(args["keep"])
        view = display.LoadView(self.shell, live=self._live)
        label = model or self.session.settings.model or "the default model"
        if args["no_wait"]:
            self.session.load_later(model, name=name, keep=keep, **args.options)
            view.finish([f"Loading {label} · %llm_status shows how far; %%llm waits for it."])
            return
        result = self.session.load_and_tell(
            model,
            name=name,
            keep=keep,
            tick=lambda: view.progress(label, self.session.progress),
            **args.options,
        )
        view.finish(words.ready_lines(result))

    @line_cell_magic
    def llm(self, line: str, cell: str | None = None) -> Table | None:
        """Ask the active model, and stream its answer into the cell."""
        from llm_magic import display, words

        if cell is None:
            args = arguments.parse_with_prompt("llm", line)
            prompt = args.rest
        else:
            args, prompt = arguments.parse("llm", line), cell.strip("\n")
        variable = _variable(args["output"])
        request, notes = self._request(prompt, args)
        if args["dry_run"]:
            return words.dry_run_table(self.session.dry_run(request))
        info = self.session.ready(request)
        view = display.view(self.shell, info, args.values, self._live)
        view.note(notes)
        earlier = self.session.last
        try:
            self.session.answer(request, view.take, view.tick)
        finally:
            # Also what was answered before an error or an interrupt is shown and kept.
            reply = self.session.last
            if reply is not None and reply is not earlier:
                view.finish(reply)
                self._put(variable, reply)
        if args["format"] == "code" and reply is not None:
            self._offer_code(reply.text)
        return None

    @line_magic
    def llm_config(self, line: str) -> Table:
        """Show the generation settings, or change them."""
        from llm_magic import words

        args = arguments.parse("llm_config", line)
        changes = arguments.assignments(args["changes"])
        if args["reset"]:
            if changes:
                raise OptionError("--reset does not go with settings. Use one of them.")
            self.session.options.reset()
        elif changes:
            self.session.configure(**changes)
        return words.config_table(self.session)

    @line_magic
    def llm_status(self, line: str) -> Table:
        """Show what is loaded, where, and the memory it takes."""
        from llm_magic import words

        arguments.parse("llm_status", line)
        return words.status_table(self.session.status())

    @line_magic
    def llm_models(self, line: str) -> Table:
        """List the models that are here."""
        from llm_magic import words

        args = arguments.parse("llm_models", line)
        models = self.session.models(
            args["backend"], base_url=args["base_url"], key_env=args["key_env"]
        )
        return words.models_table(models, self.session.status().models)

    @line_magic
    def llm_unload(self, line: str) -> None:
        """Free a model and show what came back."""
        from llm_magic import display, words

        args = arguments.parse("llm_unload", line)
        session, name = self.session, args["name"]
        gone = session.unload_all() if args["all"] else [session.unload(name)]
        lines = [words.unloaded_line(unloaded) for unloaded in gone]
        display.LoadView(self.shell, live=False).finish(lines or ["Nothing was loaded."])

    @line_magic
    def llm_panel(self, line: str) -> None:
        """Show the control panel: all of this with a mouse."""
        arguments.parse("llm_panel", line)
        before = self._panels.pop(self._cell_id(), None)
        if before is not None:
            # The cell was run again: nobody sees the one that it showed.
            before.close()
        self._panels[self._cell_id()] = _show_panel(self.session)

    @line_magic
    def llm_chats(self, line: str) -> Table:
        """List the conversations."""
        from llm_magic.tables import Table

        arguments.parse("llm_chats", line)
        rows = [[chat.name, str(len(chat.turns))] for chat in self.session.chats.all()]
        return Table(
            ("chat", "turns"), rows, "" if rows else "There is none. %%llm -c NAME begins one."
        )

    @line_magic
    def llm_reset(self, line: str) -> Table:
        """Forget a conversation, or all of them."""
        from llm_magic.tables import Table

        names = self.session.reset(arguments.parse("llm_reset", line)["chat"])
        return Table(("",), [], f"Forgotten: {', '.join(names) or 'nothing, there was no chat'}.")

    @property
    def _live(self) -> bool:
        return self.session.settings.stream == "on"

    def _request(self, prompt: str, args: Parsed) -> tuple[Request, tuple[str, ...]]:
        """Fill in the notebook's values and make the request."""
        from llm_magic.calls import Request
        from llm_magic.prompt import fill

        system = args["system"]
        notes: tuple[str, ...] = ()
        if not args["raw"]:
            names = self._names(f"{prompt} {system}")
            filled = fill(prompt, names)
            prompt, notes = filled.text, filled.notes
            system = fill(system, names).text if system else None
        key = self._cell_id() if args["chat"] else None
        options: Any = args.options
        return Request(prompt, args["model"], system, args["chat"], key, options), notes

    def _names(self, text: str) -> dict[str, Any]:
        """Return the notebook's own names: not what IPython put there (open, exit, quit, …)."""
        hidden = self.shell.user_ns_hidden
        history = {name for name in ("In", "Out") if f"{{{name}[" in text}
        return {
            name: value
            for name, value in self.shell.user_ns.items()
            if name in history or hidden.get(name, self) is not value
        }

    def _cell_id(self) -> str | None:
        """Return the frontend's id of the running cell, where it sends one."""
        get_parent = getattr(self.shell, "get_parent", None)
        parent = get_parent() if get_parent is not None else {}
        cell_id = parent.get("metadata", {}).get("cellId")
        return str(cell_id) if cell_id else None

    def _put(self, variable: str | None, value: object) -> None:
        if variable is not None:
            self.shell.user_ns[variable] = value

    def _offer_code(self, text: str) -> None:
        """Put the first fenced block into the next cell; never run it."""
        from llm_magic.markdown import code_blocks

        blocks = code_blocks(text)
        if blocks:
            self.shell.set_next_input(blocks[0].code.rstrip("\n"), replace=False)


def _variable(name: str | None) -> str | None:
    if name is not None and (not name.isidentifier() or keyword.iskeyword(name)):
        raise OptionError(f"-o {name}: that is no name of a variable.")
    return name


def _show_panel(session: Session) -> ControlPanel:
    """Display a panel, and what stands for it where no kernel runs."""
    missing = [name for name in ("ipywidgets", "anywidget") if find_spec(name) is None]
    if missing:
        raise MissingDependency(
            f"The panel needs {' and '.join(missing)}. Type: pip install 'llm_magic[panel]',"
            " then restart the kernel and reload the page."
        )
    from IPython.display import display

    from llm_magic.panel import ControlPanel

    panel = ControlPanel(session)
    still = {"text/html": panel.static_html(), "text/plain": "The control panel of llm_magic"}
    display(still, raw=True)  # type: ignore[no-untyped-call]
    display(panel.box)  # type: ignore[no-untyped-call]
    return panel


_QUESTION = re.compile(r"^(\s*%llm\s.*\?)$")


def _ask_not_help(lines: list[str]) -> list[str]:
    """Keep IPython from reading ``%llm What is this?`` as ``this?``, which opens help."""
    return [_QUESTION.sub(r"\1 ", line) for line in lines]


def register(shell: InteractiveShell, session: Session) -> None:
    """Register magics, completion and the safe display of replies; close everything at exit."""
    from llm_magic import complete

    unregister(shell)
    magics = LLMMagics(shell, session)
    shell.register_magics(magics)
    complete.register(shell, session)
    shell.input_transformers_cleanup.append(_ask_not_help)
    _html_formatter(shell).for_type_by_name("llm_magic.types", "Reply", _reply_html)
    atexit.register(session.close)


def unregister(shell: InteractiveShell) -> None:
    """Undo `register`, and close the session; does nothing where nothing was registered."""
    from llm_magic import complete

    complete.unregister(shell)
    if _ask_not_help in shell.input_transformers_cleanup:
        shell.input_transformers_cleanup.remove(_ask_not_help)
    for magics in [m for m in shell.configurables if isinstance(m, LLMMagics)]:
        shell.configurables.remove(magics)
        # IPython has no public way to take a magic away.
        for table in shell.magics_manager.magics.values():
            for name in [n for n, f in table.items() if getattr(f, "__self__", None) is magics]:
                del table[name]
        atexit.unregister(magics.session.close)
        magics.session.close()
    _html_formatter(shell).pop("llm_magic.types.Reply", None)


def _html_formatter(shell: InteractiveShell) -> Any:
    return cast(Any, shell.display_formatter).formatters["text/html"]


def _reply_html(reply: Any) -> str:
    from llm_magic import display, words

    thoughts = display.thoughts_html(reply.reasoning)
    answer = display.answer_html(reply.text, "markdown")
    return thoughts + answer + display.muted(words.footer(reply, None))
