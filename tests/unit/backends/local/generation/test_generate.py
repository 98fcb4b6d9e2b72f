"""What is streamed is what Transformers' own `generate` gives; `tests/versions` has the rest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llm_magic.session import Session
from llm_magic.types import Chunk
from tests.local_models import edited, listening, local_model, local_session
from tests.plain_generate import PlainGenerate
from tests.tiny_models import SPECIAL_TOKENS, tiny, tiny_llama

TEXT = "the other man in a hat on the table sat there "
# In tokens about 160 and 960: past the window, and read in pieces.
PROMPTS = {"past the window": TEXT * 5, "in pieces": TEXT * 30}


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with local_session(max_new_tokens=16, temperature=0) as session:
        yield session


def load_in_pieces(session: Session, folder: Path) -> None:
    """Load a model that begins with short pieces, as a large one does."""
    session.load(str(folder), dtype="float32")
    local_model(session).pace.piece = 64


@pytest.mark.parametrize(
    "settings",
    [{"cache_implementation": "hybrid"}, {"cache_implementation": "static"}, {"use_cache": False}],
)
def test_a_long_prompt_goes_with_the_caches_that_models_ask_for(
    session: Session, tmp_path: Path, settings: dict[str, Any]
) -> None:
    plain = tiny(tmp_path / "a", "gemma2", max_position_embeddings=2048, chat_template=None)
    expected = PlainGenerate(plain).answer(PROMPTS["in pieces"], max_new_tokens=8, do_sample=False)
    edited(plain, "generation_config.json", **settings)
    edited(plain, "config.json", **settings)
    load_in_pieces(session, plain)
    reply = session.generate(PROMPTS["in pieces"], max_new_tokens=8, repetition_penalty=1)
    assert reply.text == expected


@pytest.mark.parametrize("kind", ["openai-gpt", "minimax"])
def test_a_model_with_a_cache_of_its_own_reads_a_long_prompt(
    session: Session, tmp_path: Path, kind: str
) -> None:
    from transformers import AutoConfig

    folder = tiny_llama(tmp_path / "m", chat_template=None)
    (folder / "model.safetensors").unlink()
    sizes = {
        "openai-gpt": {"n_positions": 1024, "n_embd": 32, "n_layer": 1, "n_head": 2},
        "minimax": {
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16,
            "num_key_value_heads": 2, "intermediate_size": 32, "num_local_experts": 2,
            "max_position_embeddings": 1024,
        },
    }[kind]  # fmt: skip
    config = AutoConfig.for_model(kind, vocab_size=300, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    load_in_pieces(session, folder)
    reply = session.generate(PROMPTS["in pieces"], max_new_tokens=4, repetition_penalty=1)
    expected = PlainGenerate(folder).answer(PROMPTS["in pieces"], max_new_tokens=4, do_sample=False)
    assert reply.text == expected


def test_attention_implementations_agree(session: Session, tmp_path: Path) -> None:
    folder = tiny(tmp_path / "m", "gemma3_text", chat_template=None)
    texts = set()
    for attn in ("eager", "sdpa"):
        session.load(str(folder), dtype="float32", attn=attn)
        texts.add(session.generate(PROMPTS["past the window"]).text)
    assert len(texts) == 1


@pytest.fixture(scope="module")
def chatty(session: Session, tmp_path_factory: pytest.TempPathFactory) -> Session:
    """Noise that is sampled at random, so that every kind of token comes."""
    session.load(str(tiny_llama(tmp_path_factory.mktemp("chatty") / "noise")), name="noise")
    return session


def chunks(session: Session, prompt: str, **options: Any) -> list[Chunk]:
    with listening() as noise:
        made = list(session.stream(prompt, **options))
    assert noise == []
    return made


@pytest.mark.parametrize("seed", range(8))
def test_special_tokens_never_show(chatty: Session, seed: int) -> None:
    made = chunks(chatty, "Hi", temperature=2, top_k=None, top_p=1, seed=seed, max_new_tokens=60)
    text = "".join(chunk.text for chunk in made)
    assert not [token for token in SPECIAL_TOKENS if token in text]


def test_every_token_is_a_chunk_and_the_counts_are_right(chatty: Session) -> None:
    made = chunks(chatty, "Hi", max_new_tokens=9, extra={"min_new_tokens": 9})
    assert [chunk.tokens for chunk in made] == [0, *[1] * 9, 0]
    assert [chunk.finish_reason for chunk in made[:-1]] == [None] * 10
    last = made[-1]
    assert last.finish_reason == "length"
    assert last.usage is not None
    assert (last.usage.completion_tokens, last.usage.cached_tokens) == (9, 0)
    times = [chunk.time for chunk in made if chunk.tokens]
    assert times == sorted(times)
