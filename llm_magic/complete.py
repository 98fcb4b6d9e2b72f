"""Completion of magic lines: options, models, settings and names, from memory only."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from llm_magic import catalog

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from llm_magic.catalog import Argument
    from llm_magic.session import Session

_NAME = "llm_magic_matcher"


class Candidates:
    """What the values of an argument may be; asks no network, because a key press waits for it."""

    def __init__(self, shell: InteractiveShell, session: Session) -> None:
        self._shell, self._session = shell, session

    def for_argument(self, argument: Argument) -> list[str]:
        """Return the values to offer."""
        if argument.choices:
            return list(argument.choices)
        kind, _, name = argument.complete.partition(":")
        if kind == "choices":
            return self._choices(name)
        offer: dict[str, Callable[[], Iterable[str]]] = {
            "loaded": lambda: [info.name for info in self._session.status().models],
            "models": self._models,
            "chats": lambda: [chat.name for chat in self._session.chats.all()],
            "variables": lambda: [n for n in self._shell.user_ns if not n.startswith("_")],
            "backends": self._backends,
            "settings": self._settings,
        }
        return sorted(set(offer[kind]())) if kind in offer else []

    def _choices(self, option: str) -> list[str]:
        from llm_magic.config import LoadConfig
        from llm_magic.specs import specs

        if option == "device":
            return ["auto", "cpu", "cuda", "mps"]
        spec = specs(LoadConfig).get(option)
        return list(spec.choices) if spec is not None else []

    def _models(self) -> list[str]:
        return [info.name for info in self._session.known_models()]

    def _backends(self) -> list[str]:
        from llm_magic.backends import BACKENDS

        return list(BACKENDS)

    def _settings(self) -> list[str]:
        from llm_magic.config import GenerationConfig

        return [f"{name}=" for name in GenerationConfig.model_fields]


def candidates(line: str, offers: Candidates) -> tuple[str, list[str]] | None:
    """Return the word being typed and what may stand there; None for lines that are not ours."""
    name, blank, _ = line.lstrip().lstrip("%").partition(" ")
    if not blank or name not in catalog.MAGICS or not line.lstrip().startswith("%"):
        return None
    word = "" if line.endswith(" ") else line.rsplit(" ", 1)[-1]
    previous = line[: len(line) - len(word)].split()[-1]
    known = catalog.arguments(name)
    taking = next((a for a in known if previous in a.names and a.kind != "switch"), None)
    if taking is not None:
        found = offers.for_argument(taking)
    elif word.startswith("-"):
        found = sorted(n for a in known for n in a.names)
    else:
        positional = catalog.MAGICS[name].positional
        found = offers.for_argument(positional) if positional is not None else []
    return word, [text for text in found if text.startswith(word)]


def register(shell: InteractiveShell, session: Session) -> None:
    """Add the matcher to IPython's completer."""
    from IPython.core.completer import SimpleCompletion, context_matcher

    offers = Candidates(shell, session)

    @context_matcher(identifier=_NAME)  # type: ignore[untyped-decorator]
    def match(context: Any) -> dict[str, Any]:
        # Below the first line of a cell magic is its text: a prompt, a shell script.
        is_text = context.cursor_line > 0 and context.full_text.startswith("%%")
        found = None if is_text else candidates(context.text_until_cursor, offers)
        if found is None:
            return {"completions": []}
        word, texts = found
        # Our word, not IPython's: it splits at `/` and `:`, which model names have.
        return {
            "completions": [SimpleCompletion(text=text, type="param") for text in texts],
            "matched_fragment": word,
            "suppress": bool(texts),
        }

    if shell.Completer is not None:
        shell.Completer.custom_matchers.append(match)


def unregister(shell: InteractiveShell) -> None:
    """Take the matcher away."""
    if shell.Completer is not None:
        matchers = shell.Completer.custom_matchers
        matchers[:] = [m for m in matchers if getattr(m, "matcher_identifier", "") != _NAME]
