"""Plain programs, without a notebook: ``asyncio.run(main())`` with ``from llm_magic import llm``."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fault_server import CHAT, FaultServer
from tests.kernels import ROOT, within_a_second
from tests.wire import Hold, delta, sse

_PROGRAM = """
import asyncio, json, sys, threading, time
from llm_magic import llm
async def main():
{body}
print(json.dumps(asyncio.run(main())))
"""


def program(body: str, cwd: Path) -> Any:
    """Run the body of a coroutine in a process of its own; returns what it returns."""
    code = _PROGRAM.format(body="\n".join(f"    {line}" for line in body.splitlines()))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True, text=True, timeout=120, cwd=cwd, env=_environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer() as running:
        yield running


def load(server: FaultServer) -> str:
    return f"llm.load('tiny', backend='openai', base_url={server.url!r})\n"


def test_one_many_and_a_stream(server: FaultServer, tmp_path: Path) -> None:
    body = load(server) + (
        "one = await llm.agenerate('Say this.')\n"
        "many = await asyncio.gather(*(llm.agenerate(f'number {n}') for n in range(8)))\n"
        "stream = [chunk.text async for chunk in llm.astream('as a stream')]\n"
        "return [one.text, [reply.text for reply in many], ''.join(stream)]"
    )
    assert program(body, tmp_path) == [
        "Say this.", [f"number {n}" for n in range(8)], "as a stream",
    ]  # fmt: skip


def test_a_second_loop_uses_the_same_connections(server: FaultServer, tmp_path: Path) -> None:
    body = load(server) + (
        "def another(): return asyncio.run(llm.agenerate('from another loop')).text\n"
        "return [(await llm.agenerate('here')).text, await asyncio.to_thread(another)]"
    )
    assert program(body, tmp_path) == ["here", "from another loop"]
    assert server.connections == 1


# A timeout at the moment when an answer has text.
_UNTIL_TEXT = """import contextlib
@contextlib.asynccontextmanager
async def until_text():
    async with asyncio.timeout(None) as limit:
        async def watch():
            while not (llm.answering and llm.answering[0].text): await asyncio.sleep(0.01)
            limit.reschedule(asyncio.get_running_loop().time())
        watching = asyncio.create_task(watch())
        yield
