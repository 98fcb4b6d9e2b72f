"""Many prompts to one loaded model, compared with one after another and with a pipeline.

Tokens per second over 64 prompts: of equal length with 48 tokens each; and mixed, with a prefix of 200
tokens that all share, questions of different lengths, and short and long answers. One after another
is measured with some of the prompts, because each takes as long, and the pipeline with two of its
eight batches. The pipeline runs in another process, as without this package. Packed weights are compared
with the usual layers of torch in two kernels that answer nothing else, so that they stay packed.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from tests.benchmarks.notebook import bare_kernel, loaded_kernel
from tests.benchmarks.report import Row, Target, ratio
from tests.benchmarks.rounds import Rounds
from tests.kernels import Kernel

_TOKENS = {"equal": 48, "mixed": 96}
_ALONE, _PIPELINE = 6, 16
_PACKED = Target(">=", 1.2)
# The weights are packed after up to 64 products of several rows.
_UNTIL_PACKED = 80
_TARGETS = {
    "equal": (Target(">=", 6.0), Target(">=", 1.3)),
    "mixed": (Target(">=", 5.0), Target(">=", 3.0)),
}


def measure(rounds: Rounds) -> Iterator[Row]:
    """Run all variants in turn, in two kernels that stay open."""
    with loaded_kernel() as ours, bare_kernel() as bare:
        for kernel in (ours, bare):
            kernel.ok("from tests.benchmarks import batch_prompts")
        for variant, tokens in _TOKENS.items():
            prompts = f"batch_prompts.{variant}_prompts()"
            calls = {
                "stream, together": (ours, f"together({prompts}, {{}})"),
                "stream, one by one": (ours, f"one_by_one({prompts}[:{_ALONE}], {{}})"),
                "pipeline(batch_size=8)": (
                    bare,
                    f"by_pipeline(model, tokenizer, {prompts}[:{_PIPELINE}], {{}})",
                ),
            }
            yield from _compared(variant, calls, tokens, rounds)
    yield from _packed(rounds)


def _packed(rounds: Rounds) -> Iterator[Row]:
    """Compare packed weights with those of the usual layers of torch."""
    call = "together(batch_prompts.equal_prompts(), {})"
    with loaded_kernel() as packed, loaded_kernel() as usual:
        for kernel in (packed, usual):
            kernel.ok("from tests.benchmarks import batch_prompts")
        usual.ok("batch_prompts.restore_weights()")
        kernels = {"packed weights": packed, "usual weights": usual}
        for kernel in kernels.values():
            _rate(kernel, call.format(_UNTIL_PACKED))
        rates = rounds.in_turn(
            {
                name: partial(_rate, kernel, call.format(_TOKENS["equal"]))
                for name, kernel in kernels.items()
            }
        )
    for name, values in rates.items():
        yield Row(f"equal: {name}", "tok/s", values)
    packed_rates, usual_rates = rates.values()
    yield ratio("equal: packed / usual weights", packed_rates, usual_rates, _PACKED)


def _compared(
    variant: str, calls: dict[str, tuple[Kernel, str]], tokens: int, rounds: Rounds
) -> Iterator[Row]:
    for kernel, call in calls.values():
        _rate(kernel, call.format(2))
    rates = rounds.run(
        lambda: {name: _rate(kernel, call.format(tokens)) for name, (kernel, call) in calls.items()}
    )
    for name in calls:
        yield Row(f"{variant}: {name}", "tok/s", rates[name])
    many, alone, pipeline = (rates[name] for name in calls)
    yield ratio(f"{variant}: / one by one", many, alone, _TARGETS[variant][0])
    yield ratio(f"{variant}: / pipeline", many, pipeline, _TARGETS[variant][1])


def _rate(kernel: Kernel, call: str) -> float:
    kernel.ok(f"count, taken = batch_prompts.{call}", timeout=300)
    count, taken = kernel.value("(count, taken)")
    return float(count / taken)
