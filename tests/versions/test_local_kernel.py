"""A local model in a kernel on every supported version of Transformers, IPython and ipykernel."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kernels import Kernel, kernel, within_a_second
from tests.tiny_models import tiny_llama


@pytest.fixture(scope="module")
def k(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    folder = tiny_llama(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=100_000)
    with kernel(LOCAL_MODELS_DIR=str(folder.parent)) as k:
        k.ok("%load_ext llm_magic")
        k.ok("from llm_magic import llm")
        assert "ready in" in k.ok("%llm_load tiny").text
        yield k


def test_local_answer_has_every_token(k: Kernel) -> None:
    k.ok("%%llm -t 0 --max-new-tokens 1 -o one\nHello")
    k.ok("%%llm -t 0 --max-new-tokens 6 -o six\nHello")
    assert k.value("(one.usage.completion_tokens, one.finish_reason)") == (1, "length")
    assert k.value("(six.usage.completion_tokens, six.finish_reason)") == (6, "length")
    assert k.value("six.text.startswith(one.text.rstrip('\\ufffd'))")
    assert "slower" not in k.ok("%llm_status").text


def test_second_turn_reuses_the_first(k: Kernel) -> None:
    k.ok("%%llm -c talk -t 0 --max-new-tokens 4\nHello there, who are you?")
    k.ok("%%llm -c talk -t 0 --max-new-tokens 4 -o second\nAnd you?")
    assert k.value("second.usage.cached_tokens") > 10


def test_interrupt_keeps_partial_reply(k: Kernel) -> None:
    cell = k.send("print('begun')\n%llm -t 0 --max-new-tokens 90000 Hello")
    k.wait_for_output(cell, "begun")
    k.interrupt()
    ran = k.wait(cell, timeout=30)
    assert ran.ename in {"Interrupted", "KeyboardInterrupt"}
    assert k.ok("%llm -t 0 --max-new-tokens 1 Hello").seconds < within_a_second()


def test_unload_frees_the_model(k: Kernel) -> None:
    assert "Unloaded tiny" in k.ok("%llm_unload").text
    assert k.ok("%llm_load tiny").text
