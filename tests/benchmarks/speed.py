"""Tokens per second of a streamed ``%%llm``, compared with ``model.generate``.

On a CPU the result depends on the threads that have computed before. Each thread that enters an OpenMP
region gets its own OpenMP threads. With more such threads than cores they no longer spin while they
wait, and every operation starts with a wake-up. So there are several comparisons:

- *the same thread*: ``generate`` on the inference thread, in the same kernel. The OpenMP threads are
  the same; the difference is the cost of streaming and display.
- *the same process*: ``generate`` in a cell, on the main thread, of a kernel that also answers
  ``%%llm``. This is the target of the project. Both have the additional OpenMP threads.
- *a process of its own*: ``generate`` without this package, where nothing else computes.
  ``pipeline("text-generation")`` runs there too. Both show only the complete answer.
- *where cells run torch, too*: as documented, but the main thread has computed before, as in a
  notebook that also uses torch for something else. It is compared with ``%%llm`` in such a kernel.
- *as documented*: streaming as the documentation of Transformers shows it, with a new thread for each
  call. The cost of that thread is part of the comparison.
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
    """Run all variants in turn, in four kernels that stay open."""
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
            # The OpenMP threads end with the thread, so that `alone` has no additional ones.
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
