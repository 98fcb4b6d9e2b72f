"""A server that behaves as the hosted providers document their OpenAI-compatible APIs, one below each path.

    with ProviderServer() as server:
        session.load("claude-test", backend="anthropic", base_url=server.address("anthropic"))

Each API has the key `KEY` and a few models. It rejects what its provider rejects, with the provider's error
response; what its provider ignores or changes in silence is listed in `silently_changed`. The sources
are in docs/guides/hosted-providers.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from llm_magic.config.providers import PROVIDERS
from tests.exchange import Received
from tests.http_server import HttpServer
from tests.wire import Step, error_answer, json_answer, sse_words

KEY = "sk-provider-5c1d77e09ab3"
_LOGPROBS = " logprobs top_logprobs"
_OPENAI = (
    "model messages max_tokens max_completion_tokens temperature top_p stop stream stream_options seed n"
    " user response_format tools tool_choice presence_penalty frequency_penalty reasoning_effort"
    f"{_LOGPROBS}"
)
Refuse = Callable[[str], list[Step]]


def _openai_style(text: str, status: int = 400) -> Refuse:
    return lambda field: error_answer(status, text.format(field=field))


def _gemini(status: int, message: str, kind: str) -> list[Step]:
    error = {"code": status, "message": message, "status": kind}
    return json_answer(status, [{"error": error}])


def _anthropic(status: int, message: str, kind: str, **details: str) -> list[Step]:
    error: dict[str, Any] = {"type": kind, "message": message}
    if details:
        error["details"] = details
    return json_answer(status, {"type": "error", "error": error, "request_id": "req_1"})


def _mistral_extra(field: str) -> list[Step]:
    loc = (
        ["body", "stream_options", "include_usage"]
        if field == "stream_options"
        else ["body", field]
    )
    detail = [{"type": "extra_forbidden", "loc": loc, "msg": "Extra inputs are not permitted"}]
    return json_answer(
        422, {"object": "error", "message": {"detail": detail}, "type": "invalid_request_error",
              "param": None, "code": None},
    )  # fmt: skip


def _xai(message: str, status: int = 400) -> list[Step]:
    return json_answer(status, {"code": "Client specified an invalid argument", "error": message})


def _mistral(status: int, message: str) -> list[Step]:
    return json_answer(status, {"object": "error", "message": message, "type": "invalid_request"})


@dataclass(frozen=True)
class Api:
    """One API: its models, the fields it accepts and ignores, and how it refuses.

    `refuse` answers a field that is neither accepted nor ignored; without it, such a field is ignored.
    """

    models: Mapping[str, Mapping[str, Any]]
    accepted: str
    wrong_key: list[Step]
    no_model: Callable[[str], list[Step]]
    refuse: Refuse | None = None
    ignored: str = ""
    list_prefix: str = ""


_COMMON_404 = "The model `{}` does not exist or you do not have access to it."
APIS: Mapping[str, Api] = {
    "openai": Api(
        {"gpt-test": {}}, _OPENAI,
        error_answer(401, f"Incorrect API key provided: {KEY[:6]}****wrng.", "invalid_api_key"),
        lambda m: error_answer(404, _COMMON_404.format(m), "model_not_found"),
        _openai_style("Unrecognized request argument supplied: {field}"),
    ),
    "anthropic": Api(
        {"claude-test": {"type": "model", "display_name": "Claude Test"}},
        "model messages max_tokens max_completion_tokens temperature top_p stop stream stream_options n",
        _anthropic(401, "invalid x-api-key", "authentication_error"),
        lambda m: _anthropic(404, f"model: {m}", "not_found_error"),
        ignored="seed logprobs metadata response_format presence_penalty frequency_penalty logit_bias user",
    ),
    "gemini": Api(
        {"gemini-test": {}, "gemini-other": {}},
        "model messages max_tokens max_completion_tokens temperature top_p stop stream stream_options n",
        _gemini(400, "API key not valid. Please pass a valid API key.", "INVALID_ARGUMENT"),
        lambda m: _gemini(404, f"models/{m} is not found for API version v1main.", "NOT_FOUND"),
        lambda field: _gemini(
            400, f'Invalid JSON payload received. Unknown name "{field}": Cannot find field.',
            "INVALID_ARGUMENT",
        ),
        list_prefix="models/",
    ),
    "mistral": Api(
        {"mistral-test": {}},
        "model messages max_tokens temperature top_p stop random_seed stream n response_format",
        json_answer(401, {"detail": "Unauthorized"}),
        lambda m: _mistral(400, f"Invalid model: {m}"),
        _mistral_extra,
    ),
    "groq": Api(
        {"llama-test": {"context_window": 8192}}, _OPENAI.removesuffix(_LOGPROBS),
        error_answer(401, "Invalid API Key", "invalid_api_key"),
        lambda m: error_answer(404, _COMMON_404.format(m), "model_not_found"),
        _openai_style("property '{field}' is unsupported"),
    ),
    "openrouter": Api(
        {
            "open/test": {
                "context_length": 4096,
                "supported_parameters": [
                    "max_tokens", "temperature", "top_p", "seed", "stop", "repetition_penalty",
                    "logprobs", "top_logprobs",
                ],
            },
        },
        f"{_OPENAI} top_k repetition_penalty",
        json_answer(401, {"error": {"message": "User not found.", "code": 401}}),
        lambda m: json_answer(400, {"error": {"message": f"{m} is not a valid model ID", "code": 400}}),
    ),
    "together": Api(
        {"org/Test-Instruct-Turbo": {}}, f"{_OPENAI.removesuffix(_LOGPROBS)} top_k repetition_penalty min_p",
        error_answer(401, "Invalid API key provided", "invalid_api_key"),
        lambda m: error_answer(404, f"Unable to access model {m}.", "model_not_available"),
    ),
    "deepseek": Api(
        {"deepseek-chat": {}},
        "model messages max_tokens temperature top_p stop stream stream_options response_format thinking"
        f"{_LOGPROBS}",
        error_answer(401, "Authentication Fails, Your api key: ****wrng is invalid"),
        lambda _m: error_answer(400, "Model Not Exist"),
    ),
    "xai": Api(
        {"grok-test": {"aliases": ["grok-test-latest"]}}, _OPENAI.replace(" stop ", " "),
        _xai("Incorrect API key provided: sk***ng. You can obtain an API key from https://console.x.ai."),
        lambda m: json_answer(404, {"code": "not found", "error": f"The model {m} does not exist"}),
        lambda field: _xai(f"Argument not supported on this model: {field}"),
    ),
    "lmstudio": Api(
        {"local-test": {}}, f"{_OPENAI.removesuffix(_LOGPROBS)} top_k repeat_penalty logit_bias", [],
        lambda m: error_answer(404, f'Model "{m}" not found'),
    ),
    "llamacpp-server": Api(
        {"gguf-test": {"meta": {"n_ctx": 2048}, "owned_by": "llamacpp"}},
        f"{_OPENAI} top_k repeat_penalty min_p", [],
        lambda m: error_answer(404, f'Model "{m}" not found'),
    ),
}  # fmt: skip


class ProviderServer(HttpServer):
    """Serves every API of the table below ``/at-NAME``."""

    def __init__(self) -> None:
        super().__init__()
        # Fields that an API ignored or changed without an error, which no request should have.
        self.silently_changed: list[str] = []

    def address(self, name: str) -> str:
        """Return the address of the API of a provider."""
        return f"{self.url}/at-{name}{urlsplit(PROVIDERS[name].url).path}"

    def chat(self, name: str) -> str:
        """Return the path of the chats of a provider."""
        return urlsplit(self._api_url(name)).path + "/chat/completions"

    def _api_url(self, name: str) -> str:
        local = PROVIDERS[name].start
        return self.address(name) + ("/v1" if local or name == "openai" else "")

    def environment(self) -> dict[str, str]:
        """Return the variables that let every provider be used, with its key."""
        keys = {p.key_variable: KEY for p in PROVIDERS.values() if p.key_variable}
        return keys | {p.url_variable: self.address(p.name) for p in PROVIDERS.values()}

    def answer(self, request: Received) -> Generator[Step, None, None]:
        """Answer as the provider documents."""
        yield from self._reply(request)

    def _reply(self, request: Received) -> Iterable[Step]:
        name = request.path.split("/")[1].removeprefix("at-")
        path = (self.url + request.path).removeprefix(self._api_url(name))
        api = APIS[name]
        # The list of OpenRouter is public.
        if not (name == "openrouter" and path == "/models") and not _has_key(request, name):
            return api.wrong_key
        if (request.method, path) == ("GET", "/language-models" if name == "xai" else "/models"):
            listed = [
                {"id": api.list_prefix + m, "object": "model", **e} for m, e in api.models.items()
            ]
            field = "models" if name == "xai" else "data"
            return json_answer(200, listed if name == "together" else {field: listed})
        if (request.method, path) == ("GET", "/key") and name == "openrouter":
            return json_answer(200, {"data": {"label": "test"}})
        if (name, path) == ("anthropic", "/models/claude-test-latest"):
            return json_answer(200, {"type": "model", "id": "claude-test"})
        if request.method == "GET" and path.startswith("/models/"):
            return api.no_model(path.removeprefix("/models/"))
        if (request.method, path) == ("POST", "/chat/completions"):
            return self._chat(name, request.json)
        return error_answer(404, f"Unknown request URL: {request.method} {request.path}")

    def _chat(self, name: str, body: dict[str, Any]) -> list[Step]:
        api = APIS[name]
        model = body["model"].removesuffix("-latest")
        if model not in api.models:
            return api.no_model(model)
        accepted = api.models[model].get("supported_parameters", [])
        for field in body:
            if field not in api.accepted.split():
                if api.refuse is not None and field not in api.ignored.split():
                    return api.refuse(field)
                self.silently_changed.append(f"{name}: {field}")
            if accepted and field in {"top_k", "seed", "stop", "repetition_penalty"} - {*accepted}:
                self.silently_changed.append(f"{name}: {field}")
        if name == "anthropic" and {"temperature", "top_p"} <= body.keys():
            text = "`temperature` and `top_p` cannot both be specified for this model. Please use only one."
            return _anthropic(400, text, "invalid_request_error")
        if name == "anthropic" and body.get("temperature", 0) > 1:
            self.silently_changed.append("anthropic: temperature")
        pieces = re.findall(r"\s*\S+", body["messages"][-1]["content"])
        limit = body["max_tokens"]
        return sse_words(
            *pieces[:limit], finish="length" if limit < len(pieces) else "stop", model=body["model"],
            prompt_tokens=len(pieces), logprobs=body.get("top_logprobs"),
        )  # fmt: skip


def _has_key(request: Received, name: str) -> bool:
    """Return whether a request has the key as the provider requires it."""
    if not PROVIDERS[name].key_variable:
        return True
    if name == "anthropic" and request.method == "GET":
        # Its own API: a bearer token is for OAuth there.
        headers = request.headers
        has_version = headers.get("anthropic-version") == "2023-06-01"
        return has_version and headers.get("x-api-key") == KEY and "authorization" not in headers
    return request.headers.get("authorization") == f"Bearer {KEY}"
