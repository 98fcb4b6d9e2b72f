"""Each provider of the table against a server that behaves as the provider documents."""

from __future__ import annotations

import getpass
from collections.abc import Iterator
from typing import Any

import pytest

from llm_magic.backends.registry import backend_class
from llm_magic.config.providers import PROVIDERS, of_model
from llm_magic.errors import (
    AuthenticationFailed,
    LLMMagicError,
    ModelNotFound,
    OptionError,
    RequestFailed,
    ServerUnreachable,
)
from llm_magic.session import Session
from llm_magic.session.requests import Request
from tests.generation_options import EVERY
from tests.provider_server import APIS, KEY, ProviderServer
from tests.remote_sessions import NOW
from tests.scripted import settings
from tests.wire import Step, error_answer, json_answer, sse

HOSTED = [p.name for p in PROVIDERS.values() if p.key_variable]
every_provider = pytest.mark.parametrize("name", PROVIDERS)


@pytest.fixture(scope="module")
def server() -> Iterator[ProviderServer]:
    with ProviderServer() as running:
        yield running


@pytest.fixture
def session(server: ProviderServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Session]:
    server.received.clear()
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    made = Session()
    yield made
    made.close()


def model_of(name: str) -> str:
    return next(iter(APIS[name].models))


def loaded(session: Session, name: str) -> list[str]:
    """Load the model of a provider, and return the notes."""
    return list(session.load_with_details(model_of(name), backend=name).notes)


def body(server: ProviderServer, name: str) -> dict[str, Any]:
    """Return the last request for a reply."""
    sent: dict[str, Any] = server.requests_to(server.chat(name))[-1].json
    return sent


@every_provider
def test_defaults_are_accepted_at_once(session: Session, server: ProviderServer, name: str) -> None:
    loaded(session, name)
    reply = session.generate("one two three", max_new_tokens=2)
    assert (reply.text, reply.finish_reason, reply.usage.completion_tokens) == (
        "one two",
        "length",
        2,
    )
    assert len(server.requests_to(server.chat(name))) == 1, "nothing was refused first"
    assert server.silently_changed == []


@every_provider
def test_models_are_listed_by_the_names_that_requests_use(session: Session, name: str) -> None:
    listed = [info.name for info in session.models(name)]
    assert listed == list(APIS[name].models)


@pytest.mark.parametrize(
    ("name", "alias"), [("anthropic", "claude-test-latest"), ("xai", "grok-test-latest")]
)
def test_alias_is_loaded_and_requested(
    session: Session, server: ProviderServer, name: str, alias: str
) -> None:
    assert session.load(alias, backend=name).name == alias
    assert session.generate("one two").text == "one two"
    assert body(server, name)["model"] == alias


@every_provider
def test_declared_options_are_sent_and_accepted(
    session: Session, server: ProviderServer, name: str
) -> None:
    loaded(session, name)
    supported = {n: v for n, v in EVERY.items() if backend_class(name).supports(n)}
    if name == "anthropic":
        del supported["top_p"]
    if name == "openrouter":
        del supported["top_k"]
    if name == "xai":
        del supported["stop"]
    session.generate("one two", **supported)
    sent = body(server, name)
    names = backend_class(name).option_names
    assert {
        names[n]: list(v) if n == "stop" else v for n, v in supported.items()
    }.items() <= sent.items()
    assert server.silently_changed == []


@pytest.mark.parametrize(
    ("name", "option", "error"),
    [(p.name, option, f"{p.name} does not support --{option.replace('_', '-')}")
     for p in PROVIDERS.values() for option in p.unsupported]
    + [("openrouter", "top_k", "open/test on openrouter does not support top_k. Remove it.")],
)  # fmt: skip
def test_option_that_would_be_ignored_is_an_error_before_the_call(
    session: Session, server: ProviderServer, name: str, option: str, error: str
) -> None:
    loaded(session, name)
    with pytest.raises(OptionError) as caught:
        session.generate("x", **{option: EVERY[option]})
    assert str(caught.value).startswith(error)
    assert not server.requests_to(server.chat(name))


