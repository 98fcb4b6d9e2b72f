"""A server compatible with OpenAI's API on a real socket, which fails in every way that a script contains.

    with FaultServer() as server:  # the steps of a script are in tests.wire
        server.will(CHAT, *sse(delta("Hel"), done=False), Hold())
        ...  # ask server.url for an answer, and give up on it
        assert server.received[-1].left.wait(1)

Without a script it lists two models and repeats the last message word by word.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable, Mapping
from typing import Any

from tests.exchange import Received
from tests.http_server import HttpServer
from tests.wire import Step, counts, error_answer, json_answer, sse_words

CHAT = "/v1/chat/completions"
MODELS = "/v1/models"


class FaultServer(HttpServer):
    """Serves `models`, each with the other fields of its entry in the list; to `key` only, if set."""

    def __init__(
        self, models: Mapping[str, Mapping[str, Any]] | None = None, key: str | None = None
    ) -> None:
        super().__init__()
        self.models = dict(models or {"tiny": {}, "big": {}})
        self.key = key

    def answer(self, request: Received) -> Generator[Step, None, None]:
        """Answer as a server does that nothing is wrong with."""
        yield from self._reply(request)

    def _reply(self, request: Received) -> Iterable[Step]:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.key is not None and given != self.key:
            # As OpenAI does: a part of a wrong key comes back.
            return error_answer(401, f"Incorrect API key provided: {given[:8]}.", "invalid_api_key")
        if (request.method, request.path) == ("GET", MODELS):
            entries = [_entry(name, extra) for name, extra in self.models.items()]
            return json_answer(200, {"object": "list", "data": entries})
        if (request.method, request.path) == ("POST", CHAT):
            return self._chat(request)
        return error_answer(404, f"Invalid URL ({request.method} {request.path})")

    def _chat(self, request: Received) -> Iterable[Step]:
        try:
            body = request.json
            model, message = body["model"], body["messages"][-1]
        except (ValueError, LookupError, TypeError) as error:
            return error_answer(400, f"What is no chat: {error!r}")
        if model not in self.models:
            return error_answer(404, f"The model `{model}` does not exist.", "model_not_found")
        every = re.findall(r"\s*\S+", _text(message["content"]))
        limit = body.get("max_completion_tokens") or body.get("max_tokens") or len(every)
        reply, finish = every[:limit], "length" if limit < len(every) else "stop"
        prompt_tokens = sum(len(_text(m["content"]).split()) for m in body["messages"])
        if not body.get("stream"):
            return json_answer(200, _completion(model, reply, finish, prompt_tokens))
        has_usage = (body.get("stream_options") or {}).get("include_usage")
        return sse_words(
            *reply,
            finish=finish,
            model=model,
            prompt_tokens=prompt_tokens if has_usage else None,
            logprobs=body.get("top_logprobs", 0) if body.get("logprobs") else None,
        )


def _entry(name: str, extra: Mapping[str, Any]) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 1_760_000_000, "owned_by": "tests", **extra}


def _text(content: str | list[dict[str, Any]]) -> str:
    """Return the text of a message, which may come in parts."""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)


def _completion(model: str, reply: list[str], finish: str, prompt_tokens: int) -> dict[str, Any]:
    message = {"role": "assistant", "content": "".join(reply)}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1_760_000_000,
        "model": model,
        "choices": [choice],
        "usage": counts(prompt_tokens, len(reply)),
    }
