"""The matcher that adds completions of magic lines and prompts to those of IPython."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llm_magic.errors import SettingsError

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from llm_magic.session import Session

_NAME = "llm_magic_matcher"


class _NoCompletions(Sequence[Any]):
    """An empty list of completions that suppresses those of other matchers, such as Python names.

    IPython suppresses other matchers only if the length is not 0.
    """

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: Any) -> Any:
        raise IndexError(index)


def register(shell: InteractiveShell, session: Session) -> None:
    """Add the matcher to IPython's completer."""
    from IPython.core.completer import SimpleCompletion, context_matcher

    @context_matcher(identifier=_NAME)  # type: ignore[untyped-decorator]
    def match(context: Any) -> dict[str, Any]:
        from llm_magic.notebook.arguments.completer import complete
        from llm_magic.notebook.arguments.completions import Candidates

        lines = context.full_text.split("\n")
        line, column = lines[context.cursor_line], context.cursor_position
        above = "\n".join(lines[: context.cursor_line])
        try:
            found = complete(line[:column], line[column:], above, Candidates(shell, session))
        except SettingsError:
            # The magic raises it; completion must not print anything.
            found = None
        if found is None:
            return {"completions": []}
        completions = [SimpleCompletion(text=c.text, type=c.kind) for c in found.candidates]
        return {
            "completions": completions or _NoCompletions(),
            "matched_fragment": found.fragment,
            "suppress": True,
            "ordered": True,
        }

    if shell.Completer is not None:
        shell.Completer.custom_matchers.append(match)


def unregister(shell: InteractiveShell) -> None:
    """Remove the matcher from IPython's completer."""
    if shell.Completer is not None:
        matchers = shell.Completer.custom_matchers
        matchers[:] = [m for m in matchers if getattr(m, "matcher_identifier", "") != _NAME]
