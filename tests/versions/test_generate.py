"""Local answers are those of `generate`, token for token, on every supported Transformers version.

    pytest tests/versions

runs with pytest and the extra `local` only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import GenerationMixin

from llm_magic.backends.local import loader
from llm_magic.backends.local.generation.cuda_graph import StaticDecoder
from llm_magic.backends.local.generation.model_runner import PrefillChunkSize
from llm_magic.config.settings import GenerationConfig
from llm_magic.errors import OptionError
from llm_magic.session import Session
from tests.local_models import local_model, parrot
from tests.many import PROMPTS, BatchModel, conversations
from tests.plain_generate import PlainGenerate
from tests.tiny_models import Architecture, tiny, tiny_llama

ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)
OWN_STATE: tuple[Architecture, ...] = ("rwkv", "xlnet")
PROMPT = "the other man in a hat on the table sat there"
LONG_PROMPT = PROMPT * 5
GREEDY: dict[str, Any] = {"do_sample": False}
SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 1.3, "top_k": 50, "top_p": 0.9}
MODES = pytest.mark.parametrize("mode", [GREEDY, SAMPLED], ids=["greedy", "seeded"])
LENGTHS = pytest.mark.parametrize("length", [1, 2, 6, "end"])
SEED = 5
CHUNK = 64


class Pair:
    """A tiny model that `session` has loaded, and the same one in plain Transformers."""

    def __init__(self, session: Session, folder: Path) -> None:
        self.session, self.plain = session, PlainGenerate(folder)
        # Only tokens of visible ASCII: no two of them have the same text.
        texts = map(self.plain.tokenizer.decode, range(len(self.plain.tokenizer)))
        hidden = [token for token, text in enumerate(texts) if not (text.isascii() and text)]
        self._special = self.plain.tokenizer.all_special_ids
        self._extra: dict[str, Any] = {"suppress_tokens": sorted({*hidden, *self._special})}
        self.info = session.load(str(folder), name="m", dtype="float32", device="cpu")

    def check(self, prompt: str, mode: dict[str, Any], length: int | str) -> None:
        """Compare an answer of `length` tokens, or one up to the end token."""
        extra, limit = dict(self._extra), 12
        if isinstance(length, int):
            limit = length
        else:
            self.plain.answer(prompt, SEED, max_new_tokens=limit, **mode, **extra)
            # The answer ends where its ninth token comes for the first time.
            extra["eos_token_id"] = self.plain.new[8]
        expected = self.plain.answer(prompt, SEED, max_new_tokens=limit, **mode, **extra)
        options = {name: value for name, value in mode.items() if name != "do_sample"}
        options.setdefault("temperature", 0)
        chunks = list(
            self.session.stream(prompt, seed=SEED, max_new_tokens=limit, extra=extra, **options)
        )
        assert "".join(chunk.text for chunk in chunks) == expected
        assert sum(chunk.tokens for chunk in chunks) == len(self.plain.new)
        usage = chunks[-1].usage
        assert usage is not None
        assert usage.prompt_tokens == self.plain.prompt_tokens
        assert usage.completion_tokens == len(self.plain.new)
        assert chunks[-1].finish_reason == ("length" if isinstance(length, int) else "stop")
        if isinstance(length, int):
            assert len(self.plain.new) == length

    @property
    def decoding(self) -> str:
        """How the model decodes, as ``%llm_status`` shows it."""
        return self.session.status().backend_details["decoding"]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def pair(
    request: pytest.FixtureRequest, session: Session, tmp_path_factory: pytest.TempPathFactory
) -> Pair:
    folder = tmp_path_factory.mktemp("models") / request.param
    with pytest.MonkeyPatch.context() as patch:
        # A large model reads its prompts in chunks, too.
        patch.setattr(PrefillChunkSize, "for_model", lambda *_model: PrefillChunkSize(CHUNK))
        return Pair(session, tiny(folder, request.param, chat_template=None))


@MODES
@LENGTHS
def test_answer_is_that_of_generate(pair: Pair, mode: dict[str, Any], length: int | str) -> None:
    pair.check(PROMPT, mode, length)


def test_context_length_is_that_of_the_config_or_unknown(pair: Pair) -> None:
    stated = getattr(pair.plain.model.config, "max_position_embeddings", -1)
    assert pair.info.context_length == (None if stated == -1 else stated)
    assert stated in {-1, 512}


@MODES
def test_answer_to_long_prompt_is_that_of_generate(pair: Pair, mode: dict[str, Any]) -> None:
    pair.check(LONG_PROMPT, mode, 6)
    # Longer than the window of Gemma 2 and the LongRoPE threshold of Phi-3, in several chunks.
    assert pair.plain.prompt_tokens > 2 * CHUNK


def test_fast_path_is_off_only_where_status_has_the_reason(
    session: Session, tmp_path: Path
) -> None:
    shown: tuple[Architecture, ...] = ("llama", "gemma2", "gpt2", *OWN_STATE)
    for architecture in shown:
        session.load(str(tiny(tmp_path / architecture, architecture)), name="m")
        decoding = session.status().backend_details["decoding"]
        assert ("fast path off" in decoding) == (architecture in OWN_STATE)
        assert ("keeps a custom state" in decoding) == (architecture in OWN_STATE)


@pytest.fixture
def renamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Change Transformers as a new version may: an argument that the fast path needs is gone."""
    prepare: Any = GenerationMixin.prepare_inputs_for_generation

    def prepared(*args: Any, **kwargs: Any) -> Any:
        return prepare(*args, **kwargs)

    monkeypatch.setattr(GenerationMixin, "prepare_inputs_for_generation", prepared)


