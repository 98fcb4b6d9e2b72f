"""``%llm_doctor`` in kernels: the table, the kernel's own facts, and who is in the way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import quick_torch
from tests.kernels import OTHER_KERNELS, Kernel, kernel


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of the path with a ``torch`` that the checks import at once."""
    folder = tmp_path_factory.mktemp("quick")
    quick_torch.install(folder)
    return folder


@pytest.fixture
def scripted(scripted: Kernel, folder: Path) -> Iterator[Kernel]:
    """Return the scripted kernel, whose child processes import that ``torch``."""
    scripted.ok(
        f"import os; path = os.environ.get('PYTHONPATH')\nos.environ['PYTHONPATH'] = {str(folder)!r}"
    )
    yield scripted
    scripted.ok("os.environ['PYTHONPATH'] = path")


def state(k: Kernel, name: str) -> str:
    """Return the line of the table about something."""
    lines = k.ok("%llm_doctor").text.splitlines()
    return next(line for line in lines if name in line[:30])


def test_the_table(scripted: Kernel) -> None:
    ran = scripted.ok("%llm_doctor")
    assert "<table" in ran.html
    version = scripted.value("__import__('ipykernel').__version__")
    assert f"ipykernel {version}, with subshells" in ran.text
    assert "belongs to llm_magic" in ran.text
    # A program may run at one of them here.
    for name in ("ollama", "vllm", "lmstudio", "llamacpp-server"):
        assert name in ran.text
    for variable in ("ANTHROPIC_API_KEY", "GEMINI_API_KEY"):
        assert variable in ran.text
    assert "torch" not in scripted.value(
        "sorted(m for m in __import__('sys').modules if m == 'torch')"
    )
    assert [name for name in scripted.threads() if "doctor" in name] == []


def test_wrong_names_of_settings(scripted: Kernel) -> None:
    scripted.ok(
        "wrong = {'LLM_TEMPERATURE': 'hot', 'LLM_BACKEND': 'openai', 'LLM_USER_PATH': '/tmp'}\n"
        "os.environ.update(wrong)\n"
        "findings = __import__('llm_magic.doctor', fromlist=['x']).run_checks(llm)"
    )
    try:
        rows = scripted.value("[(f.state, f.text) for f in findings if f.name == 'variables']")
        assert rows == [
            (
                "warn",
                'LLM_BACKEND is not a setting. Did you mean "LLM_BACKEND_TYPE"?'
                ' LLM_TEMPERATURE is not a setting. Did you mean "DEFAULT_LLM_TEMPERATURE"?',
            )
        ]
        scripted.ok("os.environ['LLM_BACKEND_TYPE'] = 'olama'\nother = type(llm)()")
        scripted.ok("from llm_magic.notebook.display.messages import status_table")
        shown = scripted.ok("status_table(other.status())").text
        assert "LLM_BACKEND_TYPE: there is no backend 'olama'. Did you mean \"ollama\"?" in shown
    finally:
        scripted.ok("for name in (*wrong, 'LLM_BACKEND_TYPE'): os.environ.pop(name, None)")


def test_doctor_reports_another_owner_of_the_magic(scripted: Kernel) -> None:
    scripted.ok(
        "ours = get_ipython().magics_manager.magics['cell']['llm']\n"
        "get_ipython().register_magic_function(lambda line, cell: None, 'cell', 'llm')"
    )
    try:
        line = state(scripted, "%%llm")
        assert line.startswith("problem")
        assert "belongs to __main__" in line
        assert "%reload_ext llm_magic" in line
    finally:
        scripted.ok("get_ipython().magics_manager.magics['cell']['llm'] = ours")
    assert state(scripted, "%%llm").startswith("ok")


@pytest.mark.parametrize(("module", "reported"), [("nest_asyncio", True), ("nest_asyncio2", False)])
def test_doctor_reports_archived_nest_asyncio(
    module: str, reported: bool, tmp_path: Path, folder: Path
) -> None:
    source = OTHER_KERNELS / "6.31.0" / "nest_asyncio.py"
    (tmp_path / source.name).write_text(source.read_text("utf-8"))
    with kernel(cwd=tmp_path, packages=folder) as k:
        k.ok("%load_ext llm_magic")
        k.ok(f"import {module}; {module}.apply()")
        found = k.ok("%llm_doctor").text
    assert ("was applied" in found) is reported
    assert ("pip install 'llm_magic[nested]'" in found) is reported


def test_doctor_reports_older_ipykernel(folder: Path) -> None:
    with kernel("6.31.0", packages=folder) as k:
        k.ok("%load_ext llm_magic")
        assert "ipykernel 6.31.0, without subshells" in state(k, "kernel")


def test_it_can_be_stopped(scripted: Kernel) -> None:
    ran = scripted.run(
        "import threading\nfrom tests.scripted import stop_when\n"
        "now = threading.Event(); now.set(); stop_when(now)\n"
        "%llm_doctor"
    )
    assert (ran.ename, ran.error) == ("Interrupted", "Stopped.")
    assert scripted.value("1 + 1") == 2
