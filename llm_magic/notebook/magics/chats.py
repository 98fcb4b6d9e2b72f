"""Conversations: list, show, export, import and forget them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from IPython.core.magic import magics_class

from llm_magic.errors import OptionError
from llm_magic.notebook.arguments import parser
from llm_magic.notebook.frontend import deleted_cells
from llm_magic.notebook.magics.base import SessionMagics, line_magic

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from llm_magic.notebook.arguments.parser import Parsed
    from llm_magic.notebook.display.tables import Table
    from llm_magic.session import Session


@magics_class
class ChatMagics(SessionMagics):
    """The conversations of ``%%llm -c NAME``."""

    def __init__(self, shell: InteractiveShell, session: Session) -> None:
        super().__init__(shell, session)
        self._gone: set[str] = set()

    def before_cell(self, _info: object) -> None:
        """Take note of the cells that were deleted: what they asked is shown no more.

        JupyterLab tells it once or, where many cells are run at once, with each of them.
        """
        gone = set(deleted_cells(self.shell)) - self._gone
        self._gone |= gone
        for cell in gone:
            self.session.chats.lose(cell)

    @line_magic
    def llm_chats(self, line: str) -> Table:
        """List the conversations, show one, or move them to and from files."""
        from llm_magic.notebook.display import chat_messages

        args = parser.parse("llm_chats", line)
        if args["export"] is not None or args["import"] is not None:
            return self._moved(args)
        if args["force"]:
            raise OptionError("--force goes with --export or --import.")
        if args["chat"] is not None:
            return chat_messages.chat_table(self.session.chats.get(args["chat"]))
        return chat_messages.chats_table(self.session)

    def _moved(self, args: Parsed) -> Table:
        from llm_magic.notebook.display.tables import Table
        from llm_magic.session.chats import in_turns

        chats, name, force = self.session.chats, args["chat"], bool(args["force"])
        if args["export"] is not None and args["import"] is not None:
            raise OptionError("--export and --import do not go together. Use one of them.")
        if args["import"] is not None:
            names = chats.load(args["import"], name, replace=force)
            return Table(("",), [], f"Imported: {', '.join(names)}.")
        shown = [chats.get(name)] if name is not None else chats.all()
        path = chats.save(args["export"], name, replace=force)
        stale = sum(len(chat.turns) - len(chat.fresh) for chat in shown)
        without = f", without {in_turns(stale)} that went stale" if stale else ""
        kept = sum(len(chat.fresh) for chat in shown)
        return Table(("",), [], f"Exported to {path}: {in_turns(kept)}{without}.")

    @line_magic
    def llm_reset(self, line: str) -> Table:
        """Forget a conversation, or all of them, or only what is stale."""
        from llm_magic.notebook.display.tables import Table

        args = parser.parse("llm_reset", line)
        stale = bool(args["stale"])
        names = ", ".join(self.session.reset(args["chat"], stale=stale))
        if stale:
            said = f"Stale turns forgotten: {names}." if names else "No turn was stale."
        else:
            said = f"Forgotten: {names or 'nothing, there was no chat'}."
        return Table(("",), [], said)