@pytest.fixture
def fallback(renamed: None, session: Session, tmp_path: Path) -> Pair:
    return Pair(session, tiny_llama(tmp_path / "llama", chat_template=None))


@MODES
@LENGTHS
def test_answer_without_fast_path_is_that_of_generate(
    fallback: Pair, mode: dict[str, Any], length: int | str
) -> None:
    fallback.check(PROMPT, mode, length)
    assert "fast path off" in fallback.decoding
    assert "has no next_sequence_length of prepare_inputs_for_generation" in fallback.decoding


@contextlib.contextmanager
def forward_passes() -> Iterator[list[str]]:
    """Collect the class names of the models that run, one for each forward pass."""
    passes: list[str] = []

    def before(module: nn.Module, _args: Any) -> None:
        if isinstance(module, GenerationMixin):
            passes.append(type(module).__name__)

    handle = register_module_forward_pre_hook(before)
    try:
        yield passes
    finally:
        handle.remove()


@pytest.mark.parametrize("option", ["assistant", "compile"])
def test_option_of_fast_path_is_refused_without_it(
    session: Session, tmp_path: Path, option: str
) -> None:
    model, helper = tiny(tmp_path / "rwkv", "rwkv"), tiny_llama(tmp_path / "helper")
    session.load(str(helper))
    options: Any = {"assistant": str(helper)} if option == "assistant" else {"compile": True}
    with pytest.raises(OptionError, match=f"--{option} needs the fast path.*keeps a custom state"):
        session.load(str(model), **options)


@pytest.fixture(params=["fast", "fallback"])
def repeater(request: pytest.FixtureRequest, session: Session, tmp_path: Path) -> Session:
    """A model that answers the same eight letters over and over, on both paths."""
    if request.param == "fallback":
        request.getfixturevalue("renamed")
    session.load(str(parrot(tmp_path / "parrot", "abcdefgh", ends=False)), name="m")
    decoding = session.status().backend_details["decoding"]
    assert ("fast path off" in decoding) == (request.param == "fallback")
    return session


def test_answer_ends_at_length_limit(repeater: Session) -> None:
    reply = repeater.generate("?", max_new_tokens=11)
    assert reply.text == "abcdefghabc"
    assert reply.finish_reason == "length"
    assert reply.usage.completion_tokens == 11


def test_answer_ends_before_stop_text(repeater: Session) -> None:
    reply = repeater.generate("?", max_new_tokens=20, stop="ef")
    assert (reply.text, reply.finish_reason) == ("abcd", "stop")


def test_closed_stream_stops_the_model(repeater: Session) -> None:
    text = ""
    with forward_passes() as passes:
        stream: Any = repeater.stream("?", max_new_tokens=400)
        for chunk in stream:
            text += chunk.text
            if len(text) >= 5:
                break
        stream.close()
        # The next answer starts when the first one has ended.
        assert repeater.generate("?", max_new_tokens=2).text == "ab"
    assert text.startswith("abcde")
    assert len(passes) < 300


@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit"])
def test_draft_saves_forward_passes(session: Session, tmp_path: Path, quantization: str) -> None:
    folder = parrot(tmp_path / "parrot", "abcdefgh", ends=False)
    info = session.load(str(folder), name="m", device="cpu", quantization=quantization)
    assert info.quantization == quantization
    with forward_passes() as passes:
        reply = session.generate("?", max_new_tokens=80)
    assert reply.text == "abcdefgh" * 10
    assert len(passes) < 60


def test_seed_repeats_an_answer(session: Session, tmp_path: Path) -> None:
    session.load(str(tiny_llama(tmp_path / "llama")), name="m")
    texts = [
        session.generate(
            "Hi", temperature=2, top_k=None, top_p=1, seed=seed, max_new_tokens=24
        ).text
        for seed in (1, 2**32 - 1, 1)
    ]
    assert texts[0] == texts[2] != texts[1]


