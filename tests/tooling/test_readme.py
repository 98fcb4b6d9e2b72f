"""The README is true: its Python runs, its tables are whole, its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llm_magic.config.settings import Settings
from llm_magic.notebook.arguments.magic_options import MAGICS, arguments
from llm_magic.session import kernel_session
from tests.kernels import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def block_after(mark: str) -> str:
    """Return the first code block after an HTML comment."""
    found = re.search(rf"<!-- {mark} -->\n```\w*\n(.*?)```", README, re.DOTALL)
    assert found, f"README.md has no {mark}"
    return found[1]


def test_every_magic_is_described() -> None:
    for name in MAGICS:
        assert f"%{name}" in README


def test_every_option_of_the_main_magics_is_named() -> None:
    for name in ("llm", "llm_load"):
        missing = [a.names for a in arguments(name) if not any(f"`{n}" in README for n in a.names)]
        rare = {"--backend", "--trust-remote-code", "--attn"}
        assert [names for names in missing if not rare & set(names)] == []


@pytest.mark.parametrize("field", sorted(Settings.model_fields))
def test_every_setting_is_listed_with_its_default(field: str) -> None:
    info = Settings.model_fields[field]
    row = re.search(rf"\| `{info.validation_alias}` \|([^|]*)\|", README)
    assert row, f"{info.validation_alias} is not in the table"
    if info.default is not None:
        assert f"`{info.default}`" in row[1]


@pytest.mark.parametrize("mark", ["the run command", "the test command"])
def test_commands_name_files_that_exist(mark: str) -> None:
    for path in re.findall(r"(?:scripts|tests)/[\w./-]+", block_after(mark)):
        assert (ROOT / path).exists(), path


def test_files_and_pictures_that_are_linked_exist() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def drawn_tree() -> dict[str, str]:
    """Return the files of the README's tree and the description behind each."""
    section = README[README.index("## The source") :]
    lines = re.findall(r"```text\n(.*?)```", section, re.DOTALL)[0].splitlines()
    files: dict[str, str] = {}
    folders: list[str] = []
    for line in lines:
        name, _, description = line.strip().partition(" ")
        depth = (len(line) - len(line.lstrip())) // 2
        del folders[depth:]
        if name.endswith("/"):
            folders.append(name)
        else:
            files["".join([*folders, name])] = description.strip()
    return files


def test_tree_is_that_of_the_package() -> None:
    found = [
        path
        for end in ("py", "js", "css", "txt")
        for path in (ROOT / "llm_magic").rglob(f"*.{end}")
    ]
    files = {str(path.relative_to(ROOT)) for path in found}
    expected = {f for f in files if not f.endswith("__init__.py") or f == "llm_magic/__init__.py"}
    drawn = drawn_tree()
    assert set(drawn) == expected
    assert [path for path, description in drawn.items() if not description] == []


def test_python_blocks_run(
    model_cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLM_MAGIC_CACHE_DIR", str(model_cache))
    try:
        for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
            exec(compile(code, "README.md", "exec"), {})
    finally:
        # The blocks use the session of this process, whose threads would outlive the test.
        kernel_session().close()
    assert "Paris" in capsys.readouterr().out
