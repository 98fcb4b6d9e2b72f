"""Loading the extension costs nothing, and unloading it leaves nothing."""

from __future__ import annotations

from tests.kernels import Kernel, kernel

HEAVY = {
    "torch", "transformers", "accelerate", "safetensors", "huggingface_hub", "ipywidgets", "aiohttp",
    "pandas", "numpy", "anywidget", "pydantic", "markdown_it", "psutil._pslinux",
}  # fmt: skip
MAGICS = {
    "llm", "llm_load", "llm_config", "llm_status", "llm_models", "llm_unload", "llm_chats",
    "llm_panel", "llm_jobs", "llm_stop", "llm_wait", "llm_explain", "llm_doctor",
    "llm_reset", "llm_usage",
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


def test_reload_and_unload_leave_nothing_and_it_can_be_loaded_again(loaded: Kernel) -> None:
    assert k_answers(loaded)
    assert loaded.value(MODELS_ALIVE) == 1
    assert our_threads(loaded)

    loaded.ok("%reload_ext llm_magic")
    assert magics(loaded) == MAGICS
    assert loaded.value("llm.status().models") == ()
    assert loaded.value(MODELS_ALIVE) == 0
    assert our_threads(loaded) == []
    assert loaded.run("%llm hello").ename == "ModelNotLoaded"
    loaded.ok("%llm_load")
    assert k_answers(loaded)
    assert loaded.complete("%llm_unload ") == ["SmolLM2-135M-Instruct"]  # one matcher, not two

    loaded.ok("%unload_ext llm_magic")
    assert magics(loaded) == set()
    assert loaded.value(MODELS_ALIVE) == 0
    assert our_threads(loaded) == []
    assert loaded.complete("%llm_unload Smol") == []
    assert loaded.run("%llm_status").status == "error"

    loaded.ok("%load_ext llm_magic")
    loaded.ok("%llm_load")
    assert k_answers(loaded)


def k_answers(k: Kernel) -> bool:
    k.ok("%llm -t 0 --max-new-tokens 3 Say hello.")
    return bool(k.value("llm.last.text"))
