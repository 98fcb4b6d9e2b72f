"""Tokens to text with the tokenizers people have: whole characters, and all of it at the end."""

from __future__ import annotations

import random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from llm_magic.backends.local.generation.detokenizer import Detokenizer
from tests.tiny_models import byte_tokenizer

WORDS = ["▁", "▁the", "▁a", "b", "c", "你", "é", "▁hello", "🙂"]


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2, Mistral and Gemma have it: words, and 256 bytes for all that is no word."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for piece in [*(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]:
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
    """The bytes of a text, one token each: the hardest way to write it."""
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
def test_whole_characters_come_through(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    pieces = streamed(tokenizer, ids_of(tokenizer, text))
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not [piece for piece in pieces if "\ufffd" in piece]


def test_the_rest_of_a_character_is_not_lost(tokenizer: PreTrainedTokenizerFast) -> None:
    *pieces, rest = streamed(tokenizer, ids_of(tokenizer, "ok🙂")[:-1])
    assert "".join(pieces) == "ok"
    # One for all of its bytes or one for each, as the tokenizer has it.
    assert rest in {"\ufffd", "\ufffd" * 3}


def test_special_tokens_are_silent(tokenizer: PreTrainedTokenizerFast) -> None:
    end = tokenizer.eos_token_id
    ids = [end, *ids_of(tokenizer, "a🙂"), end, *ids_of(tokenizer, "b"), end]
    assert "".join(streamed(tokenizer, ids)) == "a🙂b"


def test_nonsense_breaks_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    dice = random.Random(0)
    for _ in range(2000):
        text = "".join(dice.choice(["é", "你", "🙂", " the", "a", "\n"]) for _ in range(4))
        ids = ids_of(tokenizer, text)
        for _ in range(dice.randrange(3)):
            ids.insert(dice.randrange(len(ids)), dice.randrange(len(tokenizer)))
        made = "".join(streamed(tokenizer, ids))
        whole = str(tokenizer.decode(ids, skip_special_tokens=True))
        # Of bytes that make no character, how many replacement characters come is a matter of
        # where one begins to count.
        assert made.replace("\ufffd", "") or not whole.replace("\ufffd", "")
        if "\ufffd" not in whole + made:
            assert made == whole
