"""Each option of generation has its effect on a real model.

The model is loaded as float32 too: in bfloat16 two tokens are often exactly as likely.
"""

from __future__ import annotations

import pytest

from tests.kernels import Kernel

PROMPT = "Write one sentence about a lighthouse."


@pytest.fixture(scope="module", autouse=True)
def _exact(loaded: Kernel) -> None:
    loaded.ok("%llm_load --keep --name exact --dtype float32")


def ask(k: Kernel, options: str, prompt: str = PROMPT) -> str:
    k.ok(f"%%llm -m exact {options} --max-new-tokens 8 -o reply\n{prompt}")
    text: str = k.value("reply.text")
    assert text
    return text


@pytest.fixture(scope="module")
def greedy(loaded: Kernel) -> str:
    return ask(loaded, "-t 0")


def test_the_same_seed_gives_the_same_text(loaded: Kernel) -> None:
    first = ask(loaded, "-t 1.5 --seed 1")
    assert ask(loaded, "-t 1.5 --seed 1") == first
    assert len({first, *(ask(loaded, f"-t 1.5 --seed {seed}") for seed in (2, 3))}) == 3
    loaded.ok("%llm_config seed=1 temperature=1.5")
    assert ask(loaded, "") == first
    loaded.ok("%llm_config --reset")


def test_a_seed_leaves_the_random_numbers_of_the_notebook_alone(loaded: Kernel) -> None:
    loaded.ok("import torch; torch.manual_seed(7); expected = torch.rand(1); torch.manual_seed(7)")
    ask(loaded, "-t 1 --seed 1")
    assert loaded.value("bool(torch.rand(1) == expected)")


@pytest.mark.parametrize(
    "options",
    ["--temperature 0", "-t 2 --top-k 1", "-t 2 --top-p 0.000001", "-t 2 -p min_p=1.0"],
)
def test_what_leaves_only_the_likeliest_token_is_greedy(
    loaded: Kernel, greedy: str, options: str
) -> None:
    assert ask(loaded, options) == greedy


def test_temperature_and_repetition_penalty_change_the_text(loaded: Kernel, greedy: str) -> None:
    again = "Repeat the word one many times: one one one one"
    assert ask(loaded, "-t 0 --repetition-penalty 1", again) != ask(
        loaded, "-t 0 --repetition-penalty 2", again
    )
    assert {ask(loaded, f"-t 2 --top-p 1 --seed {seed}") for seed in (1, 2)} != {greedy}


def test_stop_ends_before_the_text(loaded: Kernel, greedy: str) -> None:
    expected = greedy.split()
    text = ask(loaded, f"-t 0 --stop {expected[3]} --stop nonsense")
    assert greedy.startswith(text)
    assert text.split() == expected[:3]
    assert loaded.value("reply.finish_reason") == "stop"


def test_an_option_is_for_this_call_only(loaded: Kernel, greedy: str) -> None:
    ask(loaded, "-t 2 --seed 5 -p min_p=0.1")
    settings = "(llm.generation.temperature, llm.generation.seed, dict(llm.generation.extra))"
    assert loaded.value(settings) == (0.7, None, {})
    assert ask(loaded, "-t 0") == greedy


def test_none_leaves_a_setting_to_the_model(loaded: Kernel) -> None:
    loaded.ok("%llm_config temperature=none top_p=none top_k=none repetition_penalty=none")
    assert "temperature" not in loaded.ok("%llm --dry-run x").text.splitlines()[-1]
    ask(loaded, "--seed 1")
    loaded.ok("%llm_config --reset")


def test_the_templates_system_prompt_is_replaced(loaded: Kernel) -> None:
    assert "You are a lighthouse." in loaded.ok("%llm --dry-run -s 'You are a lighthouse.' x").text
    assert ask(loaded, "-t 0 -s 'Answer in capital letters.'") != ask(loaded, "-t 0")
    counted = loaded.value("reply.usage.prompt_tokens")
    shown = loaded.ok(f"%%llm --dry-run\n{PROMPT}").text
    assert f"{counted} tokens · " in shown
