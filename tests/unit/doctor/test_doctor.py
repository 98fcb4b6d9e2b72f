"""Checks of this machine and of installed packages, with and without problems."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_magic import __main__ as program
from llm_magic.backends import registry
from llm_magic.backends.local.cpus import cpus
from llm_magic.doctor import Finding, machine, run_checks
from llm_magic.doctor.notebook import KernelInfo, check_notebook, check_prompt_cells
from llm_magic.doctor.packages import check_backends, check_packages, installed
from llm_magic.errors import OptionError
from llm_magic.notebook.display.messages import doctor_table
from llm_magic.notebook.display.tables import Table
from llm_magic.session import Session
from tests.fault_server import FaultServer
from tests.scripted import settings
from tests.unit.test_main import run

_SMI = "echo 'NVIDIA H100 80GB HBM3, 80000, 81559, 535.104.05'"


def named(name: str, found: list[Finding]) -> Finding:
    return next(finding for finding in found if finding.name == name)


def install(folder: Path, name: str, version: str) -> None:
    """Put what pip writes about a package into a folder of the path."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a folder before all others on the path, of child processes too."""
    monkeypatch.syspath_prepend(str(tmp_path))
    others = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{others}")
    yield tmp_path
    monkeypatch.undo()
    registry.refresh()


def test_versions_are_reported() -> None:
    found = check_packages()
    assert named("python", found).text.endswith(sys.executable)
    assert f"transformers {installed('transformers')}" in named("local", found).text
    assert {finding.state for finding in found} == {"ok"}


def test_outdated_package_is_a_problem(site: Path) -> None:
    install(site, "transformers", "5.1.0")
    found = named("local", check_packages())
    assert found.state == "problem"
    assert found.text.startswith("transformers 5.1.0 is older than 5.6.2")
    assert found.fix == "pip install -U 'llm_magic[local]'"


def test_working_torch_is_ok() -> None:
    found = asyncio.run(machine.check_machine())
    assert named("memory", found).text.endswith(" free")
    assert named("CPUs", found).text == str(cpus())
    assert named("torch", found).state == "ok"


