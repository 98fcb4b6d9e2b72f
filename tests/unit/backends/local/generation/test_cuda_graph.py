"""Steps of fixed shape give the same answers, and are not used where something prevents them.

Without a GPU the same loop runs without a graph.
"""

from __future__ import annotations

import gc
import re
import shutil
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_magic.backends.local.generation.cuda_graph import StaticDecoder, bucket_length
from llm_magic.session import Session
from tests.local_models import edited, local_model, local_session
from tests.plain_generate import PlainGenerate
from tests.tiny_models import Architecture, tiny, tiny_llama

FULL_ATTENTION: list[Architecture] = ["llama", "qwen3", "gpt2"]
PROMPT = "the other man in a hat on the table sat there and the other man in a hat on the"


@pytest.fixture
def session() -> Iterator[Session]:
    with local_session(max_new_tokens=40, temperature=0, repetition_penalty=1) as session:
        yield session


@pytest.fixture
def llama(session: Session, tmp_path: Path) -> Session:
    """A session with a model that can be decoded in steps of fixed shape."""
    session.load(str(tiny_llama(tmp_path / "m")), dtype="float32")
    return session


def force_static_decoder(session: Session) -> StaticDecoder:
    """Let the active model use steps of fixed shape on the CPU too, where they save nothing."""
    loaded = local_model(session)
    decoder = StaticDecoder(loaded.model, compiled=False, forced=True)
    assert decoder.unavailable_reason is None
    loaded.static_decoder = decoder
    return decoder


def decoding(session: Session) -> str:
    return session.status().backend_details["decoding"]


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": False, "repetition_penalty": 1.3},
        {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9},
        {
            "do_sample": True,
            "temperature": 1.2,
            "top_k": 50,
            "repetition_penalty": 1.1,
            "min_p": 0.02,
        },
    ],
    ids=["greedy", "penalty", "sampled", "all"],
)
@pytest.mark.parametrize("architecture", FULL_ATTENTION)
def test_static_steps_give_the_answer_of_generate(
    session: Session, tmp_path: Path, architecture: Architecture, options: dict[str, Any]
) -> None:
    folder = tiny(tmp_path / "m", architecture, chat_template=None)
    edited(folder, "generation_config.json", eos_token_id=None)
    expected = PlainGenerate(folder).answer(PROMPT, 5, max_new_tokens=40, **options)
    session.load(str(folder), dtype="float32")
    decoder = force_static_decoder(session)
    given = {k: v for k, v in options.items() if k not in {"do_sample", "min_p"}}
    given.setdefault("temperature", 0)
    extra = {"min_p": 0.02} if "min_p" in options else {}
    for _ in range(2):
        reply = session.generate(
            PROMPT, seed=5, extra=extra, **{"top_p": None, "top_k": None} | given
        )
        assert reply.text == expected
        assert reply.usage.completion_tokens == 40
    assert len(decoder.steps) == 1


def test_next_turn_reuses_the_cache_of_static_steps(llama: Session) -> None:
    turns = ("the man", "a hat", "and?")
    expected = [llama.generate(text, chat="a").text for text in turns]
    local_model(llama).prefix_cache.clear()
    force_static_decoder(llama)
    replies = [llama.generate(text, chat="b") for text in turns]
    assert [reply.text for reply in replies] == expected
    assert all((reply.usage.cached_tokens or 0) > 10 for reply in replies[1:])


def test_static_steps_end_at_limit_stop_string_context_and_close(
    session: Session, tmp_path: Path
) -> None:
    folder = tiny_llama(tmp_path / "m", chat_template=None)
    edited(folder, "generation_config.json", eos_token_id=None)
    session.load(str(folder), dtype="float32")
    force_static_decoder(session)
    whole = session.generate(PROMPT).text
    for limit in (1, 2, 8, 9, 39):
        assert session.generate(PROMPT, max_new_tokens=limit).usage.completion_tokens == limit
    stop = whole[10:14]
    stopped = session.generate(PROMPT, stop=(stop,))
    assert stopped.text == whole[: whole.index(stop)]
    assert stopped.finish_reason == "stop"
    # All of the context, to the last position.
    length = session.generate(PROMPT, max_new_tokens=1).usage.prompt_tokens or 0
    last = session.generate(PROMPT, max_new_tokens=4000)
    assert last.usage.completion_tokens == 512 - length
    stream = session.stream(PROMPT)
    for _ in range(6):
        next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert session.generate(PROMPT).text == whole


