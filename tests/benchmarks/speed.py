"""Tokens per second of a streamed ``%%llm`` beside those of ``model.generate``.

On a CPU it matters which threads have computed before: each thread that enters an OpenMP region
gets a team of its own, and once there are more such threads than cores, they no longer spin while
they wait, and every operation begins with a wake-up. So there are several fair questions:

- *the same thread*: ``generate`` on the thread that answers ``%%llm``, in the same kernel. The
  topology is equal; what is left is the price of streaming and showing.
- *the same process*: ``generate`` in a cell, on the main thread, of a kernel that also answers
  ``%%llm``. This is the target of the project. Both sides suffer from the second team.
- *a process of its own*: what a user has who never heard of this package. Nothing else computes.
- *as documented*: the way the documentation of Transformers streams, a new thread for each call.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack

from tests.benchmarks.notebook import ask, bare, bare_kernel, loaded_kernel
from tests.benchmarks.report import Row, Target, ratio
from tests.benchmarks.rounds import Rounds

_TOKENS, _WARM_UP_TOKENS = 128, 16
_TARGET = Target(">=", 0.97)

OURS = "%%llm"
SAME_THREAD = "generate, the same thread"
ALONE = "generate, a process of its own"
DOCUMENTED = "thread and TextIteratorStreamer, its own"
MIXED = "%%llm, where the next one also runs"
SAME_PROCESS = "generate, the same process, main thread"


def measure(rounds: Rounds) -> Iterator[Row]:
    """Run all of them in turn, in four kernels that stay open."""
    with ExitStack() as kernels:
        ours, mixed = (kernels.enter_context(loaded_kernel()) for _ in range(2))
        alone, documented = (kernels.enter_context(bare_kernel()) for _ in range(2))
        variants: dict[str, Callable[[int], float]] = {
            OURS: lambda n: ask(ours, n),
            SAME_THREAD: lambda n: bare(ours, f"generate_on_its_thread({n})", n),
            ALONE: lambda n: bare(alone, f"generate(model, tokenizer, {n})", n),
            DOCUMENTED: lambda n: bare(
                documented, f"generate_as_documented(model, tokenizer, {n})", n
            ),
            MIXED: lambda n: ask(mixed, n),
            SAME_PROCESS: lambda n: bare(mixed, f"generate_here({n})", n),
        }
        rates = _take_turns(variants, rounds)
    for name, values in rates.items():
        yield Row(name, "tok/s", values)
    yield ratio(f"{OURS} / same thread", rates[OURS], rates[SAME_THREAD], _TARGET)
    yield ratio(f"{OURS} / same process", rates[MIXED], rates[SAME_PROCESS], _TARGET)
    yield ratio(f"{OURS} / a process of its own", rates[OURS], rates[ALONE])
    yield ratio(f"{OURS} / as documented", rates[OURS], rates[DOCUMENTED], Target(">=", 1.3))


def _take_turns(
    variants: dict[str, Callable[[int], float]], rounds: Rounds
) -> dict[str, tuple[float, ...]]:
    """Run every variant once a round, each round beginning with another one."""
    for run in variants.values():
        run(_WARM_UP_TOKENS)
    order = deque(variants)

    def once() -> dict[str, float]:
        order.rotate(-1)
        return {name: variants[name](_TOKENS) for name in order}

    taken = rounds.run(once)
    return {name: taken[name] for name in variants}
