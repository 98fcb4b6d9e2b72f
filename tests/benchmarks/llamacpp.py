"""The same .gguf file in llama.cpp: through ``%%llm``, by xllamacpp alone, and in Transformers.

Transformers computes with the weights in bf16, llama.cpp with those of the file.
"""

from __future__ import annotations

from collections.abc import Iterator

from tests.benchmarks.inside import PROMPT
from tests.benchmarks.notebook import ask, fresh_kernel, loaded_kernel, seconds
from tests.benchmarks.peers import PEERS
from tests.benchmarks.report import Row, Target, ratio
from tests.benchmarks.rounds import Rounds

_TOKENS, _WARM_UP_TOKENS = 128, 16
_OURS, _ALONE, _LOCAL = "%%llm, -b llamacpp", "xllamacpp alone", "%%llm, -b local"
_PREPARE = f"""
import xllamacpp
from llm_magic.backends.local.cpus import cpus
from llm_magic.backends.local.files.gguf import embedded_file
from tests.benchmarks import inside
watch = inside.Stopwatch()
parameters = xllamacpp.CommonParams()
parameters.model.path = str(embedded_file())
parameters.n_parallel, parameters.verbosity = 1, -1
for threads in (parameters.cpuparams, parameters.cpuparams_batch):
    threads.n_threads = cpus().usable
server = xllamacpp.Server(parameters)
def answer(tokens):
    body = {{
        "messages": [{{"role": "user", "content": {PROMPT!r}}}],
        "temperature": 0, "max_tokens": tokens, "stream": True,
    }}
    server.handle_chat_completions(body, lambda _chunk: False)
"""


def measure(rounds: Rounds) -> Iterator[Row]:
    """Ask in turn, in kernels of their own."""
    if missing := PEERS["xllamacpp"].missing:
        yield from (Row(name, "tok/s", note=missing) for name in (_OURS, _ALONE))
        return
    with (
        loaded_kernel("%llm_load -b llamacpp") as ours,
        loaded_kernel() as local,
        fresh_kernel() as alone,
    ):
        alone.ok(_PREPARE)
        alone.ok(f"answer({_WARM_UP_TOKENS})")
        for kernel in (ours, local):
            ask(kernel, _WARM_UP_TOKENS)
        rates = rounds.in_turn(
            {
                _OURS: lambda: ask(ours, _TOKENS),
                _ALONE: lambda: _TOKENS / seconds(alone, f"answer({_TOKENS})"),
                _LOCAL: lambda: ask(local, _TOKENS),
            }
        )
    for name, values in rates.items():
        yield Row(name, "tok/s", values)
    yield ratio(f"{_OURS} / alone", rates[_OURS], rates[_ALONE], Target(">=", 0.97))
    yield ratio(f"{_OURS} / -b local", rates[_OURS], rates[_LOCAL])
