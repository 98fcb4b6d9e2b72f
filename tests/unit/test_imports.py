"""Loading the extension costs nothing: heavy packages come with first use."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {
    "torch", "transformers", "accelerate", "safetensors", "gguf", "huggingface_hub", "tokenizers",
    "bitsandbytes", "ipywidgets", "aiohttp", "httpx", "numpy", "pandas", "pydantic", "pydantic_settings",
    "markdown_it", "mdit_py_plugins", "psutil", "filelock", "jinja2",
}  # fmt: skip
# The modules that ``%load_ext`` imports: the session, and the magics without what reads their lines,
# completes them and shows their results. Each further module adds to the 30 ms that it takes.
LOADED = {
    "llm_magic": "backends config errors notebook session text types",
    "llm_magic.backends": "reasoning stop_strings thread_bridge",
    "llm_magic.config": "commands",
    "llm_magic.notebook": "arguments cell_interrupts display frontend magics",
    "llm_magic.notebook.arguments": "matcher",
    "llm_magic.notebook.display": "call_line",
    "llm_magic.notebook.magics": "ask base chats doctor help jobs models panel traitlets_config",
    "llm_magic.session": (
        "cell_keys chat_files chats context_window event_loop interruptible_wait jobs loading"
        " nested_asyncio recording requests response session usage"
    ),
}


def modules_after(code: str) -> set[str]:
    """Return the names of the modules that a fresh process has imported after `code`."""
    code += "\nimport sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    return set(done.stdout.split())


def imported_by(code: str) -> set[str]:
    """Return which heavy packages a fresh process has after `code`."""
    return modules_after(code) & HEAVY


# IPython itself may bring some of them; those are not ours.
IPYTHON = "from IPython.core.interactiveshell import InteractiveShell"


@pytest.mark.parametrize(
    "code",
    [
        "import llm_magic",
        "from llm_magic import llm; llm.last",
        f"{IPYTHON}\nfrom llm_magic.notebook import magics\n"
        "from llm_magic.notebook.arguments import completer, parser, magic_options",
        f"{IPYTHON}\nfrom llm_magic.notebook.display import answer_view, markdown, messages\n"
        "from llm_magic.prompts import template\nfrom llm_magic.session import chats, event_loop",
    ],
)
def test_importing_brings_nothing_heavy(code: str) -> None:
    ours = imported_by(code) - imported_by(IPYTHON if IPYTHON in code else "")
    assert ours == set()


def test_loading_the_extension_imports_the_session_and_the_magics_only() -> None:
    shell = (
        f"{IPYTHON}\nfrom traitlets.config import Config\n"
        "shell = InteractiveShell.instance(config=Config(HistoryManager={'enabled': False}))"
    )
    load = "\nshell.run_line_magic('load_ext', 'llm_magic')"
    imported = modules_after(shell + load) - modules_after(shell)
    ours = {f"{package}.{name}" for package, names in LOADED.items() for name in names.split()}
    assert imported & HEAVY == set()
    assert {name for name in imported if name.startswith("llm_magic.")} == ours
    # Of the standard library: what only suggestions and the tables of trusted types need.
    assert not imported & {"difflib", "fractions"}


def test_the_options_need_pydantic_and_nothing_more() -> None:
    light = {"pydantic", "pydantic_settings"}
    assert imported_by("from llm_magic.session import Session; Session().generation") <= light
    assert imported_by("from llm_magic.session import Session; Session().status()") <= light


def test_the_local_backend_is_known_without_torch() -> None:
    code = "from llm_magic.backends.registry import names, create; names()"
    assert "torch" not in imported_by(code)
    used = imported_by(
        "from llm_magic.backends.local.backend import LocalTransformersBackend\n"
        "from llm_magic.config.settings import Settings\n"
        "from llm_magic.config.api_keys import ApiKeys\n"
        "from llm_magic.backends.local import memory\n"
        "LocalTransformersBackend(Settings, ApiKeys()).memory(), memory.memory_use(), memory.release_memory()"
    )
    assert not used & {"torch", "transformers", "accelerate", "bitsandbytes"}


def test_unknown_name_raises_attribute_error() -> None:
    import llm_magic

    assert "llm" in dir(llm_magic)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = llm_magic.nothing
