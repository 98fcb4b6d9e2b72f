"""``%llm`` and ``%%llm``: a prompt on a line or in a cell."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from IPython.core.magic import magics_class

from llm_magic.errors import OptionError
from llm_magic.notebook.arguments import parser
from llm_magic.notebook.magics.base import SessionMagics, line_cell_magic, variable
from llm_magic.notebook.magics.traitlets_config import declare

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from llm_magic.notebook.arguments.parser import Parsed
    from llm_magic.notebook.display.tables import Table
    from llm_magic.session import Session
    from llm_magic.session.requests import Request


@magics_class
class LLMMagics(SessionMagics):
    """Sends prompts to the models of this kernel; its traits are the generation settings."""

    def __init__(self, shell: InteractiveShell, session: Session) -> None:
        if shell.config.get("LLMMagics"):
            # c.LLMMagics.temperature = 0.2 in ipython_config.py
            declare(type(self))
        super().__init__(shell, session)

    @classmethod
    def class_traits(cls, **metadata: Any) -> dict[str, Any]:
        """Return the traits, with one for each generation setting.

        They are declared at the first call: loading the extension must not import pydantic.
        """
        declare(cls)
        return super().class_traits(**metadata)

    @line_cell_magic
    def llm(self, line: str, cell: str | None = None) -> Table | None:
        """Send a prompt to the active model and stream the answer into the cell."""
        if cell is None:
            args = parser.parse_with_prompt("llm", line)
            prompt = args.prompt
        else:
            args, prompt = parser.parse("llm", line), cell.strip("\n")
        variable(args["output"])
        _refuse_combinations(args)
        request, notes = self._request(prompt, args)
        if not args["bg"]:
            return self.ask(request, notes, args)
        self.wait_for_load().clear()
        self._ask_in_background(request, notes, args)
        return None

    def _ask_in_background(self, request: Request, notes: tuple[str, ...], args: Parsed) -> None:
        """Start a job that its cell displays, and return at once."""
        from llm_magic.notebook.display.background_output import BackgroundOutput

        response = self.session.ask(request, background=True)
        output = response.view = BackgroundOutput(self.shell, response, args.values, self.live)
        for other in self.session.jobs.running:
            if output.replaces(other):
                other.cancel()
                notes += (f"stopped job {other.number}, which this cell started earlier.",)
        self.put(args["output"], response)
        output.start(notes)

    def _request(self, prompt: str, args: Parsed) -> tuple[Request, tuple[str, ...]]:
        """Return the request with the notebook's values filled in, and notes about the prompt."""
        from llm_magic.prompts.template import fill
        from llm_magic.session.requests import Request

        if args["replace"] and args["format"] != "code":
            raise OptionError("--replace requires -f code.")
        system, source = args["system"], prompt
        notes: tuple[str, ...] = ()
        if not args["literal"]:
            names = self.names(f"{prompt} {system}")
            fill_in = functools.partial(fill, all_notes=bool(args["dry_run"]))
            filled, filled_system = fill_in(prompt, names), fill_in(system or "", names)
            prompt, notes = filled.text, tuple(dict.fromkeys(filled.notes + filled_system.notes))
            system = filled_system.text if system is not None else None
        chat, key, trim = args["chat"], None, bool(args["trim"])
        if chat is not None:
            from llm_magic.notebook.display.messages import context_notes

            key = self.session.cells.key(chat, source, peek=bool(args["dry_run"]))
            context = self.session.chats.context(chat, key, system)
            notes += context_notes(
                context,
                by_text=self.cell_id() is None,
                in_terminal=self.session.cells.current() is None,
            )
        options: Any = args.options
        return Request(prompt, args["model"], system, chat, key, options, trim, self.began), notes


def _refuse_combinations(args: Parsed) -> None:
    """Raise `OptionError` for options that cannot be combined with ``--bg``."""
    if not args["bg"]:
        return
    if args["dry_run"]:
        raise OptionError("--dry-run sends nothing, so --bg has no effect. Remove one of them.")
    if args["format"] == "code":
        raise OptionError(
            "--bg returns before the code is complete, so -f code cannot create a cell. Remove one of"
            " them."
        )
