"""Token probabilities are those of plain Transformers in float32, however the answer is decoded."""

from __future__ import annotations

import pickle
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llm_magic.backends.local.generation.cuda_graph import StaticDecoder
from llm_magic.backends.local.generation.token_streamer import TokenStreamer
from llm_magic.errors import OptionError, PromptTooLong
from llm_magic.session import Session
from llm_magic.types import Reply, TokenLogprob
from tests.local_models import edited, forward_sizes, local_model, local_session, parrot
from tests.tiny_models import CHATML, Architecture, tiny, tiny_llama

QUESTION = "Name three colors of the rainbow, and one fruit for each."
LIST = "Repeat this list twice: apple, pear, plum, apple, pear, plum, apple, pear, plum"
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def smollm(model_cache: Path) -> Iterator[Session]:
    """A session with the bundled model in float32."""
    with local_session() as session:
        session.load(dtype="float32")
        yield session


@pytest.fixture(scope="module")
def plain(smollm: Session) -> Any:
    """The same model, loaded by Transformers alone."""
    folder = local_model(smollm).info.folder
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture
def session() -> Iterator[Session]:
    with local_session() as session:
        yield session


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[int]]:
    """The ids of the generated tokens by answer."""
    tokens: dict[int, list[int]] = defaultdict(list)
    # Kept, so that no other one gets the id of one that has ended.
    streamers = set[TokenStreamer]()
    append = TokenStreamer.append

    def noted(streamer: TokenStreamer, token: int, *scores: Any) -> float:
        streamers.add(streamer)
        tokens[id(streamer)].append(token)
        return append(streamer, token, *scores)

    monkeypatch.setattr(TokenStreamer, "append", noted)
    return tokens


def check(model: Any, prompt: list[int], answer: list[int], tokens: Sequence[TokenLogprob]) -> None:
    """Compare the tokens of an answer with one forward pass over prompt and answer."""
    assert tokens
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    logs = logits.float().log_softmax(-1)
    for row, token, found in zip(logs, answer, tokens, strict=False):
        assert found.logprob == pytest.approx(float(row[token]), abs=TOLERANCE)
        best = row.topk(len(found.alternatives)).values.tolist()
        assert [logprob for _, logprob in found.alternatives] == pytest.approx(best, abs=TOLERANCE)


def sent(session: Session, reply: Reply) -> list[int]:
    return local_model(session).prompt_encoder.encode(reply.messages)


def joined(tokens: Sequence[TokenLogprob]) -> str:
    return "".join(token.text for token in tokens)


@pytest.mark.parametrize(
    "about",
    [
        {"temperature": 0, "logprobs": 5},
        {"temperature": 1.5, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.5, "seed": 3,
         "logprobs": 20},
        {"temperature": 0.7, "seed": 1, "logprobs": 0},
        {"temperature": 0, "schema": PERSON, "logprobs": 3},
        {"temperature": 0, "regex": "[0-9]{3}-[a-c]{2}", "logprobs": 2},
    ],
)  # fmt: skip
def test_probabilities_are_those_of_the_raw_distribution(
    smollm: Session, plain: Any, generated: dict[int, list[int]], about: dict[str, Any]
) -> None:
    reply = smollm.generate(QUESTION, max_new_tokens=40, **about)
    (answer,) = generated.values()
    check(plain, sent(smollm, reply), answer, reply.tokens)
    assert joined(reply.tokens) == reply
    assert {len(token.alternatives) for token in reply.tokens} == {about["logprobs"]}
    assert pickle.loads(pickle.dumps(reply)).tokens == reply.tokens
    free = smollm.generate(QUESTION, max_new_tokens=40, **{**about, "logprobs": None})
    assert free == reply


def test_speculative_tokens_have_probabilities(
    smollm: Session, plain: Any, generated: dict[int, list[int]]
) -> None:
    with forward_sizes(smollm) as sizes:
        reply = smollm.generate(
            LIST, temperature=0, repetition_penalty=1, max_new_tokens=60, logprobs=4
        )
    (answer,) = generated.values()
    assert len(sizes) < len(answer), "no draft was accepted"
    check(plain, sent(smollm, reply), answer, reply.tokens)
    assert joined(reply.tokens) == reply


def test_sequences_of_a_batch_have_their_own(
    smollm: Session, plain: Any, generated: dict[int, list[int]]
) -> None:
    rows = ["grass", "the sky at night", "blood", "snow in the mountains", "coal"]
    question = "Which color is {item}?"
    replies = smollm.map(question, rows, temperature=0, logprobs=3, max_new_tokens=16)
    answers = {tuple(answer) for answer in generated.values()}
    assert len(replies) == len(rows)
    for row, reply in zip(rows, replies, strict=True):
        assert isinstance(reply, Reply)
        prompt = sent(smollm, smollm.generate(question.format(item=row), max_new_tokens=1))
        tokenizer = local_model(smollm).tokenizer
        texts = {
            str(tokenizer.decode([*answer], skip_special_tokens=True)): answer for answer in answers
        }
        check(plain, prompt, list(texts[str(reply)]), reply.tokens)
        assert joined(reply.tokens) == reply


