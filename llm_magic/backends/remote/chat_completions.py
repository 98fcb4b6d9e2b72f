"""The objects of a streamed chat completion, as OpenAI and those like it send them; pure."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from llm_magic.backends.remote import server_errors
from llm_magic.backends.remote.stream_decoders import MalformedStream, text_of, whole_number
from llm_magic.config.api_keys import ApiKey
from llm_magic.config.server_address import ServerAddress
from llm_magic.errors import RequestFailed
from llm_magic.types import Chunk, FinishReason, Usage

# What servers call the end of a whole answer, and the limit; who ends for another reason ended early.
_WHOLE = (
    "stop", "eos", "eos_token", "stop_token", "stop_sequence", "end_turn", "end_of_text", "complete",
    "completed", "done", "tool_calls", "tool_use", "function_call",
)  # fmt: skip
_UNFINISHED = ("", "null", "none")
_LIMITS = ("length", "max_tokens", "max_length", "model_length", "max_output_tokens")
_FINISHED: Mapping[str, FinishReason] = {
    **dict.fromkeys(_WHOLE, "stop"), **dict.fromkeys(_LIMITS, "length"),
}  # fmt: skip
NOTHING = Chunk()


class Reader:
    """Reads the objects of one stream."""

    def __init__(self, address: ServerAddress, key: ApiKey | None) -> None:
        self._address, self._key = address, key
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
            self._end(choice["finish_reason"])
        if not isinstance(part, dict):
            raise MalformedStream("a chunk of an unknown shape")
        text, reasoning = _text(part.get("content") or part.get("refusal"))
        reasoning = reasoning or _reasoning(part)
        if not text and not reasoning:
            return NOTHING
        return Chunk(text=text, reasoning=reasoning, time=time.perf_counter())

    def whole(self, value: dict[str, Any]) -> Chunk:
        """Return an answer that came in one piece."""
        if not isinstance(value.get("choices"), list) and not value.get("error"):
            said = server_errors.from_object(value).text
            raise RequestFailed(
                f"{self._address.origin} sent no answer: {said}. Is --base-url right?",
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

    def _end(self, reason: object) -> None:
        """Note why the answer ended; a reason that is unknown ended it early."""
        name = reason.lower() if isinstance(reason, str) else "unknown"
        if name not in _UNFINISHED:
            self._finish = _FINISHED.get(name, "truncated")

    def _error(self, value: dict[str, Any]) -> RequestFailed:
        refusal = server_errors.from_object(value)
        said = self._key.scrub(refusal.text) if self._key else refusal.text
        inner = value.get("error")
        code = inner.get("code") if isinstance(inner, dict) else value.get("code")
        return RequestFailed(
            f"{self._address.origin} stopped with an error: {said}.",
            brief="an error",
            status=whole_number(code),
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
    """Return the choice that is the answer: the one with the index 0, or without any."""
    if choices in (None, []):
        return {}
    if not isinstance(choices, list):
        raise MalformedStream("a chunk of an unknown shape")
    for choice in choices:
        if not isinstance(choice, dict):
            raise MalformedStream("a chunk of an unknown shape")
        if choice.get("index") in (0, None):
            return choice
    return {}


def _text(content: object) -> tuple[str, str]:
    """Return the text and the reasoning of a content, which some servers send in parts."""
    if isinstance(content, str):
        return content, ""
    if not isinstance(content, list):
        return text_of(content), ""
    texts, thoughts = [], []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict):
            texts.append(_of_part(part.get("text")))
            thoughts.append(_of_part(part.get("thinking")))
    return "".join(texts), "".join(thoughts)


def _of_part(value: object) -> str:
    """Return the text of a part: a text, an object with a value, or parts again as Mistral has them."""
    if isinstance(value, list):
        return "".join(text_of(part.get("text")) for part in value if isinstance(part, dict))
    return text_of(value.get("value") if isinstance(value, dict) else value)


def _reasoning(part: dict[str, Any]) -> str:
    """Return the reasoning beside a text; what is no text there is ignored, as a setting may be."""
    for name in ("reasoning", "reasoning_content"):
        text = part.get(name)
        if text and isinstance(text, str | list):
            return _text(text)[0]
    return ""
