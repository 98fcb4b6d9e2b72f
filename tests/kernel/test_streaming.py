"""An answer streams into its cell, and stays there as one output with a footer."""

from __future__ import annotations

import re

import pytest

from llm_magic.notebook.display.markdown import render
from tests.benchmarks import producer
from tests.kernels import SIZE, Kernel, Ran

FOOTER = re.compile(
    r"SmolLM2-135M-Instruct · \d+ → \d+ tokens · first after \d+\.\d\d s · \d+(?:\.\d)? tokens/s"
    rf"( · {SIZE})?"
)

# Of a message, without its content.
ENVELOPE = 600


def footer(ran: Ran) -> str:
    return ran.text.splitlines()[-1]


def test_words_come_while_the_model_is_at_work(loaded: Kernel) -> None:
    ran = loaded.ok("%%llm -t 0 --max-new-tokens 60 -o reply\nTell me a story about a fox.")
    kinds = [kind for _when, kind, _text in ran.arrivals]
    assert kinds == ["display_data"] + ["update_display_data"] * (len(kinds) - 1)
    assert ran.updates >= 3
    texts = [" ".join(text.split()) for _when, _kind, text in ran.arrivals[:-1]]
    texts = [text for text in texts if "waiting for" not in text]
    state = "SmolLM2-135M-Instruct: incomplete so far · when complete: reply, unless the kernel restarts"
    assert all(text.endswith(state) for text in texts)
    answers = [text.removesuffix(state).strip() for text in texts]
    whole = " ".join(loaded.value("reply.text").split())
    assert all(whole.startswith(text) for text in answers)
    assert [len(text) for text in answers] == sorted(len(text) for text in answers)
    # Some of it is shown before the end.
    assert any(0 < len(text) < len(whole) / 2 for text in answers)


def test_the_output_is_the_reply_and_a_footer(loaded: Kernel) -> None:
    ran = loaded.ok("%%llm -t 0 --max-new-tokens 200 -o reply\nSay hello, and nothing else.")
    assert len(ran.outputs) == 1
    assert FOOTER.fullmatch(footer(ran))
    assert ran.text == f"{loaded.value('reply.text.strip()')}\n\n{footer(ran)}"
    assert loaded.value("reply.finish_reason") == "stop"
    assert loaded.value("reply is llm.last")
    assert loaded.value("type(reply).__module__") == "llm_magic.types"
    assert footer(ran) in ran.html
    assert "<|im_end|>" not in loaded.value("reply.text")


def test_truncated_answer_is_labeled(loaded: Kernel) -> None:
    ran = loaded.ok("%%llm -t 0 --max-new-tokens 5 -o reply\nTell me a story.")
    assert loaded.value("(reply.finish_reason, reply.usage.completion_tokens)") == ("length", 5)
    assert footer(ran).endswith("· cut off at 5 tokens (--max-new-tokens)")
    quiet = loaded.ok("%%llm -t 0 --max-new-tokens 5 --quiet\nTell me a story.")
    assert footer(quiet) == "cut off at 5 tokens (--max-new-tokens)"


def test_usage_and_timing_are_what_happened(loaded: Kernel) -> None:
    ran = loaded.ok("%%llm -t 0 --max-new-tokens 12 -o reply\nTell me a story.")
    first, total = loaded.value("(reply.timing.first_token_s, reply.timing.total_s)")
    assert 0 < first < total < ran.seconds
    assert loaded.value("reply.timing.tokens_per_s") > 0
    assert loaded.value("reply.usage.prompt_tokens") > 5
    assert FOOTER.search(loaded.ok("reply").html)


def test_plain_streams_text_to_stdout(loaded: Kernel) -> None:
    ran = loaded.ok("%%llm --plain -t 0 --max-new-tokens 60 -o reply\nTell me a story about a fox.")
    assert {kind for _when, kind, _text in ran.arrivals} == {"stream"}
    assert len(ran.arrivals) >= 2
    assert FOOTER.search(footer(ran))
    assert ran.text == loaded.value("reply.text") + f"\n{footer(ran)}\n"


def test_quiet_shows_no_footer(loaded: Kernel) -> None:
    ran = loaded.ok("%%llm --quiet -t 0 -o reply\nSay hello, and nothing else.")
    assert ran.text == loaded.value("reply.text.strip()")
    plain = loaded.ok("%%llm --quiet --plain -t 0 -o reply\nSay hello, and nothing else.")
    assert plain.text.rstrip("\n") == loaded.value("reply.text")


