"""The options of a request: their fields on each server, and errors for those that it does not have."""

from __future__ import annotations

from typing import Any

import pytest

from llm_magic.backends.registry import backend_class
from llm_magic.errors import OptionError
from llm_magic.notebook.arguments import parser
from tests.fault_server import FaultServer
from tests.generation_options import EVERY
from tests.http_server import HttpServer
from tests.ollama_server import OllamaServer
from tests.remote_sessions import questions, session_on

COMMON = {"max_tokens": 9, "temperature": 0.2, "top_p": 0.8, "seed": 11, "stop": ["END", "\n"]}
LOGPROBS = {"logprobs": True, "top_logprobs": 3}


def sent(server: HttpServer) -> dict[str, Any]:
    """Return the options of the last question, without what every question has."""
    body: dict[str, Any] = dict(questions(server)[-1].json)
    assert body.pop("stream") is True
    assert body.pop("messages")[-1]["role"] == "user"
    body.pop("model")
    return body


def requested(server: HttpServer, backend: str, **about: Any) -> dict[str, Any]:
    """Ask one question and return its options."""
    with session_on(server, backend) as session:
        session.generate("one two", **about)
        return sent(server)


USAGE = {"stream_options": {"include_usage": True}}


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("vllm", {**COMMON, **LOGPROBS, "top_k": 7, "repetition_penalty": 1.3}),
        ("instructlab", {**COMMON, "top_k": 7, "repeat_penalty": 1.3}),
        ("openai", COMMON | LOGPROBS),
    ],
)
def test_options_are_sent_under_names_of_server(
    server: FaultServer, backend: str, options: dict[str, Any]
) -> None:
    about = {n: v for n, v in EVERY.items() if backend_class(backend).supports(n)}
    assert requested(server, backend, **about) == {**options, **USAGE}


@pytest.mark.parametrize("backend", ["vllm", "instructlab", "openai"])
def test_supported_option_is_sent_under_its_declared_name(
    server: FaultServer, backend: str
) -> None:
    names = backend_class(backend).option_names
    options = {name: value for name, value in EVERY.items() if names[name]}
    body = requested(server, backend, **options)
    assert {names[name]: value for name, value in options.items()}.items() <= body.items()


def test_instructlab_on_vllm_uses_fields_of_vllm() -> None:
    with FaultServer({"tiny": {"owned_by": "vllm"}}) as server:
        options = requested(server, "instructlab", repetition_penalty=1.3)
        assert (options["repetition_penalty"], "repeat_penalty" in options) == (1.3, False)


def test_ollama_options_are_in_separate_object() -> None:
    with OllamaServer() as server:
        body = requested(server, "ollama", **EVERY)
    assert body == {
        "options": {
            "num_predict": 9, "temperature": 0.2, "top_p": 0.8, "top_k": 7, "repeat_penalty": 1.3,
            "seed": 11, "stop": ["END", "\n"],
        },
        "truncate": False,
        **LOGPROBS,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("backend", "names"),
    [
        ("vllm", {"max_tokens", "temperature", "top_p", "top_k", "repetition_penalty"}),
        ("instructlab", {"max_tokens", "temperature", "top_p", "top_k", "repeat_penalty"}),
        ("openai", {"max_tokens", "temperature", "top_p"}),
    ],
)
def test_supported_defaults_are_sent(server: FaultServer, backend: str, names: set[str]) -> None:
    assert requested(server, backend).keys() == {*names, "stream_options"}


def test_unset_options_are_not_sent(server: FaultServer) -> None:
    nothing = dict.fromkeys(
        ["max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed"]
    )
    assert requested(server, "vllm", **nothing, stop=()) == USAGE
    assert requested(server, "openai", **nothing, stop=()) == USAGE
    with OllamaServer() as other:
        assert requested(other, "ollama", **nothing)["options"] == {}


def test_single_stop_string_is_sent_as_list(server: FaultServer) -> None:
    assert requested(server, "vllm", stop="END")["stop"] == ["END"]
    assert requested(server, "vllm", temperature=0, seed=0)["temperature"] == 0
    assert sent(server)["seed"] == 0


def test_session_settings_are_sent(server: FaultServer) -> None:
    with session_on(server) as session:
        session.generation.update(temperature=0.3, top_k=None)
        session.generate("?")
        assert (sent(server)["temperature"], "top_k" in sent(server)) == (0.3, False)
        session.generate("?", temperature=0.4)
        assert sent(server)["temperature"] == 0.4


def test_messages_are_sent_with_roles(server: FaultServer) -> None:
    with session_on(server) as session:
        session.generate("Grüße 🦙", system="Be brief.", chat="c")
        session.generate("and now", chat="c")
    assert questions(server)[1].json["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Grüße 🦙"},
        {"role": "assistant", "content": "Grüße 🦙"},
        {"role": "user", "content": "and now"},
    ]
    assert questions(server)[1].json["model"] == "tiny"
    assert questions(server)[1].headers["content-type"] == "application/json"


