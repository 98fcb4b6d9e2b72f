"""A plugin for nbval that saves the outputs it compares: ``-p tests.notebooks.save_outputs --save-outputs FILE``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from nbval.plugin import IPyNbCell


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    parser.addoption("--save-outputs", type=Path, help="save the outputs of the cells in this file")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the outputs of each cell, by its id."""
    cells = [item for item in session.items if isinstance(item, IPyNbCell)]
    outputs = {item.cell.id: item.test_outputs for item in cells}
    session.config.getoption("--save-outputs").write_text(json.dumps(outputs), encoding="utf-8")