def test_options_that_are_not_sent_are_noted_at_load(session: Session) -> None:
    assert not loaded(session, "gemini")
    assert not loaded(session, "openrouter"), "nothing was set that the model does not get"
    active = session.status().active
    assert active is not None
    assert active.unsupported == ("top_k",)
    assert any("temperature has no effect" in note for note in loaded(session, "deepseek"))


@pytest.mark.parametrize(
    ("options", "sent"),
    [({}, {"temperature": 0.7}), ({"top_p": 0.5}, {"top_p": 0.5}), ({"temperature": 1}, {"temperature": 1})],
)  # fmt: skip
def test_anthropic_gets_temperature_or_top_p(
    session: Session, server: ProviderServer, options: dict[str, Any], sent: dict[str, float]
) -> None:
    loaded(session, "anthropic")
    session.generate("x", **options)
    request = body(server, "anthropic")
    assert {n: request[n] for n in ("temperature", "top_p") if n in request} == sent
    dry = session.dry_run(Request("x", options=options)).config
    assert {n: v for n in ("temperature", "top_p") if (v := getattr(dry, n)) is not None} == sent


@pytest.mark.parametrize("name", ["anthropic", "lmstudio"])
def test_empty_system_prompt_reaches_servers_with_chat_templates(
    session: Session, server: ProviderServer, name: str
) -> None:
    """It keeps them from adding the system prompt of the template; hosted models have none."""
    loaded(session, name)
    session.generate("x", system="")
    roles = [message["role"] for message in body(server, name)["messages"]]
    assert roles == (["user"] if name == "anthropic" else ["system", "user"])


def test_anthropic_gets_both_if_both_are_set(session: Session) -> None:
    loaded(session, "anthropic")
    with pytest.raises(RequestFailed, match="cannot both be specified for this model"):
        session.generate("x", temperature=0.2, top_p=0.5)


def test_default_that_a_model_rejects_in_words_is_omitted(
    session: Session, server: ProviderServer
) -> None:
    """The newest Claude models accept no temperature, and name the field in their message only."""
    loaded(session, "anthropic")
    server.will(
        server.chat("anthropic"), *error_answer(400, "`temperature` is deprecated for this model.")
    )
    assert session.generate("one two").text == "one two"
    assert not {"temperature", "top_p"} & body(server, "anthropic").keys()


@pytest.mark.parametrize(("name", "limit"), [("anthropic", 1), ("mistral", 1.5)])
def test_temperature_that_would_be_cut_is_an_error(
    session: Session, server: ProviderServer, name: str, limit: float
) -> None:
    loaded(session, name)
    with pytest.raises(
        OptionError, match=f"{name} accepts a temperature of at most {limit}, but it is set to 1.8"
    ):
        session.generate("x", temperature=1.8)
    assert not server.requests_to(server.chat(name))


def test_stop_that_a_model_rejects_is_an_error(session: Session) -> None:
    loaded(session, "xai")
    with pytest.raises(RequestFailed, match="Argument not supported on this model: stop"):
        session.generate("x", stop=("END",))