def put_nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put a command of that name before all others on the path."""
    smi = folder / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\n{script}\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.usefixtures("failing_torch")
@pytest.mark.parametrize(
    ("script", "name", "expected"),
    [
        ("echo 'no driver'; exit 9", "GPU", "nvidia-smi fails: no driver"),
        (
            "echo 'NVIDIA GB10, [N/A], [N/A], 580.1'",
            "GPU 0",
            "NVIDIA GB10: its driver does not report",
        ),
    ],
)
def test_incomplete_driver_output_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, name: str, expected: str
) -> None:
    put_nvidia_smi(tmp_path, monkeypatch, script)
    assert expected in named(name, asyncio.run(machine.check_machine())).text


def test_backend_that_cannot_be_imported_is_a_problem(site: Path) -> None:
    assert check_backends() == []
    install(site, "llm-magic-mine", "1.0")
    points = site / "llm_magic_mine-1.0.dist-info" / "entry_points.txt"
    points.write_text(f"[{registry.GROUP}]\nmine = no_such_module:Mine\n")
    registry.refresh()
    (found,) = check_backends()
    assert (found.name, found.state) == ("mine", "problem")
    assert "of the package llm-magic-mine cannot be imported (ModuleNotFoundError" in found.text


@pytest.mark.usefixtures("failing_torch")
def test_memory_of_a_gpu_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_nvidia_smi(tmp_path, monkeypatch, _SMI)
    found = asyncio.run(machine.check_machine())
    assert named("GPU 0", found).text == "NVIDIA H100 80GB HBM3: 83.9 GB of 85.5 GB free"


GPU = machine.Gpu("H100", 1, 2, "470.82")


@pytest.mark.parametrize(
    ("seen", "state", "expected"),
    [
        ({"cuda": "12.8", "gpus": 1, "mps": False, "warnings": []}, "ok", "for CUDA 12.8, 1 GPU"),
        ({"cuda": None, "gpus": 0, "mps": True, "warnings": []}, "ok", "mps"),
        ({"cuda": None, "gpus": 0, "mps": False, "warnings": []}, "problem",
         "2.13 is a CPU build, and there is a GPU (H100)"),
        ({"cuda": "12.8", "gpus": 0, "mps": False, "warnings": ["too old"]}, "problem", "470.82: too old"),
    ],
)  # fmt: skip
def test_devices_of_torch_are_reported(seen: dict[str, object], state: str, expected: str) -> None:
    found = machine.torch_finding("2.13", seen, [GPU])
    assert found.state == state
    assert expected in found.text
    assert bool(found.fix) == (state == "problem")


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("raise ImportError('libcudart.so.12: cannot open shared object file')", "libcudart.so.12"),
        ("import os; os.abort()", "exit code -6"),
        ("1 +", "SyntaxError"),
    ],
)
def test_torch_that_fails_to_import_is_a_problem(site: Path, code: str, expected: str) -> None:
    (site / "torch").mkdir()
    (site / "torch" / "__init__.py").write_text(code)
    found = named("torch", asyncio.run(machine.check_machine()))
    assert found.state == "problem"
    assert expected in found.text
    assert found.fix.startswith("pip install --force-reinstall torch")


def test_working_folder_that_is_gone_is_no_problem_of_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    found = asyncio.run(machine.check_machine())
    torch = named("torch", found)
    assert (torch.state, torch.text) == ("problem", "the working folder no longer exists")
    assert torch.fix == "import os; os.chdir(os.path.expanduser('~'))"


def test_cache_folder_and_free_space_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "not" / "yet"))
    found = named("hub cache", asyncio.run(machine.check_disks()))
    assert found.text.startswith(f"{tmp_path}/not/yet, ")
    assert found.text.endswith(" free")


def test_cellmage_is_reported(site: Path) -> None:
    assert named("%%llm", check_notebook(KernelInfo())).state == "ok"
    install(site, "cellmage", "0.6.1")
    found = named("%%llm", check_notebook(KernelInfo()))
    assert (found.state, found.text.partition(" is")[0]) == ("warn", "cellmage 0.6.1")
    found = named("%%llm", check_notebook(KernelInfo(owner="cellmage.magics.llm")))
    assert (found.state, found.fix) == (
        "problem",
        "%unload_ext cellmage, then %reload_ext llm_magic",
    )


def test_mismatched_widget_versions_are_a_problem(site: Path) -> None:
    assert named("widgets", check_notebook(None)).state == "ok"
    install(site, "jupyterlab_widgets", "1.1.11")
    found = named("widgets", check_notebook(None))
    assert found.state == "problem"
    assert found.fix.startswith("pip install -U ipywidgets jupyterlab_widgets")


def test_missing_or_outdated_lab_extension_is_reported(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "prefix", str(site))
    monkeypatch.setenv("HOME", str(site))
    install(site, "llm_magic", "0.2.0")
    assert (found := check_prompt_cells(site)) is not None
    assert (found.state, found.text) == ("warn", "the JupyterLab extension is not installed")
    assert found.fix == "pip install --force-reinstall llm_magic, then reload the page"
    folder = site / "share" / "jupyter" / "labextensions" / "llm-magic"
    (folder / "static").mkdir(parents=True)
    (folder / "static" / "llm_magic.0.1.0.js").write_text("old")
    (site / "labextension").mkdir()
    script = site / "labextension" / "llm_magic.js"
    for version, text, state in (
        ("0.1.0", "old", "warn"), ("0.2.0", "new", "warn"), ("0.2.0", "old", "ok"),
    ):  # fmt: skip
        (folder / "package.json").write_text(json.dumps({"version": version}))
        script.write_text(text)
        assert (found := check_prompt_cells(site)) is not None
        assert found.state == state, (version, text)
        assert (found.fix == f"pip install -e {site}, then reload the page") is (state == "warn")


def test_ipykernel_7_0_is_a_problem(site: Path) -> None:
    install(site, "ipykernel", "7.0.1")
    found = named("kernel", check_notebook(KernelInfo()))
    assert (found.state, "pip install -U ipykernel" in found.fix) == ("problem", True)


@pytest.mark.usefixtures("failing_torch")
def test_invalid_setting_does_not_stop_other_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_DEVICE", "gpu")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    session = Session()
    try:
        found = run_checks(session)
    finally:
        session.close()
    assert "LLM_DEVICE" in found[0].text
    assert found[0].state == "problem"
    assert {"python", "memory", "torch", "hub", "keys"} <= {finding.name for finding in found}


@pytest.mark.usefixtures("failing_torch")
def test_exception_in_check_becomes_finding(monkeypatch: pytest.MonkeyPatch, site: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    install(site, "aiohttp", "1")
    (site / "aiohttp-1.dist-info" / "METADATA").write_bytes(b"\xff")
    session = Session(settings())
    try:
        found = named("packages", run_checks(session))
    finally:
        session.close()
    assert found.state == "problem"
    assert "could not be checked: UnicodeDecodeError" in found.text


def test_unusable_folders_are_problems_with_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "file" / "below"))
    monkeypatch.setenv("LLM_MAGIC_CACHE_DIR", "~nobody-of-this-name/x")
    hub, own = asyncio.run(machine.check_disks())
    assert (hub.state, own.state) == ("problem", "problem")
    assert hub.text.endswith(f"{tmp_path}/file is not a folder")
    assert hub.fix == "set HF_HUB_CACHE to another folder"
    assert own.text.startswith("LLM_MAGIC_CACHE_DIR=~nobody-of-this-name/x: ")


@pytest.mark.usefixtures("failing_torch")
def test_unreadable_env_file_does_not_stop_other_checks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OLLAMA_BASE_URL", "http://127.0.0.1:9")
    Path(".env").write_bytes("# Größe\n".encode("latin-1"))
    session = Session()
    try:
        first, *others = run_checks(session)
    finally:
        session.close()
    assert (first.name, first.state) == ("settings", "problem")
    assert first.text.startswith(f"{tmp_path}/.env, line 1, is not UTF-8.")
    checked = {finding.name for finding in others}
    assert {"python", "memory", "torch", "hub", "keys", "ollama"} <= checked


@pytest.mark.usefixtures("failing_torch")
def test_unreadable_certificates_are_a_problem(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    with FaultServer() as server:
        url = server.url.replace("http:", "https:")
        session = Session(settings(openai_base_url=url, backend="openai"))
        try:
            found = run_checks(session)
        finally:
            session.close()
    assert named("certificates", found).state == "problem"
    for name in ("certificates", "openai"):
        assert f"SSL_CERT_FILE={tmp_path}/none.pem: No such file" in named(name, found).text
        assert "that variable" in named(name, found).fix


def test_table_counts_warnings_and_problems() -> None:
    table = doctor_table([Finding("a", "ok", "x"), Finding("b", "warn", "y", "z")])
    assert table.note == "1 warning."
    assert doctor_table([]).note == "No problems found."
    two = [Finding("a", "problem", "x", "y")] * 2
    assert doctor_table(two).note == "2 problems."


def test_table_wraps_to_terminal_width() -> None:
    long = "a sentence of several words that goes on for longer than a terminal is wide " * 2
    table = Table(("", "what", "found", "mend"), [["ok", "disk", long, "make room there"]], "note")
    lines = table.fitted(80).splitlines()
    assert max(map(len, lines)) <= 80
    assert " ".join(" ".join(lines).split()).count("sentence") == 2
    assert "make room there" in lines[1]
    assert table.fitted(None) == repr(table) == table.fitted(1000)


def results(shown: str) -> str:
    """Return the column of results, whose texts are wrapped, as one line."""
    head = shown.partition("\n")[0]
    column = slice(head.index("result"), head.index("fix"))
    return " ".join(" ".join(line[column] for line in shown.splitlines()).split())


def test_command_without_problems_exits_with_0(tmp_path: Path) -> None:
    unset = dict.fromkeys(("OPENAI_API_KEY", "LLM_BACKEND_TYPE", "OLLAMA_BASE_URL"), "")
    ran = run("doctor", cwd=tmp_path, **unset)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.splitlines()[0].split() == ["check", "result", "fix"]
    assert "HF_HUB_OFFLINE is set" in results(ran.stdout)
    assert max(map(len, ran.stdout.splitlines())) <= 100
    assert "XAI_API_KEY, HF_TOKEN " in results(ran.stdout), "nothing is lost"


@pytest.mark.usefixtures("failing_torch")
def test_command_with_a_problem_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OLLAMA_BASE_URL", "http://127.0.0.1:9")
    assert program.main(["doctor"]) == 1
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "no server is listening at 127.0.0.1:9" in results(shown.out)
    # A JupyterLab extension that is older than this checkout would be a warning.
    assert " problems" in shown.out.splitlines()[-1]


@pytest.mark.usefixtures("failing_torch")
def test_server_of_loaded_model_is_checked_with_its_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SOME_SERVERS_KEY", "sk-test-1")
    with FaultServer(key="sk-test-1") as server:
        session = Session(settings())
        session.load("tiny", backend="vllm", base_url=server.url, key_env="SOME_SERVERS_KEY")
        found = named("vllm", run_checks(session))
        session.close()
    assert found.state == "ok"
    assert str(server.port) in found.text


@pytest.mark.usefixtures("failing_torch")
def test_misspelled_backend_in_environment_names_variable() -> None:
    session = Session(settings(backend="olama"))
    with pytest.raises(
        OptionError, match=r"LLM_BACKEND_TYPE: there is no backend 'olama'\. Did you"
    ):
        session.load()
    assert "LLM_BACKEND_TYPE" in named("settings", run_checks(session)).text
    session.close()
