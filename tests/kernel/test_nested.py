"""`allow_nested_loops()`: asyncio.run inside cells, and no queued cell is lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernels import ROOT, Kernel, kernel

VERSIONS = ["", "6.31.0", "7.3.0"]
HERE = f"import sys; sys.path.insert(0, {str(ROOT)!r})"


@pytest.fixture(scope="module", params=VERSIONS, ids=lambda v: v or "installed")
def k(request: pytest.FixtureRequest) -> Iterator[Kernel]:
    with kernel(request.param or None) as k:
        k.ok(HERE)
        yield k


def queued(k: Kernel, first: str, count: int = 12) -> list[str]:
    """Run a cell with others queued behind it; returns what came of each."""
    k.ok("ran = []")
    cells = [k.send(first)]
    cells += [k.send(f"ran.append({number})\nran[-1]") for number in range(count)]
    return [k.wait(cell, timeout=30).status for cell in cells]


def test_no_queued_cell_is_lost(k: Kernel) -> None:
    assert "running event loop" in k.run("import asyncio\nasyncio.run(asyncio.sleep(0))").error
    k.ok("import llm_magic\nllm_magic.allow_nested_loops()")
    for _ in range(2):
        assert queued(k, "value = asyncio.run(asyncio.sleep(1, 'slept'))") == ["ok"] * 13
        assert k.value("(value, ran)") == ("slept", list(range(12)))
    k.ok("llm_magic.allow_nested_loops()  # once more does no harm")
    assert (
        k.value("__import__('llm_magic.session.nested_asyncio', fromlist=['x']).problem()") is None
    )


def test_an_answer_inside_a_nested_run_and_beside_a_job(k: Kernel) -> None:
    k.ok(
        "import asyncio, llm_magic\n"
        "from llm_magic.session import Session\n"
        "from llm_magic.notebook.magics import register\n"
        "from tests.scripted import Pause, ScriptedBackend, whole_answer\n"
        "backend = ScriptedBackend()\n"
        "llm = Session(create=lambda _name: backend)\n"
        "register(get_ipython(), llm)\n"
        "llm_magic.allow_nested_loops()\n"
        "%llm_load tiny\n"
    )
    k.ok("backend.will(Pause(0.8), *whole_answer('from the job'))")
    k.ok("%%llm --bg -o job\nTake your time.")
    ask = "reply = asyncio.run(llm.agenerate('Hello there.'))"
    assert queued(k, f"{ask}\nasyncio.run(asyncio.sleep(0.5))") == ["ok"] * 13
    assert k.value("reply.text") == "Hello there."
    k.ok("async def waited(): return await job")
    assert k.value("asyncio.run(waited()).text") == "from the job"
    k.ok(
        "async def both(): return await asyncio.gather(llm.agenerate('a'), llm.agenerate('b'))\n"
        "replies = asyncio.run(both())"
    )
    assert k.value("[reply.text for reply in replies]") == ["a", "b"]


def test_foreign_nest_asyncio_causes_warning_on_ipykernel_7() -> None:
    archived = ROOT / ".kernels" / "6.31.0" / "nest_asyncio.py"
    with kernel() as k:
        k.ok(HERE)
        k.ok(
            "import importlib.util\n"
            f"spec = importlib.util.spec_from_file_location('nest_asyncio', {str(archived)!r})\n"
            "sys.modules['nest_asyncio'] = nest = importlib.util.module_from_spec(spec)\n"
            "spec.loader.exec_module(nest)\n"
            "nest.apply()"
        )
        ran = k.run("import llm_magic\nllm_magic.allow_nested_loops()")
        assert ran.ename == "EventLoopError"
        assert ran.error.startswith("nest-asyncio was applied")
        assert "causes queued cells to be lost without an error" in ran.error
        assert "causes queued cells to be lost without an error" in k.ok("%load_ext llm_magic").text


def test_nest_asyncio_is_allowed_only_where_it_is_safe(tmp_path: Path) -> None:
    hide = (
        "import importlib.metadata\n"
        "import llm_magic.session.nested_asyncio\n"
        "installed = llm_magic.session.nested_asyncio.version\n"
        "def without(name):\n"
        "    if name == 'nest-asyncio2':\n"
        "        raise importlib.metadata.PackageNotFoundError(name)\n"
        "    return {answer}\n"
        "llm_magic.session.nested_asyncio.version = without"
    )
    with kernel("6.31.0") as k:
        k.ok(HERE)
        k.ok(hide.format(answer="installed(name)"))
        k.ok("import asyncio, llm_magic\nllm_magic.allow_nested_loops()")
        assert k.value("hasattr(asyncio, '_nest_asyncio2')") is False
        assert queued(k, "asyncio.run(asyncio.sleep(0.5))") == ["ok"] * 13
    with kernel() as k:
        k.ok(HERE)
        k.ok(hide.format(answer="'1.6.0'"))
        ran = k.run("import asyncio, llm_magic\nllm_magic.allow_nested_loops()")
        assert (ran.ename, "not safe on ipykernel 7" in ran.error) == ("EventLoopError", True)
        assert k.value("hasattr(asyncio, '_nest_patched')") is False
        k.ok(hide.format(answer="without('nest-asyncio2')"))
        ran = k.run("llm_magic.allow_nested_loops()")
        assert (ran.ename, "pip install" in ran.error) == ("MissingDependency", True)


def test_a_loop_that_cannot_be_patched_is_refused_and_nothing_is_touched() -> None:
    with kernel() as k:
        k.ok(HERE)
        ran = k.run(
            "import asyncio, llm_magic\n"
            "class Other(asyncio.AbstractEventLoop): ...\n"
            "running = asyncio.get_running_loop()\n"
            "asyncio._set_running_loop(Other())\n"
            "try:\n    llm_magic.allow_nested_loops()\n"
            "finally:\n    asyncio._set_running_loop(running)"
        )
        assert (ran.ename, "__main__.Other" in ran.error) == ("EventLoopError", True)
        assert k.value("hasattr(asyncio, '_nest_patched')") is False
