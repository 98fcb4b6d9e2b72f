"""Addresses of servers: as people write them, as they are used, and what is none."""

from __future__ import annotations

import contextlib

import pytest
import yarl
from hypothesis import given
from hypothesis import strategies as st

from llm_magic.config.server_address import parse_url, resolve_address
from llm_magic.config.settings import ServerLoadConfig
from llm_magic.errors import OptionError
from tests.scripted import settings

SECRET = "sk-4f9b27c1d8e3"


@pytest.mark.parametrize(
    ("text", "url", "origin"),
    [
        ("http://localhost:8000", "http://localhost:8000", "http://localhost:8000"),
        ("http://localhost:8000/", "http://localhost:8000", "http://localhost:8000"),
        ("http://localhost:8000/v1", "http://localhost:8000/v1", "http://localhost:8000"),
        ("http://localhost:8000/v1/", "http://localhost:8000/v1", "http://localhost:8000"),
        ("http://localhost:8000/a/b//", "http://localhost:8000/a/b", "http://localhost:8000"),
        ("  http://localhost:8000\n", "http://localhost:8000", "http://localhost:8000"),
        ("localhost", "http://localhost", "http://localhost"),
        ("localhost:11434", "http://localhost:11434", "http://localhost:11434"),
        ("localhost:11434/v1/", "http://localhost:11434/v1", "http://localhost:11434"),
        ("LOCALHOST:80", "http://localhost", "http://localhost"),
        ("127.0.0.1:8000", "http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("127.8.9.1:8000", "http://127.8.9.1:8000", "http://127.8.9.1:8000"),
        ("0.0.0.0:8000", "http://0.0.0.0:8000", "http://0.0.0.0:8000"),
        ("[::1]:8000", "http://[::1]:8000", "http://[::1]:8000"),
        ("http://[::1]", "http://[::1]", "http://[::1]"),
        ("http://[fe80::1%25eth0]:8000", "http://[fe80::1%eth0]:8000", "http://[fe80::1%eth0]:8000"),
        ("http://my_ollama:11434", "http://my_ollama:11434", "http://my_ollama:11434"),
        ("http://münchen.example", "http://xn--mnchen-3ya.example", "http://xn--mnchen-3ya.example"),
        (f"http://{'a' * 63}.com", f"http://{'a' * 63}.com", f"http://{'a' * 63}.com"),
        ("http://[2001:DB8::1]:8000/v1", "http://[2001:db8::1]:8000/v1", "http://[2001:db8::1]:8000"),
        ("tiny.localhost:8000", "http://tiny.localhost:8000", "http://tiny.localhost:8000"),
        ("https://API.Example.COM/v1", "https://api.example.com/v1", "https://api.example.com"),
        ("HTTPS://api.example.com:443", "https://api.example.com", "https://api.example.com"),
        ("http://api.example.com:443", "http://api.example.com:443", "http://api.example.com:443"),
        ("https://api.example.com./v1", "https://api.example.com/v1", "https://api.example.com"),
        ("http://localhost.:8000", "http://localhost:8000", "http://localhost:8000"),
        ("http://host:", "http://host", "http://host"),
        ("https://host/v1/chat/completions", "https://host/v1", "https://host"),
        ("https://host/v1/models", "https://host/v1", "https://host"),
        # The API of a provider.
        ("https://host/models", "https://host/models", "https://host"),
        ("https://host/v1/completions/", "https://host/v1", "https://host"),
        ("https://host/completions/v1", "https://host/completions/v1", "https://host"),
        ("localhost:11434/api/chat", "http://localhost:11434", "http://localhost:11434"),
        ("http://192.168.1.7:8000/Team/API", "http://192.168.1.7:8000/Team/API", "http://192.168.1.7:8000"),
    ],
)  # fmt: skip
def test_valid_address_is_normalized(text: str, url: str, origin: str) -> None:
    found = parse_url("openai", text)
    assert (found.backend, found.url, found.origin) == ("openai", url, origin)
    assert found.host_port == origin.partition("://")[2]
    assert parse_url("openai", found.url) == found


@pytest.mark.parametrize(
    ("text", "local", "private"),
    [
        ("http://localhost", True, True),
        ("http://LocalHost.:1", True, True),
        ("http://a.localhost", True, True),
        ("http://127.0.0.2", True, True),
        ("http://[::1]", True, True),
        ("http://0.0.0.0:8000", True, True),
        ("http://[::]:8000", True, True),
        ("https://localhost", True, True),
        ("http://notlocalhost", False, False),
        ("http://localhost.example.com", False, False),
        ("http://127.0.0.1.example.com", False, False),
        ("http://192.168.1.7", False, False),
        ("http://169.254.1.1", False, False),
        ("https://example.com", False, True),
    ],
)
def test_only_loopback_addresses_are_local(text: str, local: bool, private: bool) -> None:
    found = parse_url("vllm", text)
    assert (found.is_local, found.is_private) == (local, private)


@pytest.mark.parametrize(
    "text",
    ["", "  ", "http://", "https:///v1", "http:/localhost:8000", "http:localhost", "file:///etc/passwd",
     "ftp://localhost/x", "ws://localhost", "unix:///run/x.sock", "api.example.com/v1",
     "api.example.com:8000", "/v1", "//localhost:8000", "http://:8000", "http://?", "nonsense",
     "http://.", "localhost;8000", "http://a..b", f"http://{'a' * 64}.com", f"http://{'a.' * 200}b",
     "http://ü..de", f"http://{'ü' * 70}.de", "http://-a.b", "http://a-.b", "http://a%20b", "http://a%00b",
     "http://[fe80::1%25]", "http://[v1.x]:9", "http://[::1].b", "http://a*b:80",
     "http://localhost/\ud800", "http://localhost/\0"],
)  # fmt: skip
def test_invalid_address_raises_with_example(text: str) -> None:
    with pytest.raises(OptionError, match=r"is not a server address.*http://localhost:8000") as no:
        parse_url("vllm", text)
    assert "\n" not in str(no.value)


@pytest.mark.parametrize("port", ["0", "65536", "99999", "-1", "abc", "80a", "8000:9"])
def test_invalid_port_raises(port: str) -> None:
    with pytest.raises(OptionError):
        parse_url("vllm", f"http://localhost:{port}/v1")


@pytest.mark.parametrize(
    "text",
    ["http://[::1", "http://[", "http://[nothing]:80", "[::1", "http://ex\u2100mple.com"],
)  # fmt: skip
def test_unparsable_url_raises_option_error(text: str) -> None:
    with pytest.raises(OptionError):
        parse_url("vllm", text)


@pytest.mark.parametrize(
    "text",
    [
        "http://user:{}@localhost:8000", "http://{}@localhost:8000/v1", "http://{}:@localhost",
        "https://me:{}@example.com/v1", "user:{}@localhost:8000", "{}@localhost:8000",
        "user:{}@example.com", "{}@example.com", "{}:@example.com/v1", "{}:x@example.com",
        "http://localhost:8000?key={}", "http://localhost:8000/v1?api-key={}#x",
        "http://localhost:8000/#{}", "localhost:8000?key={}", "example.com?key={}",
        "http://user:{}@[::1", "ftp://me:{}@example.com", "http://me:{}@",
        "http://me:{}@localhost:99999",
    ],
)  # fmt: skip
def test_secret_in_address_raises_without_showing_it(text: str) -> None:
    with pytest.raises(OptionError) as refused:
        parse_url("openai", text.format(SECRET))
    assert SECRET not in str(refused.value)
    assert refused.value.__cause__ is None


@pytest.mark.parametrize("text", ["http://user:x@localhost:8000", "http://localhost:8000?key=x"])
def test_secret_in_address_error_suggests_key_env(text: str) -> None:
    with pytest.raises(
        OptionError, match=r"not contain a user name, a password or a query\. .*--key-env NAME"
    ):
        parse_url("openai", text)


@pytest.mark.parametrize(
    "text",
    ["http://bücher.example:8000/v1", "https://BÜCHER.example", "https://xn--bcher-kva.example",
     "http://[2001:DB8:0::1]:8000", "https://example.com:443/v1", "http://LOCALHOST.:80"],
)  # fmt: skip
def test_origin_equals_origin_of_request(text: str) -> None:
    # A key is bound to it, and compared with the address of each request.
    found = parse_url("openai", text)
    assert found.origin == str(yarl.URL(found.url + "/models").origin())


@given(st.text(max_size=40) | st.lists(
    st.sampled_from(["http://", "https://", "localhost", "[", "]", ":", "@", "/", "?", "#", "%", "::1",
                     "8000", "x", ".", "\\", " ", "ü"]), max_size=10
).map("".join))  # fmt: skip
def test_any_text_is_parsed_or_raises(text: str) -> None:
    with contextlib.suppress(OptionError):
        found = parse_url("vllm", text)
        assert found.origin.startswith(("http://", "https://"))
        assert found.url.startswith(found.origin)
        assert not found.url.endswith("/")


def test_base_url_overrides_settings() -> None:
    ours = settings(vllm_base_url="http://gpu:8000")
    given = ServerLoadConfig(backend="vllm", base_url="http://other:9000/")
    for config, url in (
        (ServerLoadConfig(backend="vllm"), "http://gpu:8000"),
        (given, "http://other:9000"),
    ):
        assert resolve_address(config, ours).url == url


def test_backend_without_default_address_needs_one() -> None:
    with pytest.raises(OptionError, match=r"mine needs the address of a server\. Add --base-url"):
        resolve_address(ServerLoadConfig(backend="mine"), settings())
    given = ServerLoadConfig(backend="mine", base_url="http://host:1")
    assert resolve_address(given, settings()).url == "http://host:1"
