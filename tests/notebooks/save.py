"""Run the notebooks and save them with their outputs: ``scripts/save-notebooks [FILE …]``."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from tests.notebooks import books

_KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
_LANGUAGE = {
    "file_extension": ".py",
    "mimetype": "text/x-python",
    "name": "python",
    "pygments_lexer": "ipython3",
}


def main(names: Sequence[str]) -> int:
    """Save the notebooks that are named, or all; returns the exit code."""
    for path in [Path(name).resolve() for name in names] or books.NOTEBOOKS:
        # As a person's frontend leaves it: what runs in the background ends under its own cell.
        book = books.run(path, stream="on")
        nbformat.write(cleaned(book), path)
        sys.stdout.write(f"{path.name}: {len(books.code_cells(book))} cells\n")
    return 0


def cleaned(book: NotebookNode) -> NotebookNode:
    """Return a notebook without anything of the machine that ran it."""
    book.metadata = NotebookNode(kernelspec=_KERNEL, language_info=_LANGUAGE)
    for cell in books.code_cells(book):
        cell.metadata = {name: value for name, value in cell.metadata.items() if name == "tags"}
        cell.outputs = [_without_places(output) for output in cell.outputs]
    return book


def _without_places(value: Any) -> Any:
    """Return outputs without folders of this machine, or widgets of a kernel that is gone."""
    if isinstance(value, str):
        return re.sub(*books.PATH, value)
    if isinstance(value, list):
        return [_without_places(item) for item in value]
    if isinstance(value, dict):
        without = {name: item for name, item in value.items() if name != books.WIDGET}
        return type(value)({name: _without_places(item) for name, item in without.items()})
    return value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