@pytest.mark.parametrize("flags", ["", "--plain"])
def test_two_thousand_tokens_are_a_few_messages(scripted: Kernel, flags: str) -> None:
    text = "".join(producer.tokens(2000))
    scripted.ok(
        "from tests.scripted import Pause\n"
        f"text = {text!r}\n"
        "tokens = [text[start:start + 4] for start in range(0, len(text), 4)]\n"
        "backend.will(*[step for token in tokens for step in (token, Pause(0.001))])"
    )
    ran = scripted.ok(f"%%llm --quiet {flags} -o reply\nWrite.")
    assert scripted.value("reply.text == text")
    a_token_a_message = sum(ENVELOPE + shown for shown in range(4, len(text) + 1, 4))
    assert ran.messages < 0.03 * 2000 * max(1, ran.seconds / 3)  # slow machines take longer
    assert ran.bytes < 0.03 * a_token_a_message * max(1, ran.seconds / 3)
    if flags:
        assert ran.text.startswith(text)
        return
    (output,) = ran.outputs
    assert ran.updates >= 5
    assert output["data"]["text/plain"].startswith(text.strip())
    assert output["data"]["text/html"].startswith(render(text.strip()))


def test_without_streaming_is_one_display_and_no_update(loaded: Kernel) -> None:
    loaded.ok("import os\nos.environ['LLM_MAGIC_STREAM'] = 'off'\n%llm_unload\n%llm_config --reset")
    for code in ("%llm_load", "%%llm -t 0 --max-new-tokens 30\nTell me a story."):
        ran = loaded.ok(code)
        assert [kind for _when, kind, _text in ran.arrivals] == ["display_data"]
        assert ran.updates == 0
    assert FOOTER.match(footer(ran))
    loaded.ok("del os.environ['LLM_MAGIC_STREAM']\n%llm_config --reset")


@pytest.mark.parametrize(
    "cell",
    [
        "%%llm\nHello",
        "%%llm --plain\nHello",
        "%llm --dry-run Hello",
        "%llm_unload",
    ],
)
def test_cell_that_waits_for_a_load_shows_it(scripted: Kernel, cell: str) -> None:
    scripted.ok(
        "from llm_magic.types import Progress\n"
        "from tests.scripted import at_release\n"
        "backend.reports = {'check': [Progress('importing torch', 0.5)]}\n"
        "hang = backend.hang('check')\n"
        "%llm_load org/late --bg\n"
        "hang.reached.wait()\n"
        "at_release(hang.go.set)"
    )
    sent = scripted.send(cell)
    scripted.wait_for_output(sent, "Loading org/late: ")
    scripted.release()
    ran = scripted.wait(sent)
    assert ran.status == "ok"
    scripted.ok("backend.trouble.clear(); backend.reports.clear()")
    scripted.ok("%llm_load tiny")
    assert re.match(r"Loading org/late: importing torch … \d+ s$", ran.arrivals[0][2])
    assert "Loading" not in ran.text, "the bar is gone at the end"
    if cell == "%%llm\nHello":
        assert len(ran.outputs) == 1, "the answer takes the place of the bar"
        assert ran.text.startswith("Hello")


def test_failed_load_shows_no_bar_in_the_cell_that_waits(scripted: Kernel) -> None:
    scripted.ok(
        "from llm_magic.errors import LoadFailed\n"
        "from tests.scripted import Hang, at_release\n"
        "class Fails(Hang):\n"
        "    async def wait(self):\n"
        "        await super().wait()\n"
        "        raise LoadFailed('The weights are damaged.')\n"
        "hang = backend.trouble['check'] = Fails()\n"
        "%llm_load org/late --bg\n"
        "at_release(hang.go.set)"
    )
    cell = scripted.send("%llm Hello")
    scripted.wait_for_output(cell, "Loading org/late: ")
    scripted.release()
    ran = scripted.wait(cell)
    scripted.ok("backend.trouble.clear()")
    assert ran.arrivals[0][2].startswith("Loading org/late: waiting … ")
    assert (ran.ename, ran.error) == ("LoadFailed", "The weights are damaged.")
    assert "Loading" not in ran.text
