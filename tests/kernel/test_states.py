"""The states of loading and unloading, and several models at once."""

from __future__ import annotations

import re
import time
from pathlib import Path

from tests.kernels import SIZE, Kernel, kernel, within_a_second
from tests.tiny_models import tiny_llama

MODEL = "SmolLM2-135M-Instruct"


def states(k: Kernel) -> tuple[str, str | None, list[str]]:
    """Return the state, the active model and the loaded ones, by Python and by `%llm_status`."""
    found: tuple[str, str | None, list[str]] = k.value(
        "(llm.status().status, llm.status().active_model, [m.name for m in llm.status().models])"
    )
    rows = dict(line.split(maxsplit=1) for line in k.ok("%llm_status").text.splitlines())
    assert rows["status"] == found[0]
    assert rows["active"].split()[:2] == ["model", found[1] or "none"]
    return found


def test_states_and_a_second_load_while_one_runs(model_cache: Path) -> None:
    with kernel(LLM_MAGIC_CACHE_DIR=str(model_cache)) as k:
        k.ok("%load_ext llm_magic")
        k.ok("from llm_magic import llm")
        assert states(k) == ("Inactive", None, [])
        assert k.run("%llm_load ./nowhere").ename == "ModelNotFound"
        assert states(k) == ("Failed", None, [])
        assert "last load" in k.ok("%llm_status").text
        assert "There is no file or folder './nowhere'" in k.run("%llm Hello").error

        k.ok(
            "from tests.interrupt_points import hold_import\nfrom tests.scripted import at_release"
        )
        k.ok("at_release(hold_import('torch').set)")
        begun = k.ok("%llm_load --bg")
        assert begun.text.startswith("Loading the default model · %llm_status shows the progress")
        assert begun.seconds < within_a_second()
        assert states(k)[0] == "Loading"
        for second in ("%llm_load ./nowhere", "%llm_load", "%llm_load --bg"):
            refused = k.run(second)
            assert refused.ename == "LoadInProgress"
            assert "is being loaded. Wait for it" in refused.error
        cell = k.send("%llm -t 0 --max-new-tokens 3 Hello")
        k.wait_for_output(cell, "Loading the default model")
        time.sleep(1)
        k.release()
        waited = k.wait(cell)
        assert MODEL in waited.text
        assert 1 < k.value("llm.last.timing.total_s") < waited.seconds
        assert states(k) == ("Ready", MODEL, [MODEL])
        assert "last load" not in k.ok("%llm_status").text

        assert "already loaded" in k.ok("%llm_load").text
        assert k.ok("%llm_load").seconds < within_a_second()
        k.ok("%llm_unload")
        assert states(k) == ("Inactive", None, [])

        k.ok("%llm_load ./nowhere --bg")
        assert k.run("%llm Hello").ename == "ModelNotFound"
        assert k.run("%llm Hello").ename == "ModelNotLoaded"
        k.ok("%llm_load --bg")
        assert f"Unloaded {MODEL}" in k.ok("%llm_unload").text  # waits for it first


