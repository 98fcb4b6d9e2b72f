"""`from llm_magic import llm` in cells: sync and async, also where nest-asyncio has been applied."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernels import Kernel, kernel, within_a_second

MODEL = "SmolLM2-135M-Instruct"
FEW = "temperature=0, max_new_tokens=6"


@pytest.fixture(scope="module", params=["", "nest_asyncio2", "6.31.0 with nest_asyncio"])
def k(request: pytest.FixtureRequest, model_cache: Path) -> Iterator[Kernel]:
    """Return a kernel with a model, also one whose loop the user has made re-entrant."""
    if not request.param:
        yield request.getfixturevalue("loaded")
        return
    version, _, nested = request.param.rpartition(" with ")
    with kernel(version, LLM_MAGIC_CACHE_DIR=str(model_cache)) as k:
        k.ok(f"import {nested}; {nested}.apply()")
        k.ok("%load_ext llm_magic")
        k.ok("from llm_magic import llm")
        k.ok("llm.load()")
        yield k


def test_generate_inside_the_running_loop(k: Kernel) -> None:
    assert k.value("__import__('asyncio').get_event_loop().is_running()")
    k.ok(f"reply = llm.generate('Say hello.', {FEW})")
    assert k.value("(type(reply).__name__, reply.model, reply.backend)") == (
        "Reply",
        MODEL,
        "local",
    )
    assert k.value("str(reply) == reply.text != ''")
    assert k.value("reply is llm.last")
    k.ok(f"again = llm.generate('Say hello.', system='Be rude.', {FEW})")
    assert k.value("again.messages[0].content") == "Be rude."


def test_stream(k: Kernel) -> None:
    k.ok(
        "import time\n"
        f"chunks = [(chunk, time.perf_counter()) for chunk in llm.stream('Say hello.', {FEW})]"
    )
    assert k.value("''.join(c.text for c, _ in chunks) == llm.last.text")
    assert k.value("sum(c.tokens for c, _ in chunks) == llm.last.usage.completion_tokens")
    assert k.value("chunks[-1][0].finish_reason") in {"stop", "length"}
    assert k.value("chunks[0][1] < chunks[-1][1]")
    k.ok("for chunk in llm.stream('Write a story.', max_new_tokens=400):\n    if chunk.text: break")
    assert k.ok(f"llm.generate('Say hello.', {FEW})").seconds < 3 * within_a_second()
    assert k.value("llm.last.finish_reason") == "length"


def test_agenerate_and_astream(k: Kernel) -> None:
    k.ok(f"expected = llm.generate('Say hello.', {FEW}).text")
    k.ok(f"reply = await llm.agenerate('Say hello.', {FEW})")
    assert k.value("reply.text == expected")
    k.ok(f"texts = [chunk.text async for chunk in llm.astream('Say hello.', {FEW})]")
    assert k.value("''.join(texts) == expected")
    k.ok(
        "async for chunk in llm.astream('Write a story.', max_new_tokens=400):\n"
        "    if chunk.text: break"
    )
    assert k.ok(f"llm.generate('Say hello.', {FEW})").seconds < 3 * within_a_second()


def test_four_at_once(k: Kernel) -> None:
    k.ok(
        "import asyncio\n"
        "names = ['Ada', 'Bob', 'Cy', 'Di']\n"
        f"one_by_one = [llm.generate(f'Greet {{n}}.', {FEW}).text for n in names]\n"
        "replies = await asyncio.gather("
        f"*(llm.agenerate(f'Greet {{n}}.', {FEW}) for n in names))"
    )
    assert k.value("[r.text for r in replies] == one_by_one")


def test_a_cancelled_task_frees_the_model(k: Kernel) -> None:
    ran = k.run(
        "import asyncio\n"
        "await asyncio.wait_for(\n"
        "    llm.agenerate('Write a very long story.', temperature=0, max_new_tokens=400), 0.5)"
    )
    assert ran.ename == "TimeoutError"
    assert ran.seconds < 3 * within_a_second()
    assert k.value("llm.last.finish_reason") == "cancelled"
    assert k.ok(f"llm.generate('Say hello.', {FEW})").seconds < 3 * within_a_second()


def test_magics_in_the_same_kernel(k: Kernel) -> None:
    ran = k.ok("%%llm -t 0 --max-new-tokens 8 -o reply\nSay hello.")
    assert ran.updates > 0
    k.ok("get_ipython().run_cell('%%llm -t 0 --max-new-tokens 2\\nSay hello.').raise_error()")
    if k.value("hasattr(__import__('asyncio'), '_nest_patched')"):
        k.ok(f"reply = asyncio.run(llm.agenerate('Say hello.', {FEW}))")
        assert k.value("bool(reply.text)")


def test_status_models_config_and_unload(k: Kernel) -> None:
    assert k.value("llm.status().backend_details['dtype']") == "bfloat16"
    assert k.value("llm.status().memory.process") > 269_000_000
    assert MODEL in k.value("[m.name for m in llm.models()]")
    k.ok("llm.generation.update(temperature=0, max_new_tokens=2)")
    k.ok("llm.generate('Hello')")
    assert k.value("llm.last.usage.completion_tokens") == 2
    assert k.value("repr(llm)") == f"<Session: Ready, {MODEL}>"
    k.ok("gone = llm.unload()")
    assert k.value("(gone.name, gone.size > 2e8, gone.holders)") == (MODEL, True, ())
    assert k.run("llm.generate('Hello')").ename == "ModelNotLoaded"
    k.ok("llm.generation.reset()\ninfo = llm.load(name='again', dtype='bfloat16')")
    assert k.value("(info.name, info.device, info.context_length)") == ("again", "cpu", 8192)


_RECORDED = """import warnings
with warnings.catch_warnings(record=True) as shown:
    warnings.simplefilter("always")
    """


def test_python_prompt_with_a_variable_in_braces_warns(scripted: Kernel) -> None:
    scripted.ok("prices, n, prompt = [1, 2], 2, 'How many of {len(prices)}?'")
    message = '{len(prices)} is sent as text. To insert the value, write f"…", or use %%llm.'
    for call in (
        "llm.generate(prompt);",
        "list(llm.stream(prompt));",
        "await llm.agenerate(prompt);",
        "[chunk async for chunk in llm.astream(prompt)];",
    ):
        scripted.ok(_RECORDED + call)
        assert scripted.value("[(str(one.message), one.lineno) for one in shown]") == [(message, 4)]
    for prompt in (
        '{"prices": [1]} {prices: [1]} {missing} {n} {print} {warnings} {{prices}} ${prices}',
        "Explain print(f'{prices}'), `{prices}`, '{prices}' and \\frac{prices}{prices}",
        'Explain "Costs: {prices}".format(prices=1) and <b>{prices}</b>',
        "```\n{prices}\n```",
        "const f = (x) => {prices};",
    ):
        scripted.ok(f"{_RECORDED}llm.generate({prompt!r});")
        assert scripted.value("[str(one.message) for one in shown]") == []
