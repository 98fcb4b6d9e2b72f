"""Put the notebook's values into options: ``-t {temperature}``, ``-m $name``, ``%llm_load {model}``."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from llm_magic.errors import OptionError, did_you_mean

# Returns the notebook's variables that a text may refer to.
Names = Callable[[str], Mapping[str, Any]]
# `system` is filled in like the prompt. `over` and what names a type are expressions, or have braces of
# their own. A key that is put into the line would be in its errors.
_NOT_FILLED = frozenset(
    {"s", "system", "key-env", "key_env", "over", "schema", "choice", "regex", "grammar"}
)
_DOLLAR = re.compile(r"(?:^|(?<==))\$(?P<name>[^\W\d]\w*)$")
# What every token has that refers to a variable.
MARK = re.compile(r"[{$]")
_NAME = re.compile(r"(?:^|(?<==))\{(?P<name>[^\W\d]\w*)\}$")


def fill(tokens: Sequence[str], takes_value: Collection[str], names: Names) -> list[str]:
    """Return the tokens of a line, without its prompt, with their {references} and $names replaced.

    Raises:
        OptionError: A name is not defined, or its value would be read as an option.
        PromptError: An expression failed.
    """
    found: list[str] = []
    for token in tokens:
        before = found[-1] if found else ""
        found.append(token)
        if not MARK.search(token) or option_of(found) in _NOT_FILLED:
            continue
        value = _filled(token, names(token), option_of(found))
        if value.startswith("-") and not token.startswith("-"):
            if before not in takes_value:
                raise OptionError(f"The value of {token} starts with -, like an option.")
            # argparse would take the value for an option.
            found[-2:] = [f"{before}={value}"]
        else:
            found[-1] = value
    return found


def option_of(tokens: Sequence[str]) -> str:
    """Return the name of the option or setting whose value is the last token, without dashes."""
    *before, token = tokens
    name, equals, _ = token.partition("=")
    if token.startswith("-s"):
        return "s"
    if not equals and before:
        # `system = "…"`
        name = before[-2] if before[-1] == "=" and len(before) > 1 else before[-1]
    return name.lstrip("-")


def _check_no_answer(token: str, names: Mapping[str, Any]) -> None:
    """Raise `OptionError` if the text of a job or a reply would be the name of a variable."""
    from llm_magic.session.response import Response
    from llm_magic.types import Reply

    found = _NAME.search(token)
    value = names.get(found["name"]) if found is not None else None
    if found is not None and isinstance(value, (Reply, Response)):
        kind = "reply" if isinstance(value, Reply) else "job"
        name = found["name"]
        raise OptionError(
            f"-o {found[0]} would use the text of the {kind} as a name. To store the answer in {name},"
            f" write -o {name}."
        )


def _filled(token: str, names: Mapping[str, Any], option: str) -> str:
    from llm_magic.prompts import template

    if (dollar := _DOLLAR.search(token)) is not None and dollar["name"] in names:
        token = f"{token[: dollar.start()]}{{{dollar['name']}}}"
    if option in {"o", "output"}:
        _check_no_answer(token, names)
    value = template.fill(token, names).text
    unknown = _NAME.search(value) if value == token else None
    # A stop string may be a name in braces.
    if unknown is not None and option != "stop":
        near = did_you_mean(unknown["name"], names) or " Assign a value to it first."
        raise OptionError(f"{unknown[0]} is not defined in this notebook.{near}")
    return value
