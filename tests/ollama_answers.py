"""The answers of the double of Ollama to a question, as objects; pure, no I/O."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from tests.ollama_models import RefusedError, Runner, stamp
from tests.wire import token_entry


@dataclass(frozen=True)
class OllamaRequest:
    """A question: what `/api/chat` and `/api/generate` have in common."""

    model: str
    messages: Sequence[Mapping[str, Any]] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    thinks: bool = False
    truncate: bool = True
    logprobs: int | None = None
    began: int = field(default_factory=time.monotonic_ns)


@dataclass(frozen=True)
class Answer:
    """An answer, token by token, and why it ended."""

    pieces: tuple[tuple[str, str], ...]
    reason: str
    prompt_tokens: int
    began: int
    loaded: int = field(default_factory=time.monotonic_ns)

    def whole(self) -> dict[str, str]:
        """Return the parts that there are, each in one."""
        parts: dict[str, str] = {}
        for part, text in self.pieces:
            parts[part] = parts.get(part, "") + text
        return parts

    def end(self) -> dict[str, Any]:
        """Return the fields that only the last object has; times are in nanoseconds."""
        now = time.monotonic_ns()
        metrics = {
            "total_duration": now - self.began,
            "load_duration": self.loaded - self.began,
            "prompt_eval_count": self.prompt_tokens,
            "prompt_eval_duration": self.prompt_tokens * 1_000_000,
            "eval_count": len(self.pieces),
            "eval_duration": now - self.loaded,
        }
        # Go leaves out what is zero.
        counted = {name: value for name, value in metrics.items() if value}
        return {"done": True, "done_reason": self.reason, **counted}


def reply(request: OllamaRequest, runner: Runner) -> Answer:
    """Return the last message again: in the order of the seed, to a stop string, to a length.

    The context limits the answer too, unless the runner shifts it: then it removes the beginning of
    the prompt, and goes on.
    """
    messages = _within_context(request, runner.num_ctx)
    question = messages[-1].get("content") or ""
    reply_tokens = tokens(question)
    if "seed" in request.options:
        random.Random(request.options["seed"]).shuffle(reply_tokens)
    reply_tokens = tokens(_until("".join(reply_tokens), request.options.get("stop") or ()))
    reasoning = tokens(f"Somebody asks: {question}") if request.thinks else []
    every: list[tuple[str, str]] = [
        *(("thinking", token) for token in reasoning),
        *(("content", token) for token in reply_tokens),
    ]
    limits = [request.options.get("num_predict", -1)]
    if not runner.shift:
        limits.append(runner.num_ctx - _count(messages))
    limit = min((limit for limit in limits if limit > 0), default=len(every))
    cut = limit < len(every)
    return Answer(
        tuple(every[:limit] if cut else every),
        "length" if cut else "stop",
        _count(messages),
        request.began,
    )


def tokens(text: str) -> list[str]:
    """Return the words with the spaces before them."""
    return re.findall(r"\s*\S+|\s+$", text)


def chat_object(request: OllamaRequest, parts: Mapping[str, str]) -> dict[str, Any]:
    """Return one object of `/api/chat`, as it is before the last one."""
    message = {"role": "assistant", "content": "", **parts}
    # Version 0.12.11 and newer.
    has_tokens = request.logprobs is not None and bool(parts)
    entries = [token_entry(text, request.logprobs or 0) for text in parts.values()]
    logprobs = {"logprobs": entries} if has_tokens else {}
    return {**_start(request), "message": message, **logprobs, "done": False}


def generate_object(request: OllamaRequest, parts: Mapping[str, str]) -> dict[str, Any]:
    """Return one object of `/api/generate`, as it is before the last one."""
    thinking = {"thinking": parts["thinking"]} if "thinking" in parts else {}
    return {**_start(request), "response": parts.get("content", ""), **thinking, "done": False}


def _start(request: OllamaRequest) -> dict[str, Any]:
    return {"model": request.model, "created_at": stamp(datetime.now(UTC))}


def _within_context(request: OllamaRequest, num_ctx: int) -> list[Mapping[str, Any]]:
    """Return the messages that fit: the oldest are dropped in silence, unless that is forbidden."""
    messages = list(request.messages)
    if not request.truncate and _count(messages) >= num_ctx:
        raise RefusedError(400, _too_long(_count(messages), num_ctx))
    system = [m for m in messages[:-1] if m["role"] == "system"]
    others = [m for m in messages if m not in system]
    while len(others) > 1 and _count([*system, *others]) > num_ctx:
        del others[0]
    return [*system, *others]


def _too_long(prompt: int, num_ctx: int) -> str:
    """Return the error of llama.cpp's server, which Ollama passes on as the text of its own error."""
    exceeds = f"exceeds the available context size ({num_ctx} tokens), try increasing it"
    message = f"request ({prompt} tokens) {exceeds}"
    error = {
        "code": 400, "message": message, "type": "exceed_context_size_error",
        "n_prompt_tokens": prompt, "n_ctx": num_ctx,
    }  # fmt: skip
    return json.dumps({"error": error})


def _count(messages: Sequence[Mapping[str, Any]]) -> int:
    return sum(len(tokens(message.get("content") or "")) for message in messages)


def _until(text: str, stops: Sequence[str]) -> str:
    ends = [text.find(stop) for stop in stops if stop in text]
    return text[: min(ends)] if ends else text
