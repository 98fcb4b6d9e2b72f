"""`llm.map` in the cells of a real kernel: a DataFrame, ■, an awaited map."""

from __future__ import annotations

import time
from pathlib import Path

from tests import worker_backend
from tests.kernels import Kernel, within_a_second
from tests.until import until

_POOL = """import multiprocessing, sys
from concurrent.futures import ProcessPoolExecutor
from tests import worker_backend
sys.path.insert(0, {site!r})
workers_llm = Session()
register(get_ipython(), workers_llm)
pool = ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn"))
%llm_load {model} -b recorded"""


def test_map_over_a_dataframe(scripted: Kernel) -> None:
    k = scripted
    k.ok("import pandas as pd")
    k.ok("df = pd.DataFrame({'text': ['good tea', None, 'bad tea']}, index=[5, 7, 9])")
    k.ok("mapped = llm.map('Which? {text}', df)")
    assert k.value("[one and one.text for one in mapped]") == [
        "Which? good tea",
        None,
        "Which? bad tea",
    ]
    assert k.value("list(mapped.frame()['answer'].dropna())") == [
        "Which? good tea",
        "Which? bad tea",
    ]
    assert "3 rows, 1 missing" in k.ok("mapped").text
    assert k.value("list(df.columns)") == ["text"]
    wrong = k.run("llm.map('Which? {txet}', df)")
    assert wrong.error is not None
    assert 'Did you mean "text"?' in wrong.text
    k.ok("awaited = await llm.amap('{item}', ['a', 'b'])")
    assert k.value("[one.text for one in awaited]") == ["a", "b"]
    assert k.value("[one.text for one in llm.imap('{item}', iter('xy'))]") == ["x", "y"]


def test_interrupt_ends_a_map_within_a_second_and_keeps_its_answers(scripted: Kernel) -> None:
    k = scripted
    for call in (
        "llm.map('{item}', range(9))",
        "await llm.amap('and {item}', range(9))",
        "list(llm.imap('or {item}', range(9)))",
    ):
        k.ok("from tests import interrupt_points\nfrom tests.scripted import Hang\nhang = Hang()")
        k.ok("backend.will(*whole_answer('one')); backend.will(hang)")
        message = k.send(f"interrupt_points.announce(hang.reached.is_set)\n{call}")
        k.wait_for_announcement(message)
        time.sleep(0.3)
        began = time.perf_counter()
        k.interrupt()
        ran = k.wait(message)
        assert time.perf_counter() - began < within_a_second(), call
        assert ran.error is not None, call
        assert "Stopped after 1 of 9 rows. They are kept: the same call goes on" in ran.text, call
        k.ok(f"before = len(backend.requests)\nanswers = {call}")
        assert k.value("(answers[0].text, len(backend.requests) - before)") == ("one", 8), call
    # A generator of the user that blocks is interrupted, too.
    k.ok("import time\ndef rows():\n    yield 'a'\n    time.sleep(60)")
    k.ok("done = len(backend.requests)")
    message = k.send(
        "interrupt_points.announce(lambda: [r.outcome for r in backend.requests[done:]] == ['whole'])\n"
        "llm.map('{item}', rows())"
    )
    k.wait_for_announcement(message)
    time.sleep(0.3)
    began = time.perf_counter()
    k.interrupt()
    ran = k.wait(message)
    assert time.perf_counter() - began < 2 * within_a_second()
    assert "Stopped after 1 row. " in ran.text


def test_interrupt_of_waiting_for_a_background_map_leaves_it(scripted: Kernel) -> None:
    k = scripted
    k.ok("from tests.scripted import Hang\nhang = Hang(); backend.will('one', hang)")
    k.ok("%%llm --bg --over ['a', 'b'] -o job --workers 1\nSay {item}")
    k.ok("from tests import interrupt_points")
    for kind, wait in (("await", "await job"), ("wait", "job.result()")):
        cell = k.send(f"interrupt_points.announce_{kind}()\n{wait}")
        k.wait_for_announcement(cell)
        k.interrupt()
        ran = k.wait(cell)
        assert ran.error == f"Stopped waiting; job {k.value('job.number')} continues."
    k.ok("import asyncio")
    assert k.run("await asyncio.wait_for(job, 0.2)").ename == "TimeoutError"
    assert k.value("job.state") == "running"
    k.ok("hang.go.set()")
    assert k.value("[one.text for one in await job]") == ["one", "Say b"]


def test_workers_of_an_executor_answer_and_outlive_an_interrupt(
    scripted: Kernel, tmp_path: Path
) -> None:
    k, model = scripted, tmp_path / "model"
    model.mkdir()
    site = worker_backend.install(tmp_path / "site")
    k.ok(_POOL.format(site=str(site), model=model))
    k.ok("import pandas as pd\ndf = pd.DataFrame({'text': list('abcdefghij')}, index=range(5, 15))")
    k.ok("%%llm --over df -o out --on pool\nWhich? {text}")
    assert k.value("list(out['answer'])") == [f"Which? {letter}" for letter in "abcdefghij"]
    assert k.value("list(out.index)") == list(range(5, 15))
    assert len(set(worker_backend.loads(model))) == len(worker_backend.loads(model)) == 3
    wrong = k.run("%%llm --over df --on pol\n{text}")
    assert "--on pol: pol is not defined. Did you mean" in wrong.error
    for call in (
        "workers_llm.map('{item}', ['a', 'it waits'], on=pool)",
        "await workers_llm.amap('{item}', ['b', 'it waits'], on=pool)",
    ):
        message = k.send(call)
        until((model / "waiting").exists, "no worker waits", within=60)
        began = time.perf_counter()
        k.interrupt()
        ran = k.wait(message)
        assert time.perf_counter() - began < within_a_second(), call
        # Nothing is kept if both rows were in one chunk.
        assert "Interrupted" in ran.text, call
        assert "Stopped " in ran.text, call
        until(lambda: not (model / "waiting").exists(), "the worker was not stopped", within=25)
    assert k.value("[r.text for r in workers_llm.map('{item}', ['c', 'd'], on=pool)]") == ["c", "d"]
    assert len(worker_backend.loads(model)) == 3
    k.ok("pool.shutdown()\nworkers_llm.close()\nregister(get_ipython(), llm)")
    # Other modules use the kernel, too: its help lists the backends.
    k.ok(
        f"sys.path.remove({str(site)!r})\n"
        "from llm_magic.backends import registry\nregistry.refresh()"
    )
