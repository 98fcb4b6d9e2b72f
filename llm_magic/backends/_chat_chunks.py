"""The objects of a streamed chat completion, as OpenAI and those like it send them; pure."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from llm_magic.backends import _refusals
from llm_magic.backends._lines import MalformedStream, whole_number
from llm_magic.errors import RequestRefused
from llm_magic.keys import Key
from llm_magic.places import Place
from llm_magic.types import Chunk, FinishReason, Usage

# What servers call the end of a whole answer, and the limit; who ends for another reason ended early.
_WHOLE = (
    "stop", "eos", "eos_token", "stop_token", "stop_sequence", "end_turn", "end_of_text", "complete",
    "completed", "done", "tool_calls", "tool_use", "function_call",
)  # fmt: skip
_LIMITS = ("length", "max_tokens", "max_length", "model_length", "max_output_tokens")
_FINISHED: Mapping[str, FinishReason] = {
    **dict.fromkeys(_WHOLE, "stop"), **dict.fromkeys(_LIMITS, "length"),
}  # fmt: skip
NOTHING = Chunk()


class Reader:
    """Reads the objects of one stream."""

    def __init__(self, place: Place, key: Key | None) -> None:
        self._place, self._key = place, key
        self._finish: FinishReason | None = None
        self._usage: Usage | None = None

    @property
    def finished(self) -> bool:
        """Whether the server said why it ended."""
        return self._finish is not None

    def read(self, value: dict[str, Any]) -> Chunk:
        """Return what an object adds to the answer."""
        if value.get("error") or value.get("object") == "error":
            raise self._error(value)
        self._count(value.get("usage"))
        choice = _first(value.get("choices"))
        part = choice.get("delta") or choice.get("message") or {}
        if choice.get("finish_reason"):
            reason = str(choice["finish_reason"]).lower()
            self._finish = _FINISHED.get(reason, "truncated")
        if not isinstance(part, dict):
            raise MalformedStream("a chunk of an unknown shape")
        text, reasoning = (
            part.get("content") or part.get("refusal"),
            part.get("reasoning") or part.get("reasoning_content"),
        )
        if not text and not reasoning:
            return NOTHING
        return Chunk(text=_text(text), reasoning=_text(reasoning), time=time.perf_counter())

    def whole(self, value: dict[str, Any]) -> Chunk:
        """Return an answer that came in one piece."""
        if not isinstance(value.get("choices"), list) and not value.get("error"):
            said = _refusals.from_object(value).text
            raise RequestRefused(
                f"{self._place.origin} sent no answer: {said}. Is --base-url right?",
                brief="no answer",
            )
        chunk, end = self.read(value), self.end()
        return Chunk(
            text=chunk.text,
            reasoning=chunk.reasoning,
            finish_reason=end.finish_reason,
            usage=end.usage,
            time=time.perf_counter(),
        )

    def end(self) -> Chunk:
        """Return the last chunk; without a reason for the end the answer was cut."""
        return Chunk(
            finish_reason=self._finish or "truncated", usage=self._usage, time=time.perf_counter()
        )

    def _error(self, value: dict[str, Any]) -> RequestRefused:
        refusal = _refusals.from_object(value)
        said = self._key.scrub(refusal.text) if self._key else refusal.text
        inner = value.get("error")
        code = inner.get("code") if isinstance(inner, dict) else value.get("code")
        return RequestRefused(
            f"{self._place.origin} stopped with an error: {said}.",
            brief="an error",
            status=code if isinstance(code, int) else None,
            parameter=refusal.parameter,
        )

    def _count(self, usage: object) -> None:
        if not isinstance(usage, dict):
            return
        details = usage.get("prompt_tokens_details")
        cached = details.get("cached_tokens") if isinstance(details, dict) else None
        self._usage = Usage(
            whole_number(usage.get("prompt_tokens")), whole_number(usage.get("completion_tokens")),
            whole_number(cached),
        )  # fmt: skip


def _first(choices: object) -> dict[str, Any]:
    if choices in (None, []):
        return {}
    if isinstance(choices, list) and isinstance(choices[0], dict):
        return choices[0]
    raise MalformedStream("a chunk of an unknown shape")


def _text(value: object) -> str:
    """Return text; some servers send it in parts."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, list):
        return "".join(str(p.get("text", "")) for p in value if isinstance(p, dict))
    raise MalformedStream("a chunk of an unknown shape")
