"""Parses the objects of a streamed chat completion, with the variants of compatible servers."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

from llm_magic.backends.remote.stream_decoders import MalformedStream, parse_text, whole_number
from llm_magic.backends.remote.token_logprobs import TokenReader
from llm_magic.errors import LLMMagicError
from llm_magic.types import Chunk, FinishReason, Usage

# Finish reasons of a complete reply, and of one that reached the token limit. Others mean truncation.
_COMPLETE = (
    "stop", "eos", "eos_token", "stop_token", "stop_sequence", "end_turn", "end_of_text", "complete",
    "completed", "done", "tool_calls", "tool_use", "function_call",
)  # fmt: skip
_UNFINISHED = ("", "null", "none")
_LIMITS = ("length", "max_tokens", "max_length", "model_length", "max_output_tokens")
_FINISH_REASONS: Mapping[str, FinishReason] = {
    **dict.fromkeys(_COMPLETE, "stop"), **dict.fromkeys(_LIMITS, "length"),
}  # fmt: skip
EMPTY = Chunk()
_XAI_UNITS_PER_DOLLAR = 10_000_000_000
_MAX_AMOUNT = 1e18


class ReplyReader:
    """Converts the objects of one reply to chunks; `to_error` converts an error object."""

    def __init__(
        self, to_error: Callable[[dict[str, Any]], LLMMagicError], logprobs: int | None = None
    ) -> None:
        """`logprobs` is the option of the request."""
        self._to_error = to_error
        self._tokens = TokenReader(logprobs)
        self._finish: FinishReason | None = None
        self._has_choices = self._has_text = False
        self._usage: Usage | None = None

    @property
    def is_finished(self) -> bool:
        """Whether the server has sent a finish reason."""
        return self._finish is not None

    @property
    def missing(self) -> str:
        """What a response without an answer lacks; empty for one that has text or a finish reason."""
        if self._has_text or self.is_finished:
            return ""
        return "ended before the first word" if self._has_choices else "has no choices"

    def read(self, value: dict[str, Any]) -> Chunk:
        """Return the chunk of an object; raises the error of an error object."""
        if value.get("error") or value.get("object") == "error":
            raise self._to_error(value)
        self._read_usage(value.get("usage"))
        choice = _first_choice(value.get("choices"))
        self._has_choices = self._has_choices or bool(choice)
        part = choice.get("delta") or choice.get("message") or {}
        if reason := choice.get("finish_reason"):
            name = reason.lower() if isinstance(reason, str) else "unknown"
            if name not in _UNFINISHED:
                self._finish = _FINISH_REASONS.get(name, "truncated")
        if not isinstance(part, dict):
            raise MalformedStream("a chunk in an unknown format")
        text, reasoning = _split_content(part.get("content") or part.get("refusal"))
        reasoning = reasoning or _reasoning(part)
        logprobs = self._tokens.read(_inner(choice, "logprobs", "content"))
        if not text and not reasoning and not logprobs:
            return EMPTY
        self._has_text = self._has_text or bool(text or reasoning)
        return Chunk(text=text, reasoning=reasoning, time=time.perf_counter(), logprobs=logprobs)

    def read_whole(self, value: dict[str, Any]) -> Chunk:
        """Return the only chunk of a reply that is not streamed."""
        chunk = self.read(value)
        return dataclasses.replace(
            self.last_chunk(),
            text=chunk.text,
            reasoning=chunk.reasoning,
            logprobs=chunk.logprobs,
        )

    def last_chunk(self) -> Chunk:
        """Return the last chunk. A reply without a finish reason is truncated."""
        return Chunk(
            finish_reason=self._finish or "truncated", usage=self._usage, time=time.perf_counter()
        )

    def _read_usage(self, usage: object) -> None:
        # Some servers send an empty usage after the counts.
        if not usage or not isinstance(usage, dict):
            return
        self._usage = Usage(
            whole_number(usage.get("prompt_tokens")),
            whole_number(usage.get("completion_tokens")),
            whole_number(_inner(usage, "prompt_tokens_details", "cached_tokens")),
            whole_number(_inner(usage, "completion_tokens_details", "reasoning_tokens")),
            _cost(usage),
        )


def _inner(value: dict[str, Any], name: str, field: str) -> object:
    details = value.get(name)
    return details.get(field) if isinstance(details, dict) else None


def _cost(usage: dict[str, Any]) -> float | None:
    """Return the cost of a reply in dollars, where the server reports it.

    OpenRouter reports its own charge in credits of one dollar. With the user's key at a provider, the
    provider charges the user as well. xAI reports a whole number of small units.
    """
    units, cost = _amount(usage.get("cost_in_usd_ticks")), _amount(usage.get("cost"))
    if units is not None:
        return units / _XAI_UNITS_PER_DOLLAR
    if usage.get("is_byok") is not True:
        return cost
    charge = _amount(_inner(usage, "cost_details", "upstream_inference_cost"))
    return None if cost is None or charge is None else cost + charge


def _amount(value: object) -> float | None:
    """Return an amount that a server reports as a number; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 <= value <= _MAX_AMOUNT else None


def _first_choice(choices: object) -> dict[str, Any]:
    """Return the choice with index 0 or without an index; empty if there is none."""
    if choices in (None, []):
        return {}
    if not isinstance(choices, list):
        raise MalformedStream("a chunk in an unknown format")
    for choice in choices:
        if not isinstance(choice, dict):
            raise MalformedStream("a chunk in an unknown format")
        if choice.get("index") in (0, None):
            return choice
    return {}


def _split_content(content: object) -> tuple[str, str]:
    """Return the text and the reasoning of a content, which is a string or a list of parts."""
    if isinstance(content, str):
        return content, ""
    if not isinstance(content, list):
        return parse_text(content), ""
    texts, reasoning = [], []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict):
            texts.append(_part_text(part.get("text")))
            reasoning.append(_part_text(part.get("thinking")))
    return "".join(texts), "".join(reasoning)


def _part_text(value: object) -> str:
    """Return the text of a part: a string, an object with a value, or (Mistral) a list of parts."""
    if isinstance(value, list):
        return "".join(parse_text(part.get("text")) for part in value if isinstance(part, dict))
    return parse_text(value.get("value") if isinstance(value, dict) else value)


def _reasoning(part: dict[str, Any]) -> str:
    """Return the reasoning next to a text; ignores values of other types, such as settings."""
    for name in ("reasoning", "reasoning_content"):
        value = part.get(name)
        if value and isinstance(value, str | list):
            return _split_content(value)[0]
    return ""
