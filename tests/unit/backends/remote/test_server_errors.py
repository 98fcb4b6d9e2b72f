"""Error responses: bodies of all shapes become one line."""

from __future__ import annotations

import json
import socket
import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_magic.backends.remote.server_errors import (
    ErrorResponse,
    connection_error,
    encoding_error,
    no_reply_error,
    one_line,
    parse_error,
    parse_error_body,
    proxy_error,
    status_error,
)
from llm_magic.config.server_address import parse_url
from llm_magic.errors import AuthenticationFailed, RequestFailed

VLLM_LENGTH = (
    "This model's maximum context length is 2048 tokens. However, you requested 4096 tokens"
    " in the messages. Please reduce the length of the messages."
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["error", "detail", "message", "param", "loc", "msg", "code"]), inner
        )
    ),
    max_leaves=12,
)


@pytest.mark.parametrize(
    ("value", "text", "parameter"),
    [
        (
            {"error": {"message": "Bad.", "type": "invalid", "param": "top_p", "code": None}},
            "Bad", "top_p",
        ),
        ({"error": {"message": "Bad.", "param": None, "code": 400}}, "Bad", ""),
        ({"object": "error", "message": VLLM_LENGTH, "type": "BadRequestError", "param": None,
          "code": 400}, VLLM_LENGTH.rstrip("."), ""),
        ({"object": "error", "message": "Bad", "param": "seed"}, "Bad", "seed"),
        ({"error": "model 'x' not found"}, "model 'x' not found", ""),
        ({"detail": "Not Found"}, "Not Found", ""),
        ({"detail": {"message": "Bad", "param": "stop"}}, "Bad", "stop"),
        ({"message": "no Route matched"}, "no Route matched", ""),
        (
            {"detail": [{"loc": ["body", "stream_options"], "msg": "extra fields not permitted",
                         "type": "value_error.extra"}]},
            "stream_options: extra fields not permitted", "stream_options",
        ),
        (
            {"detail": [{"loc": ["body", "messages", 0, "role"], "msg": "field required"}]},
            "messages.0.role: field required", "messages",
        ),
        ({"error": {"error": {"message": "deep"}, "param": "n"}}, "deep", "n"),
        ({"error": {"message": {"detail": "odd"}}}, "odd", ""),
        ("just text", "just text", ""),
    ],
)  # fmt: skip
def test_message_and_parameter_are_parsed(value: Any, text: str, parameter: str) -> None:
    response = parse_error(value)
    assert (response.text, response.parameter) == (text, parameter)
    assert parse_error_body(json.dumps(value).encode()) == response
    assert parse_error_body(json.dumps(value, indent=4).encode()) == response


@pytest.mark.parametrize(
    ("value", "has"),
    [({"error": {"code": 7}}, "7"), ({"detail": []}, "detail"), ([], ""), (None, ""), (503, "503"),
     ({"error": ["a", "b"]}, "a"), ({"detail": [{"msg": "no place"}]}, "no place"),
     ({"error": {"message": ""}}, "message"), ({}, "")],
)  # fmt: skip
def test_unknown_shapes_are_shown_as_text(value: Any, has: str) -> None:
    assert has in parse_error(value).text


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", ""),
        (b"  \r\n ", ""),
        (b"Service Unavailable\n", "Service Unavailable"),
        (b"upstream connect error or\r\n  disconnect/reset", "upstream connect error or disconnect/reset"),
        (b"<html><head><title>502 Bad Gateway</title></head><body>x</body></html>", "502 Bad Gateway"),
        (b"<!DOCTYPE html>\n<HTML><HEAD><TITLE lang='en'>\n  Login\n</TITLE>", "Login"),
        (b"<html><body><h1>no title</h1>", ""),
        ("Größe über alles".encode("latin-1"), "Gr\ufffd\ufffde \ufffdber alles"),
        (b'{"error": "cut in the mid', '{"error": "cut in the mid'),
    ],
)  # fmt: skip
def test_html_and_plain_text_are_parsed(body: bytes, text: str) -> None:
    assert parse_error_body(body) == ErrorResponse(text)


@pytest.mark.parametrize(
    "body", [b"invalid value: <nil>", b"The model <think-7b> does not exist", b"need n < 5"]
)
def test_angle_bracket_in_text_is_not_html(body: bytes) -> None:
    assert parse_error_body(body) == ErrorResponse(body.decode())


def test_title_is_unescaped() -> None:
    assert parse_error_body(b"<title>Tom &amp; Jerry&#39;s proxy</title>") == ErrorResponse(
        "Tom & Jerry's proxy"
    )


