"""Loading the extension costs nothing, and unloading it leaves nothing."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernels import ROOT, Kernel, kernel
from tests.until import until

HEAVY = {
    "torch", "transformers", "accelerate", "safetensors", "huggingface_hub", "ipywidgets", "aiohttp",
    "pandas", "numpy", "anywidget", "pydantic", "markdown_it", "psutil._pslinux",
}  # fmt: skip
MAGICS = {
    "llm", "llm_load", "llm_config", "llm_status", "llm_models", "llm_unload", "llm_chats",
    "llm_panel", "llm_jobs", "llm_stop", "llm_wait", "llm_explain", "llm_doctor",
    "llm_reset", "llm_use", "llm_help", "llm_usage",
}  # fmt: skip
MODELS_ALIVE = "sum(type(o).__name__ == 'LlamaForCausalLM' for o in __import__('gc').get_objects())"


def magics(k: Kernel) -> set[str]:
    names: set[str] = k.value(
        "{name for table in get_ipython().magics_manager.magics.values() for name in table}"
    )
    return {name for name in names if name.startswith("llm")}


def our_threads(k: Kernel) -> list[str]:
    return [name for name in k.threads() if name.startswith("llm_magic")]


def test_load_ext_imports_nothing_heavy_and_starts_no_thread() -> None:
    with kernel() as k:
        k.ok("import sys; before = set(sys.modules)")
        threads = k.threads()
        k.ok("%load_ext llm_magic")
        new = k.value("set(sys.modules) - before")
        assert "llm_magic.notebook.magics" in new
        assert not new & HEAVY
        assert k.threads() == threads
        assert magics(k) == MAGICS

        k.ok("from llm_magic import llm")
        assert not k.value("set(sys.modules) - before") & HEAVY

        assert "already loaded" in k.ok("%load_ext llm_magic").text
        k.ok("%llm_status")
        assert "torch" not in k.value("set(sys.modules)")


def test_reload_keeps_what_is_loaded_and_unload_leaves_nothing(loaded: Kernel) -> None:
    assert k_answers(loaded)
    assert loaded.value(MODELS_ALIVE) == 1
    assert our_threads(loaded)
    loaded.ok("%llm_config temperature=0 system=Hello")

    assert loaded.ok("%reload_ext llm_magic").text == ""
    assert magics(loaded) == MAGICS
    assert loaded.value(MODELS_ALIVE) == 1
    assert loaded.value("(llm.generation.temperature, llm.generation.system)") == (0, "Hello")
    loaded.ok("%llm_config --reset")
    assert k_answers(loaded)
    assert loaded.complete("%llm_unload ") == ["SmolLM2-135M-Instruct"]  # one matcher, not two

    loaded.ok("%unload_ext llm_magic")
    assert magics(loaded) == set()
    assert loaded.value(MODELS_ALIVE) == 0
    until(lambda: our_threads(loaded) == [], "a thread is left")
    assert loaded.complete("%llm_unload Smol") == []
    assert loaded.run("%llm_status").status == "error"

    loaded.ok("%load_ext llm_magic")
    loaded.ok("%llm_load")
    assert k_answers(loaded)


def k_answers(k: Kernel) -> bool:
    k.ok("%llm -t 0 --max-new-tokens 3 Say hello.")
    return bool(k.value("llm.last.text"))


# An extension with a scripted backend, as `%load_ext` and not `register` makes it.
COPIED = """import sys; sys.path.insert(0, {folder!r})
import llm_magic.session.session as module
from tests.scripted import Hang, ScriptedBackend
backend = ScriptedBackend()
session = module.Session(create=lambda _name: backend)
module.kernel_session = lambda: session
import llm_magic.session
llm_magic.session.kernel_session = module.kernel_session
%load_ext llm_magic
from llm_magic import llm
%llm_load tiny"""


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Kernel, Path]]:
    """Return a kernel that runs a copy of the package, whose files may be changed."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "llm_magic", folder / "llm_magic")
    with kernel() as k:
        k.ok(COPIED.format(folder=str(folder)))
        assert k.value("llm_magic.__file__").startswith(str(folder))
        yield k, folder / "llm_magic"


def change(file: Path, old: str = "", new: str = "") -> None:
    """Change a file after it was imported; bytecode is current for the same size and second."""
    file.write_text(file.read_text("utf-8").replace(old, new) + "\n", "utf-8")
    os.utime(file, (time.time() + 1,) * 2)


def test_reload_keeps_jobs_chats_settings_and_panels(copied: tuple[Kernel, Path]) -> None:
    k, _ = copied
    k.ok("%llm_load big --keep\n%llm_use tiny\n%llm_config top_k=7 system=Short")
    k.ok("%llm -c zoo hello")
    k.ok("%llm_panel", cell_id="panel")
    k.ok("backend.will('one', hang := Hang(), ' two')")
    k.ok("%llm --bg -o job Answer.\nhang.reached.wait()", cell_id="job")
    assert k.ok("%reload_ext llm_magic").text == ""
    assert k.ok("%llm_use").text.splitlines()[0].startswith("active  tiny")
    assert k.value("(llm.generation.top_k, [c.name for c in llm.chats.all()])") == (7, ["zoo"])
    assert "running" in k.ok("%llm_jobs").text
    k.ok("hang.go.set()\n%llm_wait")
    assert k.value("job.result().text") == "one two"
    # The panel is connected, and shown again.
    k.ok(
        "magics = next(m for m in get_ipython().configurables if type(m).__name__ == 'PanelMagics')"
    )
    k.ok("panel = magics.panel")
    k.ok("%llm_panel", cell_id="panel")
    assert k.value("(panel.is_closed, magics.panel is panel)") == (False, True)


def test_reload_uses_changed_code_of_the_notebook_package(copied: tuple[Kernel, Path]) -> None:
    k, package = copied
    k.ok("%llm_panel", cell_id="old")
    k.ok("panel = magics.panel")
    help_module = package / "notebook/magics/help.py"
    change(help_module, "%llm_help lists all.", "Changed.")
    assert k.ok("%reload_ext llm_magic").text == ""
    assert "Changed." in k.run("%llm_help nothing").error
    assert k.ok("%llm hello").status == "ok"
    assert magics(k) == MAGICS
    assert "Run %llm_panel again" in k.value("panel.status.value")
    os.utime(help_module, (time.time() - 60,) * 2)

    change(package / "session/jobs.py")
    shown = k.ok("%reload_ext llm_magic").text
    assert shown == (
        "Note: llm_magic.session.jobs changed. Restart the kernel to use the new code.\n"
    )
    assert k.ok("%llm hello").status == "ok"

    for name in ("chats", "usage", "recording"):
        change(package / f"session/{name}.py")
    shown = k.ok("%reload_ext llm_magic").text
    assert shown.endswith(
        " modules of llm_magic changed. Restart the kernel to use the new code.\n"
    )

    change(help_module, "def magics_table", "def magics table")
    assert k.run("%reload_ext llm_magic").ename == "SyntaxError"
    change(help_module, "def magics table", "def magics_table")
    k.ok("%reload_ext llm_magic")
    assert k.ok("%llm_use").text.splitlines()[0].startswith("active  tiny")
    k.ok("%unload_ext llm_magic")
    assert magics(k) == set()
    assert k.value("(llm.status().models, backend.events[-1])") == ((), "close")
    until(lambda: our_threads(k) == [], "a thread is left")