# -- keys -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTED)
def test_wrong_key_names_its_variable(
    session: Session, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    variable = PROVIDERS[name].key_variable
    monkeypatch.setenv(variable, "sk-wrong-000000000wrng")
    with pytest.raises(AuthenticationFailed, match=f"rejected the key in {variable} ") as caught:
        loaded(session, name)
    assert "wrng" not in str(caught.value)
    assert session.status().status == "Failed"


@pytest.mark.parametrize("name", HOSTED)
def test_missing_key_names_its_variable_and_sends_nothing(
    server: ProviderServer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    provider = PROVIDERS[name]
    for variable in (provider.key_variable, provider.url_variable):
        monkeypatch.delenv(variable, raising=False)
    session = Session(settings())
    with pytest.raises(OptionError) as caught:
        session.load("any", backend=name)
    session.close()
    assert str(caught.value).startswith(f"{provider.key_variable} is not set, and ")
    assert "Set" in str(caught.value)
    assert "%env" in str(caught.value)


def test_missing_key_can_be_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    questions: list[str] = []

    def ask(question: str) -> str:
        questions.append(question)
        return KEY

    monkeypatch.setattr(getpass, "getpass", ask)
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("GROQ_API_KEY", raising=False)
    session = Session(settings())
    for _ in range(2):
        with pytest.raises(ServerUnreachable, match=r"cannot connect to https://api\.groq\.com"):
            session.load("any", backend="groq")
    session.close()
    assert questions == [
        "Key for https://api.groq.com (GROQ_API_KEY is not set; Enter without a key cancels): "
    ]


@pytest.mark.parametrize("name", HOSTED)
def test_key_goes_to_no_other_server(
    server: ProviderServer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A notebook of another author names its own server, and the variable that people have set."""
    provider = PROVIDERS[name]
    monkeypatch.setenv(provider.key_variable, KEY)
    monkeypatch.delenv(provider.url_variable, raising=False)
    server.received.clear()
    session = Session(settings())
    with pytest.raises(LLMMagicError):
        session.load("any", backend=name, base_url=server.address(name))
    for backend in (name, "openai", "vllm"):
        with pytest.raises(
            OptionError, match=rf"is the key for {provider.url[:16]}.* is not sent to"
        ):
            session.load("any", backend=backend, base_url=server.url, key_env=provider.key_variable)
    session.close()
    assert not [r for r in server.received if {"authorization", "x-api-key"} & r.headers.keys()]


# -- error responses -------------------------------------------------------------------------------------

_ANTHROPIC_SPEND = {
    "type": "error",
    "error": {
        "type": "rate_limit_error", "message": "This request would exceed your spend limit.",
        "details": {"error_code": "enforced_spend_limit_reached"},
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "answer", "message", "requests"),
    [
        ("deepseek", error_answer(402, "Insufficient Balance"),
         "has no credit left (402): Insufficient Balance. Add credit there,", 1),
        ("openai", error_answer(429, "You exceeded your current quota.", "insufficient_quota", NOW),
         "has no credit left (429): You exceeded your current quota. Add credit", 1),
        ("anthropic", json_answer(429, _ANTHROPIC_SPEND, NOW), "has no credit left (429): This request", 1),
        ("anthropic", error_answer(400, "Your credit balance is too low to access the Anthropic API."),
         "has no credit left (400): Your credit", 1),
        ("xai", json_answer(403, {"code": "x", "error": "Your team doesn't have any credits yet."}),
         "has no credit left (403): Your team", 1),
        ("groq", error_answer(429, "Rate limit reached for model.", "rate_limit_exceeded",
                              {"Retry-After": "90"}),
         "received too many requests (429): Rate limit reached for model. Try again in 90 s.", 1),
        ("anthropic", json_answer(529, {"type": "error", "error": {"type": "overloaded_error",
                                                                   "message": "Overloaded"}}, NOW),
         "is not ready or is overloaded (529): Overloaded. Try again later.", 3),
        ("deepseek", error_answer(503, "Server overloaded", None, NOW),
         "is not ready or is overloaded (503): Server overloaded.", 3),
        ("openai", error_answer(403, "Country, region, or territory not supported",
                                "unsupported_country_region_territory"),
         "is not available from this region (403): Country, region, or territory not supported. Load", 1),
        ("gemini", json_answer(400, [{"error": {"code": 400, "status": "FAILED_PRECONDITION",
                                                "message": "User location is not supported for the API."}}]),
         "is not available from this region (400): User location is not supported", 1),
        ("openrouter", error_answer(403, "Your chosen model requires moderation and your input was flagged"),
         "denied access with the key in OPENROUTER_API_KEY (403): Your chosen model", 1),
        ("groq", error_answer(404, "The model `x` has been decommissioned."),
         "rejected the request (404): The model `x` has been decommissioned. Load a model that it has:"
         " %llm_models -b groq", 1),
        ("openrouter", sse({"id": "1", "choices": [{"index": 0, "delta": {"content": ""},
                                                    "finish_reason": "error"}],
                            "error": {"code": 400, "message": "Provider returned error"}}),
         "stopped with an error: Provider returned error.", 1),
    ],
)  # fmt: skip
def test_error_response_is_one_line_with_a_fix(
    session: Session,
    server: ProviderServer,
    name: str,
    answer: list[Step],
    message: str,
    requests: int,
) -> None:
    loaded(session, name)
    for _ in range(requests):
        server.will(server.chat(name), *answer)
    with pytest.raises(LLMMagicError) as caught:
        session.generate("one two")
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert len(server.requests_to(server.chat(name))) == requests
    assert session.generate("three four").text == "three four"


@pytest.mark.parametrize("name", PROVIDERS)
def test_unknown_model_suggests_a_near_name(session: Session, name: str) -> None:
    with pytest.raises(ModelNotFound) as caught:
        session.load(f"{model_of(name)}x", backend=name)
    assert f'Did you mean "{model_of(name)}"' in str(caught.value)
    assert f"%llm_models -b {name}" in str(caught.value)


# -- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "backend", "own"),
    [
        ("gpt-4o", "openai", "gpt-4o"), ("openai/gpt-4o", "openai", "gpt-4o"), ("o3", "openai", "o3"),
        ("o4-mini", "openai", "o4-mini"), ("chatgpt-4o-latest", "openai", "chatgpt-4o-latest"),
        ("claude-sonnet-4-5", "anthropic", "claude-sonnet-4-5"),
        ("anthropic/claude-opus-4", "anthropic", "claude-opus-4"),
        ("gemini-2.5-flash", "gemini", "gemini-2.5-flash"),
        ("google/gemini-2.5-pro", "gemini", "gemini-2.5-pro"),
        ("models/gemini-2.5-pro", "gemini", "gemini-2.5-pro"),
        ("mistral-large", "mistral", "mistral-large"),
        ("mistral-small-2506", "mistral", "mistral-small-2506"),
        ("codestral-latest", "mistral", "codestral-latest"),
        ("deepseek-chat", "deepseek", "deepseek-chat"),
        ("deepseek/deepseek-reasoner", "deepseek", "deepseek-reasoner"),
        ("deepseek-v4-flash", "deepseek", "deepseek-v4-flash"),
        ("grok-4", "xai", "grok-4"), ("x-ai/grok-4", "xai", "grok-4"),
        ("llama-3.3-70b-versatile", "groq", "llama-3.3-70b-versatile"),
        ("meta-llama/Llama-3.3-70B-Instruct-Turbo", "together", "meta-llama/Llama-3.3-70B-Instruct-Turbo"),
        ("openrouter/auto", "openrouter", "auto"), ("openai:gpt-4o", "openai", "gpt-4o"),
        ("anthropic:claude-opus-4", "anthropic", "claude-opus-4"),
    ],
)  # fmt: skip
def test_name_of_a_hosted_model_is_known(model: str, backend: str, own: str) -> None:
    provider = of_model(model)
    assert provider is not None
    assert (provider.name, provider.api_name(model)) == (backend, own)


@pytest.mark.parametrize(
    "model",
    ["gpt2", "openai-community/gpt2", "openai/gpt-oss-20b", "openai/whisper-tiny", "EleutherAI/gpt-neo-125m",
     "gpt-neo", "google/gemma-3-1b-it", "mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b", "orca-mini",
     "mistralai/Magistral-Small-2506", "mistralai/Mistral-Large-Instruct-2411", "deepseek-ai/DeepSeek-V3",
     "deepseek-coder", "deepseek-r1", "xai-org/grok-1", "meta-llama/Llama-3.3-70B-Instruct", "o", "olmo",
     "SmolLM2-135M-Instruct", "", "llama3.2", "Qwen/Qwen2.5-7B-Instruct"],
)  # fmt: skip
def test_name_on_the_hub_belongs_to_no_provider(model: str) -> None:
    assert of_model(model) is None


@pytest.mark.parametrize("name", PROVIDERS)
def test_entry_is_whole(name: str) -> None:
    provider = PROVIDERS[name]
    assert provider.page.startswith("https://")
    is_hosted = provider.url.startswith("https://")
    assert is_hosted == bool(provider.key_variable) == (not provider.start)
    assert backend_class(name).name == name
