"""The tree of errors: as drawn, one line each, with a hint where a word was nearly right."""

from __future__ import annotations

import copy
import pickle
import re

import pytest

from llm_magic import errors
from llm_magic.errors import (
    GenerationFailed,
    Interrupted,
    LLMMagicError,
    LLMMagicException,
    ModelNotLoaded,
    OptionError,
    ServerUnreachable,
    did_you_mean,
)


def drawn() -> dict[str, str]:
    """Return the parent of each class in the docstring's tree."""
    parents: dict[str, str] = {}
    path: list[str] = []
    for line in str(errors.__doc__).splitlines():
        match = re.match(r"    ([ │├└─]*)(\w+)", line)
        if match:
            depth = len(match[1]) // 4
            path[depth:] = [match[2]]
            parents[match[2]] = path[depth - 1] if depth else "BaseException"
    return parents


def test_tree_matches_docstring() -> None:
    classes = {
        name: thing.__bases__[0].__name__
        for name, thing in vars(errors).items()
        if isinstance(thing, type) and issubclass(thing, LLMMagicException)
    }
    assert drawn() == classes
    assert all(getattr(errors, name).__doc__ for name in classes)
    assert issubclass(LLMMagicError, Exception)
    assert not issubclass(Interrupted, Exception), (
        "or a loop with `except Exception` goes on after ■"
    )


def test_notebook_displays_one_line() -> None:
    error = GenerationFailed("The model broke.", details="Traceback …\n" * 50)
    assert error._render_traceback_() == ["\x1b[31mGenerationFailed\x1b[0m: The model broke."]
    assert (str(error), error.details[:9]) == ("The model broke.", "Traceback")
    assert LLMMagicError("x").details == ""
    assert Interrupted("Stopped.").reply is None


def test_message_has_no_lone_surrogates() -> None:
    for name in ("OptionError", "ServerError", "Interrupted"):
        error: LLMMagicError = getattr(errors, name)("There is no chat \ud800.")
        assert str(error) == "There is no chat \\ud800."
        assert str(error.append("It has \udfff.")) == "There is no chat \\ud800. It has \\udfff."


def test_advice_is_the_end_of_the_message_and_apart_from_it() -> None:
    error = ServerUnreachable("No server.", brief="gone").advise("Check --base-url.", "base_url")
    for one in (error, copy.deepcopy(error), pickle.loads(pickle.dumps(error))):
        assert str(one) == "No server. Check --base-url."
        assert (one.problem, one.advice, one.option, one.brief) == (
            "No server.", "Check --base-url.", "base_url", "gone",
        )  # fmt: skip
    error.append("a was unloaded.").advise("Or wait.")
    assert str(error) == "No server. Check --base-url. a was unloaded. Or wait."
    assert (error.problem, error.advice) == (
        "No server. a was unloaded.",
        "Check --base-url. Or wait.",
    )
    assert error.option == "base_url", "later advice without an option leaves it"
    invalid = pickle.loads(pickle.dumps(OptionError("3 is too hot.", option="temperature")))
    assert str(invalid) == "temperature=3 is too hot."
    assert (invalid.problem, invalid.option) == ("3 is too hot.", "temperature")


def test_error_like_another_has_its_message_and_advice() -> None:
    error = ServerUnreachable("No server.").advise("Check --base-url.", "base_url")
    other = ModelNotLoaded.like(error, "The load failed.")
    assert str(other) == "The load failed. No server. Check --base-url."
    assert (other.problem, other.advice, other.option) == (
        "The load failed. No server.", "Check --base-url.", "base_url",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("word", "known", "hint"),
    [
        ("temprature", ["temperature", "top_p"], ' Did you mean "temperature"?'),
        ("SMOLLM2", ["SmolLM2-135M", "Qwen"], ' Did you mean "SmolLM2-135M"?'),
        ("topp", ["top_p", "top_k"], ' Did you mean "top_p"?'),
        ("top", ["top_p", "top_k"], ' Did you mean "top_p" or "top_k"?'),
        ("qwen", ["Qwen2.5-7B"], ' Did you mean "Qwen2.5-7B"?'),
        ("gpt2", ["distilgpt2"], ' Did you mean "distilgpt2"?'),
        ("other-70b", ["llama-70b", "Qwen2.5-7B"], ""),
        ("tone", ["context", "one"], ' Did you mean "one"?'),
        ("version", ["question"], ""),
        ("id", ["i", "d"], ""),
        ("xyz", ["temperature"], ""),
        ("xyz", [], ""),
        ("", ["temperature"], ""),
    ],
)
def test_similar_names_are_suggested(word: str, known: list[str], hint: str) -> None:
    assert did_you_mean(word, known) == hint


def test_number_of_suggestions_is_limited() -> None:
    names = [f"model-{n}" for n in range(9)]
    assert did_you_mean("model-x", names).count("model-") == 3
    assert did_you_mean("model-x", names, count=1).count("model-") == 1
