"""Tab in real kernels: the line reads right afterwards, and no server hears of it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernels import Kernel, kernel
from tests.ollama_server import OllamaServer

# Names that every splitter of words takes apart, each at another character.
WIDE, BLANKS = "org/wide:7b-Q4.K", "two words"


@pytest.fixture(scope="module")
def ollama() -> Iterator[OllamaServer]:
    with OllamaServer() as running:
        yield running


@pytest.fixture(scope="module", params=["", "6.31.0", "7.3.0"], ids=lambda v: v or "installed")
def k(
    request: pytest.FixtureRequest, ollama: OllamaServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Kernel]:
    folder = tmp_path_factory.mktemp("home")
    (folder / "models" / "local one").mkdir(parents=True)
    (folder / "models" / "local one" / "config.json").touch()
    (folder / "folder with spaces").mkdir()
    (folder / "folder with spaces" / "x.gguf").touch()
    snapshot = folder / "hub" / "models--org--cached" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").touch()
    with kernel(
        request.param or None,
        cwd=folder,
        OLLAMA_BASE_URL=ollama.url,
        LOCAL_MODELS_DIR=str(folder / "models"),
        HF_HUB_CACHE=str(folder / "hub"),
    ) as k:
        k.ok(
            "from llm_magic.backends import registry as backends\n"
            "from llm_magic.notebook.magics import register\n"
            "from llm_magic.session import Session\n"
            "from tests.scripted import ScriptedBackend\n"
            "backend, real = ScriptedBackend(), backends.create\n"
            "llm = Session(create=lambda name: backend if name == 'local'"
            " else real(name, lambda: llm.settings, llm.keys))\n"
            "register(get_ipython(), llm)\n"
            f"%llm_load {WIDE} --name {WIDE}\n"
            f"%llm_load tiny --keep --name '{BLANKS}'\n"
            "answer_of_mine, towns = 1, {'north side': ['York']}\n"
            "%llm -c a_chat Hello"
        )
        yield k


@pytest.mark.parametrize(
    ("line", "read"),
    [
        ("%llm_lo|", ["%llm_load"]),
        ("%%ll|", ["%%llm", "%%llm_explain"]),
        ("%llm_load -q |", [f"%llm_load -q {q}" for q in ("none", "8bit", "4bit", "bnb-8bit", "bnb-4bit")]),
        ("%llm_load x -q 4| -d cpu", ["%llm_load x -q 4bit -d cpu"]),
        ("%llm_load x --quantization=4|", ["%llm_load x --quantization=4bit"]),
        ("%llm_load -b oll|", ["%llm_load -b ollama"]),
        ("%llm_load --tr|", ["%llm_load --trust-remote-code"]),
        ("%llm_load org/c|", ["%llm_load org/cached"]),
        ("%llm_load loc|", ['%llm_load "local one"']),
        ("%llm_load ./fol|", ['%llm_load "./folder with spaces/']),
        ('%llm_load "./folder with spaces/|"', ['%llm_load "./folder with spaces/x.gguf"']),
        (f"%llm_unload {WIDE[:4]}|", [f"%llm_unload {WIDE}"]),
        (f"%llm_unload {WIDE[:9]}|", [f"%llm_unload {WIDE}"]),
        (f"%%llm -m {WIDE[:13]}|\nHello", [f"%%llm -m {WIDE}\nHello"]),
        ("%%llm -m two|", [f'%%llm -m "{BLANKS}"']),
        ("%%llm -m 'two w|' -t 0", [f"%%llm -m '{BLANKS}' -t 0"]),
        ("%%llm --te| -o x", ["%%llm --temperature -o x"]),
        ("%%llm -t 0.5 -f j|", ["%%llm -t 0.5 -f json"]),
        ("%%llm -c |", ["%%llm -c a_chat"]),
        ("%%llm -o answ|", ["%%llm -o answer_of_mine"]),
        ("%%llm\nAsk {answ|} now", ["%%llm\nAsk {answer_of_mine} now"]),
        ("%%llm\nAsk {answer_of_mine.ima|}", ["%%llm\nAsk {answer_of_mine.imag}"]),
        ("%%llm\nAsk {towns['no|']}", ["%%llm\nAsk {towns['north side']}"]),
        ("%%llm\nansw|", []),
        ("%%llm\n--te|", []),
        ("%%llm\n%llm_lo|", []),
        ("%llm Ask {answ|", ["%llm Ask {answer_of_mine"]),
        ("%llm_config te|", ["%llm_config temperature="]),
        ("%llm_config top_k=3 top_|", ["%llm_config top_k=3 top_p="]),
        ("%llm_config temperature=|", ["%llm_config temperature=0.7", "%llm_config temperature=none"]),
        ("x = 1\n%llm_reset a|\ny = 2", ["x = 1\n%llm_reset a_chat\ny = 2"]),
        ("answer_of_m|", ["answer_of_mine"]),
    ],
)  # fmt: skip
def test_the_cell_after_a_choice(k: Kernel, line: str, read: list[str]) -> None:
    assert k.completed(line) == read


def test_python_is_left_alone(k: Kernel) -> None:
    assert "llm.generate" in k.completed("llm.gen|")
    assert "print" in k.completed("prin|")


def test_completion_offers_listed_server_models_without_a_request(
    k: Kernel, ollama: OllamaServer
) -> None:
    heard = len(ollama.received)
    k.completed("%llm_load -b ollama |")
    k.completed("%llm_load -b ollama --base-url http://127.0.0.1:9 |")
    k.completed("%llm_models -b |")
    assert len(ollama.received) == heard
    assert not any(name.startswith("llm_magic-hub") for name in k.threads())
    k.ok("%llm_models -b ollama")
    heard = len(ollama.received)
    assert k.completed("%llm_load -b ollama q|") == ["%llm_load -b ollama qwen3:0.6b"]
    assert k.completed("%llm_load -b ollama qwen3:|") == ["%llm_load -b ollama qwen3:0.6b"]
    assert k.completed("%llm_load qw| -b ollama") == ["%llm_load qwen3:0.6b -b ollama"]
    url = f"--base-url {ollama.url}"
    assert k.completed(f"%llm_load -b ollama {url} q|") == [f"%llm_load -b ollama {url} qwen3:0.6b"]
    assert k.completed("%llm_load -b vllm q|") == []
    assert len(ollama.received) == heard


def test_a_load_fills_the_list_too(ollama: OllamaServer) -> None:
    with kernel(OLLAMA_BASE_URL=ollama.url) as k:
        k.ok("%load_ext llm_magic")
        assert k.completed("%llm_load -b ollama qw|") == []
        k.ok("%llm_load llama3.2 -b ollama")
        heard = len(ollama.received)
        assert k.completed("%llm_load -b ollama qw|") == ["%llm_load -b ollama qwen3:0.6b"]
        assert len(ollama.received) == heard


@pytest.mark.parametrize("line", ["%llm_load ", "%%llm -m ", "%%llm --te", "%llm_config te"])
def test_a_key_press_is_answered_at_once(loaded: Kernel, line: str) -> None:
    # In the kernel's own time, however busy the machine is.
    loaded.ok(
        "import time\n"
        "from IPython.core.completer import provisionalcompleter\n"
        "def press(line):\n"
        "    began = time.thread_time()\n"
        "    with provisionalcompleter():\n"
        "        list(get_ipython().Completer.completions(line, len(line)))\n"
        "    return (time.thread_time() - began) * 1000"
    )
    taken = loaded.value(f"[press({line!r}) for _ in range(20)]")
    assert statistics.median(taken) < 30
    assert "torch" in loaded.value("list(__import__('sys').modules)")  # with a real model in it


def test_the_first_key_press_imports_no_torch_and_no_http(tmp_path: Path) -> None:
    with kernel(HF_HUB_CACHE=str(tmp_path)) as k:
        k.ok("%load_ext llm_magic")
        before = k.threads()
        assert k.completed("%llm_load -b vllm |") == []
        assert k.completed("%llm_load Smol|") == ["%llm_load SmolLM2-135M-Instruct"]
        assert not {"torch", "transformers", "aiohttp"} & k.value("set(__import__('sys').modules)")
        assert [name for name in k.threads() if name.startswith("llm_magic")] == []
        assert k.threads() == before
