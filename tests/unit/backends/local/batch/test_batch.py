"""Many prompts at once: each gets the answer that it gets alone, or an error of its own."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_magic.backends.local.batch import scheduler, shared_prefix
from llm_magic.config.settings import GenerationConfig
from llm_magic.errors import GenerationFailed, OutOfMemory, PromptTooLong
from llm_magic.types import Chunk, Message
from tests.kernels import within_a_second
from tests.local_models import edited, parrot
from tests.many import PROMPTS, SIZE, TEXT, BatchModel, conversations
from tests.tiny_models import CHATML, Architecture, tiny, tiny_llama

ARCHITECTURES: list[Architecture] = [
    "llama", "qwen3", "gemma2", "gemma3_text", "mistral", "gpt2", "mamba", "phi3",
]  # fmt: skip
GREEDY = GenerationConfig(max_new_tokens=10, temperature=0)
SAMPLED = GenerationConfig(max_new_tokens=10, temperature=1.3, top_k=None, top_p=0.95, seed=7)
FULL_SIZE = scheduler.MAX_SEQUENCES["cpu"]
# More than share a step, of all lengths.
MANY = conversations(PROMPTS[::3])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_prompt_gets_the_answer_that_it_gets_alone(
    load: Callable[[Path], BatchModel], tmp_path: Path, architecture: Architecture
) -> None:
    model = load(tiny(tmp_path / "m", architecture))
    texts = set()
    for longer in (GREEDY, SAMPLED):
        config = longer.model_copy(update={"max_new_tokens": 6})
        alone = model.alone(MANY, config)
        assert model.together(MANY, config) == alone
        texts |= {text for text, _reason, _usage in alone}
    # The answers differ; those of a random Mamba hardly depend on the prompt.
    assert len(texts) > (5 if architecture != "mamba" else 1)


def test_waiting_sequences_replace_finished_ones(
    load: Callable[[Path], BatchModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(scheduler.MAX_SEQUENCES, "cpu", FULL_SIZE)
    # The context ends some answers before their limit, those to long prompts first.
    model = load(tiny_llama(tmp_path / "m", max_position_embeddings=150))
    many = conversations([TEXT[: 1 + number] * 3 for number in range(FULL_SIZE + 12)])
    config = GenerationConfig(max_new_tokens=70, temperature=0, repetition_penalty=None)
    with model.passes() as passes:
        answers = model.together(many, config)
    assert answers[::4] == model.alone(many[::4], config)
    running = [sequences for sequences, columns in passes.shapes if columns == 1]
    assert max(running) == FULL_SIZE
    assert running[-1] < FULL_SIZE / 2
    assert any(after > before for before, after in itertools.pairwise(running))


def test_shared_prefix_is_read_once(load: Callable[[Path], BatchModel], tmp_path: Path) -> None:
    model = load(tiny_llama(tmp_path / "m", max_position_embeddings=2048))
    system = Message("system", "Answer as the other man would. " * 8)
    many = [[system, Message("user", f"{number}, {TEXT[:number]}")] for number in range(12)]
    with model.passes() as passes:
        answers = model.together(many, GREEDY)
    assert answers == model.alone(many, GREEDY)
    assert passes.shapes[0][0] == 1
    assert passes.shapes[0][1] > 200
    assert passes.tokens < 200 + 12 * 100
    assert model.together(many, SAMPLED) == model.alone(many, SAMPLED)


@pytest.mark.parametrize("window", [16, 400])
def test_prefix_is_shared_only_within_the_window(
    load: Callable[[Path], BatchModel], tmp_path: Path, window: int
) -> None:
    folder = tiny(tmp_path / "m", "gemma3_text")
    model = load(edited(folder, "config.json", sliding_window=window))
    many = conversations([TEXT * 2 + prompt for prompt in PROMPTS[::3]])
    with model.passes() as passes:
        answers = model.together(many, GREEDY)
    assert answers == model.alone(many, GREEDY)
    assert (passes.shapes[0][0] == 1) is (window == 400)


def test_prompts_of_equal_length_have_no_attention_mask(llama: BatchModel) -> None:
    masks: list[Any] = []
    handle = llama.model.register_forward_pre_hook(
        lambda _m, _a, named: masks.append(named.get("attention_mask")), with_kwargs=True
    )
    many = conversations([f"{number:02d}, and?" for number in range(6)])
    answers = llama.together(many, GREEDY)
    handle.remove()
    assert answers == llama.alone(many, GREEDY)
    assert masks[0] is None


def test_characters_and_stop_strings_are_split_in_no_sequence(
    load: Callable[[Path], BatchModel], tmp_path: Path
) -> None:
    model = load(parrot(tmp_path / "m", "né漢😀 uv-w|xyz"))
    config = GREEDY.model_copy(update={"max_new_tokens": 40})
    whole = model.together(MANY, config)
    assert {text for text, *_ in whole} == {"né漢😀 uv-w|xyz"}  # type: ignore[misc]
    config = config.model_copy(update={"stop": ("w|", "yz")})
    answers = model.together(MANY, config)
    assert answers == model.alone(MANY, config)
    assert {(text, reason) for text, reason, _ in answers} == {("né漢😀 uv-", "stop")}  # type: ignore[misc]


def test_each_answer_ends_at_its_own_context_limit(
    load: Callable[[Path], BatchModel], tmp_path: Path
) -> None:
    model = load(tiny_llama(tmp_path / "m", max_position_embeddings=128))
    config = GenerationConfig(max_new_tokens=60, temperature=0, repetition_penalty=None)
    many = conversations(["x" * length for length in (95, 20, 70, 90, 3, 3, 60)])
    answers = model.together(many, config)
    assert answers == model.alone(many, config)
    assert len({usage.completion_tokens for _text, _reason, usage in answers}) > 2  # type: ignore[misc]


def test_too_long_prompt_fails_alone(llama: BatchModel) -> None:
    many = conversations([*PROMPTS[:3], "y" * 600, *PROMPTS[3:6]])
    answers = llama.together(many, GREEDY)
    error = answers[3]
    assert isinstance(error, PromptTooLong)
    assert str(error).startswith("The prompt has ")
    assert error.__context__ is None
    others = llama.alone([*many[:3], *many[4:]], GREEDY)
    assert [*answers[:3], *answers[4:]] == others


def test_error_of_the_template_fails_one_prompt(
    load: Callable[[Path], BatchModel], tmp_path: Path
) -> None:
    template = (
        "{% if 'no' in messages[0]['content'] %}{{ raise_exception('Not that.') }}{% endif %}"
    )
    model = load(tiny_llama(tmp_path / "m", chat_template=template + CHATML))
    first, error, last = model.together(conversations(["yes", "no", "well"]), GREEDY)
    assert isinstance(error, GenerationFailed)
    assert "Not that." in str(error)
    assert [first, last] == model.alone(conversations(["yes", "well"]), GREEDY)


def test_no_prompt_one_prompt_and_only_errors(llama: BatchModel) -> None:
    assert llama.items([], GREEDY) == []
    one = conversations(["one"])
    assert llama.together(one, GREEDY) == llama.alone(one, GREEDY)
    errors = llama.together(conversations(["y" * 600] * 2), GREEDY)
    assert {type(error) for error in errors} == {PromptTooLong}


@pytest.mark.parametrize(
    ("extra", "together"),
    [
        ({"bad_words_ids": [[token] for token in range(100)]}, False),
        ({"no_repeat_ngram_size": 1}, False),
        ({"suppress_tokens": list(range(100))}, True),
    ],
)
def test_option_that_cannot_be_batched_is_answered_one_by_one(
    llama: BatchModel, extra: dict[str, object], together: bool
) -> None:
    config = GREEDY.model_copy(update={"extra": extra})
    many = conversations(PROMPTS[:6])
    with llama.passes() as passes:
        answers = llama.together(many, config)
    assert answers == llama.alone(many, config)
    assert answers != llama.alone(many, GREEDY)
    assert (max(sequences for sequences, _columns in passes.shapes) == 6) is together


def test_time_limit_starts_with_each_answer(llama: BatchModel) -> None:
    config = GenerationConfig(max_new_tokens=400, temperature=0, extra={"max_time": 1.0})
    with llama.passes(lambda _ids: time.sleep(0.05)):
        answers = llama.together(MANY, config)
        alone = llama.answer(MANY[0], config)
    counts = [usage.completion_tokens or 0 for _text, _reason, usage in answers]  # type: ignore[misc]
    # Those that waited have as long as the first ones.
    assert len(counts) == len(MANY)
    assert all(1 < count < 40 for count in counts)
    assert {answer[1] for answer in answers} <= {"truncated", "stop"}  # type: ignore[index]
    assert alone[1] == "truncated"


def out_of_memory(when: Callable[[Any], bool]) -> Callable[[Any], None]:
    """Return a hook that raises the error of torch in the forward passes that `when` selects."""

    def before(ids: Any) -> None:
        if when(ids):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    return before


@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_fewer_sequences_run_after_memory_ran_out(llama: BatchModel, stage: str) -> None:
    def fails(ids: Any) -> bool:
        return len(ids) > 2 and (ids.shape[1] == 1) is (stage == "decode")

    with llama.passes(out_of_memory(fails)) as passes:
        answers = llama.together(MANY, SAMPLED)
    assert answers == llama.alone(MANY, SAMPLED)
    sizes = [size for size, columns in passes.shapes if (columns == 1) is (stage == "decode")]
    assert max(sizes) > 2
    assert sizes[-1] <= 2


def test_limit_rises_again_once_memory_is_free(
    llama: BatchModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A pass with one column is a step: of equal prompts that share a prefix, such a pass reads the rest.
    monkeypatch.setattr(shared_prefix, "MIN_SHARED_TOKENS", 1000)
    steps = itertools.count()

    def fifth_step(ids: Any) -> bool:
        return ids.shape[1] == 1 and next(steps) == 4

    many = conversations([TEXT[: 3 + number % 5] for number in range(6 * SIZE)])
    with llama.passes(out_of_memory(fifth_step)) as passes:
        answers = llama.together(many, GREEDY)
    assert answers == llama.alone(many, GREEDY)
    sizes = [sequences for sequences, columns in passes.shapes if columns == 1]
    assert sizes[4] == SIZE
    assert max(sizes[5:9]) == SIZE // 2
    assert SIZE in sizes[9:]


def test_memory_that_runs_out_in_the_answers_repeats_nothing(llama: BatchModel) -> None:
    steps = itertools.count()

    def seventh_step(ids: Any) -> bool:
        return ids.shape[1] == 1 and next(steps) == 6

    with llama.passes(out_of_memory(seventh_step)):
        answers = llama.together(MANY, SAMPLED)
    assert answers == llama.alone(MANY, SAMPLED)


def test_prompt_that_does_not_fit_even_alone_fails_alone(llama: BatchModel) -> None:
    prompts = [*PROMPTS[:5], "§" + TEXT, *PROMPTS[5:9]]
    sign = llama.tokenizer("§").input_ids[0]
    with llama.passes(out_of_memory(lambda ids: bool((ids == sign).any()))):
        answers = llama.together(conversations(prompts), GREEDY)
    assert isinstance(answers.pop(5), OutOfMemory)
    assert answers == llama.alone(conversations(prompts[:5] + prompts[6:]), GREEDY)


def test_probabilities_that_are_not_numbers_fail_one_prompt(llama: BatchModel) -> None:
    def spoil(_module: Any, _args: Any, output: Any) -> None:
        if len(output.logits) == 3 and output.logits.shape[1] == 1:
            output.logits[1] = float("nan")

    handle = llama.model.register_forward_hook(spoil)
    answers = llama.together(conversations(["a bc", "def", "gh"]), SAMPLED)
    handle.remove()
    assert isinstance(answers.pop(1), GenerationFailed)
    assert answers == llama.alone(conversations(["a bc", "gh"]), SAMPLED)


def test_error_of_the_model_ends_all_answers(llama: BatchModel) -> None:
    def before(ids: Any) -> None:
        if ids.shape[1] == 1:
            raise ZeroDivisionError("of the model")

    with llama.passes(before):
        errors = llama.together(MANY, GREEDY)
    assert {type(error) for error in errors} == {GenerationFailed}
    assert {"ZeroDivisionError: of the model" in str(error) for error in errors} == {True}
    assert llama.together(MANY[:2], GREEDY) == llama.alone(MANY[:2], GREEDY)


LONG = GenerationConfig(max_new_tokens=400, temperature=0)


def test_close_stops_at_the_next_step(llama: BatchModel) -> None:
    with llama.passes(lambda _ids: time.sleep(0.05)) as passes:
        took = llama.close_after(5 * SIZE, MANY, LONG)
        count = len(passes.shapes)
        time.sleep(0.3)
    assert len(passes.shapes) == count
    assert took < within_a_second()
    assert llama.together(MANY[:2], GREEDY) == llama.alone(MANY[:2], GREEDY)


def test_close_stops_within_long_prompts(
    load: Callable[[Path], BatchModel], tmp_path: Path
) -> None:
    model = load(tiny_llama(tmp_path / "m", max_position_embeddings=4096))
    many = conversations([f"{number} {TEXT * 40}" for number in range(6)])
    with model.passes(lambda ids: time.sleep(ids.numel() * 0.002)) as passes:
        took = model.close_after(2, many, LONG)
        assert took < within_a_second()
        assert passes.tokens < 6 * 900 / 2


def count_tensors(model: BatchModel) -> int:
    model.wait_until_idle()
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def test_no_tensor_is_left_after_answers_errors_and_close(llama: BatchModel) -> None:
    llama.items(MANY, SAMPLED)
    state = torch.get_rng_state()
    before = count_tensors(llama)
    llama.items(MANY, SAMPLED)
    llama.close_after(3 * SIZE, MANY, LONG)
    with llama.passes(out_of_memory(lambda ids: ids.shape[1] == 1)):
        errors = llama.together(MANY[:4], SAMPLED)
    assert {type(error) for error in errors} == {OutOfMemory}
    assert count_tensors(llama) <= before
    assert torch.equal(torch.get_rng_state(), state)


def test_caches_of_a_batch_are_freed_without_garbage_collection(llama: BatchModel) -> None:
    llama.items(MANY, GREEDY)
    before = count_tensors(llama)
    gc.disable()
    try:
        llama.items(MANY, GREEDY)
        llama.wait_until_idle()
        left = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
    finally:
        gc.enable()
    assert left <= before


def test_chunks_of_an_answer_are_in_order_and_have_their_time(llama: BatchModel) -> None:
    last: dict[int, float] = {}
    for index, item in llama.items(MANY, GREEDY):
        assert isinstance(item, Chunk)
        assert item.time >= last.get(index, 0.0)
        last[index] = item.time
    assert len(last) == len(MANY)