"""


@pytest.mark.parametrize(
    "ask",
    [
        "async with until_text(): await asyncio.wait_for(llm.agenerate('Never ends.'), 60)",
        "async with until_text():\n        async for _ in llm.astream('Never ends.'): pass",
        "async with until_text(), asyncio.TaskGroup() as group:\n"
        "        group.create_task(llm.agenerate('Never ends.'))",
    ],
)
def test_a_cancelled_task_leaves_the_server(server: FaultServer, tmp_path: Path, ask: str) -> None:
    server.will(CHAT, *sse(delta("one"), done=False), Hold())
    body = load(server) + (
        f"{_UNTIL_TEXT}try:\n    {ask}\nexcept TimeoutError:\n    pass\n"
        "first = [llm.last.text, llm.last.finish_reason]\n"
        "return [first, (await llm.agenerate('And on.')).text]"
    )
    assert program(body, tmp_path) == [["one", "cancelled"], "And on."]
    assert server.wait_for(CHAT).left.wait(within_a_second())


def test_a_program_that_ends_early_leaves_the_server(server: FaultServer, tmp_path: Path) -> None:
    server.will(CHAT, *sse(delta("one"), done=False), Hold())
    body = load(server) + (
        "task = asyncio.create_task(llm.agenerate('Never ends.'))\n"
        "while not (llm.answering and llm.answering[0].text): await asyncio.sleep(0.01)\n"
        "return 'gone'"
    )
    assert program(body, tmp_path) == "gone"
    assert server.wait_for(CHAT).left.wait(within_a_second())


def test_daemon_thread_reports_nothing_when_the_program_ends(
    server: FaultServer, tmp_path: Path
) -> None:
    server.will(CHAT, *sse(delta("one"), done=False), Hold())
    listening = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    body = load(server) + (
        "def ask(): llm.generate('Never ends.')\n"
        "threading.Thread(target=ask, daemon=True).start()\n"
        "while not (llm.answering and llm.answering[0].text): await asyncio.sleep(0.01)\n"
        f"def load(): llm.load('other', backend='openai', base_url={url!r}, keep=True)\n"
        "threading.Thread(target=load, daemon=True).start()\n"
        "while not llm.loading: await asyncio.sleep(0.01)\n"
        "return llm.loading"
    )
    with listening:
        assert program(body, tmp_path) == "other"


def test_the_local_model(model_cache: Path, tmp_path: Path) -> None:
    few = "temperature=0, max_new_tokens=4"
    body = (
        # In 16 bits, answers that are decoded together round differently.
        "llm.load(dtype='float32')\n"
        f"alone = [(await llm.agenerate(name, {few})).text for name in ('Ada', 'Bob')]\n"
        f"at_once = await asyncio.gather(*(llm.agenerate(n, {few}) for n in ('Ada', 'Bob')))\n"
        "task = asyncio.create_task(llm.agenerate('Write a long story.', max_new_tokens=500))\n"
        "while not (llm.answering and llm.answering[0].text): await asyncio.sleep(0.01)\n"
        "task.cancel()\n"
        "await asyncio.wait([task])\n"
        "cancelled = time.monotonic()\n"
        f"await llm.agenerate('Hello', {few})\n"
        "free = time.monotonic() - cancelled\n"
        "count = llm.last.usage.completion_tokens\n"
        "llm.unload()\n"
        "return [alone == [reply.text for reply in at_once], task.cancelled(), free, count]"
    )
    equal, cancelled, free, count = program(body, tmp_path)
    assert (equal, cancelled, count) == (True, True, 4)
    assert free < 3 * within_a_second(), "it stopped at the next token"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_child_has_a_session_of_its_own(server: FaultServer, tmp_path: Path) -> None:
    file = tmp_path / "seen"
    load_again = load(server).strip()
    body = load(server) + (
        "first = llm.generate('before').text\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    try:\n"
        "        seen = [llm.last.text, llm.status().status]\n"
        "        try: llm.generate('nothing is loaded')\n"
        "        except errors.ModelNotLoaded as error: seen.append(str(error))\n"
        f"        {load_again}\n"
        "        seen.append(llm.generate('in the child').text)\n"
        "        llm.close()\n"
        f"        with open({str(file)!r}, 'w') as out: out.write(json.dumps(seen))\n"
        "    finally:\n"
        "        os._exit(0)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "return [first, (await llm.agenerate('after')).text]"
    )
    assert program("import os; from llm_magic import errors\n" + body, tmp_path) == [
        "before", "after",
    ]  # fmt: skip
    assert json.loads(file.read_text()) == [
        "before", "Inactive", 'No model is loaded. Run llm.load() (or llm.load("MODEL")).',
        "in the child",
    ]  # fmt: skip
    assert server.connections == 2


def test_errors_name_calls_and_not_magics(tmp_path: Path) -> None:
    calls = (
        "llm.generate('hello')",
        "llm.load('gpt-4o')",
        "llm.load('x', backend='openai', base_url='http://localhost:1/v1')",
        "llm.load('x', backend='openai', key_env='my-key')",
        "llm.load('x', backend='openai', quantization='4bit')",
        "llm.load('ollama/llama3.2')",
        "llm.load('http://localhost:8000/v1')",
        "llm.load('claude-sonnet-4', backend='anthropic')",
        "llm.load('Qwen/Qwen2.5-7B-Instruct', backend='llamacpp')",
        "llm.generate('')",
        "llm.generate('hello', bg=True)",
        "llm.generate('hello', model='other')",
        "llm.load(bg=True)",
        "llm.temperature",
        "llm.stop",
        "llm.chats.save('all.json')",
        "llm.chats.load('talk.json') and llm.chats.load('talk.json')",
        "llm.chats.save('talk.json')",
    )
    talk = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    (tmp_path / "talk.json").write_text(json.dumps(talk))
    body = (
        "from llm_magic.errors import LLMMagicError\n"
        "def error(call):\n"
        "    try: eval(call)\n"
        "    except LLMMagicError as raised: return str(raised)\n"
        f"return [*(error(call) for call in {calls!r}), repr(llm.status())]"
    )
    errors = program(body, tmp_path)
    assert errors[0] == 'No model is loaded. Run llm.load() (or llm.load("MODEL")).'
    assert 'Run llm.load("gpt-4o", backend="openai") (key: OPENAI_API_KEY' in errors[1]
    assert errors[2].endswith("Check base_url, and whether the server is running.")
    assert 'write key_env="MY_KEY"' in errors[3]
    assert errors[4] == "quantization works only with backend local, not with openai. Remove it."
    assert errors[5].endswith('Run llm.load("llama3.2", backend="ollama").')
    assert errors[-4] == 'There is no chat to export. llm.generate(PROMPT, chat="NAME") starts one.'
    assert errors[-3] == "There is already a chat 'talk'. Add replace=True to overwrite."
    assert errors[-2] == "talk.json already exists. Add replace=True to overwrite it."
    assert not any("%" in error or "--" in error or " -b" in error for error in errors), errors
