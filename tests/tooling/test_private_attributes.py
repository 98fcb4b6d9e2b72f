"""Tests and benchmarks use the public API: no attribute with one leading underscore of another object."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.kernels import ROOT

# Documented by the packages that call them or have them.
_DOCUMENTED = {
    "_replace",  # namedtuple
    "_repr_html_", "_render_traceback_",  # IPython
    "_handle_msg",  # ipywidgets: what a frontend sends
    "_from_config",  # Transformers
}  # fmt: skip


def private_attributes(code: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of each use of another object's private attribute."""
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Attribute) or node.attr in _DOCUMENTED:
            continue
        is_private = node.attr.startswith("_") and not node.attr.startswith("__")
        if is_private and ast.unparse(node.value) not in {"self", "cls", "super()"}:
            yield node.lineno, ast.unparse(node)


def test_no_private_attribute_is_used() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for line, text in private_attributes(path.read_text(encoding="utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("session._loop.run()", ["session._loop"]),
        ("a.b()._c = 1", ["a.b()._c"]),
        ("self._x, cls._x, super()._x, a.__dict__, a.b, pair._replace(x=1)", []),
        ("self.other._x", ["self.other._x"]),
    ],
)
def test_private_attributes_are_found(code: str, found: list[str]) -> None:
    assert [text for _line, text in private_attributes(code)] == found
