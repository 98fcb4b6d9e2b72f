"""How an answer ends, what its text is, and what the options of a request do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from llm_magic.errors import GenerationFailed, OptionError, PromptTooLong
from llm_magic.session import Session
from llm_magic.session.requests import request
from llm_magic.types import Message
from tests.local_models import edited, local_session, parrot
from tests.tiny_models import tiny_llama

ANSWER = "Hex é🙂日,ok?[Q]NDL.by"
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}<model>\n{% endif %}"
)


pytestmark = pytest.mark.usefixtures("no_noise")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    parrot(folder / "parrot", ANSWER)
    parrot(folder / "endless", "abcdef", ends=False, max_position_embeddings=64)
    tiny_llama(folder / "noise")
    return folder


@pytest.fixture(scope="module")
def session(models: Path) -> Iterator[Session]:
    with local_session(max_new_tokens=40, repetition_penalty=1) as session:
        for name in ("noise", "endless", "parrot"):
            session.load(str(models / name), keep=True)
        yield session


@contextlib.contextmanager
def loaded(session: Session, folder: Path) -> Iterator[None]:
    """Load one more model within the block."""
    name = session.load(str(folder), keep=True).name
    try:
        yield
    finally:
        session.unload(name)


def test_answer_ends_at_end_token(session: Session) -> None:
    reply = session.generate("Say it", temperature=0)
    assert (reply.text, reply.finish_reason) == (ANSWER, "stop")
    assert reply.model == "parrot"
    # The end token was generated, too.
    assert reply.usage.completion_tokens == len(ANSWER.encode()) + 1


def test_characters_of_several_bytes_are_never_split(session: Session) -> None:
    pieces = [chunk.text for chunk in session.stream("Say it", temperature=0)]
    assert "".join(pieces) == ANSWER
    assert not [piece for piece in pieces if "\ufffd" in piece]
    assert {"é", "🙂", "日"} <= set(pieces)


def test_answer_cut_within_a_character_ends_with_replacement(session: Session) -> None:
    cut = len("Hex é".encode()) + 2
    reply = session.generate("Say it", temperature=0, max_new_tokens=cut)
    assert (reply.text, reply.finish_reason) == ("Hex é\ufffd", "length")


def test_answer_ends_at_length_limit(session: Session) -> None:
    reply = session.generate("Go", model="endless", temperature=0, max_new_tokens=8)
    assert (reply.text, reply.finish_reason) == ("abcdefab", "length")
    assert reply.usage.completion_tokens == 8


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("NDL", "Hex é🙂日,ok?[Q]"),
        (["Q]ND", "zzz"], "Hex é🙂日,ok?["),
        (["🙂日"], "Hex é"),
        (["H"], ""),
        (["NDLE"], ANSWER),
        (["by"], ANSWER[:-2]),
    ],
)
def test_stop_string_ends_the_answer_anywhere_in_a_token(
    session: Session, stop: str | list[str], text: str
) -> None:
    shown = [chunk.text for chunk in session.stream("Say it", temperature=0, stop=stop)]
    assert "".join(shown) == text
    assert session.last is not None
    assert session.last.finish_reason == "stop"


def test_prompt_is_counted_and_too_long_is_an_error(session: Session) -> None:
    fits = "x" * 18
    count = session.dry_run(request(fits, {"model": "endless"})).count.prompt_tokens
    assert count is not None
    reply = session.generate(fits, model="endless", temperature=0)
    assert reply.usage.prompt_tokens == count < 64
    # The answer ends where the context does.
    assert reply.usage.completion_tokens == 64 - count < 40
    assert (reply.finish_reason, reply.context_full) == ("length", True)
    with pytest.raises(PromptTooLong) as caught:
        session.generate("x" * 300, model="endless")
    assert str(caught.value) == (
        f"The prompt has {count + 282} tokens, but endless reads at most 64."
        f" Shorten it by at least {count + 219}."
    )
    assert session.generate("x", model="endless", temperature=0, max_new_tokens=2).text == "ab"


def test_any_of_several_end_tokens_ends_the_answer(session: Session, tmp_path: Path) -> None:
    # The other end token is not special, so its text is part of the answer.
    folder = parrot(tmp_path / "two ends", "abcd")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (end,) = tokenizer("c").input_ids
    edited(folder, "generation_config.json", eos_token_id=[tokenizer.eos_token_id, end])
    with loaded(session, folder):
        reply = session.generate("Say it", temperature=0)
    assert (reply.text, reply.finish_reason) == ("abc", "stop")


def test_base_model_gets_the_plain_prompt(session: Session, tmp_path: Path) -> None:
    with loaded(session, parrot(tmp_path / "base", "abc", chat_template=None)):
        plain = session.generate("line\n", temperature=0)
        with_system = session.generate("line\n", system="Be brief.", temperature=0)
    assert plain.text == with_system.text == "abc"
    assert plain.usage.prompt_tokens == 4  # "l", "in", "e", line break
    assert with_system.usage.prompt_tokens == 4 + len("Be brief.\n\n")


def test_system_prompt_reaches_template_without_system_role(
    session: Session, tmp_path: Path
) -> None:
    with loaded(session, parrot(tmp_path / "strict", "abc", chat_template=NO_SYSTEM)):
        plain = session.generate("Qq", temperature=0)
        with_system = session.generate("Qq", system="Sys", temperature=0)
    assert plain.text == with_system.text == "abc"
    assert plain.usage.prompt_tokens is not None
    assert with_system.usage.prompt_tokens == plain.usage.prompt_tokens + len("Sys\n\n")


def test_all_turns_of_a_conversation_are_in_the_prompt(session: Session) -> None:
    turns = [Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
    one = session.generate("c", temperature=0).usage.prompt_tokens
    three = session.generate(turns, temperature=0).usage.prompt_tokens
    assert one is not None
    assert three is not None
    assert three > one


def test_same_seed_repeats_the_text_and_keeps_random_state_of_the_user(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    # A training on a GPU, next to a model on the CPU, has its own random numbers.
    other_devices: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", other_devices.append)
    before = torch.get_rng_state()

    def text(seed: int) -> str:
        return session.generate("Hi", model="noise", temperature=1.5, seed=seed).text

    first, other, again = text(5), text(6), text(5)
    assert first == again != other
    assert other_devices == []
    assert torch.equal(torch.get_rng_state(), before)
    stream = session.stream("Hi", model="noise", temperature=1.5, seed=5)
    next(stream)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert torch.equal(torch.get_rng_state(), before)


def texts(session: Session, **options: Any) -> set[str]:
    settings = {"temperature": None, "top_p": None, "top_k": None, "repetition_penalty": None}
    return {
        session.generate("Hi", seed=seed, **{**settings, **options}, max_new_tokens=12).text
        for seed in range(3)
    }


@pytest.mark.parametrize(
    ("own", "different"),
    [({"do_sample": False}, 1), ({"do_sample": True, "top_k": 1}, 1), ({"do_sample": True}, 3)],
)
def test_without_temperature_the_model_decides_whether_to_sample(
    session: Session, tmp_path: Path, own: dict[str, Any], different: int
) -> None:
    folder = edited(tiny_llama(tmp_path / "own"), "generation_config.json", **own)
    with loaded(session, folder):
        default, greedy = texts(session), texts(session, temperature=0)
        with_default_top_p = texts(session, top_p=0.9)
    assert len(default) == different
    assert len(greedy) == 1
    assert len(with_default_top_p) == different
    if different == 1:
        assert default == greedy


@pytest.mark.parametrize(
    "own",
    [
        {"max_length": 400, "do_sample": True, "temperature": 0.6, "top_p": 0.9, "min_p": 0.1},
        {"num_beams": 4},
        {"num_return_sequences": 2, "do_sample": True, "return_dict_in_generate": True},
        {"prompt_lookup_num_tokens": 3},
        {"stop_strings": ["ef"], "output_scores": True},
    ],
    ids=lambda own: next(iter(own)),
)
@pytest.mark.parametrize("temperature", [0, 0.7])
def test_generation_config_of_a_model_cannot_break_a_stream(
    session: Session, tmp_path: Path, own: dict[str, Any], temperature: float
) -> None:
    folder = parrot(tmp_path / "own", "abcdef", ends=False)
    edited(folder, "generation_config.json", **own)
    with loaded(session, folder):
        reply = session.generate("Go", temperature=temperature, max_new_tokens=12)
    assert reply.text == ("abcd" if "stop_strings" in own else "abcdefabcdef")


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1e-300},
        {"temperature": 5e-324},
        {"temperature": 1e-40, "seed": 1},
        {"temperature": 1e-9},
        {"temperature": 1.0, "top_p": 1e-300},
        {"temperature": 1.0, "top_p": 0},
    ],
    ids=str,
)
def test_tiny_temperature_or_top_p_is_greedy(session: Session, options: dict[str, Any]) -> None:
    plain: dict[str, Any] = {"model": "noise", "max_new_tokens": 6, "repetition_penalty": 1}
    greedy = session.generate("Hi", temperature=0, **plain)
    assert session.generate("Hi", **plain, **options).text == greedy.text


@pytest.mark.parametrize(
    "options",
    [{"repetition_penalty": 1e300}, {"top_k": 10**30}, {"max_new_tokens": 10**30}],
    ids=str,
)
def test_huge_option_value_is_accepted(session: Session, options: dict[str, Any]) -> None:
    limit = {} if "max_new_tokens" in options else {"max_new_tokens": 3}
    reply = session.generate("Hi", model="noise", **options, **limit)  # type: ignore[arg-type]
    assert reply.usage.completion_tokens
    assert reply.finish_reason in {"stop", "length"}


def test_lone_surrogate_is_encoded_as_replacement_character(session: Session) -> None:
    options: dict[str, Any] = {"model": "noise", "max_new_tokens": 3, "temperature": 0}
    replaced = session.generate("a\ufffdb", **options)
    reply = session.generate("a\ud800b", **options)
    assert (reply.text, reply.usage.prompt_tokens) == (replaced.text, replaced.usage.prompt_tokens)


def test_other_options_of_transformers_are_passed_to_generate(session: Session) -> None:
    def text(**extra: Any) -> str:
        return session.generate(
            "Go", model="endless", temperature=0, max_new_tokens=12, extra=extra
        ).text

    assert text() == "abcdefabcdef"
    # No pair of tokens may occur twice, so the second round differs.
    assert text(no_repeat_ngram_size=2)[:7] == "abcdefa"
    assert text(no_repeat_ngram_size=2) != text()
    sampled = session.generate(
        "Hi", model="noise", temperature=1.5, extra={"min_p": 1.0}, max_new_tokens=12
    )
    greedy = session.generate("Hi", model="noise", temperature=0, max_new_tokens=12)
    assert sampled.text == greedy.text


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"mim_p": 0.1}, r"no generation option 'mim_p'\. Did you mean \"min_p\""),
        ({"num_beams": 4}, "-p num_beams cannot be used with a streamed answer"),
        ({"temperature": 1}, "temperature has its own option"),
        ({"_from_model_config": True}, "no generation option"),
        ({"min_p": "high"}, r"^-p min_p='high' is invalid\. Expected a number\.$"),
        (
            {"no_repeat_ngram_size": [2]},
            r"^-p no_repeat_ngram_size=\[2\] is invalid\. Expected a number\.$",
        ),
        ({"typical_p": True}, "^-p typical_p=True is invalid. Expected a number"),
        ({"do_sample": "True"}, "^-p do_sample='True' is invalid. Expected true or false"),
        (
            {"suppress_tokens": "x" * 99},
            "^-p suppress_tokens='x{39}… is invalid. Expected a number, a list",
        ),
    ],
)
def test_invalid_option_of_transformers_is_an_error(
    session: Session, extra: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        session.generate("Go", extra=extra)


def test_value_that_transformers_rejects_is_a_one_line_error(
    session: Session,
) -> None:
    with pytest.raises(GenerationFailed) as caught:
        session.generate("Go", temperature=1, extra={"min_p": 7})
    assert "min_p" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "ValueError" in caught.value.details
    assert caught.value.__context__ is None
    assert session.generate("Say it", temperature=0).text == ANSWER
