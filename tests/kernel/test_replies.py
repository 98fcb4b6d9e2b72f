"""Replies in cells: a text in every way, shown once, and what they took."""

from __future__ import annotations

import pytest

from tests.fault_server import CHAT, FaultServer
from tests.kernels import Kernel
from tests.wire import Hold, delta, sse, sse_words

AS_A_TEXT = """
import json, pathlib, pickle, re
from IPython.display import Markdown
assert "you" in reply and len(reply) == 9 and reply[:5] == "Hello" and reply == "Hello you"
assert reply + "!" == "Hello you!" and type(reply + "!") is str and ", ".join([reply, reply])
assert f"{reply:>11}" == "  Hello you" and re.sub("you", "all", reply) == "Hello all"
pathlib.Path("reply.txt").write_text(reply)
with open("reply.txt", "a") as file:
    file.write(reply)
assert pathlib.Path("reply.txt").read_text() == reply * 2
assert Markdown(reply).data == reply.text and type(reply.text) is str
again = pickle.loads(pickle.dumps(reply))
assert type(again) is type(reply) and again == reply and again.usage == reply.usage
assert json.loads(llm.generate('{"a": 1}')) == llm.last.json() == {"a": 1}
"""


AS_IN_OTHER_LIBRARIES = """
from llm_magic.types import Chunk
def long_answer():
    backend.will(Chunk(), 'one', ' two', *whole_answer()[-1:])
long_answer()
text = ""
chunks = []
for chunk in llm.stream("Count."):
    chunks.append(chunk)
    text += chunk
long_answer()
async for chunk in llm.astream("Count."):
    chunks.append(chunk)
assert text == "one two" and [str(chunk) for chunk in chunks] == ["one", " two", ""] * 2
assert "<" + chunks[0] + ">" == "<one>" and chunks[0] + chunks[1] == "one two"
assert chunks[2].finish_reason == "stop" and chunks[2].usage.prompt_tokens == 7
assert await llm.generate("Hi") == "Hi" and type(await llm.generate("Hi")) is type(llm.last)
stream = llm.stream("one two three")
assert next(stream).text == "one"
stream.close()
assert llm.last.finish_reason == "cancelled"
"""


@pytest.fixture
def k(scripted: Kernel) -> Kernel:
    scripted.ok("%llm_usage --reset")
    return scripted


def test_reply_works_like_a_text(k: Kernel) -> None:
    k.ok("%llm -o reply Hello you")
    k.ok(AS_A_TEXT)
    k.ok("%llm -o again {reply}, {len(reply)}, {reply[:5].upper()}")
    assert k.value("(again.text, again.messages[0].content)") == ("Hello you, 9, HELLO",) * 2
    # A message with a reply in it would keep the messages before it in memory.
    k.ok("llm.generate(reply); llm.generate([{'role': 'user', 'content': reply}], system=reply)")
    assert k.value("{type(message.content) for message in llm.last.messages} == {str}")


def test_streams_work_as_in_other_libraries(k: Kernel) -> None:
    k.ok(AS_IN_OTHER_LIBRARIES)
    assert k.ok("print(chunks[0], end='')\nchunks[0]").text == "oneChunk(text='one', tokens=1)"
    for code, advice in (
        ("async for chunk in llm.stream('Hi'): pass", "Use: async for chunk in llm.astream(…)"),
        ("await llm.stream('Hi')", "Use await llm.agenerate(…) for the reply, or async for"),
    ):
        before = k.value("len(backend.requests)")
        wrong = k.run(code)
        assert (wrong.ename, len(wrong.traceback)) == ("OptionError", 1)
        assert advice in wrong.error
        assert k.value("len(backend.requests)") == before
    for code in ("chunks[0] + 1", "1 + chunks[0]"):
        assert k.run(code).ename == "TypeError"


def test_names_of_other_libraries_show_what_to_use(k: Kernel) -> None:
    k.ok("%llm -o reply -c shop Hello you")
    for name, advice in (
        ("tokens", "or ask with logprobs=0 for the probability of each token."),
        ("total_tokens", "Use reply.usage.total_tokens."),
        ("content", "The reply is the text itself."),
        ("choices[0].message", "The reply is the text itself."),
        ("model_dump()", "vars(reply) has its attributes."),
        ("jsn()", 'Did you mean "json"?'),
    ):
        wrong = k.run(f"reply.{name}")
        assert (wrong.ename, len(wrong.traceback)) == ("NoAttribute", 1)
        assert wrong.error.endswith(advice), wrong.error
    assert k.value("(hasattr(reply, 'items'), 'model' in vars(reply))") == (False, True)
    assert k.value("[turn.answer.content for turn in llm.chats['shop'].turns]") == ["Hello you"]
    assert k.value("(list(llm.chats), len(llm.chats), 'shop' in llm.chats)") == (["shop"], 1, True)
    for name, text in (
        ("'shp'", "There is no chat 'shp'. Did you mean \"shop\"?"),
        ("0", "chat 0."),
    ):
        wrong = k.run(f"llm.chats[{name}]")
        assert (wrong.ename, len(wrong.traceback), text in wrong.error) == ("OptionError", 1, True)
    k.ok("%llm_reset shop")


