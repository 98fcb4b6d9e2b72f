"""A backend that streams Markdown from a thread that holds the GIL, for the benchmark of displays."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any

from IPython.display import Markdown, display

from llm_magic.backends.local.worker import Job, Worker
from llm_magic.config.settings import GenerationConfig
from llm_magic.errors import GenerationFailed, LLMMagicError
from llm_magic.session import Session
from llm_magic.types import Chunk, Message, Usage
from tests.benchmarks.inside import shell
from tests.scripted import ScriptedBackend, settings

_TOKEN_S = 0.001
_LETTERS = 4  # in a token
_SECTION = r"""## Step {n}: fitting a line

Ordinary **least squares** minimises the *sum* of squared residuals, `rss`, over all of the points.
It costs little to run and says much, which is why [the manual](https://example.org/ols) has it
first; the inverse of a matrix is never needed, and where it stands in a formula it is a name.

1. Centre the data, so that $\bar{{x}} = 0$ holds for the sample of step {n}.
2. Solve for the slope, and keep the intercept for later.
3. Look at what is left: a pattern in it says that a line is not enough.

| Method | Cost | Exact? |
|:-------|-----:|:------:|
| `lstsq` | $O(nd^2)$ | yes |
| gradient descent | $O(ndk)$ | no |

```python
def fit(x: np.ndarray, y: np.ndarray) -> Line:
    centred = x - x.mean()  # it is better conditioned
    return Line(slope=float(centred @ y / (centred @ centred)))
```

Outliers pull the line towards them, so it is worth while to draw the points before anything else
is done with them. What looks like a cloud is a cloud, whatever the coefficient says about it.

"""


def tokens(count: int) -> Iterator[str]:
    """Yield an answer with every kind of Markdown, in tokens of four letters."""
    text = "".join(_SECTION.format(n=n) for n in range(1 + count * _LETTERS // len(_SECTION)))
    return (text[i * _LETTERS : (i + 1) * _LETTERS] for i in range(count))


class Producer(ScriptedBackend):
    """Answers a prompt that is a number with that many tokens, each after a millisecond of Python."""

    def __init__(self) -> None:
        super().__init__()
        self.worker = Worker("producer")
        self.steps = _steps_a_token()
        self.seconds = 0.0

    async def stream(
        self, name: str, messages: Sequence[Message], config: GenerationConfig
    ) -> AsyncGenerator[Chunk, None]:
        """Stream as the local backend does: from a thread of its own."""
        count = int(messages[-1].content)

        def work(job: Job[None]) -> None:
            began = time.perf_counter()
            for text in tokens(count):
                _burn(self.steps)
                job.emit(Chunk(text=text, tokens=1, time=time.perf_counter()))
                if job.cancel.is_set():
                    return
            self.seconds = time.perf_counter() - began
            job.emit(Chunk(finish_reason="stop", usage=Usage(1, count)))

        async for chunk in self.worker.stream(work, _translate):
            yield chunk


def _burn(steps: int) -> int:
    """Run Python code, which holds the GIL."""
    total = 0
    for step in range(steps):
        total += step
    return total


def _steps_a_token() -> int:
    """Return how many steps take the time of a token on this machine."""
    times = []
    for _ in range(20):
        began = time.perf_counter()
        _burn(10_000)
        times.append(time.perf_counter() - began)
    return int(10_000 * _TOKEN_S / min(times))


def _translate(error: BaseException) -> LLMMagicError:
    return GenerationFailed(f"{type(error).__name__}: {error}")


_producer = Producer()


def prepare() -> Session:
    """Register the magics with the producer as backend; returns the session."""
    from llm_magic.notebook.magics import register

    session = Session(settings(), create=lambda _name: _producer)
    register(shell(), session)
    session.load("org/tiny")
    return session


def seconds() -> float:
    """Return the seconds of the last answer."""
    return _producer.seconds


def as_peers_do(session: Session, prompt: str) -> None:
    """Display the whole text so far again for every token."""
    text = ""
    handle: Any = display(Markdown(text), display_id=True)  # type: ignore[no-untyped-call]
    for chunk in session.stream(prompt):
        text += chunk.text
        handle.update(Markdown(text))  # type: ignore[no-untyped-call]
