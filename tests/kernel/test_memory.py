"""Unloading gives the memory back, and neither failures nor repetition take any."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import pytest

from tests.kernels import SIZE, Kernel
from tests.tiny_models import tiny_llama

MB = 1_000_000
COUNT = (
    "import gc, torch\n"
    "def tensors():\n"
    "    gc.collect()\n"
    "    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())\n"
)
# The prefix cache is for the next prompt.
CLEAR = "from tests.benchmarks.inside import loaded_model\nloaded_model().prefix_cache.clear()"


def rss(k: Kernel) -> int:
    return int(k.process.memory_info().rss)


def cycle(k: Kernel) -> tuple[int, int]:
    """Load, answer, unload; returns what the process held before and after the unloading."""
    k.ok("%llm_load")
    k.ok("%llm -t 0 --max-new-tokens 2 Write about foxes.")
    before = rss(k)
    shown = k.ok("%llm_unload").text
    after = rss(k)
    found = re.search(rf"\({SIZE}\) · process (\d+(?:\.\d+)?) (MB|GB) → (\d+) MB$", shown)
    assert found, shown
    assert abs(int(found[3]) * MB - after) < 30 * MB
    return before, after


def resting_tensors(k: Kernel) -> int:
    """Return how many tensors there are once the thread of the model has freed those of its last step."""
    counts: list[int] = [-1]
    for _ in range(50):
        counts.append(k.value("tensors()"))
        if counts[-1] == counts[-2]:
            break
        time.sleep(0.2)
    return counts[-1]


def test_load_cycles_release_memory(loaded: Kernel) -> None:
    # Ten cycles of a tiny model, in tests/unit/backends/local/test_memory_use.py, find less than these.
    measured = [cycle(loaded) for _ in range(5)]
    for before, after in measured:
        assert before - after > 0.6 * 269 * MB, measured
    ends = [after for _before, after in measured]
    assert ends[-1] <= ends[2] + 30 * MB, measured
    loaded.ok("%llm_load")


def test_a_failed_call_keeps_no_tensor(loaded: Kernel) -> None:
    loaded.ok(COUNT)
    loaded.ok("%llm -t 0 --max-new-tokens 4 Hello")
    before, held = resting_tensors(loaded), rss(loaded)
    loaded.ok("long = 'The fox runs. ' * 100")
    for _ in range(3):
        assert loaded.run("%llm -p min_p=7 {long}").ename == "GenerationFailed"
        # The frames of the last error are what IPython keeps.
        assert resting_tensors(loaded) == before
    assert rss(loaded) < held + 200 * MB
    assert loaded.run("llm.generate('x', extra={'min_p': 7})").ename == "GenerationFailed"
    assert resting_tensors(loaded) == before


def test_an_interrupted_call_keeps_no_tensor(loaded: Kernel) -> None:
    loaded.ok(COUNT)
    loaded.ok("%llm -t 0 --max-new-tokens 4 Hello")
    loaded.ok(CLEAR)
    before = resting_tensors(loaded)
    cell = loaded.send("%llm -t 0 --max-new-tokens 400 Write a very long story about a fox.")
    loaded.wait_for_output(cell)
    loaded.interrupt()
    assert loaded.wait(cell).ename == "Interrupted"
    # Its last step may still be computed, and stored afterwards.
    resting_tensors(loaded)
    loaded.ok(CLEAR)
    assert resting_tensors(loaded) == before


# Who holds a model does not depend on its size; a tiny one is loaded in a tenth of the time.
LOAD = "%llm_load ./tiny"
MODEL = (
    "import gc\nmine = next(o for o in gc.get_objects() if type(o).__name__ == 'LlamaForCausalLM')"
)
FAILING = (
    "def scale(weight):\n"
    "    return weight * 2 / 0 + [][1]\n"
    "def work():\n"
    "    for o in gc.get_objects():\n"
    "        if type(o).__name__ == 'LlamaForCausalLM':\n"
    "            scale(o.lm_head.weight[0])\n"
    "work()"
)


@pytest.fixture(scope="module")
def k(loaded: Kernel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    """Return a kernel whose folder has the model ``tiny``."""
    before: str = loaded.value("__import__('os').getcwd()")
    folder = tiny_llama(tmp_path_factory.mktemp("models") / "tiny").parent
    loaded.ok(f"%cd -q {folder}")
    yield loaded
    loaded.ok(f"%cd -q {before}")


@pytest.mark.parametrize(
    ("cell", "holder", "freed"),
    [
        ("", "mine", "del mine"),
        ("rows = [1, mine.model.layers[0]]; del mine", r"rows\[1\]", "del rows"),
        ("weight = mine.lm_head.weight.detach()[0]; del mine", "weight", "del weight"),
        ("x = {'w': mine.lm_head.weight}; del mine", r"x\['w'\]", "x.clear()"),
    ],
)
def test_holder_of_an_unloaded_model_is_named(
    k: Kernel, cell: str, holder: str, freed: str
) -> None:
    k.ok(LOAD)
    k.ok(MODEL)
    k.ok(cell)
    assert re.search(f"still held by {holder}$", k.ok("%llm_unload").text)
    k.ok(freed)
    k.ok(LOAD)


def test_last_error_that_holds_a_weight_is_named(k: Kernel) -> None:
    k.ok(f"{LOAD}\nimport gc")
    assert k.run(FAILING).ename == "IndexError"
    shown = k.ok("%llm_unload").text
    assert "still held by sys.last_value (" in shown
    assert " in scale)" in shown or " in work)" in shown
    k.run("1 / 0")
    k.ok(LOAD)
    assert "held" not in k.ok("%llm_unload").text
    k.ok(LOAD)


# The weight's memory is free when its weak reference is dead, whatever the unload line names.
REFERENCE = f"{MODEL}\nimport weakref\nweight = weakref.ref(mine.lm_head.weight)\ndel mine"
FREE = "(gc.collect(), weight() is None)[1]"


@pytest.mark.parametrize(
    "failing",
    [
        "%llm_load nope/x",
        "%llm_load ./nope",
        "%llm_load -d cuda:99",
        "%llm_load --assistant nope",
        "%llm_load -q 8bit --assistant nope",
        "%llm_load --bg nope/x\nllm.wait_for_load()",
        "llm.load('nope/x')",
        "await llm.agenerate('x', extra={'min_p': 7})",
        "for chunk in llm.stream('x', extra={'min_p': 7}): pass",
        "later = llm.load_later('nope/x')\nllm.wait_for_load()",
    ],
)
def test_failed_call_does_not_keep_model_in_memory(k: Kernel, failing: str) -> None:
    k.ok(LOAD)
    k.ok("%llm -t 0 --max-new-tokens 2 Hello")
    k.ok(REFERENCE)
    assert k.run(failing).status == "error"
    k.ok("None")
    assert "held" not in k.ok("%llm_unload").text
    assert k.value(FREE) is True


def test_failed_load_before_a_good_load_does_not_keep_model_in_memory(k: Kernel) -> None:
    k.ok(LOAD)
    k.ok(REFERENCE)
    assert k.run("%llm_load nope/x").ename == "LoadFailed"
    assert "held" not in k.ok(f"{LOAD} --name other").text
    assert k.value(FREE) is True


def test_documented_command_frees_a_weight_in_an_output(k: Kernel) -> None:
    k.ok(LOAD)
    k.ok(f"{REFERENCE}\nw = weight()")
    k.ok("w")
    shown = k.ok("%llm_unload").text
    held = re.search(r"still held by Out\[(\d+)\], w$", shown)
    assert held, shown
    k.ok("del w")
    assert k.value(FREE) is False
    k.ok(f"%xdel _{held[1]}")
    assert k.value(FREE) is True
    # The names of the last outputs go on to work.
    assert "7" in k.ok("7").text
    assert k.value("_") == 7


def test_output_that_ipython_keeps_after_a_reset_is_named(k: Kernel) -> None:
    k.ok(LOAD)
    k.ok(REFERENCE)
    k.ok("weight()")
    k.run("%reset -f out")
    shown = k.ok("%llm_unload").text
    held = re.search(r"still held by get_ipython\(\)\.user_ns_hidden\['_'\]$", shown)
    assert held, shown
    k.ok("%xdel -n _")
    assert k.value(FREE) is True


def test_next_error_frees_what_the_last_error_holds(k: Kernel) -> None:
    k.ok(LOAD)
    k.ok(REFERENCE)
    assert k.run(FAILING).ename == "IndexError"
    assert "still held by sys.last_value (" in k.ok("%llm_unload").text
    assert k.value(FREE) is False
    k.run("1 / 0")
    assert k.value(FREE) is True


def test_unload_line_counts_the_holders_that_it_does_not_name(k: Kernel) -> None:
    k.ok(LOAD)
    k.ok(
        f"{REFERENCE}\nclass Store: w = weight()\n"
        "def bound(kept): return lambda: kept\n"
        "import collections\n"
        "fn, s, t = bound(weight()), {weight()}, (1, weight())\ndq = collections.deque([weight()])"
    )
    shown = k.ok("%llm_unload").text
    assert shown.endswith("still held by Store.w, dq, fn and 2 more"), shown
    k.ok("del Store, fn, s, t, dq")
    assert k.value(FREE) is True
    k.ok(LOAD)
