"""A .gguf file in llama.cpp, in a real kernel: everything that a local model does."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernels import Kernel, kernel, within_a_second
from tests.tiny_gguf import write_gguf

LONG = "%%llm -t 0 --max-new-tokens 4000 -p ignore_eos=true\nName three colors."


@pytest.fixture(scope="module")
def k() -> Iterator[Kernel]:
    with kernel() as k:
        k.ok("%load_ext llm_magic")
        k.ok("from llm_magic import llm")
        ran = k.ok("%llm_load -b llamacpp")
        assert re.match(
            r"SmolLM2-135M-Instruct · llamacpp cpu Q4_1 · 98 MB · 8,192 ctx · ready in [\d.]+ s\n"
            r"llama\.cpp answers, not Transformers: the same seed gives another text than -b local\.$",
            ran.text.strip(),
        ), ran.text
        yield k


def test_answer_is_streamed_with_its_counts(k: Kernel) -> None:
    ran = k.ok("%llm -t 0 --max-new-tokens 12 Name three colors.")
    assert ran.text.startswith("1. Red")
    assert re.search(
        r" · \d+ → 12 tokens · first after .* tokens/s · 98 MB · cut off at 12", ran.text
    )
    assert ran.updates > 1
    again = k.ok("%llm -t 0 --max-new-tokens 12 Name three colors.")
    assert re.search(r"\(\d+ reused\) → 12 tokens", again.text)


def test_chat_stop_and_seed(k: Kernel) -> None:
    k.ok("%%llm -c colors -t 0 --max-new-tokens 12\nName three colors.")
    turn = k.ok("%%llm -c colors -t 0 --max-new-tokens 4\nAnother one?")
    assert "chat colors, turn 2" in turn.text
    assert "1. Red" in k.ok('%llm --stop ":" -t 0 --max-new-tokens 12 Name three colors.').text
    assert ":" not in k.value("llm.last.text")
    seeded = "llm.generate('Write a joke.', seed={}, temperature=1.5, max_new_tokens=16).text"
    assert k.value(seeded.format(3)) == k.value(seeded.format(3)) != k.value(seeded.format(4))


def test_interrupt_stops_the_answer_and_the_next_prompt_works(k: Kernel) -> None:
    cell = k.send(LONG)
    k.wait_for_output(cell, "Red")
    pressed = time.monotonic()
    k.interrupt()
    ran = k.wait(cell)
    assert ran.ename == "Interrupted"
    assert k.ok("%llm --max-new-tokens 2 Hi").text
    assert time.monotonic() - pressed < 2 * within_a_second()
    assert k.value("llm.last.usage.completion_tokens") == 2


def test_interrupt_while_a_long_prompt_is_read(k: Kernel) -> None:
    k.ok("text = 'one two three four five ' * 800")
    cell = k.send("%llm --max-new-tokens 4000 -p ignore_eos=true {text} How many?")
    k.wait_for_output(cell, "reading the prompt")
    pressed = time.monotonic()
    k.interrupt()
    assert k.wait(cell).ename == "Interrupted"
    assert k.ok("%llm --max-new-tokens 2 Hi").text
    assert time.monotonic() - pressed < 3 * within_a_second()


def test_interrupt_while_the_file_is_read(k: Kernel, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "large.gguf")
    # A hole, which takes no place on the disk and seconds to read.
    os.truncate(file, 6 << 30)
    cell = k.send(f"%llm_load {file} -b llamacpp --keep")
    k.wait_for_output(cell, "reading the weights")
    pressed = time.monotonic()
    k.interrupt()
    ran = k.wait(cell)
    assert (ran.ename, ran.error) == ("Interrupted", f"Stopped loading {file}.")
    assert time.monotonic() - pressed < within_a_second()
    assert k.value("[model.name for model in llm.status().models]") == ["SmolLM2-135M-Instruct"]


@pytest.mark.parametrize(
    ("cell", "error"),
    [
        ("%llm {text * 3}", r"The prompt has [\d,]+ tokens, but SmolLM2-135M-Instruct reads at most 8,192\."),
        ("%llm -p messages=1 Hi", "-p messages cannot be set"),
        ("%llm -p repeat_penalty=2 Hi", "has its own option. Use --repetition-penalty"),
        ("%llm -p min_p=high Hi", "llama.cpp failed while SmolLM2-135M-Instruct was answering: .*min_p"),
        ("%llm_load ./nothere.gguf -b llamacpp", "There is no file or folder"),
        ("%llm_load gpt2 -b llamacpp", r"gpt2 is no \.gguf file"),
        ("%llm_load -b llamacpp -q 4bit", "--quantization works only with -b local"),
        ("%llm_load -b llamacpp --context 9000", "reads at most 8,192 tokens. Use --context 8192 or less"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(k: Kernel, cell: str, error: str) -> None:
    ran = k.run(cell)
    assert (len(ran.traceback), bool(re.search(error, ran.error))) == (1, True), ran.error


def test_control_tokens_in_a_prompt_are_text(k: Kernel) -> None:
    """A pasted log cannot end the turn: the token takes the tokens of its characters."""
    count = (
        "llm.dry_run(__import__('llm_magic').session.requests.Request({!r})).count.prompt_tokens"
    )
    plain, pasted = k.value(count.format("Hi")), k.value(count.format("Hi <|im_end|>"))
    assert pasted - plain > 3


def test_nothing_listens_and_nothing_is_printed(k: Kernel) -> None:
    assert not [c for c in k.process.net_connections() if "python" in str(c.laddr)]
    status = k.ok("%llm_status").text
    assert re.search(r"engine +llama\.cpp \(xllamacpp [\d.]+\), \d+ threads?", status)
    connect = (
        "import socket\nfor line in open('/proc/net/unix'):\n"
        "    if 'llm_magic-' in line: socket.socket(socket.AF_UNIX).connect(line.split()[-1])"
    )
    assert "FileNotFoundError" in k.run(connect).ename


def test_unload_returns_the_memory(k: Kernel) -> None:
    before = k.process.memory_info().rss
    assert re.match(r"Unloaded SmolLM2-135M-Instruct \(98 MB\) · process", k.ok("%llm_unload").text)
    assert before - k.process.memory_info().rss > 200e6
