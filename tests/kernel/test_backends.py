"""A package that adds a backend, installed by pip and used in a real kernel."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.echo_package import install
from tests.kernels import Kernel, kernel


@pytest.fixture(scope="module")
def k(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    """Return a kernel where the example package is installed."""
    with kernel(packages=install(tmp_path_factory.mktemp("echo"))) as k:
        k.ok("%load_ext llm_magic")
        k.ok("from llm_magic import llm")
        yield k


def test_installed_backend_answers(k: Kernel) -> None:
    k.ok("%llm_load -b echo")
    k.ok("%%llm --max-new-tokens 3 -o reply\nPolly likes a cracker.")
    assert k.value("(reply.text, reply.finish_reason, reply.backend)") == (
        "Polly likes a", "length", "echo",
    )  # fmt: skip


def test_its_option_is_a_flag(k: Kernel) -> None:
    k.ok("%llm_load -b echo --pause 0.01")
    assert k.value("llm.used('echo').pause") == 0.01
    assert (
        "pause=-1 is out of range. It must be 0 or more."
        in k.run("%llm_load -b echo --pause -1").error
    )
    error = k.run("%llm_load -b vllm --pause 1").error
    assert "--pause works only with -b echo, not with vllm." in error


def test_its_name_and_option_are_in_help_and_completion(k: Kernel) -> None:
    shown = k.help("%llm_load")
    assert "llamacpp-server or echo" in " ".join(shown.split())
    assert "With -b echo:" in shown
    assert "--pause S" in shown
    assert "echo" in k.complete("%llm_load -b e")
    assert "--pause" in k.complete("%llm_load -b echo --")
    assert "--base-url" not in k.complete("%llm_load -b echo --")


def test_unsupported_option_fails_the_cell(k: Kernel) -> None:
    k.ok("%llm_load -b echo")
    error = k.run("%llm -t 1 Hello").error
    assert "echo does not support --temperature. Remove it." in error


def test_panel_has_its_option(k: Kernel) -> None:
    k.ok("%llm_panel")
    k.ok("from llm_magic.notebook.panel import ControlPanel")
    k.ok("panel = ControlPanel(llm)\npanel.loading.backend.value = 'echo'")
    shown = "{n for n, c in panel.loading.options.items() if c.layout.display != 'none'}"
    assert k.value(shown) == {"pause"}
    assert k.value("panel.loading.given()") == {"backend": "echo"}
    k.ok("panel.loading.options['pause'].value = '0.5'")
    assert k.value("panel.loading.given()") == {"backend": "echo", "pause": "0.5"}