def test_line_magic_returns_the_reply_and_an_answer_is_shown_once(k: Kernel) -> None:
    alone = [
        "%llm Hi *there*",
        "%%llm\nHi *there*",
        "%%time\n%llm Hi *there*",
        "reply = %llm Hi *there*",
    ]
    for cell in alone:
        shown = [output for output in k.ok(cell).outputs if output["type"] != "stream"]
        assert [output["type"] for output in shown] == ["display_data"], cell
    assert k.value("(type(reply).__name__, reply is llm.last)") == ("Reply", True)
    k.ok("def ask(question):\n    return get_ipython().run_line_magic('llm', question)")
    k.ok("replies = [ask(question) for question in ('a', 'b')]")
    assert k.value("[reply.text for reply in replies]") == ["a", "b"]
    k.ok("job = %llm --bg Hi")
    assert k.value("job.result().text") == "Hi"
    assert k.ok("dry = %llm --dry-run Hi").outputs == []


@pytest.mark.parametrize("prompt", ["What is Paris?", "it's (here", 'a "b; # $c %d? ', "no \\ way"])
def test_any_text_after_an_assigned_magic_is_the_prompt(k: Kernel, prompt: str) -> None:
    k.ok("replies = {}")
    assert k.ok(f"reply = %llm {prompt}\nreplies['a'] = %llm {prompt}").payload == []
    assert k.value("(reply.text, replies['a'].text)") == (prompt.strip(),) * 2


def test_reply_at_the_end_of_a_cell_is_shown_as_an_answer(k: Kernel) -> None:
    k.ok("reply = llm.generate('Hi *there*')")
    for cell in ("reply", "llm.generate('Hi *there*')", "await llm.agenerate('Hi *there*')"):
        (shown,) = k.ok(cell).outputs
        assert shown["type"] == "execute_result"
        assert shown["data"]["text/plain"] == "Hi *there*"
        assert "<em>there</em>" in shown["data"]["text/html"]
        assert "7 → 2 tokens" in shown["data"]["text/html"]
    assert k.ok("reply = await llm.agenerate('Hi')").outputs == []
    assert k.ok("[reply]").text == "[Reply('Hi')]"


def test_partial_reply_is_a_reply(k: Kernel) -> None:
    k.ok("from tests.scripted import Hang\nbackend.will('half', ' of', Hang())")
    cell = k.send("%llm -o reply Hello")
    k.wait_for_output(cell, "half of")
    k.interrupt()
    assert k.wait(cell).ename == "Interrupted"
    assert k.value("(type(reply).__name__, reply + '!', reply.finish_reason)") == (
        "Reply", "half of!", "cancelled",
    )  # fmt: skip
    k.ok("backend.will('4', Hang())\ndata = 'before'")
    cell = k.send("%llm -f json -o data Hello")
    k.wait_for_output(cell, "4")
    k.interrupt()
    assert k.wait(cell).ename == "Interrupted"
    # It may be the start of another number.
    assert k.value("(data, llm.last.text)") == ("before", "4")


def test_usage_of_the_session(k: Kernel) -> None:
    assert k.ok("%llm_usage").text == "No answers yet."
    k.ok("%llm one two")
    k.ok("from tests.scripted import Hang\nbackend.will('half', Hang())")
    cell = k.send("%llm Hello")
    k.wait_for_output(cell, "half")
    k.interrupt()
    k.wait(cell)
    k.ok("backend.will(ValueError('No.'))")
    assert k.run("%llm Hello").status == "error"
    with FaultServer() as server:
        other = "from llm_magic.session import Session\nother = Session()\n"
        k.ok(f"{other}other.load('tiny', backend='openai', base_url='{server.url}')")
        usage = {"prompt_tokens": 2_000, "completion_tokens": 3, "cost": 0.00095}
        server.will(CHAT, *sse(delta("a", finish="stop"), {"choices": [], "usage": usage}))
        ran = k.ok("other.generate('Hello')")
        assert "$0.00095" in ran.html
        assert k.value("other.last.usage.cost") == 0.00095
        server.will(CHAT, *sse_words("a", " b"))
        assert "$" not in k.ok("other.generate('Hello')").html
        hold = Hold()
        server.will(CHAT, *sse(delta("a"), done=False), hold)
        k.ok("for chunk in other.stream('Hello'):\n    if chunk.text: break")
        ran = k.ok("other.usage()")
        k.ok("other.close()")
    heads, row, note = ran.text.splitlines()
    assert " ".join(heads.split()) == (
        "model backend answers prompt tokens generated tokens seconds cost"
    )
    assert row.split()[:9] == ["tiny", "openai", "3", "(1", "stopped)", "≥", "2,000", "≥", "3"]
    assert row.endswith("≥\u00a0$0.00095")
    assert note == "≥ is a lower bound: some answers reported no number."
    assert "<table" in ran.html
    shown = k.ok("%llm_usage --reset").text
    assert "3 (1 stopped, 1 failed)" in shown
    assert "cost" not in shown
    assert k.value("llm.usage().models") == ()
    assert k.completed("%llm_usage --r|") == ["%llm_usage --reset"]
    assert "--reset" in k.help("%llm_usage")
