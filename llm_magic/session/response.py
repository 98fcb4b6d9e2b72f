"""The response to a request: an answer while it is generated, and every way to read or stop it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import io
import itertools
import math
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Protocol

from llm_magic.backends.reasoning import separated
from llm_magic.backends.thread_bridge import ThreadBridge
from llm_magic.errors import (
    GenerationError,
    GenerationStopped,
    IncompleteReply,
    Interrupted,
    InvalidReply,
    NoAttribute,
    NotText,
    OptionError,
    PromptTooLong,
    first_line,
)
from llm_magic.session import context_window, interruptible_wait
from llm_magic.session.event_loop import LoopStream, LoopThread
from llm_magic.session.jobs import stopped_waiting
from llm_magic.session.loading import wait_for_end
from llm_magic.text import generated, visible_line
from llm_magic.types import (
    Chunk,
    FinishReason,
    Message,
    Reply,
    Timing,
    TokenLogprob,
    Usage,
    tokens_of,
)

if TYPE_CHECKING:
    from llm_magic.backends.manager import BackendManager, LoadResult
    from llm_magic.session.recording import Recorder
    from llm_magic.session.requests import PreparedRequest
    from llm_magic.session.schemas import InvalidValue
    from llm_magic.types import ModelInfo, Progress

    # Not at runtime: jedi 0.20 fails to complete an object with a property that returns a Literal.
    ResponseState = Literal[
        "queued", "waiting", "running", "done", "incomplete", "stopped", "failed"
    ]

# A server that reports only the total sends the text in a few lumps: their times give no speed.
_LUMP_S = 0.1
_TURN_CHECK_S = 0.02
_REPR_CHARACTERS = 60  # of the text
# The magics and the panel use the others.
_DOCUMENTED = {
    "cancel", "done", "error", "model", "number", "prompt", "reasoning", "reply", "result", "state",
    "text", "timing", "tokens", "usage",
}  # fmt: skip
# What ends a reader that leaves early, not because something failed.
_LEAVING = (KeyboardInterrupt, Interrupted, GeneratorExit, asyncio.CancelledError)


class AnswerParts:
    """What the chunks of an answer add up to: its text, its reasoning, its usage and why it ended."""

    __slots__ = (
        "finish_reason", "logprobs", "probabilities", "reasoning", "retry", "text", "tokens", "usage",
    )  # fmt: skip

    def __init__(self) -> None:
        self.clear()
        self.usage = Usage()
        self.finish_reason: FinishReason | None = None
        self.probabilities: tuple[tuple[str, float], ...] = ()
        # What was wrong with an answer before this one.
        self.retry = ""

    def clear(self) -> None:
        """Remove the text, the reasoning and the count of their tokens."""
        # Buffers: a list of millions of short pieces takes ten times the memory of the text.
        self.text, self.reasoning = io.StringIO(), io.StringIO()
        # Those of the text; the last ones of the reasoning may precede them.
        self.logprobs: list[TokenLogprob] = []
        self.tokens = 0

    def add(self, chunk: Chunk) -> None:
        """Add a chunk."""
        if chunk.retry:
            # Its tokens count.
            self.text, self.reasoning, self.retry = io.StringIO(), io.StringIO(), chunk.retry
            self.logprobs.clear()
        if chunk.ends_reasoning:
            self.reasoning.write(self.text.getvalue())
            self.text = io.StringIO()
        self.text.write(chunk.text)
        self.reasoning.write(chunk.reasoning)
        if chunk.logprobs and (chunk.text or not chunk.reasoning):
            self.logprobs += chunk.logprobs
        self.tokens += chunk.tokens
        self.usage = chunk.usage or self.usage
        self.finish_reason = chunk.finish_reason or self.finish_reason
        self.probabilities = chunk.probabilities or self.probabilities

    def joined(self) -> Chunk:
        """Return one chunk with all of it."""
        return Chunk(
            text=self.text.getvalue(),
            reasoning=self.reasoning.getvalue(),
            tokens=self.tokens,
            usage=self.usage,
            finish_reason=self.finish_reason,
            probabilities=self.probabilities,
            logprobs=self.text_tokens,
        )

    @property
    def text_tokens(self) -> tuple[TokenLogprob, ...]:
        """The tokens of the text with their probabilities, if they were requested."""
        return tokens_of(self.text.getvalue(), self.logprobs) if self.logprobs else ()

    @property
    def is_empty(self) -> bool:
        """Whether nothing was generated."""
        return not (self.tokens or self.text.tell() or self.reasoning.tell())

    @property
    def completion_tokens(self) -> int | None:
        """The number of generated tokens; None if unknown."""
        count = self.tokens or self.usage.completion_tokens
        # Some servers send a usage of 0 along with the first words.
        return count if count or self.is_empty else None


class ResponseView(Protocol):
    """Where a background response is shown, if it is shown anywhere."""

    @property
    def origin(self) -> str:
        """What started the response, such as ``cell [3]``."""

    def update(self) -> bool:
        """Send how the response ended to its own cell once more; returns False where that is impossible."""

    def show_again(self, heading: str = "") -> None:
        """Show how the response ended once more, below a heading, in the cell that is running now."""

    def close(self) -> None:
        """Wait until the end of the response has been shown."""


@dataclass(slots=True)
class Pending:
    """What a response waits for: the load of its model, and the earlier turns of its chat, by key.

    `prepare` returns the request afterwards.
    """

    prepare: Callable[[], PreparedRequest]
    load: asyncio.Task[LoadResult] | None
    turns: dict[str, Response]


class Response:
    """An answer while it is generated. You can read every attribute from any thread at any time.

    Iterate over it, await it, or call `result`. If you stop reading early, the answer stops, unless it
    runs in the background: then it has a `number`, and only `cancel` stops it.

    While a loop iterates over the chunks, each chunk is added to the text when the loop reads it, so a
    loop that ends early records exactly the chunks that it has read. Otherwise, chunks are added when
    they arrive.
    """

    def __init__(
        self,
        prepared: PreparedRequest,
        manager: BackendManager,
        thread: LoopThread,
        recorder: Recorder,
        pending: Pending | None = None,
    ) -> None:
        """`pending` is what has to end before the request can be prepared completely."""
        self.prepared = prepared
        self._pending = pending
        # The turns of its chat that it has waited for.
        self.turns_before: tuple[Response, ...] = ()
        self.number: int | None = None
        self.view: ResponseView | None = None
        # Whether a cell has waited for it and reported how it ended.
        self.is_awaited = False
        # `has_reply`: it has ended with something to show.
        self.done = self.has_reply = False
        self.finished_at = math.inf
        self.reply: Reply | None = None
        self.error: BaseException | None = None
        # What was waited for, such as a busy server; it is not part of the answer.
        self.notices: list[str] = []
        self.notice = ""
        self.progress: Progress | None = None
        self._is_queued = False
        # Counts the changes, and how often all text until then turned out to be reasoning.
        self.revision = self.restarts = 0
        self.has_text = self.has_reasoning = False
        # What stop strings and tags held back when the stream was cancelled.
        self.pending_chunks: list[Chunk] = []
        self._parts = AnswerParts()
        self._first: float | None = None
        self.latest = prepared.request.started
        # `is_read`: a loop iterates over it, and adds the chunks.
        self._is_cancelled = self.is_read = False
        # Reentrant: the end adds what was held back.
        self._lock = threading.RLock()
        self._recorder = recorder
        chunks = separated(
            self._generated(manager),
            prepared.loaded_model.backend,
            prepared.config,
            self.pending_chunks,
        )
        answer_type = prepared.request.answer_type
        if answer_type is not None and answer_type.by == "prompt":
            from llm_magic.session.second_try import with_second_try

            chunks = with_second_try(chunks, answer_type, functools.partial(self._again, manager))
        self._stream = LoopStream(thread, chunks, self.add, self._finished)

    # -- what it is and waits for -------------------------------------------------------------

    @property
    def model(self) -> str:
        """The name of the model."""
        return self.prepared.loaded_model.name

    @property
    def info(self) -> ModelInfo:
        """The model; only its name and its backend while it is being loaded."""
        return self.prepared.loaded_model.info

    @property
    def prompt(self) -> str:
        """The text of the last message."""
        return self.prepared.messages[-1].content

    @property
    def is_in_process(self) -> bool:
        """Whether the model is in the memory of this process."""
        return self.prepared.loaded_model.backend.capabilities.in_process

    @property
    def awaits_load(self) -> bool:
        """Whether its model is still being loaded."""
        load = self._pending.load if self._pending is not None else None
        return load is not None and not load.done()

    @property
    def awaited_turns(self) -> Mapping[str, Response]:
        """The earlier turns of its chat that it waits for, by key."""
        return self._pending.turns if self._pending is not None else {}

    @property
    def is_queued(self) -> bool:
        """Whether something else has to end before the model starts with it."""
        return not self.done and (self._pending is not None or self._is_queued)

    @property
    def is_generating(self) -> bool:
        """Whether it needs its model; a reader may not have read all of an answer that is complete."""
        return not (self.done or self._stream.done.is_set() or self.awaits_load)

    @property
    def short_name(self) -> str:
        """What messages call it: ``job 3``, or ``an answer to Python code``."""
        return "an answer to Python code" if self.number is None else f"job {self.number}"

    @property
    def ahead(self) -> tuple[Response, ...]:
        """The responses that the same model or server answers first, oldest first."""
        mine = self.prepared.loaded_model
        earlier = itertools.takewhile(lambda one: one is not self, self._recorder.running)
        loaded = ((one, one.prepared.loaded_model) for one in earlier if not one.done)
        return tuple(
            one
            for one, model in loaded
            if model.backend is mine.backend and model.info.server == mine.info.server
        )

    # -- what there is of the answer ----------------------------------------------------------

    @property
    def text(self) -> str:
        """The text generated so far."""
        return self._parts.text.getvalue()

    @property
    def reasoning(self) -> str:
        """The reasoning generated so far."""
        return self._parts.reasoning.getvalue()

    @property
    def tokens(self) -> int | None:
        """The number of tokens generated so far; None if unknown."""
        return self._parts.completion_tokens

    @property
    def retry(self) -> str:
        """What was wrong with the first answer, if this is the second one."""
        return self._parts.retry

    @property
    def is_empty(self) -> bool:
        """Whether nothing was generated yet."""
        return self._parts.is_empty

    @property
    def is_turn(self) -> bool:
        """Whether the reply is a turn of its chat: one that failed, or without text to continue, is none."""
        reply = self.reply
        if self.prepared.context is None or self.error is not None or not reply:
            return False
        return reply.finish_reason != "truncated"

    @property
    def amount(self) -> str:
        """How much was generated so far, in words: tokens, or characters where those are unknown."""
        return generated(self.tokens, len(self.text) + len(self.reasoning))

    @property
    def usage(self) -> Usage:
        """The token counts so far, and the cost once the server reports it."""
        return dataclasses.replace(self._parts.usage, completion_tokens=self.tokens)

    @property
    def timing(self) -> Timing:
        """The times so far, or the times of the whole answer once it has ended."""
        if self.reply is not None:
            return self.reply.timing
        counted, first, started = self.tokens, self._first, self.prepared.request.started
        decoding = self.latest - first if first is not None else 0.0
        measured = decoding > (0.0 if self._parts.tokens else _LUMP_S)
        return Timing(
            first_token_s=first - started if first is not None else None,
            total_s=time.perf_counter() - started,
            tokens_per_s=(counted - 1) / decoding if counted and measured else None,
            load_s=max(0.0, self.prepared.loaded_model.ready_at - started),
        )

    @property
    def seconds(self) -> float:
        """How long it has run, or ran."""
        return min(self.finished_at, time.perf_counter()) - self.prepared.request.started

    @property
    def state(self) -> ResponseState:
        """``queued``, ``waiting`` for the first token, ``running``, and how it ended.

        ``done``, ``incomplete`` without the end of the answer, ``stopped``, or ``failed``.
        """
        if not self.done:
            return "queued" if self.is_queued else "waiting" if self.is_empty else "running"
        if self._is_cancelled:
            return "stopped"
        if self.error is not None:
            return "failed"
        is_cut = self.reply is not None and self.reply.finish_reason == "truncated"
        return "incomplete" if is_cut else "done"

    @property
    def failure(self) -> str:
        """The first line of the error that it failed with, empty if it did not fail."""
        return "" if self.error is None or self.state != "failed" else first_line(self.error)

    def __str__(self) -> str:
        """Return the text of an answer that has ended; while it runs or if it failed, the repr."""
        return self.text if self.state in {"done", "incomplete", "stopped"} else repr(self)

    def __repr__(self) -> str:
        so_far = "" if self.done else " so far"
        amount = f", {self.amount}{so_far}" if self.amount else ""
        start = self.text[:_REPR_CHARACTERS]
        text = f": {start!r}{'…' if len(self.text) > len(start) else ''}" if start else ""
        about = f"{visible_line(self.model)}, {self.state}{amount}, {self.seconds:.1f} s"
        failure = f": {self.failure}" if self.failure else ""
        return f"<{self._label}: {about}{text}{failure}>"

    @property
    def _label(self) -> str:
        return "Response" if self.number is None else f"Job {self.number}"

    def __contains__(self, _part: object) -> NoReturn:
        raise NotText(
            f"{self._label} is a {type(self).__name__}, not a text. Use .result(), which returns the reply."
        )

    __getitem__ = __add__ = __radd__ = __contains__

    def __len__(self) -> NoReturn:
        self.__contains__(None)

    def __format__(self, spec: str) -> str:
        if spec:
            self.__contains__(None)
        return str(self)

    def __bool__(self) -> bool:
        return True

    def __array__(self, *_: object, **__: object) -> NoReturn:
        """Raise `TypeError`: pandas and NumPy would take the chunks for the values."""
        self.__contains__(None)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> NoReturn:
            """Raise `AttributeError`, which names `result` for what only a reply has."""
            number = self.__dict__.get("number")
            about = f"{type(self).__name__!r} object" if number is None else f"Job {number}"
            advice = f"Use .result().{name}: result() returns the reply." * hasattr(Reply, name)
            raise NoAttribute(f"{about} has no attribute {name!r}.").advise(advice)

    def __dir__(self) -> list[str]:
        """Return the documented attributes, which completion offers."""
        return [name for name in super().__dir__() if name[0] == "_" or name in _DOCUMENTED]

    # -- how it is read -----------------------------------------------------------------------

    def start(self) -> Response:
        """Start to generate, unless that was done; returns the response itself."""
        if not self._stream.is_started:
            self._recorder.start(self)
            self._stream.start()
        return self

    def cancel(self) -> None:
        """Stop the answer and return at once; `done` becomes true when it has ended."""
        self._stream.cancel()

    def wait(self, timeout: float) -> None:
        """Wait for the end at most `timeout` seconds, and raise nothing."""
        self._stream.done.wait(timeout)

    def __enter__(self) -> Response:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        """Stop generating if it has not ended, unless it runs in the background.

        An error of the block, such as one of a display, is the error of the response.
        """
        if self.done or self.number is not None:
            return
        # First: what comes while it stops was not shown.
        self._end_early(error)
        self._stream.stop()
        if isinstance(error, KeyboardInterrupt):
            raise self._interrupted(Interrupted) from None

    def result(self, timeout: float | None = None) -> Reply:
        """Wait for the reply and return it.

        Raises:
            Interrupted: You stopped the wait, and with it an answer that does not run in the background.
            GenerationStopped: The answer was stopped in another way, such as by ``%llm_stop``; `reply`
                of the exception is the partial reply.
            TimeoutError: The answer takes longer than `timeout` seconds. It continues.
            LLMMagicError: The answer failed.
        """
        if not self.done:
            deadline = math.inf if timeout is None else time.monotonic() + timeout
            with self._recorded():
                for _ in self._read(ThreadBridge(keep=0), deadline=deadline):
                    pass
        if not self.done:
            raise TimeoutError(f"{self!r} is still running after {timeout} s.")
        return self._outcome()

    def updates(self, pause: Callable[[], float] | None = None) -> Iterator[None]:
        """Return, again and again, when there is something new, or after about 0.1 s; until the end.

        The next news is waited for no sooner than after `pause()` seconds. An interrupt stops the
        response; leaving the loop does not, but the end of its ``with`` block.
        """
        batches = self._read(ThreadBridge(keep=1), pause)
        while True:
            with self._recorded():
                if next(batches, None) is None:
                    return
            yield

    def until_end(self, pause: Callable[[], float], deadline: float = math.inf) -> Iterator[object]:
        """Return, as `updates` does, until nothing more is generated; never stops the response.

        The `deadline` (`time.monotonic`) ends it earlier.

        An interrupt raises `KeyboardInterrupt`.
        """
        bridge: ThreadBridge[Chunk] = ThreadBridge(keep=1)
        self._stream.attach(bridge)
        return self._stream.read(bridge, pause, stops=False, deadline=deadline)

    def _read(
        self,
        bridge: ThreadBridge[Chunk],
        pause: Callable[[], float] | None = None,
        deadline: float = math.inf,
    ) -> Iterator[list[Chunk]]:
        self._stream.attach(bridge)
        return self._stream.read(bridge, pause, stops=self.number is None, deadline=deadline)

    def __iter__(self) -> Generator[Chunk, None, None]:
        """Yield the chunks; what came before as one."""
        bridge: ThreadBridge[Chunk] = ThreadBridge()
        with self._recorded():
            self._take_over(bridge)
            for batch in self._stream.read(bridge, stops=self.number is None):
                for chunk in batch:
                    self.add(chunk, by_reader=True)
                    yield chunk
            self._end_reading(bridge)

    async def __aiter__(self) -> AsyncGenerator[Chunk, None]:
        """Yield the chunks; what came before as one."""
        bridge: ThreadBridge[Chunk] = ThreadBridge()
        with self._recorded():
            self._take_over(bridge)
            async with contextlib.aclosing(self._read_async(bridge)) as batches:
                async for batch in batches:
                    for chunk in batch:
                        self.add(chunk, by_reader=True)
                        yield chunk
            self._end_reading(bridge)

    def __await__(self) -> Generator[Any, None, Reply]:
        return self._await().__await__()

    async def _await(self) -> Reply:
        bridge: ThreadBridge[Chunk] = ThreadBridge(keep=0)
        with self._recorded():
            self._stream.attach(bridge)
            self.start()
            async with contextlib.aclosing(self._read_async(bridge)) as batches:
                async for _ in batches:
                    pass
        return self._outcome()

    def _read_async(self, bridge: ThreadBridge[Chunk]) -> AsyncGenerator[list[Chunk], None]:
        return self._stream.read_async(bridge, self._end_outside, stops=self.number is None)

    def _take_over(self, bridge: ThreadBridge[Chunk]) -> None:
        """Start, and let the reader of a bridge add the chunks; what there is comes as the first one."""

        def first() -> None:
            if self.revision:
                parts, notice = self._parts, self.notice
                logprobs = parts.text_tokens
                bridge.put(
                    Chunk(self.text, self.reasoning, parts.tokens, notice=notice, logprobs=logprobs)
                )
            if self.number is None and not self.done:
                # It is added again when it is read.
                self._parts.clear()
                self.is_read = True

        self._stream.attach(bridge, first)
        self.start()

    def _end_reading(self, bridge: ThreadBridge[Chunk]) -> None:
        if isinstance(bridge.error, asyncio.CancelledError):
            self.end("cancelled")
            raise self._stopped()
        if bridge.error is not None:
            raise bridge.error
        self.end()
        if self.error is not None:
            raise self.error

    # -- how it grows and ends ----------------------------------------------------------------

    async def _generated(self, manager: BackendManager) -> AsyncGenerator[Chunk, None]:
        """Yield the chunks of the model, once nothing is pending."""
        if self._pending is not None:
            await self._wait_for(self._pending)
            self.prepared, self._pending = self._pending.prepare(), None
            self._recorder.changed()
        async with contextlib.aclosing(context_window.stream(manager, self)) as chunks:
            async for chunk in chunks:
                yield chunk

    def _again(
        self, manager: BackendManager, more: tuple[Message, ...]
    ) -> AsyncGenerator[Chunk, None]:
        """Return the answer to the same request with more messages."""
        prepared, name = self.prepared, self.model
        messages = (*prepared.sent, *more)
        loaded, config = manager.find(name), prepared.config
        chunks = loaded.backend.stream(name, messages, config)
        return separated(chunks, loaded.backend, config, self.pending_chunks)

    async def _wait_for(self, pending: Pending) -> None:
        """Wait until the model is loaded and the earlier turns have ended, also those that run again."""
        if pending.load is not None:
            await wait_for_end(pending.load)
        context = self.prepared.context
        while context is not None:
            running = self._recorder.turns(context.chat)
            pending.turns |= {key: running[key] for key in pending.turns if key in running}
            if all(turn.done for turn in pending.turns.values()):
                break
            await asyncio.sleep(_TURN_CHECK_S)
        self.turns_before = tuple(pending.turns.values())

    def add(self, chunk: Chunk, *, by_reader: bool = False) -> None:
        """Add a chunk once: when it arrives, or when it is read where a reader iterates.

        One that comes after the end is ignored.
        """
        with self._lock:
            if self.done or by_reader is not self.is_read:
                return
            self._parts.add(chunk)
            if chunk.retry:
                self.restarts += 1
                self.has_reasoning = self.has_text = False
            if chunk.ends_reasoning:
                self.restarts += 1
                self.has_reasoning, self.has_text = self.has_reasoning or self.has_text, False
            if chunk.text:
                self.has_text = self.has_text or not chunk.text.isspace()
            if chunk.reasoning:
                self.has_reasoning = self.has_reasoning or not chunk.reasoning.isspace()
            if chunk.time and (chunk.tokens or chunk.text or chunk.reasoning):
                self._first = self._first or chunk.time
                self.latest = chunk.time
            if chunk.notice:
                self.notices.append(chunk.notice)
            self.notice = chunk.notice or ("" if chunk.text or chunk.reasoning else self.notice)
            self._is_queued, self.progress = chunk.queued, chunk.progress
            self.revision += 1
        self._recorder.changed()

    def _finished(self, error: BaseException | None) -> None:
        """End it when its stream has ended, unless a reader iterates: that ends it when it has read all."""
        if self.is_read:
            return
        if error is not None:
            self._end_early(error)
        else:
            self.end()

    @contextlib.contextmanager
    def _recorded(self) -> Iterator[None]:
        """Stop and end the response, and so record it, where its reader leaves early.

        An interrupt leaves as `Interrupted`, which carries the reply.
        """
        try:
            yield
        except BaseException as error:
            is_interrupt = isinstance(error, (KeyboardInterrupt, Interrupted))
            kind = type(error) if isinstance(error, Interrupted) else Interrupted
            if self.number is not None:
                if not is_interrupt:
                    raise
                raise stopped_waiting([self], kind) from None
            try:
                self._stream.stop()
            finally:
                self._end_early(error)
            if is_interrupt:
                raise self._interrupted(kind) from None
            raise

    def _end_early(self, error: BaseException | None) -> None:
        """End it before the whole answer is there: `error` is why, None where its reader has left."""
        if error is None or isinstance(error, _LEAVING):
            self.end("cancelled")
        else:
            self.end("truncated", error)

    def end(self, reason: FinishReason | None = None, error: BaseException | None = None) -> None:
        """Make the reply and record it; has no effect after the end."""
        with self._lock:
            if self.done:
                return
            for chunk in self.pending_chunks:
                self.add(chunk, by_reader=self.is_read)
            self._is_cancelled = reason == "cancelled"
            value, problem = (None, None) if error is not None else self._value()
            self.reply = self._made_reply(reason, value)
            if error is None and not self._is_cancelled:
                error = self._form_error(self.reply, problem)
            self.error = error
            if isinstance(error, GenerationError):
                error.reply = self.reply
            if isinstance(error, PromptTooLong):
                error.append(context_window.long_reference(self.prepared, error))
            if isinstance(error, IncompleteReply):
                error.append(f"The received part is in {self.prepared.request.stored_in}.")
            # A failure before the first word leaves the last reply as it is.
            self.has_reply = error is None or not self.is_empty
            if self.has_reply:
                self._recorder.record(self, self.reply, cancelled=self._is_cancelled)
            self.finished_at, self.done = time.perf_counter(), True
        self._recorder.end(self)

    def _made_reply(self, reason: FinishReason | None, value: object) -> Reply:
        """Return the reply with the value of its type; `reason` is why it ended if the backend has none."""
        is_requested = self.prepared.config.logprobs is not None
        requested: Any = {"tokens": self._parts.text_tokens} if is_requested else {}
        return Reply(
            self.text,
            model=self.model,
            backend=self.prepared.loaded_model.config.backend,
            # A stream that reported no reason was cut.
            finish_reason=self._parts.finish_reason or reason or "truncated",
            usage=self.usage,
            timing=self.timing,
            messages=self.prepared.sent,
            reasoning=self.reasoning.strip(),
            dropped_turns=self.prepared.dropped,
            context_full=self._is_context_full,
            probabilities=dict(self._parts.probabilities),
            value=value,
            retry=self.retry,
            **requested,
        )

    @property
    def _is_context_full(self) -> bool:
        """Whether the answer reached the limit of the context, not that of its request."""
        context, prompt = self.info.context_length, self._parts.usage.prompt_tokens
        if self._parts.finish_reason != "length" or not context or prompt is None:
            return False
        # Some servers keep one token free.
        return prompt + (self.tokens or 0) >= context - 1

    def _value(self) -> tuple[Any, InvalidValue | None]:
        """Return the value of a typed answer, and why it has none."""
        answer_type = self.prepared.request.answer_type
        if answer_type is None or self._is_cancelled:
            return None, None
        return answer_type.checked(self.text, self._parts.finish_reason or "truncated")

    def _form_error(self, reply: Reply, problem: InvalidValue | None) -> InvalidReply | None:
        """Return the error of a reply that does not have the structure that was requested."""
        answer_type = self.prepared.request.answer_type
        try:
            if answer_type is not None and problem is not None:
                raise answer_type.error(reply, problem)
            if self.prepared.request.as_json:
                reply.json()
        except InvalidReply as error:
            if self.number is not None or self.is_empty:
                return error
            return error.append(f"The text is in {self.prepared.request.stored_in}.")
        return None

    def _outcome(self) -> Reply:
        self.is_awaited = True
        if self.error is not None:
            raise self.error
        assert self.reply is not None
        if self._is_cancelled:
            raise self._stopped()
        return self.reply

    def _stopped(self) -> GenerationStopped:
        """Return the error for a reader whose wait was not interrupted."""
        assert self.reply is not None
        label = "The answer" if self.number is None else self._label
        where = self.prepared.request.stored_in
        error = GenerationStopped(_stopped(self.reply, where, f"{label} was stopped"))
        error.reply = self.reply
        return error

    def _interrupted(self, kind: type[Interrupted]) -> Interrupted:
        assert self.reply is not None
        message = _stopped(self.reply, self.prepared.request.stored_in, "Stopped")
        error = kind(message, reply=self.reply)
        if isinstance(error, interruptible_wait.Interrupted):
            self._recorder.show(error)
        return error

    def _end_outside(self) -> None:
        """End it when ■ has ended the cell, before its task is cancelled."""
        if self.number is None:
            self.end("cancelled")
            self._interrupted(interruptible_wait.Interrupted)


class ChunkIterator(Iterator[Chunk]):
    """The chunks of a response with content; leaving the loop early stops the response."""

    def __init__(self, response: Response) -> None:
        self._chunks = iter(response)

    def __repr__(self) -> str:
        return "<ChunkIterator: for chunk in llm.stream(…): print(chunk.text, end='')>"

    def __next__(self) -> Chunk:
        return next(chunk for chunk in self._chunks if chunk.has_content)

    def close(self) -> None:
        """Stop the response."""
        self._chunks.close()

    def __aiter__(self) -> NoReturn:
        """Raise `OptionError`, which names the method for ``async for``."""
        raise OptionError("llm.stream is for a for loop. Use: async for chunk in llm.astream(…)")

    def __await__(self) -> NoReturn:
        """Raise `OptionError`, which names the method for ``await``."""
        raise OptionError(
            "llm.stream cannot be awaited. Use await llm.agenerate(…) for the reply, or async for chunk in"
            " llm.astream(…)."
        )


def _stopped(reply: Reply, stored_in: str, start: str) -> str:
    """Return the message about an answer that was stopped: `start`, when, and where it is stored."""
    if reply.finish_reason in {"stop", "length"}:
        return f"{start} just after the answer was complete; it is in {stored_in}."
    amount = generated(reply.usage.completion_tokens, len(reply.text) + len(reply.reasoning))
    if not amount:
        return f"{start} before the first word."
    return f"{start} after {amount}; the answer so far is in {stored_in}."
