"""Steps of fixed shape: the same answers; what does not allow them goes on step by step.

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

from llm_magic.backends.local.generation.cuda_graph import bucket
from llm_magic.backends.local.generation.fast_path import FastPath
from llm_magic.session import Session
from tests.local_models import edited, local_model, local_session
from tests.tiny_models import Architecture, tiny, tiny_llama
from tests.unit.backends.local.generation.test_speculative import PROMPT, reference

FULL: list[Architecture] = ["llama", "qwen3", "gpt2"]


@pytest.fixture
def session() -> Iterator[Session]:
    with local_session(max_new_tokens=40, temperature=0, repetition_penalty=1) as session:
        yield session


def loaded(session: Session) -> Any:
    return local_model(session)


def make_fast(session: Session) -> FastPath:
    """Let the resident model take its fast path on the CPU too, where it brings nothing."""
    model = loaded(session)
    model.fast = FastPath(model.model, compiled=False, forced=True)
    assert model.fast.problem is None
    return model.fast  # type: ignore[no-any-return]


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
@pytest.mark.parametrize("architecture", FULL)
def test_an_answer_is_that_of_generate(
    session: Session, tmp_path: Path, architecture: Architecture, options: dict[str, Any]
) -> None:
    folder = tiny(tmp_path / "m", architecture, chat_template=None)
    edited(folder, "generation_config.json", eos_token_id=None)
    expected = reference(folder, PROMPT, 5, max_new_tokens=40, **options)
    session.load(str(folder), dtype="float32")
    fast = make_fast(session)
    given = {k: v for k, v in options.items() if k not in {"do_sample", "min_p"}}
    given.setdefault("temperature", 0)
    extra = {"min_p": 0.02} if "min_p" in options else {}
    for _ in range(2):
        reply = session.generate(
            PROMPT, seed=5, extra=extra, **{"top_p": None, "top_k": None} | given
        )
        assert reply.text == expected
        assert reply.usage.completion_tokens == 40
    assert len(fast._steps) == 1, "it was taken"


def test_a_conversation_goes_on_from_it(session: Session, tmp_path: Path) -> None:
    session.load(str(tiny_llama(tmp_path / "m")), dtype="float32")
    usual = [session.generate(text, chat="a").text for text in ("the man", "a hat", "and?")]
    loaded(session).prefixes.clear()
    make_fast(session)
    replies = [session.generate(text, chat="b") for text in ("the man", "a hat", "and?")]
    assert [reply.text for reply in replies] == usual
    assert all((reply.usage.cached_tokens or 0) > 10 for reply in replies[1:])


def test_it_ends_where_it_should(session: Session, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "m", chat_template=None)
    edited(folder, "generation_config.json", eos_token_id=None)
    session.load(str(folder), dtype="float32")
    make_fast(session)
    whole = session.generate(PROMPT).text
    for limit in (1, 2, 8, 9, 39):
        assert session.generate(PROMPT, max_new_tokens=limit).usage.completion_tokens == limit
    stop = whole[10:14]
    stopped = session.generate(PROMPT, stop=(stop,))
    assert stopped.text == whole[: whole.index(stop)]
    assert stopped.finish_reason == "stop"
    # All of its context, to the last place.
    length = session.generate(PROMPT, max_new_tokens=1).usage.prompt_tokens or 0
    last = session.generate(PROMPT, max_new_tokens=4000)
    assert last.usage.completion_tokens == 512 - length
    stream = session.stream(PROMPT)
    for _ in range(6):
        next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert session.generate(PROMPT).text == whole


@pytest.mark.parametrize(
    ("architecture", "options", "why"),
    [
        ("mistral", {}, "windows or states"),
        ("mamba", {}, "architecture decides in Python|takes no mask"),
        ("llama", {"attn": "eager"}, "takes no mask of fixed shape"),
    ],
)
def test_what_has_no_fixed_shape_goes_step_by_step(
    session: Session, tmp_path: Path, architecture: Architecture, options: Any, why: str
) -> None:
    session.load(str(tiny(tmp_path / "m", architecture)), dtype="float32", **options)
    model = loaded(session)
    usual = session.generate(PROMPT).text
    model.fast = FastPath(model.model, compiled=False, forced=True)
    assert re.search(why, model.fast.problem)
    assert session.generate(PROMPT).text == usual
    assert "step by step" in session.status().backend_details["decoding"]


def test_options_that_look_at_the_order_of_tokens_go_step_by_step(
    session: Session, tmp_path: Path
) -> None:
    session.load(str(tiny_llama(tmp_path / "m")), dtype="float32")
    options: Any = {"extra": {"no_repeat_ngram_size": 2}}
    usual = session.generate(PROMPT, **options).text
    fast = make_fast(session)
    assert session.generate(PROMPT, **options).text == usual
    assert not fast._steps


def test_a_failure_falls_back_and_is_told(session: Session, tmp_path: Path) -> None:
    session.load(str(tiny_llama(tmp_path / "m")), dtype="float32")
    usual = session.generate(PROMPT).text
    fast = make_fast(session)

    def broken(**_arguments: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    fast._compiled_forward = lambda: broken  # type: ignore[method-assign]
    fast.warm_up(lambda _progress: None, threading.Event())
    assert session.generate(PROMPT).text == usual
    assert "stream is capturing" in session.status().backend_details["decoding"]


def test_lengths_are_few() -> None:
    assert [bucket(n, None) for n in (1, 1024, 1025, 5000)] == [1024, 1024, 2048, 8192]
    assert bucket(300, 512) == 512
    assert bucket(513, 512) == 513


def test_compiled_it_says_the_same(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A tiny model may well be slower so.
    monkeypatch.setattr(FastPath, "_slower", lambda _self, _step: None)
    folder = tiny_llama(tmp_path / "m", layers=1)
    session.load(str(folder), dtype="float32")
    usual = session.generate(PROMPT).text
    session.load(str(folder), dtype="float32", compile=True)
    compiler = any(map(shutil.which, ("g++", "clang++")))
    said = "compiled, fixed shapes" if compiler else "needs a C++ compiler"
    assert said in session.status().backend_details["decoding"]
    assert session.generate(PROMPT).text == usual


def test_what_is_slower_compiled_is_not_used(session: Session, tmp_path: Path) -> None:
    session.load(str(tiny_llama(tmp_path / "m", layers=1)), dtype="float32")
    fast = make_fast(session)
    step = fast._of_length(512)

    def dawdle() -> None:
        time.sleep(0.05)

    step.try_out = dawdle  # type: ignore[method-assign]
    assert re.fullmatch(r"compiled 5\d ms a token, not compiled \d+ ms", str(fast._slower(step)))
    step.try_out = lambda: None  # type: ignore[method-assign]
    assert fast._slower(step) is None


def test_a_cache_that_is_let_go_is_freed_at_once(session: Session, tmp_path: Path) -> None:
    session.load(str(tiny_llama(tmp_path / "m")), dtype="float32")
    fast = make_fast(session)
    session.generate(PROMPT)
    (step,) = fast._steps.values()
    gone = weakref.ref(step._cache)
    del step
    gc.disable()
    try:
        fast.clear()
        assert gone() is None
    finally:
        gc.enable()
    assert session.generate(PROMPT).text


def test_positions_that_depend_on_the_length_have_no_fixed_shape(
    session: Session, tmp_path: Path
) -> None:
    session.load(str(tiny(tmp_path / "m", "phi3")), dtype="float32")
    fast = FastPath(loaded(session).model, compiled=False, forced=True)
    assert fast.problem == "it places tokens by the length of the text"
