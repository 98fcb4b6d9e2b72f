"""The time to the first token in a long conversation, and the speedup of drafts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from tests.benchmarks.notebook import bare_kernel, loaded_kernel
from tests.benchmarks.report import Row, Target, ratio
from tests.benchmarks.rounds import Rounds
from tests.kernels import Kernel

_OURS, _WHOLE = "the tenth turn", "the same without the prefix cache"


def measure_turns(rounds: Rounds) -> Iterator[Row]:
    """Answer the tenth turn of a conversation of 2,000 tokens, with and without the prefix cache."""
    with loaded_kernel() as kernel:
        _value(kernel, "talk.tenth_turn()")
        taken = rounds.run(lambda: _turns(kernel))
    yield Row(f"first token of {_OURS}", "s", taken["ours"])
    yield Row(f"first token of {_WHOLE}", "s", taken["whole"])
    yield Row("tokens of the prompt", "", taken["tokens"])
    yield Row("of these in the prefix cache", "share", taken["share"], Target(">=", 0.9))
    yield ratio(f"{_OURS} / {_WHOLE}", taken["ours"], taken["whole"], Target("<=", 0.15))


def _turns(kernel: Kernel) -> dict[str, float]:
    figures = _value(kernel, "talk.tenth_turn()")
    return {**figures, "share": figures["reused"] / figures["tokens"]}


def measure_prompt(rounds: Rounds) -> Iterator[Row]:
    """Read a new prompt of about 500 tokens, and the same one with ``generate``."""
    numbers = itertools.count()

    def once() -> dict[str, float]:
        number = next(numbers)
        ours = _value(kernel, f"talk.read({number})")
        call = f"inside.read(model, tokenizer, talk.long_prompt({number}))"
        return {**ours, "bare": float(_value(bare, f"{{'s': {call}}}")["s"])}

    with loaded_kernel() as kernel, bare_kernel() as bare:
        once()
        taken = rounds.run(once)
    yield Row("tokens of the prompt", "", taken["tokens"])
    yield Row("%%llm, until the first token", "s", taken["ours"])
    yield Row("generate, until the first token", "s", taken["bare"])
    yield ratio("%%llm / generate", taken["ours"], taken["bare"], Target("<=", 1.0))


def measure_speculative(rounds: Rounds) -> Iterator[Row]:
    """Answer a prompt whose answer repeats it and one without repetition, with and without drafts."""
    with loaded_kernel() as kernel:
        _value(kernel, "talk.speculative_rates()")
        taken = rounds.run(lambda: _value(kernel, "talk.speculative_rates()"))
    for name, target in (("repeating", 1.25), ("open", 0.97)):
        with_draft, without = taken[f"{name} with"], taken[f"{name} without"]
        yield Row(f"{name} text, with drafts", "tok/s", with_draft)
        yield Row(f"{name} text, without", "tok/s", without)
        yield ratio(f"{name} text: with / without", with_draft, without, Target(">=", target))


def _value(kernel: Kernel, call: str) -> dict[str, float]:
    kernel.ok(f"from tests.benchmarks import talk\nfigures = {call}", timeout=300)
    figures: dict[str, float] = kernel.value("figures")
    return figures
