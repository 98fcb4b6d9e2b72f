"""What the options of ``%%llm`` name as the type of the answer: classes of the notebook, files, fields."""

from __future__ import annotations

import ast
import builtins
import re
import typing
from collections.abc import Mapping
from pathlib import Path
from traceback import format_exc
from typing import Any

from llm_magic.errors import LLMMagicException, OptionError, did_you_mean
from llm_magic.text import visible_line

_NAMED = re.compile(r"\{([^\W\d]\w*)\}|\$([^\W\d]\w*)")
# What the notation of a type consists of, such as dict[str, list[Person]] | None.
_TYPE_NODES = (
    ast.Name, ast.Attribute, ast.Subscript, ast.BinOp, ast.BitOr, ast.Constant, ast.Tuple, ast.List, ast.Load,
)  # fmt: skip
# What makes a list of labels, besides a name.
_LIST_NODES = (ast.Attribute, ast.Subscript, ast.Call, ast.List, ast.Tuple, ast.ListComp)


def named_types(
    given: Mapping[str, str], form: str | None, names: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what the `given` options name; `names` are the notebook's variables.

    Raises `OptionError` for a name that is not defined, and beside a `form`, the value of ``-f``.
    """
    if form is not None:
        option = f"--{next(iter(given)).replace('_', '-')}"
        raise OptionError(
            f"-f has no effect on a value, which {option} requires. Remove one of them."
        )
    return {name: _value(name, text, names) for name, text in given.items()}


def _value(name: str, text: str, names: Mapping[str, Any]) -> Any:
    if named := _NAMED.fullmatch(text.strip()):
        return _variable(name, named[1] or named[2], names)
    if name == "schema":
        return _schema(text, names)
    if name == "choice":
        return _labels(text, names)
    if name == "grammar" and text in names and not Path(text).is_file():
        return names[text]
    return text


def _variable(option: str, name: str, names: Mapping[str, Any], advice: str = "") -> Any:
    if name not in names and not hasattr(builtins, name):
        near = did_you_mean(name, names)
        raise OptionError(f"--{option} {name}: {name} is not defined.{near}{advice}")
    return names.get(name, getattr(builtins, name, None))


def _schema(text: str, names: Mapping[str, Any]) -> Any:
    """Return a class, a type or a JSON schema; else the text, which names a file or is a short form."""
    tree = _tree(text)
    if tree is None or text.endswith(".json"):
        return text
    if isinstance(tree, ast.Name):
        advice = f' For one field of that name, write "{tree.id} str".'
        return _variable("schema", tree.id, names, advice)
    is_type = not isinstance(tree, (ast.Tuple, ast.Constant)) and all(
        isinstance(node, _TYPE_NODES) for node in ast.walk(tree)
    )
    return _evaluated("schema", text, names) if is_type or isinstance(tree, ast.Dict) else text


def _labels(text: str, names: Mapping[str, Any]) -> Any:
    """Return the labels of a list, an Enum or another expression; else the text, which lists them."""
    tree = _tree(text)
    if isinstance(tree, ast.Name):
        advice = " Write labels with commas between them: --choice red,green."
        return _variable("choice", tree.id, names, advice)
    is_list = isinstance(tree, ast.Tuple) and not text.lstrip().startswith("(")
    if tree is None or is_list or not isinstance(tree, _LIST_NODES):
        return text
    return _evaluated("choice", text, names)


def _tree(text: str) -> ast.expr | None:
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _evaluated(option: str, code: str, names: Mapping[str, Any]) -> Any:
    try:
        return eval(code.strip(), {"__builtins__": builtins, **names})
    except LLMMagicException:
        raise
    except Exception as error:  # noqa: BLE001 - the code of the user raises anything
        name = error.name if isinstance(error, NameError) else None
        advice = did_you_mean(name, names) if name is not None else ""
        if name in typing.__all__:
            advice = f" Run: from typing import {name}"
        problem = visible_line(f"{type(error).__name__}: {error}").rstrip(".")
        raise OptionError(f"--{option} {code}: {problem}.{advice}", details=format_exc()) from None