@pytest.mark.parametrize(("name", "value"), [("top_k", 5), ("repetition_penalty", 1.2)])
def test_unsupported_option_raises_before_the_request(
    server: FaultServer, name: str, value: float
) -> None:
    flag = "--" + name.replace("_", "-")
    with session_on(server, "openai") as session:
        with pytest.raises(OptionError) as refused:
            session.generate("?", **{name: value})  # type: ignore[arg-type]
        assert str(refused.value) == (
            f"openai does not support {flag}. Remove it, or send it unchecked with -p {name}={value}."
        )
        assert questions(server) == []
        session.generate("?", extra={name: value})
        assert sent(server)[name] == value


def test_unsupported_session_setting_is_not_sent(
    server: FaultServer,
) -> None:
    with session_on(server, "openai") as session:
        session.generation.update(top_k=20, repetition_penalty=1.2, temperature=0.3)
        session.generate("?")
        assert (sent(server)["temperature"], "top_k" in sent(server)) == (0.3, False)
        with pytest.raises(OptionError, match="openai does not support --top-k"):
            session.generate("?", top_k=20)


def test_penalty_of_one_is_accepted(server: FaultServer) -> None:
    assert "repetition_penalty" not in requested(server, "openai", repetition_penalty=1)


@pytest.mark.parametrize("backend", ["vllm", "instructlab", "openai"])
def test_other_parameters_are_sent(server: FaultServer, backend: str) -> None:
    extra = {
        "min_p": 0.1,
        "logit_bias": {"5": 1},
        "chat_template_kwargs": {"enable_thinking": False},
    }
    body = requested(server, backend, extra=extra)
    assert {name: body[name] for name in extra} == extra


def test_json_in_line_is_sent(server: FaultServer) -> None:
    line = '-p response_format={"type": "json_object"} -p user="5" -p store=true'
    body = requested(server, "openai", **parser.parse("llm", line).options)
    assert body["response_format"] == {"type": "json_object"}
    assert (body["user"], body["store"]) == ("5", True)


def _nested() -> list[Any]:
    inner: list[Any] = []
    for _ in range(100_000):
        inner = [inner]
    return inner


@pytest.mark.parametrize("backend", ["openai", "ollama"])
@pytest.mark.parametrize("value", [{1, 2}, float("nan"), [float("inf")], object(), _nested()])
def test_extra_that_is_not_json_raises_before_request(backend: str, value: object) -> None:
    server = OllamaServer() if backend == "ollama" else FaultServer()
    with server, session_on(server, backend) as session:
        before = len(questions(server))
        with pytest.raises(OptionError, match=r"-p x: .* cannot be sent as JSON") as caught:
            session.generate("?", extra={"x": value})
        assert len(str(caught.value)) < 200
        assert len(questions(server)) == before


def test_ollama_top_level_fields_are_separate() -> None:
    beside = {"keep_alive": "5m", "format": "json", "think": False, "shift": True}
    inside = {"num_ctx": 8192, "mirostat": 2, "min_p": 0.1}
    with OllamaServer() as server:
        body = requested(server, "ollama", extra={**beside, **inside, "truncate": True})
    assert {name: body[name] for name in beside} == beside
    assert {name: body["options"][name] for name in inside} == inside
    assert body["options"].keys().isdisjoint({*beside, "truncate"})
    assert body["truncate"] is True


@pytest.mark.parametrize(
    ("backend", "names"),
    [
        ("vllm", ["model", "messages", "stream", "stream_options", "n", "prompt"]),
        ("instructlab", ["model", "messages", "stream", "best_of"]),
        ("openai", ["model", "messages", "stream", "stream_options", "n", "best_of"]),
        ("ollama", ["model", "messages", "stream", "options"]),
    ],
)
def test_reserved_fields_raise(backend: str, names: list[str]) -> None:
    server = OllamaServer() if backend == "ollama" else FaultServer()
    with server, session_on(server, backend) as session:
        for name in names:
            with pytest.raises(OptionError, match=rf"^-p {name} cannot be set\. .+\.$"):
                session.generate("?", extra={name: 1})
        assert questions(server) == []


OPTIONS = {
    "--max-new-tokens N": ("max_new_tokens", "max_tokens", "max_completion_tokens", "num_predict",
                           "n_predict"),
    "--temperature T": ("temperature",), "--top-p P": ("top_p",), "--seed N": ("seed",),
    "--stop TEXT": ("stop",),
    "--top-k K": ("top_k",), "--repetition-penalty R": ("repetition_penalty", "repeat_penalty"),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["vllm", "instructlab", "openai", "ollama"])
def test_parameter_with_own_option_raises_with_its_name(backend: str) -> None:
    server = OllamaServer() if backend == "ollama" else FaultServer()
    with server, session_on(server, backend) as session:
        for flag, names in OPTIONS.items():
            if backend == "openai" and flag in {"--top-k K", "--repetition-penalty R"}:
                continue
            for name in names:
                with pytest.raises(OptionError) as refused:
                    session.generate("?", extra={name: 3})
                option = flag.split()[0].removeprefix("--").replace("-", "_")
                assert str(refused.value) == (
                    f"{name} has its own option. Use {flag} instead of -p (in Python: {option}=)."
                )
        assert questions(server) == []
