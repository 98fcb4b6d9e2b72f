"""Tokens become text in whole characters, equal to that of all tokens decoded at once.

Reasoning between special tokens, or that the prompt starts, is separate from the answer.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llm_magic.backends.local.generation.token_streamer import Detokenizer, ReasoningTokens
from llm_magic.backends.reasoning import ReasoningSplitter
from llm_magic.session import Session
from llm_magic.types import Chunk
from tests.local_models import local_session, parrot
from tests.tiny_models import CHATML, byte_tokenizer, tiny_llama

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

PIECES = ["▁", "▁the", "▁a", "b", "c", "你", "é", "▁hello", "🙂"]


def byte_fallback() -> PreTrainedTokenizerFast:
    """The vocabulary of Llama 2, Mistral and Gemma: words, and 256 bytes for the rest."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for piece in [*(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]:
        vocabulary[piece] = len(vocabulary)
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    raw.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    raw.add_special_tokens([AddedToken("</s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")


TOKENIZERS = {"byte level": byte_tokenizer(None, 512), "byte fallback": byte_fallback()}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return TOKENIZERS[request.param]


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Return a text as one token a byte."""
    vocabulary = tokenizer.get_vocab()
    if "<0x00>" in vocabulary:
        return [vocabulary[f"<0x{byte:02X}>"] for byte in text.encode()]
    return list(tokenizer(text).input_ids)


def streamed(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.step(token) for token in ids), detokenizer.flush()]


@pytest.mark.parametrize(
    "text",
    ["é🙂日本語", "a\nb\n🙂\n", "👩‍👩‍👧 family", "\ufffd is a character too\ufffd", "e\u0301"],
)
def test_characters_are_returned_whole(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    pieces = streamed(tokenizer, ids_of(tokenizer, text))
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not [piece for piece in pieces if "\ufffd" in piece]


def test_incomplete_character_becomes_a_replacement_at_the_end(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    *pieces, last = streamed(tokenizer, ids_of(tokenizer, "ok🙂")[:-1])
    assert "".join(pieces) == "ok"
    # One for all bytes or one for each, depending on the tokenizer.
    assert last in {"\ufffd", "\ufffd" * 3}


def test_special_tokens_have_no_text(tokenizer: PreTrainedTokenizerFast) -> None:
    end = tokenizer.eos_token_id
    ids = [end, *ids_of(tokenizer, "a🙂"), end, *ids_of(tokenizer, "b"), end]
    assert "".join(streamed(tokenizer, ids)) == "a🙂b"


def test_random_tokens_give_the_text_of_decoding_all_at_once(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    dice = random.Random(0)
    for _ in range(2000):
        text = "".join(dice.choice(["é", "你", "🙂", " the", "a", "\n"]) for _ in range(4))
        ids = ids_of(tokenizer, text)
        for _ in range(dice.randrange(3)):
            ids.insert(dice.randrange(len(ids)), dice.randrange(len(tokenizer)))
        made = "".join(streamed(tokenizer, ids))
        whole = str(tokenizer.decode(ids, skip_special_tokens=True))
        # The number of replacement characters for invalid bytes depends on where decoding starts.
        assert made.replace("\ufffd", "") or not whole.replace("\ufffd", "")
        if "\ufffd" not in whole + made:
            assert made == whole


def test_space_after_invalid_bytes_stays() -> None:
    """SentencePiece strips the space before the first word of a text."""
    tokenizer = TOKENIZERS["byte fallback"]
    vocabulary = tokenizer.get_vocab()
    invalid = [*ids_of(tokenizer, "你"), vocabulary["<0xF0>"]]
    ids = [vocabulary["▁hello"], *invalid, vocabulary["▁the"], vocabulary["▁a"]]
    text = "".join(streamed(tokenizer, ids))
    assert text.startswith("hello你")
    assert text.endswith(" the a")


# --- tokenizers that are written in Python ---


class ByteTokenizer:
    """Has one token a byte, and -1 for a special token."""

    calls = 0
    longest = 0

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        self.calls += 1
        self.longest = max(self.longest, len(ids))
        return bytes(i for i in ids if i >= 0).decode("utf-8", errors="replace")


class WordTokenizer:
    """Has words with a space before each, stripped from the first one, as SentencePiece does."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(f" w{i}" for i in ids if i >= 0)[1:]


def detokenizer(tokenizer: object) -> Detokenizer:
    return Detokenizer(cast("PreTrainedTokenizerBase", tokenizer))


@given(st.text(st.characters(exclude_characters="\ufffd", exclude_categories=["Cs"])))
@example("a😀é日本")
def test_character_is_returned_when_its_bytes_are_complete(text: str) -> None:
    slow = detokenizer(ByteTokenizer())
    parts = [slow.step(byte) for byte in text.encode()]
    assert "".join(parts) == text
    assert "\ufffd" not in "".join(parts)


@given(st.lists(st.one_of(st.integers(-1, 255), st.sampled_from("é😀".encode()))))
def test_steps_and_flush_give_the_whole_text_of_any_tokens(ids: list[int]) -> None:
    tokenizer = ByteTokenizer()
    slow = detokenizer(tokenizer)
    parts = [slow.step(i) for i in ids]
    assert "".join([*parts, slow.flush()]) == tokenizer.decode(ids, True)
    assert slow.flush() == ""


@given(st.lists(st.integers(0, 9)))
def test_spaces_between_tokens_stay(ids: list[int]) -> None:
    tokenizer = WordTokenizer()
    slow = detokenizer(tokenizer)
    assert "".join(slow.step(i) for i in ids) == tokenizer.decode(ids, True)


def test_special_token_has_no_text() -> None:
    tokenizer = WordTokenizer()
    slow = detokenizer(tokenizer)
    ids = [1, 2, -1, 3, -1, -1, 4]
    assert "".join(slow.step(i) for i in ids) == tokenizer.decode(ids, True) == "w1 w2 w3 w4"


def test_each_step_decodes_a_constant_number_of_tokens() -> None:
    tokenizer = ByteTokenizer()
    slow = detokenizer(tokenizer)
    for byte in b"x" * 500:
        slow.step(byte)
    assert tokenizer.longest <= 3
    assert tokenizer.calls <= 1000


# --- reasoning ---

CHANNELS = (
    "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>So."
    "<|end|><|start|>assistant<|channel|>final<|message|>Yes!<|return|>"
)


@pytest.fixture(scope="module")
def reasoning_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: Any = AutoTokenizer.from_pretrained(tiny_llama(tmp_path_factory.mktemp("m") / "m"))
    names = ["channel", "message", "start", "end", "return"]
    special = [*(f"<|{name}|>" for name in names), "[THINK]", "[/THINK]"]
    made.add_tokens([AddedToken(name, special=True) for name in special], special_tokens=True)
    return made


def split(tokenizer: Any, text: str) -> tuple[str, str]:
    """Return reasoning and answer of a text that is read token by token."""
    detokenizer = Detokenizer(tokenizer, ReasoningTokens.find(tokenizer))
    splitter = ReasoningSplitter()
    chunks = [
        piece
        for token in tokenizer(text).input_ids
        for piece in splitter.feed(Chunk(text=detokenizer.step(token), tokens=1))
    ]
    chunks += splitter.flush()
    return "".join(c.reasoning for c in chunks), "".join(c.text for c in chunks)


@pytest.mark.parametrize(
    ("text", "reasoning", "answer"),
    [
        (CHANNELS, "Hm.\n\nSo.", "Yes!"),
        ("<|channel|>final<|message|>Yes!", "", "Yes!"),
        ("<|start|>assistant<|message|>Yes!", "", "Yes!"),
        ("<|channel|>analysis<|message|>Hm.", "Hm.", ""),
        ("[THINK]Hm.[/THINK]Yes!", "Hm.", "Yes!"),
        ("Yes! [no tags]", "", "Yes! [no tags]"),
    ],
)
def test_special_tokens_around_reasoning_become_tags(
    reasoning_tokenizer: Any, text: str, reasoning: str, answer: str
) -> None:
    assert split(reasoning_tokenizer, text) == (reasoning, answer)


@pytest.fixture
def session() -> Iterator[Session]:
    with local_session(max_new_tokens=20, temperature=0, repetition_penalty=1) as session:
        yield session


@pytest.mark.parametrize(
    ("limit", "reasoning", "answer"), [(20, "0123", "Y!"), (2, "01", "")], ids=["whole", "cut"]
)
def test_reasoning_that_starts_in_the_prompt_is_split(
    session: Session, tmp_path: Path, limit: int, reasoning: str, answer: str
) -> None:
    template = CHATML.replace("assistant\n{%", "assistant\n<think>\n{%")
    session.load(str(parrot(tmp_path / "m", "0123</think>Y!", chat_template=template)))
    reply = session.generate("?", max_new_tokens=limit)
    assert reply.reasoning.startswith(reasoning)
    assert reply.text == answer
