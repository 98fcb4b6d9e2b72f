"""Many prompts at once: every one gets the answer that it gets alone, or an error of its own."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_magic.config.settings import GenerationConfig
from llm_magic.errors import GenerationFailed, OutOfMemory, PromptTooLong
from llm_magic.types import Chunk, Message
from tests.local_models import edited, listening, local_model, local_session, parrot
from tests.many import PROMPTS, TEXT, Asker, Conversations, asked
from tests.tiny_models import CHATML, Architecture, tiny, tiny_llama

ARCHITECTURES: list[Architecture] = [
    "llama", "qwen3", "gemma2", "gemma3_text", "mistral", "gpt2", "mamba", "phi3",
]  # fmt: skip
GREEDY = GenerationConfig(max_new_tokens=10, temperature=0)
SAMPLED = GenerationConfig(max_new_tokens=10, temperature=1.3, top_k=None, top_p=0.95, seed=7)


@pytest.fixture(scope="module")
def asker() -> Iterator[Asker]:
    with local_session() as session:
        yield Asker(session)


@pytest.fixture
def llama(asker: Asker, tmp_path: Path) -> Asker:
    return asker.load(tiny_llama(tmp_path / "llama"))


@pytest.fixture(autouse=True)
def no_noise(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Neither logged nor printed."""
    with listening() as noise:
        yield
    # Mamba's own advice, once a process: its Python code is slow without another package.
    assert [line for line in noise if "reference PyTorch implementation" not in line] == []
    lines = capfd.readouterr().err.splitlines()
    expected = ("Writing model shards", "reference PyTorch implementation")
    assert [x for x in lines if x and not any(words in x for words in expected)] == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_gets_the_answer_that_it_gets_alone(
    asker: Asker, tmp_path: Path, architecture: Architecture
) -> None:
    asker.load(tiny(tmp_path / "m", architecture))
    texts = set()
    for longer in (GREEDY, SAMPLED):
        config = longer.model_copy(update={"max_new_tokens": 6})
        alone = asker.alone(asked(PROMPTS), config)
        assert asker.together(asked(PROMPTS), config) == alone
        texts |= {text for text, _reason, _usage in alone}
    # Not one answer over and over; Mamba's noise hardly looks at the prompt.
    assert len(texts) > (5 if architecture != "mamba" else 1)


def test_rows_share_steps_go_when_they_are_over_and_others_take_their_place(
    asker: Asker, tmp_path: Path
) -> None:
    # The context ends some answers before their limit, those to long prompts first.
    asker.load(tiny_llama(tmp_path / "m", max_position_embeddings=150))
    prompts = [TEXT[: 1 + number] * 3 for number in range(44)]
    ends = GenerationConfig(max_new_tokens=70, temperature=0, repetition_penalty=None)
    with asker.watched() as passes:
        answers = asker.together(asked(prompts), ends)
    assert answers == asker.alone(asked(prompts), ends)
    rows = [rows for rows, columns in passes.shapes if columns == 1]
    assert max(rows) == 32
    assert rows[-1] < 16
    # After some had gone others came: never more than fit, and not one batch after the other.
    assert any(after > before for before, after in itertools.pairwise(rows))


def test_what_all_begin_with_is_read_once(asker: Asker, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "m", max_position_embeddings=2048)
    asker.load(folder)
    system = "Answer as the other man would. " * 8
    prompts = [
        [Message("system", system), Message("user", f"{number}, {TEXT[:number]}")]
        for number in range(12)
    ]
    with asker.watched() as passes:
        answers = asker.together(prompts, GREEDY)
    assert answers == asker.alone(prompts, GREEDY)
    assert passes.shapes[0][0] == 1
    assert passes.shapes[0][1] > 200
    assert passes.tokens < 200 + 12 * 100
    sampled = asker.together(prompts, SAMPLED)
    assert sampled == asker.alone(prompts, SAMPLED)


def test_a_shared_beginning_within_and_beyond_the_window(asker: Asker, tmp_path: Path) -> None:
    for window in (16, 400):
        folder = tiny(tmp_path / str(window), "gemma3_text")
        asker.load(edited(folder, "config.json", sliding_window=window))
        prompts = asked([TEXT * 2 + prompt for prompt in PROMPTS[::3]])
        with asker.watched() as passes:
            answers = asker.together(prompts, GREEDY)
        assert answers == asker.alone(prompts, GREEDY)
        assert (passes.shapes[0][0] == 1) is (window == 400)


def test_no_padding_where_all_are_as_long(llama: Asker) -> None:
    masks: list[Any] = []
    handle = llama.model.register_forward_pre_hook(
        lambda _m, _a, named: masks.append(named.get("attention_mask")), with_kwargs=True
    )
    prompts = asked([f"{number:02d}, and?" for number in range(20)])
    answers = llama.together(prompts, GREEDY)
    handle.remove()
    assert answers == llama.alone(prompts, GREEDY)
    assert masks[0] is None


