"""``%llm_help``: list the magics; suggest one for a name that does not exist."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING

from IPython.core.display_functions import display
from IPython.core.magic import magics_class

from llm_magic.errors import OptionError, did_you_mean
from llm_magic.notebook.magics.base import SessionMagics, line_magic

if TYPE_CHECKING:
    from IPython.core.error import UsageError

    from llm_magic.notebook.display.tables import Table


# In names as short as llm, two swapped or doubled letters are a third of the name: %%lmm.
_SIMILAR = 0.65
# What else people call a magic, or one with an option.
_OTHER_NAMES = {
    "llm": ("ask", "complete", "generate", "prompt", "query", "run", "stream"),
    "llm --dry-run": ("dry_run", "preview"),
    "llm --over DATA": ("batch", "map", "over", "rows"),
    "llm -c NAME": ("chat",),
    "llm -f code": ("code",),
    "llm -f json": ("json",),
    "llm --schema TYPE": ("extract", "schema", "structured", "typed"),
    "llm --choice LABELS": ("choose", "classify"),
    "llm_chats": ("chat_history", "conversation", "conversations", "history"),
    "llm_config": ("options", "set", "settings"),
    "llm_explain": ("debug", "fix"),
    "llm_jobs": ("bg", "queue"),
    "llm_models": ("available", "list", "ls"),
    "llm_panel": ("gui", "ui"),
    "llm_reset": ("clear", "new"),
    "llm_status": ("info", "memory"),
    "llm_stop": ("cancel", "interrupt", "kill"),
    "llm_unload": ("delete", "free", "remove"),
    "llm_usage": ("cost", "costs", "tokens"),
    "llm_use": ("select", "switch"),
}
_OURS = {other: ours for ours, others in _OTHER_NAMES.items() for other in others}
_NO_MAGIC = re.compile(r"`(?P<prefix>%%?)(?P<name>\w*lm\w*)` not found", re.IGNORECASE)


def missing_magic(error: UsageError) -> re.Match[str] | None:
    """Return the prefix and the name in IPython's error about a magic like ours that does not exist."""
    return _NO_MAGIC.search(str(error))


def suggest_magic(missing: re.Match[str]) -> None:
    """Write how to correct the cell, below the error of IPython about a magic that does not exist."""
    if not missing.string.endswith(" not found."):
        # IPython has a suggestion.
        return
    name, prefix = missing["name"], missing["prefix"]
    if prefix == "%%" and name == "llm":
        advice = (
            "%%llm must be the first line of the cell: write nothing above it, not even a comment."
        )
    elif prefix == "%%":
        advice = did_you_mean(name, ("llm",), prefix=prefix, similar=_SIMILAR).strip()
    else:
        advice = similar_magic(name)
    if advice:
        sys.stderr.write(f"{advice}\n")


def similar_magic(name: str) -> str:
    """Return ``Did you mean "%…"?`` for the name of a line magic that does not exist, or ``""``."""
    from llm_magic.notebook.arguments.magic_options import MAGICS

    short = name.casefold().removeprefix("llm_")
    if short in _OURS:
        return f'Did you mean "%{_OURS[short]}"?'
    if not name.startswith("llm_"):
        found = did_you_mean(name, MAGICS, count=1, prefix="%", similar=_SIMILAR)
    else:
        # Compared without the start, which all names share.
        known = [one.removeprefix("llm_") for one in MAGICS if one != "llm"]
        found = did_you_mean(short, known, count=1, prefix="%llm_", similar=_SIMILAR)
    return found.strip()


def magics_table() -> Table:
    """Return every magic with its purpose."""
    from llm_magic.notebook.arguments.magic_options import MAGICS
    from llm_magic.notebook.display.tables import Table

    rows = [
        [f"%%{name}, %{name}" if magic.takes_prompt else f"%{name}", magic.summary]
        for name, magic in MAGICS.items()
    ]
    return Table(("", ""), rows, "A magic with -h, such as %llm_load -h, shows its options.")


def option_table(word: str) -> Table | None:
    """Return the magics that have an option, and its help; None for any other word."""
    from llm_magic.notebook.arguments.magic_options import HELP, MAGICS, arguments
    from llm_magic.notebook.display.tables import Table

    rows = [
        [f"%{magic} {', '.join(one.names)} {one.metavar}".rstrip(), one.help]
        for magic in MAGICS
        for one in arguments(magic)
        if one is not HELP and {word, f"--{word}"} & {*one.names}
    ]
    return Table(("", ""), rows, "%MAGIC -h shows all options of a magic.") if rows else None


@magics_class
class HelpMagics(SessionMagics):
    """The magic that lists the others."""

    @line_magic
    def llm_help(self, line: str) -> Table | None:
        """List the magics, or show the options of one, or the magics that have an option."""
        from llm_magic.notebook.arguments.help_pages import HelpPage
        from llm_magic.notebook.arguments.magic_options import MAGICS

        if line.startswith("-") and (table := option_table(line.strip())):
            return table
        typed = self.parse("llm_help", line, fill=False)["magic"]
        if typed is None:
            return magics_table()
        name = typed.lstrip("%")
        found = next((known for known in (name, f"llm_{name}") if known in MAGICS), None)
        if found is None and (table := option_table(name)):
            return table
        if found is None:
            near = " ".join(
                filter(
                    None,
                    (similar_magic(f"llm_{name.removeprefix('llm_')}"), "%llm_help lists all."),
                )
            )
            raise OptionError(f"There is no magic %{name}. {near}")
        display(HelpPage(found))  # type: ignore[no-untyped-call]
        return None
