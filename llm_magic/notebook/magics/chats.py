"""``%llm_chats`` and ``%llm_reset``: list, show, export, import and delete chats."""

from __future__ import annotations

from typing import TYPE_CHECKING

from IPython.core.magic import magics_class

from llm_magic.errors import OptionError
from llm_magic.notebook.frontend import deleted_cells
from llm_magic.notebook.magics.base import SessionMagics, line_magic

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from llm_magic.notebook.arguments.parser import Parsed
    from llm_magic.notebook.display.tables import Table
    from llm_magic.session import Session


@magics_class
class ChatMagics(SessionMagics):
    """The magics for the chats of ``%%llm -c NAME``."""

    def __init__(self, shell: InteractiveShell, session: Session) -> None:
        super().__init__(shell, session)
        self._deleted: set[str] = set()

    def before_cell(self, _info: object) -> None:
        """Mark the turns of deleted cells as stale.

        JupyterLab reports a deleted cell once or, if many cells run at once, with each of them.
        """
        deleted = set(deleted_cells(self.shell)) - self._deleted
        self._deleted |= deleted
        for cell in deleted:
            self.session.chats.lose(cell)

    @line_magic
    def llm_chats(self, line: str) -> Table:
        """List the chats, show one, or export and import them."""
        from llm_magic.notebook.display import messages

        args = self.parse("llm_chats", line)
        if args["export"] is not None or args["import"] is not None:
            return self._export_or_import(args)
        if args["force"]:
            raise OptionError("--force requires --export or --import.")
        if args["chat"] is not None:
            chat = self.session.chats.get(args["chat"])
            return messages.chat_table(chat, self.session.generation.system)
        return messages.chats_table(self.session)

    def _export_or_import(self, args: Parsed) -> Table:
        from llm_magic.notebook.display.tables import Table
        from llm_magic.text import counted

        chats, name, force = self.session.chats, args["chat"], bool(args["force"])
        if args["export"] is not None and args["import"] is not None:
            raise OptionError("--export and --import cannot be combined. Use one of them.")
        if args["import"] is not None:
            names = chats.load(args["import"], name, replace=force)
            return Table(("",), [], f"Imported: {', '.join(names)}.")
        exported = [chats.get(name)] if name is not None else chats.all()
        system = self.session.generation.system
        path = chats.save(args["export"], name, replace=force, default=system)
        fresh = sum(len(chat.fresh) for chat in exported)
        stale = sum(len(chat.turns) for chat in exported) - fresh
        omitted = f" Not exported because stale: {counted(stale, 'turn')}." if stale else ""
        return Table(("",), [], f"Exported to {path}: {counted(fresh, 'turn')}.{omitted}")

    @line_magic
    def llm_reset(self, line: str) -> Table:
        """Delete a chat, all of them, or only their stale turns."""
        from llm_magic.notebook.display.tables import Table
        from llm_magic.session.chats import spelled

        args = self.parse("llm_reset", line)
        name, stale, chats = args["chat"], bool(args["stale"]), self.session.chats.all()
        if args["all"] and name is not None:
            raise OptionError("--all and the name of a chat cannot be combined. Use one of them.")
        # A chat may have this name.
        is_word = name == "all" and name not in {chat.name for chat in chats}
        name, every = (None, True) if is_word else (name, bool(args["all"]))
        if len(chats) > 1 and name is None and not (every or stale):
            listed = ", ".join(spelled(chat.name) for chat in chats)
            raise OptionError(
                f"Name the chat to delete: {listed}. %llm_reset --all deletes all of them."
            )
        names = ", ".join(self.session.reset(name, stale=stale))
        if stale:
            message = f"Deleted the stale turns of {names}." if names else "No turn is stale."
        else:
            message = f"Deleted: {names}." if names else "No chat to delete."
        return Table(("",), [], message)
