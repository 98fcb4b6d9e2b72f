"""Tokens per second of a streamed ``%%llm`` beside those of ``model.generate``.

On a CPU it matters which threads have computed before: each thread that enters an OpenMP region
gets a team of its own, and once there are more such threads than cores, they no longer spin while
they wait, and every operation begins with a wake-up. So there are several fair questions:

- *the same thread*: ``generate`` on the thread that answers ``%%llm``, in the same kernel. The
  topology is equal; what is left is the price of streaming and showing.
- *the same process*: ``generate`` in a cell, on the main thread, of a kernel that also answers
  ``%%llm``. This is the target of the project. Both sides suffer from the second team.
- *a process of its own*: what a user has who never heard of this package. Nothing else computes.
  ``pipeline("text-generation")`` is asked there too: it computes on the same thread, so that both
  have one team, and both only show their answer when it is whole.
- *where cells run torch, too*: as documented, but the main thread has computed before, as in a
  notebook that does anything else with torch. ``%%llm`` in such a kernel is the second side.
- *as documented*: the way the documentation of Transformers streams, a new thread for each call.
  The price of that thread is a part of what is compared: whoever wants to stream has to pay it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial

from tests.benchmarks.notebook import ask, bare, bare_kernel, loaded_kernel
from tests.benchmarks.report import Row, Target, ratio
from tests.benchmarks.rounds import Rounds

_TOKENS, _WARM_UP_TOKENS = 128, 16
_TARGET = Target(">=", 0.98)

OURS = "%%llm"
SAME_THREAD = "generate, the same thread"
ALONE = "generate, a process of its own"
PIPELINE = "pipeline, a process of its own"
DOCUMENTED = "thread and TextIteratorStreamer, its own"
BUSY = "thread and TextIteratorStreamer, where cells run torch"
MIXED = "%%llm, where the next one also runs"
SAME_PROCESS = "generate, the same process, main thread"


def measure(rounds: Rounds) -> Iterator[Row]:
    """Run all of them in turn, in four kernels that stay open."""
    with ExitStack() as kernels:
        ours, mixed = (kernels.enter_context(loaded_kernel()) for _ in range(2))
        alone, documented = (kernels.enter_context(bare_kernel()) for _ in range(2))
        alone.ok("pipeline = inside.Pipeline(model, tokenizer)")
        variants: dict[str, Callable[[int], float]] = {
            OURS: lambda n: ask(ours, n),
            SAME_THREAD: lambda n: bare(ours, f"inside.generate_on_its_thread({n})", n),
            ALONE: lambda n: bare(alone, f"inside.generate(model, tokenizer, {n})", n),
            PIPELINE: lambda n: bare(alone, f"pipeline({n})", n),
            DOCUMENTED: lambda n: bare(
                documented, f"inside.generate_as_documented(model, tokenizer, {n})", n
            ),
            # Its thread's team ends with it, so that nothing is left for `alone`.
            BUSY: lambda n: bare(alone, f"inside.generate_as_documented(model, tokenizer, {n})", n),
            MIXED: lambda n: ask(mixed, n),
            SAME_PROCESS: lambda n: bare(mixed, f"inside.generate_here({n})", n),
        }
        for run in variants.values():
            run(_WARM_UP_TOKENS)
        rates = rounds.in_turn({name: partial(run, _TOKENS) for name, run in variants.items()})
    for name, values in rates.items():
        yield Row(name, "tok/s", values)
    yield ratio(f"{OURS} / generate, same thread", rates[OURS], rates[SAME_THREAD], _TARGET)
    yield ratio(f"{OURS} / generate, same process", rates[MIXED], rates[SAME_PROCESS], _TARGET)
    yield ratio(f"{OURS} / generate, a process of its own", rates[OURS], rates[ALONE], _TARGET)
    yield ratio(f"{OURS} / pipeline", rates[OURS], rates[PIPELINE], _TARGET)
    streamer = f"{OURS} / thread and TextIteratorStreamer"
    yield ratio(streamer, rates[OURS], rates[DOCUMENTED], Target(">=", 1.35))
    where = f"{streamer}, where cells run torch"
    yield ratio(where, rates[MIXED], rates[BUSY], Target(">=", 1.35))