@pytest.mark.parametrize(
    ("architecture", "options", "reason"),
    [
        ("mistral", {}, "sliding window or a state"),
        ("mamba", {}, "architecture makes decisions|takes no mask"),
        ("llama", {"attn": "eager"}, "takes no mask of fixed shape"),
        ("phi3", {}, "rotary embeddings depend on the length"),
    ],
)
def test_status_has_the_reason_where_shapes_cannot_be_fixed(
    session: Session, tmp_path: Path, architecture: Architecture, options: Any, reason: str
) -> None:
    session.load(str(tiny(tmp_path / "m", architecture)), dtype="float32", **options)
    loaded = local_model(session)
    expected = session.generate(PROMPT).text
    loaded.static_decoder = StaticDecoder(loaded.model, compiled=False, forced=True)
    assert session.generate(PROMPT).text == expected
    assert re.search(rf"step by step \(.*({reason})", decoding(session))


def test_option_that_depends_on_token_order_is_decoded_step_by_step(llama: Session) -> None:
    options: Any = {"extra": {"no_repeat_ngram_size": 2}}
    expected = llama.generate(PROMPT, **options).text
    decoder = force_static_decoder(llama)
    assert llama.generate(PROMPT, **options).text == expected
    assert not decoder.steps


def test_failed_capture_falls_back_and_status_has_the_reason(llama: Session) -> None:
    expected = llama.generate(PROMPT).text
    decoder = force_static_decoder(llama)

    def fail_in_static_step(_model: Any, _args: Any, named: dict[str, Any]) -> None:
        if named.get("attention_mask") is not None:
            raise RuntimeError("operation not permitted when stream is capturing")

    local_model(llama).model.register_forward_pre_hook(fail_in_static_step, with_kwargs=True)
    decoder.warm_up(lambda _progress: None, threading.Event())
    assert llama.generate(PROMPT).text == expected
    assert "stream is capturing" in decoding(llama)


def test_cache_lengths_are_few() -> None:
    lengths = [bucket_length(n, None) for n in (1, 1024, 1025, 5000)]
    assert lengths == [1024, 1024, 2048, 8192]
    assert bucket_length(300, 512) == 512
    assert bucket_length(513, 512) == 513


def test_compiled_model_gives_the_same_answer(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A tiny model may well be slower when it is compiled.
    monkeypatch.setattr(StaticDecoder, "compare_speed", lambda _self, _step: None)
    folder = tiny_llama(tmp_path / "m", layers=1)
    session.load(str(folder), dtype="float32")
    expected = session.generate(PROMPT).text
    session.load(str(folder), dtype="float32", compile=True)
    has_compiler = any(map(shutil.which, ("g++", "clang++")))
    shown = "compiled, fixed shapes" if has_compiler else "needs a C++ compiler"
    assert shown in decoding(session)
    assert session.generate(PROMPT).text == expected


def test_slower_compiled_step_is_not_used(llama: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = force_static_decoder(llama)
    llama.generate(PROMPT)
    (step,) = decoder.steps.values()
    monkeypatch.setattr(step, "warm_up", lambda: time.sleep(0.05))
    shown = str(decoder.compare_speed(step))
    assert re.fullmatch(r"compiled 5\d ms a token, not compiled \d+ ms", shown)
    monkeypatch.setattr(step, "warm_up", lambda: None)
    assert decoder.compare_speed(step) is None


def test_clear_frees_caches_without_garbage_collection(llama: Session) -> None:
    decoder = force_static_decoder(llama)
    llama.generate(PROMPT)
    (step,) = decoder.steps.values()
    cache = weakref.ref(step.cache)
    del step
    gc.disable()
    try:
        decoder.clear()
        assert cache() is None
    finally:
        gc.enable()
    assert llama.generate(PROMPT).text
