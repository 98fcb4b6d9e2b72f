"""A streamed answer is that of Transformers' own `generate`; `tests/versions` has the other cases."""

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
# In tokens about 160 and 960: longer than the window, and read in chunks.
PROMPTS = {"past the window": TEXT * 5, "in chunks": TEXT * 30}


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with local_session(max_new_tokens=16, temperature=0) as session:
        yield session


def load_with_small_chunks(session: Session, folder: Path) -> None:
    """Load a model with small prefill chunks, as a large one has."""
    session.load(str(folder), dtype="float32")
    local_model(session).prefill_chunk_size.tokens = 64


@pytest.mark.parametrize(
    "settings",
    [{"cache_implementation": "hybrid"}, {"cache_implementation": "static"}, {"use_cache": False}],
)
def test_long_prompt_is_answered_with_the_cache_of_the_generation_config(
    session: Session, tmp_path: Path, settings: dict[str, Any]
) -> None:
    plain = tiny(tmp_path / "a", "gemma2", max_position_embeddings=2048, chat_template=None)
    expected = PlainGenerate(plain).answer(PROMPTS["in chunks"], max_new_tokens=8, do_sample=False)
    edited(plain, "generation_config.json", **settings)
    edited(plain, "config.json", **settings)
    load_with_small_chunks(session, plain)
    reply = session.generate(PROMPTS["in chunks"], max_new_tokens=8, repetition_penalty=1)
    assert reply.text == expected


@pytest.mark.parametrize("kind", ["openai-gpt", "minimax"])
def test_model_with_its_own_cache_type_reads_a_long_prompt(
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
    load_with_small_chunks(session, folder)
    reply = session.generate(PROMPTS["in chunks"], max_new_tokens=4, repetition_penalty=1)
    expected = PlainGenerate(folder).answer(PROMPTS["in chunks"], max_new_tokens=4, do_sample=False)
    assert reply.text == expected


def test_attention_implementations_give_the_same_answer(session: Session, tmp_path: Path) -> None:
    folder = tiny(tmp_path / "m", "gemma3_text", chat_template=None)
    texts = set()
    for attn in ("eager", "sdpa"):
        session.load(str(folder), dtype="float32", attn=attn)
        texts.add(session.generate(PROMPTS["past the window"]).text)
    assert len(texts) == 1


@pytest.fixture(scope="module")
def random_model(session: Session, tmp_path_factory: pytest.TempPathFactory) -> Session:
    """A random model, which samples tokens of every kind."""
    session.load(str(tiny_llama(tmp_path_factory.mktemp("random_model") / "noise")), name="noise")
    return session


def chunks(session: Session, prompt: str, **options: Any) -> list[Chunk]:
    with listening() as noise:
        made = list(session.stream(prompt, **options))
    assert noise == []
    return made


@pytest.mark.parametrize("seed", range(8))
def test_special_tokens_are_never_in_the_text(random_model: Session, seed: int) -> None:
    made = chunks(
        random_model, "Hi", temperature=2, top_k=None, top_p=1, seed=seed, max_new_tokens=60
    )
    text = "".join(chunk.text for chunk in made)
    assert not [token for token in SPECIAL_TOKENS if token in text]


def test_every_token_is_one_chunk_and_is_counted(random_model: Session) -> None:
    made = chunks(random_model, "Hi", max_new_tokens=9, extra={"min_new_tokens": 9})
    assert [chunk.tokens for chunk in made] == [*[1] * 9, 0]
    assert [chunk.finish_reason for chunk in made[:-1]] == [None] * 9
    last = made[-1]
    assert last.finish_reason == "length"
    assert last.usage is not None
    assert (last.usage.completion_tokens, last.usage.cached_tokens) == (9, 0)
    times = [chunk.time for chunk in made if chunk.tokens]
    assert times == sorted(times)
