"""The labels of a choice get the probabilities that the model gives them, in one forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from llm_magic.errors import InvalidReply, PromptTooLong
from llm_magic.session import Session
from llm_magic.types import Reply
from tests.local_models import edited, forward_sizes, local_model, local_session, parrot
from tests.tiny_models import CHATML, Architecture, tiny

LABELS = ["positive", "negative", "neutral", "mixed feelings"]
PROMPT = "Which sentiment? I love this phone, but its battery is awful."


@pytest.fixture(scope="module")
def smollm(model_cache: Path) -> Iterator[Session]:
    """A session with the bundled model."""
    with local_session() as session:
        session.load(dtype="float32")
        yield session


@pytest.fixture
def session() -> Iterator[Session]:
    with local_session() as session:
        yield session


def reference(
    session: Session, reply: Reply, labels: Sequence[str], read: Sequence[int] = ()
) -> dict[str, float]:
    """Return the probabilities by one plain forward pass of Transformers for each label, in quotes.

    `read` are the tokens before them, if these are not only those of the prompt.
    """
    loaded = local_model(session)
    ids = list(read) or loaded.prompt_encoder.encode(reply.messages)
    sums = []
    for label in labels:
        tokens = loaded.tokenizer(f'"{label}"', add_special_tokens=False).input_ids
        with torch.inference_mode():
            model = loaded.model(input_ids=torch.tensor([ids + tokens]))
        logs = model.logits[0, len(ids) - 1 :].double().log_softmax(-1)
        sums.append(sum((logs[n, token] for n, token in enumerate(tokens)), torch.tensor(0.0)))
    return dict(zip(labels, torch.stack(sums).softmax(-1).tolist(), strict=True))


def check(reply: Reply, expected: dict[str, float], tolerance: float = 1e-4) -> None:
    assert dict(reply.probabilities) == pytest.approx(expected, abs=tolerance)
    assert sum(reply.probabilities.values()) == pytest.approx(1, abs=1e-6)
    assert list(reply.probabilities) == sorted(expected, key=lambda label: -expected[label])
    assert reply == next(iter(reply.probabilities))
    assert reply.finish_reason == "stop"


def test_probabilities_are_those_of_transformers_in_one_pass(smollm: Session) -> None:
    with forward_sizes(smollm) as sizes:
        reply = smollm.generate(PROMPT, choice=LABELS)
    assert len(sizes) == 1
    check(reply, reference(smollm, reply, LABELS))
    with forward_sizes(smollm) as sizes:
        again = smollm.generate(PROMPT, choice=LABELS, temperature=2)
    assert len(sizes) == 1
    assert dict(again.probabilities) == dict(reply.probabilities)
    check(again, reference(smollm, reply, LABELS))
    tokens = local_model(smollm).tokenizer(f'"{reply}"', add_special_tokens=False).input_ids
    assert reply.usage.completion_tokens == len(tokens)


def test_label_and_one_that_starts_with_it_end_with_quotes(smollm: Session) -> None:
    labels = ["New", "New York", "Boston"]
    question = "Where is Wall Street?"
    reply = smollm.generate(question, choice=labels)
    check(reply, reference(smollm, reply, labels))
    assert reply.probabilities["New York"] > reply.probabilities["New"]


def test_answer_after_a_choice_is_the_same(smollm: Session) -> None:
    free = smollm.generate(PROMPT, temperature=0, max_new_tokens=12)
    smollm.generate(PROMPT, choice=LABELS)
    assert smollm.generate(PROMPT, temperature=0, max_new_tokens=12) == free


def test_rows_of_a_map_take_a_pass_each(smollm: Session) -> None:
    rows = [f"The {thing} is {word}." for thing in ("phone", "film") for word in ("good", "bad")]
    with forward_sizes(smollm) as sizes:
        question = "Which sentiment does this sentence have, in one word? {item}"
        mapped = smollm.map(question, rows, choice=LABELS)
    assert len(sizes) == len(rows)
    # Rows start alike.
    assert sizes[1] < 0.7 * sizes[0]
    assert {str(reply) for reply in mapped} <= set(LABELS)


@pytest.mark.parametrize(
    "architecture",
    ["llama", "qwen3", "gemma2", "gemma3_text", "mistral", "gpt2", "mamba", "lfm2", "phi3"],
)
@pytest.mark.parametrize("chunk", [16, 256])
def test_probabilities_are_right_on_every_architecture(
    session: Session, tmp_path: Path, architecture: Architecture, chunk: int
) -> None:
    session.load(str(tiny(tmp_path / "m", architecture)), dtype="float32")
    local_model(session).prefill_chunk_size.tokens = chunk
    labels = ["hat", "the", "the other man", "z"]
    for prompt in ("x", "the other man in a hat " * 4, "the other man in a hat " * 4):
        reply = session.generate(prompt, choice=labels)
        check(reply, reference(session, reply, labels))


def test_label_is_chosen_after_the_reasoning(session: Session, tmp_path: Path) -> None:
    template = CHATML.replace("assistant\n", "assistant\n<think>\n")
    assert "<think>" in template
    folder = parrot(tmp_path / "m", "ab</think>", chat_template=template)
    session.load(str(folder), dtype="float32")
    reply = session.generate("x", choice=["u", "v", "vw"], temperature=0)
    assert reply in {"u", "v", "vw"}
    assert reply.reasoning == "ab"
    loaded = local_model(session)
    read = loaded.prompt_encoder.encode(reply.messages)
    read += loaded.tokenizer("ab</think>").input_ids
    check(reply, reference(session, reply, ["u", "v", "vw"], read))
    with pytest.raises(InvalidReply, match="cut off at the token limit"):
        session.generate("x", choice=["u", "v"], max_new_tokens=3)


def test_prompt_that_leaves_no_place_for_a_label_is_an_error(
    session: Session, tmp_path: Path
) -> None:
    folder = tiny(tmp_path / "m", "llama", chat_template=None, max_position_embeddings=32)
    edited(folder, "generation_config.json", eos_token_id=None)
    session.load(str(folder), dtype="float32")
    labels = ["abcdefghij", "klm"]
    assert session.generate("x" * 10, choice=labels) in labels
    with pytest.raises(PromptTooLong):
        session.generate("x" * 28, choice=labels)