def test_long_headers_are_truncated() -> None:
    address = parse_url("openai", "http://localhost:8000")
    long = "x/" + "y" * 50_000
    redirected = status_error(address, None, 307, {"location": f"http://{long}"}, ErrorResponse(""))
    for error in (no_reply_error(address, long), redirected, encoding_error(address, long)):
        assert "yyy" in str(error)
        assert len(str(error)) < 600


@pytest.mark.parametrize("length", [299, 300, 301, 5000])
def test_long_text_is_truncated(length: int) -> None:
    text = one_line("x" * length)
    assert len(text) <= 302
    assert text == ("x" * length if length <= 300 else "x" * 300 + " …")
    assert parse_error_body(b'{"error": "%s"}' % (b"x" * length)).text == text


@pytest.mark.parametrize(
    "body",
    [
        bytes(range(256)) * 4,
        b"\x1b[2J\x1b[31mred",
        b"\x00\x07bell",
        b'{"error": "turned \\u202e round \\u001b[0m"}',
    ],
)
def test_control_characters_are_removed(body: bytes) -> None:
    kinds = {unicodedata.category(character) for character in parse_error_body(body).text}
    assert not kinds & {"Cc", "Cf", "Cs"}


@pytest.mark.parametrize(
    "value",
    [
        {"detail": [{"loc": None, "msg": "x"}]},
        {"detail": [{"loc": 5, "msg": "x"}]},
        {"detail": [{"loc": "body", "msg": "x"}]},
        {"detail": [{"loc": [None, {"a": 1}], "msg": None}]},
        {"error": {"message": 5, "param": ["a", "b"]}},
        {"error": True},
        {"error": {"message": ["a", {"b": 1}]}},
    ],
)
def test_odd_shapes_are_parsed(value: Any) -> None:
    assert "\n" not in parse_error_body(json.dumps(value).encode()).text


def test_deep_nesting_is_parsed() -> None:
    for depth in (1, 10, 100, *range(300, 1100), 10_000, 100_000):
        body = b'{"error":' * depth + b'"x"' + b"}" * depth
        assert "\n" not in parse_error_body(body).text, depth


@given(JSON)
def test_any_json_becomes_one_line(value: Any) -> None:
    response = parse_error_body(json.dumps(value).encode())
    assert len(response.text) <= 302
    assert len(response.text.splitlines()) <= 1


@given(st.binary(max_size=400))
def test_any_bytes_become_one_line(body: bytes) -> None:
    response = parse_error_body(body)
    assert len(response.text) <= 302
    assert len(response.text.splitlines()) <= 1


@pytest.mark.parametrize(
    "text",
    [
        VLLM_LENGTH,
        "Requested tokens (600) exceed context window of 512",
        "the input length exceeds the context length",
        "prompt is too long: 9000 tokens > 8192 maximum",
        "This endpoint's maximum context length is 8192 tokens",
        "the request exceeds the available context size, try increasing it",
        "Too many tokens in the prompt",
        "exceed_context_size_error: the request exceeds the available context size",
    ],
)
def test_messages_about_context_are_recognized(text: str) -> None:
    assert ErrorResponse(text).exceeds_context


@pytest.mark.parametrize(
    "text",
    ["temperature must be at most 2", "You exceeded your current quota", "model 'x' not found",
     "Rate limit reached: 500 tokens per minute", "context must be a string", ""],
)  # fmt: skip
def test_other_messages_are_not_about_context(text: str) -> None:
    assert not ErrorResponse(text).exceeds_context


ADDRESS = parse_url("vllm", "http://gpu-box:8000")


@pytest.mark.parametrize("number", [socket.EAI_NONAME, socket.EAI_FAIL])
def test_unknown_host_is_named(number: int) -> None:
    cause = socket.gaierror(number, "Name or service not known")
    wrapped = OSError("Could not connect to proxy")
    wrapped.__cause__ = cause
    assert str(connection_error(ADDRESS, cause, "Start one.")) == (
        "Host gpu-box:8000 not found. Check --base-url."
    )
    for error in (cause, wrapped):
        assert str(proxy_error(ADDRESS, "proxy:3128", str(error), error)) == (
            "Proxy host proxy:3128 (for http://gpu-box:8000) not found. Correct HTTP_PROXY,"
            " or set NO_PROXY=gpu-box if no proxy is needed."
        )


@pytest.mark.parametrize(
    ("url", "advice"),
    [("https://api.openai.com", "Check the network or the proxy."),
     ("https://api.opnai.com", "Check --base-url.")],
)  # fmt: skip
def test_host_of_a_provider_is_not_called_misspelled(url: str, advice: str) -> None:
    cause = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    address = parse_url("openai", url)
    assert str(connection_error(address, cause, "")) == (
        f"Host {address.host_port} not found. {advice}"
    )