def test_characters_of_many_tokens_and_stop_strings_are_cut_in_each_row(
    asker: Asker, tmp_path: Path
) -> None:
    asker.load(parrot(tmp_path / "m", "né漢😀 uv-w|xyz"))
    prompts = asked(PROMPTS[:10])
    whole = GREEDY.model_copy(update={"max_new_tokens": 40})
    assert {text for text, *_ in asker.together(prompts, whole)} == {"né漢😀 uv-w|xyz"}  # type: ignore[misc]
    cut = whole.model_copy(update={"stop": ("w|", "yz")})
    answers = asker.together(prompts, cut)
    assert answers == asker.alone(prompts, cut)
    assert {(text, reason) for text, reason, _ in answers} == {("né漢😀 uv-", "stop")}  # type: ignore[misc]


def test_the_room_of_each_row_is_its_own(asker: Asker, tmp_path: Path) -> None:
    asker.load(tiny_llama(tmp_path / "m", max_position_embeddings=128))
    config = GenerationConfig(max_new_tokens=60, temperature=0, repetition_penalty=None)
    prompts = asked(["x" * length for length in (95, 20, 70, 90, 3, 3, 60)])
    answers = asker.together(prompts, config)
    assert answers == asker.alone(prompts, config)
    assert len({usage.completion_tokens for _text, _reason, usage in answers}) > 2  # type: ignore[misc]


def test_one_that_is_too_long_loses_no_other_and_is_told_before_the_work(llama: Asker) -> None:
    prompts = asked([*PROMPTS[:3], "y" * 600, *PROMPTS[3:6]])
    items = llama.items(prompts, GREEDY)
    index, error = items[0]
    assert index == 3
    assert isinstance(error, PromptTooLong)
    assert str(error).startswith("The prompt has ")
    assert error.__traceback__ is None
    assert error.__context__ is None
    assert 3 not in {index for index, _item in items[1:]}
    others = [*prompts[:3], *prompts[4:]]
    answers = llama.together(prompts, GREEDY)
    assert [*answers[:3], *answers[4:]] == llama.alone(others, GREEDY)


def test_one_that_the_template_refuses_loses_no_other(asker: Asker, tmp_path: Path) -> None:
    refusing = (
        "{% if 'no' in messages[0]['content'] %}{{ raise_exception('Not that.') }}{% endif %}"
    )
    asker.load(tiny_llama(tmp_path / "m", chat_template=refusing + CHATML))
    first, refused, last = asker.together(asked(["yes", "no", "well"]), GREEDY)
    assert isinstance(refused, GenerationFailed)
    assert "Not that." in str(refused)
    assert [first, last] == asker.alone(asked(["yes", "well"]), GREEDY)


def test_none_one_and_only_errors(llama: Asker) -> None:
    assert llama.items([], GREEDY) == []
    assert llama.together(asked(["one"]), GREEDY) == llama.alone(asked(["one"]), GREEDY)
    errors = llama.together(asked(["y" * 600] * 2), GREEDY)
    assert {type(error) for error in errors} == {PromptTooLong}


@pytest.mark.parametrize(
    ("extra", "together"),
    [
        ({"bad_words_ids": [[token] for token in range(100)]}, False),
        ({"no_repeat_ngram_size": 1}, False),
        ({"suppress_tokens": list(range(100))}, True),
    ],
)
def test_every_option_is_honoured_where_rows_can_share_it_and_where_not(
    llama: Asker, extra: dict[str, object], together: bool
) -> None:
    config = GREEDY.model_copy(update={"extra": extra})
    with llama.watched() as passes:
        answers = llama.together(asked(PROMPTS[:6]), config)
    assert answers == llama.alone(asked(PROMPTS[:6]), config)
    assert answers != llama.alone(asked(PROMPTS[:6]), GREEDY)
    assert (max(rows for rows, _columns in passes.shapes) == 6) is together


def test_a_time_limit_is_that_of_each_answer(llama: Asker) -> None:
    config = GenerationConfig(max_new_tokens=400, temperature=0, extra={"max_time": 0.3})
    with llama.watched(lambda _ids: time.sleep(0.02)):
        answers = llama.together(asked(PROMPTS), config)
    counts = [usage.completion_tokens or 0 for _text, _reason, usage in answers]  # type: ignore[misc]
    # The last ones began when the first were over, and had as long as they.
    assert len(counts) == 36
    assert all(1 < count < 40 for count in counts)
    assert {answer[1] for answer in answers} <= {"truncated", "stop"}  # type: ignore[index]
    with llama.watched(lambda _ids: time.sleep(0.02)):
        alone = llama.alone(asked(PROMPTS[:1]), config)
    assert [answer[1] for answer in alone] == ["truncated"]


def exhausted(when: Callable[[Any], bool]) -> Callable[[Any], None]:
    """Let memory run out in some passes, as torch says it."""

    def before(ids: Any) -> None:
        if when(ids):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    return before


