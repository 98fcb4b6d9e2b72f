"""What errors say in the panel: a label where it has a control, never the flag of one."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import llm_magic
from llm_magic import errors
from llm_magic.backends.registry import generation_specs, load_specs
from llm_magic.config.option_spec import OptionSpec

# Modules whose errors the panel can show.
FOLDERS = ("backends", "config")
# The subject of a message, not what to do.
SUBJECTS = {"-q "}


def controlled() -> Iterator[OptionSpec]:
    """Yield the options with a control in the panel."""
    yield from (spec for spec in load_specs().values() if spec.label)
    yield from (spec for spec in generation_specs().values() if spec.label or spec.is_number)


def problems(tree: ast.AST) -> Iterator[str]:
    """Yield the constant texts in the constructors of errors, without their advice."""
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name | ast.Attribute):
            name = call.func.id if isinstance(call.func, ast.Name) else call.func.attr
            if isinstance(getattr(errors, name, None), type):
                texts = (one for arg in call.args for one in ast.walk(arg))
                yield from (
                    one.value
                    for one in texts
                    if isinstance(one, ast.Constant) and isinstance(one.value, str)
                )


def test_flags_with_a_control_are_named_in_advice_only() -> None:
    flags = "|".join(flag for spec in controlled() for flag in spec.flags)
    pattern = re.compile(rf"(?<![\w-])({flags}|--backend)(?![\w-])")
    root, read = Path(str(llm_magic.__file__)).parent, 0
    for path in (found for folder in FOLDERS for found in (root / folder).rglob("*.py")):
        for text in problems(ast.parse(path.read_text("utf-8"))):
            read += 1
            assert text in SUBJECTS or not pattern.search(text), f"{path.name}: {text}"
    assert read > 100
