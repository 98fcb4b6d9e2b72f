"""Hosted providers and names of models from a notebook: what a new user types first."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.kernels import Kernel, kernel, within_a_second
from tests.provider_server import KEY, ProviderServer

# Imports that take long: none of them is needed to report a wrong name.
LARGE = (
    "{'torch', 'transformers', 'aiohttp', 'numpy', 'llm_magic.notebook.display.markdown'}"
    " & __import__('sys').modules.keys()"
)
HOSTED = {
    "gpt-4o": "OpenAI and is not on this machine. Run %llm_load gpt-4o -b openai (key: OPENAI_API_KEY).",
    "openai/gpt-4o": "Run %llm_load gpt-4o -b openai (key: OPENAI_API_KEY).",
    "claude-sonnet-4-5": "Run %llm_load claude-sonnet-4-5 -b anthropic (key: ANTHROPIC_API_KEY).",
    "gemini-2.5-flash": "Run %llm_load gemini-2.5-flash -b gemini (key: GEMINI_API_KEY).",
    "mistral-large": "Run %llm_load mistral-large -b mistral (key: MISTRAL_API_KEY).",
    "deepseek-chat": "Run %llm_load deepseek-chat -b deepseek (key: DEEPSEEK_API_KEY).",
    "grok-4": "Run %llm_load grok-4 -b xai (key: XAI_API_KEY, not set).",
    "claude": "claude is the name of Anthropic, not of a model."
    " Run %llm_load MODEL -b anthropic (key: ANTHROPIC_API_KEY).",
    "OpenAI": "Run %llm_load MODEL -b openai (key: OPENAI_API_KEY).",
    "vllm": "vllm is the name of a backend, not of a model. Run %llm_load MODEL -b vllm.",
    "./models/foo": "There is no file or folder './models/foo'.",
    "~/no-such-model": "There is no file or folder '~/no-such-model'.",
    "/data/no-such-model": "There is no file or folder '/data/no-such-model'.",
    "no-such-model.gguf": "There is no file or folder 'no-such-model.gguf'.",
}


@pytest.fixture(scope="module")
def server() -> Iterator[ProviderServer]:
    with ProviderServer() as running:
        yield running


@pytest.fixture(scope="module")
def k(server: ProviderServer) -> Iterator[Kernel]:
    variables: dict[str, Any] = {
        **server.environment(),
        **{"XAI_API_KEY": "", "XAI_BASE_URL": "", "TOGETHER_API_KEY": "sk-wrong-000000000wrng"},
    }
    with kernel(**variables) as k:
        k.ok("%load_ext llm_magic")
        yield k


def test_wrong_name_is_reported_before_any_large_import(k: Kernel) -> None:
    began = time.monotonic()
    assert k.run("%llm_load gpt-4o").error.endswith(HOSTED["gpt-4o"])
    assert time.monotonic() - began < within_a_second()
    for name, error in HOSTED.items():
        ran = k.run(f"%llm_load {name}")
        assert ran.ename == "ModelNotFound"
        assert ran.error.endswith(error)
        assert len(ran.traceback) == 1
    assert k.value(LARGE) == set()


def test_folder_of_a_hosted_name_is_a_folder(k: Kernel) -> None:
    k.ok("import os, pathlib, tempfile; home = os.getcwd(); os.chdir(tempfile.mkdtemp())")
    k.ok("pathlib.Path('gpt-4o').mkdir()")
    assert "gpt-4o contains no model" in k.run("%llm_load gpt-4o").error
    k.ok("os.chdir(home)")


def test_provider_is_loaded_by_name_and_answers(k: Kernel, server: ProviderServer) -> None:
    ran = k.ok("%llm_load claude-test -b anthropic")
    assert ran.text.startswith("claude-test · anthropic ")
    assert "top_p is sent only if you set it" in ran.text
    assert k.ok("%llm -f text one two three").text.startswith("one two three")
    assert "anthropic does not support --seed" in k.run("%llm --seed 3 Hello").error
    assert "at most 1, but it is set to 1.5" in k.run("%llm -t 1.5 Hello").error
    assert server.silently_changed == []
    assert "gemini-test" in k.ok("%llm_models -b gemini").text
    assert KEY not in k.ok("%llm_status").text


def test_only_unsupported_options_that_were_set_are_noted(k: Kernel) -> None:
    assert "Not sent" not in k.ok("%llm_load open/test -b openrouter").text
    k.ok("%llm_load claude-test -b anthropic")
    k.ok("%llm_config top_k=7")
    try:
        ran = k.ok("%llm_load open/test -b openrouter")
        assert "Not sent, because open/test does not support them: top_k.\n" in ran.text
        assert "† not sent: open/test does not support it." in k.ok("%llm_config").text
    finally:
        k.ok("%llm_config --reset")


@pytest.mark.parametrize(
    ("cell", "error"),
    [
        ("%llm_load grok-4 -b xai", "XAI_API_KEY is not set, and you cannot be prompted for it here. Set "),
        ("%llm_models -b xai", "XAI_API_KEY is not set"),
        ("%llm_load x -b together", "rejected the key in TOGETHER_API_KEY (401): Invalid API key provided."),
        ("%llm_load gemini-tset -b gemini", 'Did you mean "gemini-test"'),
        ("%llm_load x -b antropic", 'There is no backend \'antropic\'. Did you mean "anthropic"?'),
        ("%llm_load x -b llama-server", 'Did you mean "llamacpp-server"?'),
        ("%llm_load x -b llama.cpp", 'Did you mean "llamacpp"?'),
        ("%llm_load x -b openai-compatible", 'Did you mean "openai"?'),
        ("%llm_load http://localhost:8123/v1/",
         "http://localhost:8123/v1 is the address of a server, not a model."
         " Run %llm_load MODEL -b openai --base-url http://localhost:8123/v1"),
        ("%llm_load localhost:11434", "Run %llm_load MODEL -b ollama --base-url http://localhost:11434"),
        ("%llm_load http://localhost:8 -b vllm", "Run %llm_load MODEL -b vllm --base-url http://localhost:8"),
        ("%llm_load https://me:pw-wrng@host/v1", "must not contain a user name, a password or a query."),
        ("%llm_load https://huggingface.co/org/model/tree/main",
         "is the page of a model. Run %llm_load org/model."),
        ("%llm_load -b openai fast http://localhost:8123/v1", "unexpected argument 'http://localhost:8123/v1'."
         " Write --base-url before the address of a server."),
        ("%llm_models openai", "unexpected argument 'openai'. Use -b openai."),
        ("%llm_load x -b Claude", 'There is no backend \'Claude\'. Did you mean "anthropic"?'),
        ("%llm_load x -b grok", 'Did you mean "xai"?'),
        ("%llm_load x --base-url http://localhost:1", "with local. Add the -b that you mean, or remove it."),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(k: Kernel, cell: str, error: str) -> None:
    ran = k.run(cell)
    assert error in ran.error
    assert len(ran.traceback) == 1
    assert "wrng" not in ran.text


def test_choosing_a_provider_in_the_panel_does_not_wait_for_a_key(k: Kernel) -> None:
    """A frontend shows no prompt for a message of a widget: the kernel would wait forever."""
    k.ok("from llm_magic import llm; from llm_magic.notebook.panel import ControlPanel")
    k.ok("panel = ControlPanel(llm)")
    comm_id = k.value("panel.loading.backend.comm.comm_id")
    index = k.value("panel.loading.backend.options.index('xai')")
    # As JupyterLab runs a cell, which can prompt.
    k.wait(k.send("ready = True", asks=True))
    data = {"method": "update", "state": {"index": index}, "buffer_paths": []}
    k.client.shell_channel.send(
        k.client.session.msg("comm_msg", {"comm_id": comm_id, "data": data})
    )
    k.ok(
        "while 'XAI' not in (shown := panel.loading.message.value): __import__('time').sleep(0.01)"
    )
    shown = k.value("shown")
    assert "XAI_API_KEY is not set, and you cannot be prompted for it here." in shown