def test_label_has_the_probabilities_of_its_tokens(smollm: Session, plain: Any) -> None:
    labels = ["positive", "negative", "mixed feelings"]
    reply = smollm.generate(QUESTION, choice=labels, logprobs=2)
    tokenizer = local_model(smollm).tokenizer
    ids, quote = (tokenizer(text, add_special_tokens=False).input_ids for text in (str(reply), '"'))
    check(plain, sent(smollm, reply) + quote, ids, reply.tokens)
    assert joined(reply.tokens) == reply


def test_tokens_end_before_the_stop_text(smollm: Session) -> None:
    whole = smollm.generate(QUESTION, temperature=0, max_new_tokens=30, logprobs=1)
    text = str(whole)
    # In the middle of a token.
    stop = text[len(text) // 2 : len(text) // 2 + 4]
    reply = smollm.generate(QUESTION, temperature=0, max_new_tokens=30, logprobs=1, stop=stop)
    assert reply == text[: text.index(stop)]
    assert joined(reply.tokens) == reply
    for token, same in zip(reply.tokens[:-1], whole.tokens, strict=False):
        assert token.logprob == pytest.approx(same.logprob, abs=TOLERANCE)


def test_characters_of_several_tokens_are_in_their_last_token(
    smollm: Session, plain: Any, generated: dict[int, list[int]]
) -> None:
    reply = smollm.generate(QUESTION, temperature=0, regex="(日本|é😀){2}", logprobs=1)
    (answer,) = generated.values()
    assert joined(reply.tokens) == reply
    assert "" in {token.text for token in reply.tokens}
    assert len(reply.tokens) > len(reply)
    check(plain, sent(smollm, reply), answer, reply.tokens)


def test_probabilities_are_off_unless_requested(smollm: Session) -> None:
    reply = smollm.generate(QUESTION, max_new_tokens=2)
    with pytest.raises(AttributeError, match=r"Use reply.usage.completion_tokens, or .*logprobs=0"):
        _ = reply.tokens


def test_chunks_have_the_tokens_of_their_text(smollm: Session) -> None:
    chunks = list(smollm.stream(QUESTION, temperature=0, max_new_tokens=12, logprobs=0))
    assert smollm.last is not None
    assert [joined(chunk.logprobs) for chunk in chunks] == [chunk.text for chunk in chunks]
    assert smollm.last.tokens == tuple(token for chunk in chunks for token in chunk.logprobs)


def test_answer_that_is_stopped_keeps_its_tokens(smollm: Session) -> None:
    stream = smollm.stream(QUESTION, temperature=0, max_new_tokens=200, logprobs=2)
    for chunk in stream:
        if chunk.text.strip():
            break
    stream.close()  # type: ignore[attr-defined]
    assert smollm.last is not None
    assert joined(smollm.last.tokens) == smollm.last
    assert smollm.last.finish_reason == "cancelled"


def test_tokens_of_the_reasoning_are_omitted(session: Session, tmp_path: Path) -> None:
    template = CHATML.replace("assistant\n", "assistant\n<think>\n")
    folder = parrot(tmp_path / "m", "ab</think>cdefg", chat_template=template)
    session.load(str(folder), dtype="float32")
    for stop in ((), ("ef",)):
        reply = session.generate("x", temperature=0, logprobs=1, stop=stop, repetition_penalty=1)
        assert reply.reasoning == "ab"
        assert reply == ("cd" if stop else "cdefg")
        assert joined(reply.tokens) == reply


@pytest.mark.parametrize("is_sampled", [False, True])
def test_steps_of_fixed_shape_have_probabilities(
    session: Session, tmp_path: Path, generated: dict[int, list[int]], is_sampled: bool
) -> None:
    session.load(str(tiny_llama(tmp_path / "m")), dtype="float32")
    loaded = local_model(session)
    loaded.static_decoder = StaticDecoder(loaded.model, compiled=False, forced=True)
    about: dict[str, Any] = {"temperature": 1.2, "seed": 5} if is_sampled else {"temperature": 0}
    reply = session.generate("x", max_new_tokens=24, logprobs=3, **about)
    assert loaded.static_decoder.steps
    (answer,) = generated.values()
    check(loaded.model, sent(session, reply), answer, reply.tokens)
    assert session.generate("x", max_new_tokens=24, **about) == reply


def test_assistant_changes_no_probability(
    session: Session, tmp_path: Path, generated: dict[int, list[int]]
) -> None:
    large, other = tiny_llama(tmp_path / "large", layers=4), tiny_llama(tmp_path / "other", seed=3)
    session.load(str(large), dtype="float32", assistant=str(other))
    reply = session.generate("x", temperature=0, max_new_tokens=24, logprobs=2)
    (answer,) = generated.values()
    check(local_model(session).model, sent(session, reply), answer, reply.tokens)


def test_model_that_transformers_decodes_is_an_error(session: Session, tmp_path: Path) -> None:
    session.load(str(tiny(tmp_path / "m", "rwkv")), dtype="float32")
    with pytest.raises(
        OptionError, match=r"reports no probabilities of tokens: .* Remove (--)?logprobs"
    ):
        session.generate("x", logprobs=1)
    with pytest.raises(OptionError, match="cannot score texts: "):
        session.score("x", ["a"])


# -- llm.score --


def expected_score(model: Any, prompt: list[int], tokens: list[int]) -> float:
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    logs = logits.double().log_softmax(-1)
    return float(logs.gather(-1, torch.tensor(tokens)[:, None]).sum())


def test_scores_are_those_of_transformers_in_one_pass(smollm: Session, plain: Any) -> None:
    texts = ["Paris", "London is the capital.", "Paris, of course", "é😀 日本", "Paris"]
    question = "What is the capital of France?"
    prompt = sent(smollm, smollm.generate(question, max_new_tokens=1))
    with forward_sizes(smollm) as sizes:
        scores = smollm.score(question, texts, logprobs=2)
    assert len(sizes) == 1
    tokenizer = local_model(smollm).tokenizer
    for text, score in zip(texts, scores, strict=True):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert score.text == text == joined(score.tokens)
        expected = expected_score(plain, prompt, ids)
        assert score.logprob == pytest.approx(expected, abs=TOLERANCE)
        assert score.logprob == pytest.approx(sum(token.logprob for token in score.tokens))
        check(plain, prompt, ids, score.tokens)
    assert scores[0] == scores[4]
    best = max(scores[:2], key=lambda score: score.logprob)
    assert best.text == "Paris"


def test_special_tokens_of_given_texts_are_text(smollm: Session) -> None:
    texts = ["<|im_end|>", "Blue<|im_end|>\n<|im_start|>user"]
    for text, score in zip(texts, smollm.score("Which color?", texts), strict=True):
        assert joined(score.tokens) == text
        assert len(score.tokens) > 3


def test_long_texts_are_scored_in_parts(smollm: Session, plain: Any) -> None:
    texts = ["one two three four five " * 130, "Paris", "six seven eight " * 60]
    prompt = sent(smollm, smollm.generate("Count.", max_new_tokens=1))
    tokenizer = local_model(smollm).tokenizer
    for text, score in zip(texts, smollm.score("Count.", texts), strict=True):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        expected = expected_score(plain, prompt, ids)
        assert score.logprob == pytest.approx(expected, abs=TOLERANCE * len(ids) / 10)
        assert joined(score.tokens) == text


@pytest.mark.parametrize(
    "architecture", ["llama", "qwen3", "gemma3_text", "gpt2", "mamba", "lfm2", "phi3"]
)
def test_scores_are_right_on_every_architecture(
    session: Session, tmp_path: Path, architecture: Architecture
) -> None:
    session.load(str(tiny(tmp_path / "m", architecture)), dtype="float32")
    loaded = local_model(session)
    prompt = sent(session, session.generate("the other man", max_new_tokens=1))
    texts = ["hat", "the other man", "z"]
    for text, score in zip(texts, session.score("the other man", texts), strict=True):
        ids = loaded.tokenizer(text, add_special_tokens=False).input_ids
        assert score.logprob == pytest.approx(
            expected_score(loaded.model, prompt, ids), abs=TOLERANCE
        )


def test_scoring_changes_no_later_answer(smollm: Session) -> None:
    free = smollm.generate(QUESTION, temperature=0, max_new_tokens=12)
    smollm.score(QUESTION, ["red", "a long answer"])
    assert smollm.generate(QUESTION, temperature=0, max_new_tokens=12) == free


@pytest.mark.parametrize(
    ("texts", "error"),
    [("Paris", "are a list of texts"), ([], "a list of texts"), (["a", ""], "not empty"),
     ([1], "a list of texts")],
)  # fmt: skip
def test_wrong_texts_are_an_error(smollm: Session, texts: Any, error: str) -> None:
    with pytest.raises(OptionError, match=error):
        smollm.score("x", texts)


def test_text_that_exceeds_the_context_is_an_error(session: Session, tmp_path: Path) -> None:
    folder = edited(tiny_llama(tmp_path / "m"), "config.json", max_position_embeddings=64)
    session.load(str(folder), dtype="float32")
    with pytest.raises(PromptTooLong):
        session.score("x", ["a " * 100])
    assert session.score("x", ["a"])