def test_unavailable_name_server_is_not_unknown_host() -> None:
    cause = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    assert str(connection_error(ADDRESS, cause, "Start one.")) == (
        "Could not resolve the host of gpu-box:8000: no DNS server responded. Check the network,"
        " then --base-url."
    )
    assert str(proxy_error(ADDRESS, "proxy:3128", str(cause), cause)) == (
        "Could not resolve the host of the proxy proxy:3128: no DNS server responded. Check the network, then"
        " HTTP_PROXY."
    )


def test_refused_connection_is_not_unknown_host() -> None:
    refused = ConnectionRefusedError(111, "Connect call failed ('127.0.0.1', 9)")
    assert "No server is listening" in str(connection_error(ADDRESS, refused, "Start one."))


LITELLM_WRONG_KEY = (
    b'{"error":{"message":"No connected db.","type":"no_db_connection","param":null,"code":"400"}}'
)


def test_litellm_wrong_key_is_authentication_error() -> None:
    error = status_error(ADDRESS, None, 400, {}, parse_error_body(LITELLM_WRONG_KEY))
    assert type(error) is AuthenticationFailed
    assert "--key-env NAME" in str(error)
    assert (
        type(status_error(ADDRESS, None, 400, {}, parse_error_body(b'{"error": "other"}')))
        is RequestFailed
    )


def test_500_refers_to_the_log_which_users_of_a_provider_cannot_read() -> None:
    response = parse_error_body(b"<title>500 Internal Server Error</title>")
    error = status_error(ADDRESS, None, 500, {}, response)
    assert str(error).endswith("failed (500): Internal Server Error. Check the log of the server.")
    hosted = parse_url("openai", "https://api.openai.com")
    error = status_error(hosted, None, 500, {}, response)
    assert str(error).endswith("failed (500): Internal Server Error. Try again later.")


@pytest.mark.parametrize(
    ("text", "header", "seconds", "advice"),
    [
        ("Please try again in 7.2s. Visit https://a.b", "2", 7.2, ""),
        ("Please retry in 36.07s", "", 36.07, ""),
        ("try again in 20ms", "3", 3.0, ""),
        ("Please try again in 6m0s", "", 360.0, ""),
        ("Try again after 20 seconds", "", 20.0, ""),
        ("try again in " + "9" * 250 + "s", "", 7 * 24 * 3600.0, ""),
        ("Slow down", "90", 90.0, " Try again in 90 s."),
        ("Slow down", "", None, " Try again later."),
        ("Please try again", "", None, " Try again later."),
    ],
)
def test_message_names_one_time_of_the_next_try(
    text: str, header: str, seconds: float | None, advice: str
) -> None:
    error = status_error(ADDRESS, None, 429, {"retry-after": header}, ErrorResponse(text))
    assert isinstance(error, RequestFailed)
    assert error.retry_after == seconds
    assert str(error).endswith(f"(429): {text}.{advice}")


LLAMA_CPP_LENGTH = {
    "error": {
        "code": 400, "type": "exceed_context_size_error", "n_prompt_tokens": 5012, "n_ctx": 4096,
        "message": "request (5012 tokens) exceeds the available context size (4096 tokens), try"
        " increasing it",
    }
}  # fmt: skip


def test_token_counts_of_llama_cpp_are_parsed() -> None:
    wrapped = {"error": json.dumps(LLAMA_CPP_LENGTH)}
    for value in (LLAMA_CPP_LENGTH, wrapped):
        response = parse_error_body(json.dumps(value).encode())
        assert response.lengths == (5012, 4096)
        assert response.text.startswith("request (5012 tokens) exceeds")
        error = status_error(ADDRESS, None, 400, {}, response)
        assert isinstance(error, RequestFailed)
        assert error.lengths == (5012, 4096)


@pytest.mark.parametrize(
    "counts",
    [{}, {"n_ctx": 5}, {"n_prompt_tokens": "5", "n_ctx": 4}, {"n_prompt_tokens": 0, "n_ctx": 0},
     {"n_prompt_tokens": True, "n_ctx": [1]}, {"n_prompt_tokens": -1, "n_ctx": 1.5}],
)  # fmt: skip
def test_odd_counts_are_ignored(counts: dict[str, Any]) -> None:
    assert parse_error({"error": {"message": "too long", **counts}}).lengths is None


@pytest.mark.parametrize("text", ["{", "{not json}", "{" * 5000, '{"a": 1', "{}"])
def test_text_that_starts_like_json_is_shown(text: str) -> None:
    assert parse_error({"error": text}).text == one_line(text)
