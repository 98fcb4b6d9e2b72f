"""Answers the requests for one loaded model: one alone, those that come meanwhile together with it.

Every request gets the answer that it gets alone, with the same options and the same seed. Rounding may
differ: in float32 that is too small to matter, in 16 bits a token that is almost as likely as another
may be the other one. With a seed every sequence has random numbers of its own, which start with that
seed: equal prompts get equal answers. Without one they differ.

A request that cannot be answered (too long, an error of the template, not enough memory even alone)
ends with its error. The others go on.
"""

from __future__ import annotations

import contextlib
from collections import abc
from collections.abc import Iterator

import torch

from llm_magic.backends.local import memory, openmp
from llm_magic.backends.local.batch.scheduler import Scheduler
from llm_magic.backends.local.generation import generate
from llm_magic.backends.local.generation.sequence import Sequence
from llm_magic.backends.local.local_model import LocalModel
from llm_magic.backends.local.worker import Job, process_lock


def answer(loaded: LocalModel, job: Job[None]) -> None:
    """Answer the request of a job, and with it those of the jobs that can be done together with it.

    Raises `Cancelled` soon after the flag of the job is set, if it is the only one.
    """
    with _computing(loaded, job):
        sequence = Sequence.start(loaded, job)
        if generate.answer(loaded, sequence):
            return
        last = Scheduler(loaded, sequence).run()
        memory.release_memory(collect=False)
        if last is None:
            return
        try:
            generate.answer(loaded, last)
        except BaseException as error:  # noqa: BLE001 - the end of another job than the running one
            last.fail(error)
        else:
            last.job.finish(None)


def score(loaded: LocalModel, job: Job[None], texts: abc.Sequence[str]) -> None:
    """Emit how probable each text is as the answer to the request of a job."""
    with _computing(loaded, job):
        for found in generate.score(loaded, Sequence.start(loaded, job), texts):
            job.emit(found)


@contextlib.contextmanager
def _computing(loaded: LocalModel, job: Job[None]) -> Iterator[None]:
    """Wait until no other session computes, and leave time to others that use the CPU."""
    with process_lock(job.cancel), torch.inference_mode(), contextlib.ExitStack() as stack:
        if loaded.model.device.type == "cpu":
            stack.enter_context(openmp.throttle_beside_others())
        yield
