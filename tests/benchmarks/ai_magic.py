"""``%%llm`` beside the ``%%ai`` of Jupyter AI: the same paced server, each in a kernel of its own.

``%%ai`` asks for the whole answer and shows it once; so the first word is where they differ, and
the messages and bytes of live words are measured as well. All times are those of the frontend.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

from tests.benchmarks.notebook import fresh_kernel
from tests.benchmarks.peers import PEERS
from tests.benchmarks.report import Row, Target, ratio
from tests.benchmarks.rounds import Rounds
from tests.benchmarks.server import PIECE, Timing, serving
from tests.kernels import Kernel

_PACE = Timing(50, 10, 200)
_QUESTION = "Tell a long story about a whale."
_OURS, _THEIRS = "%%llm", "%%ai"
_PEER = "jupyter_ai_magic_commands"
# Names of figures, their units, and what ours should be of theirs.
FIGURES: dict[str, tuple[str, Target | None]] = {
    f"the first word of {_PACE.first_ms} ms": ("ms", Target("<=", 0.1)),
    f"the whole cell of {_PACE.ideal_ms} ms": ("ms", Target("<=", 1.0)),
    "messages": ("", None),
    "bytes": ("kB", None),
}
_OUTPUTS = {"stream", "display_data", "update_display_data", "execute_result", "clear_output"}


def measure(rounds: Rounds) -> Iterator[Row]:
    """Ask both in turn; the first question of each kernel is not counted."""
    ways = {_OURS: _ours, _THEIRS: _theirs}
    if PEERS[_PEER].missing:
        del ways[_THEIRS]
    with serving() as url, ExitStack() as kernels:
        cells = {name: start(url, kernels) for name, start in ways.items()}
        for cell in cells.values():
            cell()
        taken = rounds.run(
            lambda: {
                f"{name} {figure}": value
                for name, cell in cells.items()
                for figure, value in zip(FIGURES, cell(), strict=True)
            }
        )
    yield from rows(taken)


def rows(taken: Mapping[str, tuple[float, ...]]) -> Iterator[Row]:
    """Yield every figure of both, and their quotient where both are there."""
    for figure, (unit, target) in FIGURES.items():
        ours, theirs = (taken.get(f"{name} {figure}", ()) for name in (_OURS, _THEIRS))
        yield Row(f"{figure}: {_OURS}", unit, ours)
        yield Row(f"{figure}: {_THEIRS}", unit, theirs, note=PEERS[_PEER].missing)
        if theirs:
            yield ratio(f"{figure}: %%llm / %%ai", ours, theirs, target)


Cell = Callable[[], tuple[float, ...]]


def _ours(url: str, kernels: ExitStack) -> Cell:
    kernel = kernels.enter_context(fresh_kernel())
    kernel.ok(f"%load_ext llm_magic\n%llm_load {_PACE.model} -b openai --base-url {url}")
    outputs = _Outputs(kernel)
    return lambda: outputs.of(f"%%llm\n{_QUESTION}")


def _theirs(url: str, kernels: ExitStack) -> Cell:
    # Or it asks the network for prices while it is imported.
    offline = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "OPENAI_API_KEY": "none"}
    kernel = kernels.enter_context(fresh_kernel(PEERS[_PEER].python, **offline))
    kernel.ok(f"%load_ext {_PEER}\n%ai alias paced openai/{_PACE.model} --api-base {url}/v1")
    outputs = _Outputs(kernel)
    return lambda: outputs.of(f"%%ai paced\n{_QUESTION}")


class _Outputs:
    """Listens to everything that a kernel shows."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._heard: list[tuple[float, str]] = []
        client: Any = kernel.client
        self._receive = client.get_iopub_msg
        client.get_iopub_msg = self._listen

    def _listen(self, *args: Any, **kwargs: Any) -> Any:
        message = self._receive(*args, **kwargs)
        if message["msg_type"] in _OUTPUTS:
            self._heard.append((time.monotonic(), json.dumps(message["content"])))
        return message

    def of(self, cell: str) -> tuple[float, ...]:
        """Run a cell; returns when its first word came and all of it, its messages and kilobytes."""
        self._heard.clear()
        ran = self._kernel.ok(cell)
        first = next(when for when, content in self._heard if PIECE.strip() in content)
        whole = (PIECE * _PACE.count).strip()
        assert whole in self._heard[-1][1] or whole in ran.text, "the answer is not whole"
        size = sum(len(content) for _when, content in self._heard) / 1000
        return (first - ran.sent) * 1000, ran.seconds * 1000, float(len(self._heard)), size
