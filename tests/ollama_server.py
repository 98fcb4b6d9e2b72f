"""An Ollama on a real socket, without a model behind it; see `tests.ollama_models` for its sources.

    with OllamaServer() as server:
        ollama.Client(server.url).chat("llama3.2", [{"role": "user", "content": "Hello"}])
        assert "llama3.2:latest" in server.running

It repeats the question word by word, in an order that a seed decides where one is given; a word is
a token. Scripts (`will`), `pace`, and `received` are those of every `HttpServer`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from tests.exchange import Received
from tests.http_server import HttpServer
from tests.ollama_answers import Answer, OllamaRequest, chat_object, generate_object, reply
from tests.ollama_models import (
    OllamaModel,
    RefusedError,
    Runner,
    Running,
    full_name,
    keep_alive,
    options,
    runner,
    thinks,
)
from tests.wire import NDJSON, Head, Pause, Step, json_answer, lines, text_answer

Steps = Generator[Step, None, None]
_Shape = Callable[[OllamaRequest, Mapping[str, str]], dict[str, Any]]

MODELS = (
    OllamaModel("llama3.2"),
    OllamaModel(
        "qwen3:0.6b", family="qwen3", parameter_size="751.63M", size=522_653_767,
        context_length=40_960, capabilities=("completion", "tools", "thinking"),
    ),
)  # fmt: skip
LIBRARY = (OllamaModel("gemma3:270m", family="gemma3", parameter_size="268.10M", size=291_554_930),)


@dataclass(frozen=True)
class _Route:
    method: str
    reply: Callable[[Received], Iterable[Step]]


class OllamaServer(HttpServer):
    """Has `models`, can pull those in `library`, and keeps some `running`, all by full names."""

    version = "0.33.0"

    def __init__(
        self, models: Sequence[OllamaModel] = MODELS, library: Sequence[OllamaModel] = LIBRARY
    ) -> None:
        super().__init__()
        self.models = {model.full_name: model for model in models}
        self.library = {model.full_name: model for model in library}
        self.running: dict[str, Running] = {}
        self.load_s = 0.0  # seconds that loading a model takes
        self.loads: Counter[str] = Counter()  # how often each model was read into memory
        self.pull_pieces = 10  # progress lines of the largest file of a pull
        self.pulled: dict[str, int] = {}  # bytes of each file here; interrupted pulls go on there

    def answer(self, request: Received) -> Steps:
        """Answer as an Ollama does that nothing is wrong with."""
        route = self._routes().get(request.path)
        if route is None:
            yield from text_answer(404, "404 page not found")
        elif route.method != ("GET" if request.method == "HEAD" else request.method):
            yield from text_answer(405, "405 method not allowed")
        else:
            try:
                yield from route.reply(request)
            except RefusedError as refused:
                yield from json_answer(refused.status, {"error": refused.message})

    def _routes(self) -> dict[str, _Route]:
        return {
            "/": _Route("GET", lambda _: text_answer(200, "Ollama is running")),
            "/api/version": _Route("GET", lambda _: _json({"version": self.version})),
            "/api/tags": _Route("GET", lambda _: _json({"models": self._tags()})),
            "/api/ps": _Route("GET", lambda _: _json({"models": self._ps()})),
            "/api/show": _Route("POST", self._show),
            "/api/pull": _Route("POST", self._pull),
            "/api/chat": _Route("POST", self._chat),
            "/api/generate": _Route("POST", self._generate),
        }

    def _tags(self) -> list[dict[str, Any]]:
        newest = sorted(self.models.values(), key=lambda m: m.modified_at, reverse=True)
        return [model.tag() for model in newest]

    def _ps(self) -> list[dict[str, Any]]:
        now = datetime.now(UTC)
        self.running = {n: one for n, one in self.running.items() if one.expires_at > now}
        longest = sorted(self.running.values(), key=lambda one: one.expires_at, reverse=True)
        return [one.entry() for one in longest]

    def _model(self, name: str) -> OllamaModel:
        try:
            return self.models[full_name(name)]
        except KeyError:
            raise RefusedError(404, f"model '{name}' not found") from None

    def _show(self, request: Received) -> Steps:
        body = _body(request)
        name = body.get("model") or body.get("name")
        if not name:
            raise RefusedError(400, "model is required")
        yield from _json(self._model(name).page())

    def _pull(self, request: Received) -> Steps:
        body = _body(request)
        name = body.get("model") or body.get("name")
        if not name:
            raise RefusedError(400, "invalid model name")
        if body.get("stream") is not False:
            yield Head(200, NDJSON)
            for status in self._pulling(full_name(name)):
                yield from lines(status)
            return
        *_, status = self._pulling(full_name(name))
        yield from json_answer(500 if "error" in status else 200, status)

    def _pulling(self, name: str) -> Iterator[dict[str, Any]]:
        """Yield how a pull goes on; one that was interrupted goes on where it was."""
        yield {"status": "pulling manifest"}
        if name not in self.library:
            yield {"error": "pull model manifest: file does not exist"}
            return
        model = self.library[name]
        for digest, total in model.layers():
            step = max(1, -(-model.size // self.pull_pieces))
            status = {"status": f"pulling {digest[7:19]}", "digest": digest, "total": total}
            while (done := self.pulled.get(digest, 0)) < total:
                yield status | ({"completed": done} if done else {})
                self.pulled[digest] = min(total, done + step)
            yield status | {"completed": total}
        yield {"status": "verifying sha256 digest"}
        yield {"status": "writing manifest"}
        self.models[name] = model
        yield {"status": "success"}

    def _load(self, model: OllamaModel, required: Runner, stays: timedelta) -> Steps:
        """Have a model in memory, loaded as a request requires it, until it expires."""
        running = self.running.get(model.full_name)
        if running is None or running.runner != required:
            self.loads[model.full_name] += 1
            if self.load_s:
                yield Pause(self.load_s)
        self.running[model.full_name] = Running(model, required, datetime.now(UTC) + stays)

    def _chat(self, request: Received) -> Steps:
        body = _body(request)
        if not body.get("model"):
            raise RefusedError(400, "model is required")
        yield from self._complete(body, body.get("messages") or [], chat_object)

    def _generate(self, request: Received) -> Steps:
        body = _body(request)
        prompt = [{"role": "user", "content": body["prompt"]}] if body.get("prompt") else []
        system = [{"role": "system", "content": body["system"]}] if body.get("system") else []
        yield from self._complete(body, system + prompt if prompt else [], generate_object)

    def _complete(
        self, body: dict[str, Any], messages: Sequence[Mapping[str, Any]], shape: _Shape
    ) -> Steps:
        """Answer a question; without one, load the model or let it go."""
        question = OllamaRequest(body.get("model", ""))
        model = self._model(question.model)
        stays = keep_alive(body.get("keep_alive"))
        if not messages and not stays:
            self.running.pop(model.full_name, None)
            yield from _json(shape(question, {}) | {"done": True, "done_reason": "unload"})
            return
        question = replace(
            question, messages=messages, options=options(body), thinks=thinks(body, model),
            truncate=body.get("truncate") is not False,
            logprobs=body.get("top_logprobs", 0) if body.get("logprobs") else None,
        )  # fmt: skip
        yield from self._load(model, runner(body, question.options, model), stays)
        if not messages:
            yield from _json(shape(question, {}) | {"done": True, "done_reason": "load"})
            return
        answer = reply(question, self.running[model.full_name].runner)
        try:
            if body.get("stream") is False:
                yield Pause(self.pace * len(answer.pieces))
                yield from _json(shape(question, answer.whole()) | answer.end())
            else:
                yield from _stream(question, answer, shape)
        finally:
            if not stays:
                self.running.pop(model.full_name, None)


def _stream(question: OllamaRequest, answer: Answer, shape: _Shape) -> Steps:
    yield Head(200, NDJSON)
    for part, text in answer.pieces:
        yield from lines(shape(question, {part: text}))
    yield from lines(shape(question, {}) | answer.end())


def _json(value: Any) -> Steps:
    yield from json_answer(200, value)


def _body(request: Received) -> dict[str, Any]:
    if not request.body:
        raise RefusedError(400, "missing request body")
    try:
        body = request.json
    except ValueError as error:
        raise RefusedError(400, str(error)) from None
    if not isinstance(body, dict):
        raise RefusedError(400, "json: cannot unmarshal into Go value")
    return body
