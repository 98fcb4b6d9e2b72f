"""``%llm_help``: list the magics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from IPython.core.display_functions import display
from IPython.core.magic import magics_class

from llm_magic.errors import OptionError, did_you_mean
from llm_magic.notebook.arguments import parser
from llm_magic.notebook.arguments.help_pages import HelpPage
from llm_magic.notebook.arguments.magic_options import MAGICS
from llm_magic.notebook.magics.base import SessionMagics, line_magic

if TYPE_CHECKING:
    from llm_magic.notebook.display.tables import Table


def magics_table() -> Table:
    """Return every magic with its purpose."""
    from llm_magic.notebook.display.tables import Table

    rows = [
        ["%%llm, %llm" if magic.takes_prompt else f"%{name}", magic.summary]
        for name, magic in MAGICS.items()
    ]
    return Table(("", ""), rows, "A magic with -h, such as %llm_load -h, shows its options.")


@magics_class
class HelpMagics(SessionMagics):
    """The magic that lists the others."""

    @line_magic
    def llm_help(self, line: str) -> Table | None:
        """List the magics, or show the options of one."""
        typed = parser.parse("llm_help", line)["magic"]
        if typed is None:
            return magics_table()
        name = typed.lstrip("%")
        found = next((known for known in (name, f"llm_{name}") if known in MAGICS), None)
        if found is None:
            short = (known.removeprefix("llm_") for known in MAGICS)
            near = did_you_mean(name.removeprefix("llm_"), short, prefix="%llm_")
            raise OptionError(f"There is no magic %{name}.{near} %llm_help lists all.")
        display(HelpPage(found))  # type: ignore[no-untyped-call]
        return None