@pytest.mark.parametrize("columns", [1, 8])
def test_fewer_at_once_after_memory_ran_out(llama: Asker, columns: int) -> None:
    """In a step, and while prompts are read."""
    broken = exhausted(lambda ids: len(ids) > 5 and (ids.shape[1] == 1) is (columns == 1))
    with llama.watched(broken) as passes:
        answers = llama.together(asked(PROMPTS), SAMPLED)
    assert answers == llama.alone(asked(PROMPTS), SAMPLED)
    assert max(rows for rows, _columns in passes.shapes) == 32
    assert {rows for rows, _columns in passes.shapes[-10:]} <= {1, 2, 3, 4}


def test_memory_that_runs_out_in_the_middle_of_the_answers_repeats_nothing(llama: Asker) -> None:
    calls: list[int] = []

    def seventh_step(ids: Any) -> bool:
        calls.append(ids.shape[1])
        return ids.shape[1] == 1 and calls.count(1) == 7

    with llama.watched(exhausted(seventh_step)):
        answers = llama.together(asked(PROMPTS[:20]), SAMPLED)
    assert answers == llama.alone(asked(PROMPTS[:20]), SAMPLED)


def test_one_that_does_not_fit_even_alone_loses_no_other(llama: Asker) -> None:
    prompts = [*PROMPTS[:5], "§" + TEXT, *PROMPTS[5:9]]
    (sign,) = set(local_model(llama.session).tokenizer("§").input_ids[:1])
    with llama.watched(exhausted(lambda ids: bool((ids == sign).any()))):
        answers = llama.together(asked(prompts), GREEDY)
    assert isinstance(answers.pop(5), OutOfMemory)
    assert answers == llama.alone(asked(prompts[:5] + prompts[6:]), GREEDY)


def test_probabilities_that_are_no_numbers_are_an_error_of_their_row(llama: Asker) -> None:
    def spoil(_module: Any, _args: Any, output: Any) -> None:
        if len(output.logits) == 3 and output.logits.shape[1] == 1:
            output.logits[1] = float("nan")

    handle = llama.model.register_forward_hook(spoil)
    answers = llama.together(asked(["a bc", "def", "gh"]), SAMPLED)
    handle.remove()
    broken = answers.pop(1)
    assert isinstance(broken, GenerationFailed)
    assert answers == llama.alone(asked(["a bc", "gh"]), SAMPLED)


def test_a_model_that_breaks_ends_everything_in_one_line(llama: Asker) -> None:
    def before(ids: Any) -> None:
        if ids.shape[1] == 1:
            raise ZeroDivisionError("of the model")

    with llama.watched(before), pytest.raises(GenerationFailed, match="ZeroDivisionError: of the"):
        llama.items(asked(PROMPTS), GREEDY)
    assert llama.together(asked(["x", "y"]), GREEDY) == llama.alone(asked(["x", "y"]), GREEDY)


def stopped(asker: Asker, conversations: Conversations, after: int) -> float:
    """Close the stream after some items; returns how long that took."""

    async def ask() -> float:
        config = GenerationConfig(max_new_tokens=400, temperature=0)
        many = asker.backend.stream_many(asker.name, conversations, config)
        for _ in range(after):
            await anext(many)
        began = time.perf_counter()
        await many.aclose()
        return time.perf_counter() - began

    return asker.session._loop.run(ask())


def test_closing_it_stops_at_the_next_step(llama: Asker) -> None:
    with llama.watched(lambda _ids: time.sleep(0.05)) as passes:
        took = stopped(llama, asked(PROMPTS), 200)
        count = len(passes.shapes)
        time.sleep(0.3)
    assert len(passes.shapes) == count
    assert took < 1
    assert llama.together(asked(["x", "y"]), GREEDY) == llama.alone(asked(["x", "y"]), GREEDY)


def test_closing_it_stops_in_the_middle_of_long_prompts(asker: Asker, tmp_path: Path) -> None:
    asker.load(tiny_llama(tmp_path / "m", max_position_embeddings=4096))
    prompts = asked([f"{number} {TEXT * 40}" for number in range(6)])
    with asker.watched(lambda ids: time.sleep(ids.numel() * 0.0005)) as passes:
        took = stopped(asker, prompts, 2)
        assert took < 1
        assert passes.tokens < 6 * 900 / 2


def tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def test_nothing_is_left_afterwards(llama: Asker) -> None:
    llama.items(asked(PROMPTS), SAMPLED)
    state = torch.get_rng_state()
    before = tensors()
    llama.items(asked(PROMPTS), SAMPLED)
    stopped(llama, asked(PROMPTS), 60)
    with llama.watched(exhausted(lambda ids: ids.shape[1] == 1)):
        errors = llama.together(asked(PROMPTS[:4]), SAMPLED)
    assert {type(error) for error in errors} == {OutOfMemory}
    assert tensors() <= before
    assert torch.equal(torch.get_rng_state(), state)


def test_the_chunks_of_a_row_come_in_order_and_bear_their_time(llama: Asker) -> None:
    last: dict[int, float] = {}
    for index, item in llama.items(asked(PROMPTS), GREEDY):
        assert isinstance(item, Chunk)
        assert item.time >= last.get(index, 0.0)
        last[index] = item.time
    assert len(last) == 36