def test_several_models_at_once(loaded: Kernel) -> None:
    assert "fp32 · 538 MB" in loaded.ok("%llm_load --keep --name two --dtype float32").text
    assert states(loaded) == ("Ready", "two", [MODEL, "two"])
    loaded.ok("%llm -t 0 --max-new-tokens 2 Hello")
    assert loaded.value("llm.last.model") == "two"
    loaded.ok(f"%llm -m {MODEL} -t 0 --max-new-tokens 2 Hello")
    assert loaded.value("llm.last.model") == MODEL
    assert (
        "name two is already used"
        in loaded.run("%llm_load --keep --name two --dtype float16").error
    )
    listed = loaded.ok("%llm_models").text.splitlines()
    assert [line.split()[:2] for line in listed[1:3]] == [["loaded", MODEL], ["loaded", "two"]]
    assert any(line.split()[:2] == ["bundled", MODEL] for line in listed[3:])

    loaded.ok(f"%llm_load {MODEL} --keep")
    assert states(loaded) == ("Ready", MODEL, [MODEL, "two"])
    loaded.ok("%llm_unload two")
    assert states(loaded) == ("Ready", MODEL, [MODEL])

    loaded.ok("%llm_load --keep --name three -q 8bit")
    shown = loaded.ok("%llm_unload --all").text.splitlines()
    assert [line.split()[1] for line in shown] == [MODEL, "three"]
    assert states(loaded) == ("Inactive", None, [])

    loaded.ok("%llm_load")
    shown = loaded.ok("%llm_load --name four -q 4bit").text.splitlines()
    assert shown[0].startswith("four · local cpu 4bit · 151 MB · ")
    assert re.match(rf"Unloaded {MODEL} \({SIZE}\) · process ", shown[1])
    assert states(loaded) == ("Ready", "four", ["four"])
    loaded.ok("%llm -t 0 --max-new-tokens 8 What is the capital of Germany?")
    assert "Berlin" in loaded.value("llm.last.text")
    # In a batch, and with a seed.
    loaded.ok(
        "import asyncio\n"
        "def answer(n):\n    return llm.agenerate(f'{n} + 1 =', seed=5, max_new_tokens=4)\n"
        "both = [await asyncio.gather(*map(answer, range(3))) for _ in range(2)]"
    )
    first, second = loaded.value("[[reply.text for reply in replies] for replies in both]")
    assert first == second
    assert all(first)
    status = loaded.ok("%llm_status").text
    assert re.search(r"^quantization +4bit$", status, re.MULTILINE), status
    loaded.ok("%llm_load")


def test_the_settings_of_the_session(loaded: Kernel) -> None:
    assert loaded.value("llm.generation.temperature") == 0.7
    shown = loaded.ok("%llm_config temperature=0.2 top_k=none stop=END").text
    assert "top_k        50 → none" in shown.splitlines()
    assert loaded.value("(llm.generation.top_k, llm.generation.stop)") == (None, ("END",))
    loaded.ok("llm.generation.temperature = 0.5")
    assert "0.5 *" in loaded.ok("%llm_config").text
    loaded.ok("%llm_config --reset")
    assert "*" not in loaded.ok("%llm_config").text
    assert loaded.value("llm.generation.temperature") == 0.7


def test_settings_come_from_the_environment_and_a_file(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("DEFAULT_LLM_TOP_K=7\nDEFAULT_LLM_TEMPERATURE=0.1\n")
    with kernel(cwd=tmp_path, DEFAULT_LLM_TEMPERATURE="0.3", DEFAULT_LLM_MAX_NEW_TOKENS="9") as k:
        k.ok("%load_ext llm_magic")
        k.ok("from llm_magic import llm")
        config = "(llm.generation.top_k, llm.generation.temperature, llm.generation.max_new_tokens)"
        assert k.value(config) == (7, 0.3, 9)
        (tmp_path / ".env").write_text("DEFAULT_LLM_TOP_K=8\n")
        assert k.value(config) == (7, 0.3, 9)
        k.ok("%llm_config --reset")
        assert k.value(config) == (8, 0.3, 9)


def test_failed_load_keeps_the_model_before_it(loaded: Kernel, tmp_path: Path) -> None:
    damaged = tiny_llama(tmp_path / "damaged") / "tokenizer.json"
    damaged.write_text("{}")
    config = tiny_llama(tmp_path / "other_sizes", layers=2) / "config.json"
    config.write_text(config.read_text().replace('"hidden_size": 64', '"hidden_size": 128'))
    more = tiny_llama(tmp_path / "more_layers", layers=2) / "config.json"
    more.write_text(more.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    tiny_llama(tmp_path / "whole")
    loaded.ok("%llm_load")
    for line, reason in {
        "damaged": "damaged could not be loaded",
        "other_sizes": "do not match its config.json",
        "more_layers": "weights are missing",
        "whole --attn flash_attention_2": "FlashAttention2",
        f"--assistant {tmp_path}/whole": "has a different vocabulary",
    }.items():
        folder = "" if line.startswith("-") else f"{tmp_path}/"
        failed = loaded.run(f"%llm_load {folder}{line}")
        assert reason in failed.error, line
        assert "unloaded" not in failed.error
        assert states(loaded) == ("Ready", MODEL, [MODEL])
    loaded.ok("%llm -t 0 --max-new-tokens 2 Hello")
    loaded.ok(f"%llm_load {tmp_path}/whole")
    assert states(loaded) == ("Ready", "whole", ["whole"])
    loaded.ok("%llm_load")