@MODES
def test_answer_of_static_steps_is_that_of_generate(
    monkeypatch: pytest.MonkeyPatch, session: Session, tmp_path: Path, mode: dict[str, Any]
) -> None:
    # As on a GPU, without graphs.
    monkeypatch.setattr(loader, "StaticDecoder", partial(StaticDecoder, forced=True))
    folder = tiny_llama(tmp_path / "llama", chat_template=None)
    plain = PlainGenerate(folder)
    session.load(str(folder), name="m", dtype="float32")
    options = {name: value for name, value in mode.items() if name != "do_sample"}
    reply = session.generate(PROMPT, max_new_tokens=20, seed=SEED, **options)
    assert reply.text == plain.answer(PROMPT, SEED, max_new_tokens=20, **mode)
    assert reply.usage.completion_tokens == len(plain.new)
    assert session.status().backend_details["decoding"] == "fixed shapes"


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_second_turn_reuses_the_prefix_cache(
    session: Session, tmp_path: Path, architecture: Architecture
) -> None:
    folder = tiny(tmp_path / "m", architecture, max_position_embeddings=1024)
    plain = PlainGenerate(folder)
    session.load(str(folder), name="m", dtype="float32")
    session.reset()
    first = session.generate(PROMPT, chat="c", max_new_tokens=8)
    second = session.generate("go on", chat="c", max_new_tokens=8)
    turns = (("user", PROMPT), ("assistant", first.text), ("user", "go on"))
    conversation = [{"role": role, "content": content} for role, content in turns]
    prompt = plain.tokenizer.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=False
    )
    assert second.text == plain.answer(prompt, max_new_tokens=8, do_sample=False)
    assert second.usage.prompt_tokens == plain.prompt_tokens
    assert first.usage.cached_tokens == 0
    assert second.usage.cached_tokens
    if architecture != "gemma2":  # a full window cannot be cropped to the common prefix
        assert second.usage.cached_tokens >= plain.prompt_tokens // 2


@MODES
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_batch_gives_the_answers_of_single_prompts(
    session: Session, tmp_path: Path, mode: dict[str, Any], architecture: Architecture
) -> None:
    batch = BatchModel(session, str(tiny(tmp_path / "m", architecture)))
    options = {name: value for name, value in mode.items() if name != "do_sample"}
    options.setdefault("temperature", 0)
    config = GenerationConfig(max_new_tokens=8, seed=SEED, **options)
    many = conversations(PROMPTS[:8])
    alone = batch.alone(many, config)
    with forward_passes() as passes:
        assert batch.together(many, config) == alone
    assert len(passes) < 30


def test_batch_without_fast_path_answers_one_by_one(
    renamed: None, session: Session, tmp_path: Path
) -> None:
    batch = BatchModel(session, str(tiny_llama(tmp_path / "llama")))
    config = GenerationConfig(max_new_tokens=4, temperature=0)
    many = conversations(PROMPTS[:3])
    assert batch.together(many, config) == batch.alone(many, config)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_form_of_an_answer_is_enforced(
    session: Session, tmp_path: Path, architecture: Architecture
) -> None:
    folder = tiny(tmp_path / "m", architecture, chat_template=None)
    session.load(str(folder), dtype="float32", device="cpu")
    digits, labels = "[0-9]{3,5}", ["hat", "the man"]
    if local_model(session).traits.fallback_reason is not None:
        # Of old versions, also models with states.
        assert architecture in (*OWN_STATE, "mamba", "jamba", "granitemoehybrid", "lfm2")
        with pytest.raises(OptionError, match="cannot be held to a structure: "):
            session.generate(PROMPT, regex=digits)
        with pytest.raises(OptionError, match="cannot be held to a structure: "):
            session.generate(PROMPT, choice=labels)
        return
    reply = session.generate(PROMPT, regex=digits)
    assert reply.isdigit()
    assert 3 <= len(reply) <= 5
    plain, sums = PlainGenerate(folder), []
    for label in labels:
        prompt, tokens = (plain.tokenizer(text).input_ids for text in (PROMPT, label))
        with torch.inference_mode():
            logits = plain.model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 :]
        logs = logits.double().log_softmax(-1)
        sums.append(logs[range(len(tokens)), tokens].sum())
    expected = dict(zip(labels, torch.stack(sums).softmax(-1).tolist(), strict=True))
    probabilities = session.generate(PROMPT, choice=labels).probabilities
    assert dict(probabilities) == pytest.approx(expected, abs=1e-5)
