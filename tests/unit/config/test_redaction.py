"""No secret gets through: by its name, by its value elsewhere, by its look; and the rest stays."""

from __future__ import annotations

import re
import string
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_magic.config.redaction import MASK, Redactor, is_secret_name

SECRET = "tulips-in-may"
SECRET_NAMES = [
    "password", "DB_PASSWORD", "dbPassword", "passwd", "api_key", "apiKey", "APIKEY", "OPENAI_API_KEY",
    "key", "token", "hf_token", "accessToken", "client_secret", "auth", "Authorization", "cookie",
    "Set-Cookie", "credentials", "api_keys", "access_tokens", "private_key", "X-Api-Key", "secrets",
    "AWS_SECRET_ACCESS_KEY", "sessionid", "token_2",
]  # fmt: skip
HARMLESS = [
    "town", "keys", "tokens", "max_new_tokens", "tokenizer", "num_tokens", "pad_token", "eos_token_id",
    "primary_key", "keyboard", "author", "passenger", "KeyError", "monkey", "AuthenticationError", "bypass",
    "sort_keys", "", "_", "secretary",
]  # fmt: skip


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_secret_names_are_recognized(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize("name", HARMLESS)
def test_other_names_are_not_secret(name: str) -> None:
    assert not is_secret_name(name)


SHAPES = [
    "sk-proj-abcdEFGH12345678", "sk-ant-api03-abcdefghijkl", "hf_abcdefghijklmnop", "sk_live_abcdefgh1",
    "ghp_abcdefghijklmnop1234", "github_pat_11ABCDEFG0123456789", "glpat-abcdefghijkl1",
    "AKIAIOSFODNN7EXAMPLE",
    "xoxb-123456789012-abcdef", "AIzaSyA-1234567890abcdefghij", "npm_abcdefghijklmnop1234",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b", "Zx9Kq2Lm8Np4Rt6Vw1Yb3Cd5", "nvapi-abcdefghijklmn",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIB\nabc\n-----END RSA PRIVATE KEY-----",
    "-----BEGIN PRIVATE KEY-----\nMIIB\nabc",
]  # fmt: skip


@pytest.mark.parametrize("secret", SHAPES)
@pytest.mark.parametrize(
    "around", ["{}", "x = '{}'", "at {}.", "[{}, 1]", "https://host/?s={}&t=1"]
)
def test_key_formats_are_masked(secret: str, around: str) -> None:
    masked = Redactor({}).mask(around.format(secret))
    assert MASK in masked
    assert not any(part in masked for part in secret.split() if len(part) > 3)


READABLE = [
    "/usr/lib/python3.11/site-packages/transformers/models/llama/modeling_llama.py",
    "AutoModelForSequenceClassification", "Qwen2ForSequenceClassification", "a-very-long-name-of-a-branch-2",
    "~/.cache/huggingface/hub/models--org--name/snapshots/0123abc/config.json", "tokenizer.pad_token = None",
    "model.generate(max_new_tokens=512, use_cache=True)", "sorted(d, key=lambda item: item.name)",
    "KeyError: 'town'", "if password == entered:", "token: str | None = None", "def f(key: str) -> int:",
    "password = getpass('Password: ')", "api_key = os.environ['OPENAI_API_KEY']", "x ** 2 + y // 3",
    "https://example.org/a/page?town=Paris", "user@example.org", "torch.float32 on cuda:0",
    "for key in keys: print(d[key])", "token = 12", "RuntimeError: CUDA error: out of memory",
]  # fmt: skip


@pytest.mark.parametrize("text", READABLE)
def test_other_text_is_unchanged(text: str) -> None:
    redactor = Redactor({"HOME": "/root", "LANG": "C.UTF-8"})
    redactor.add_source(text.replace("getpass('Password: ')", "ask()"))
    assert redactor.mask(text, is_program=True) == text


GIVEN = [
    "password = '{}'", 'password = b"{}"', "password: str = '{}'", "login(password='{}')",
    "d = {{'password': '{}', 'town': 'Paris'}}", "os.environ['API_KEY'] = '{}'", "self.token = f'{}'",
    "os.environ.setdefault('API_KEY', '{}')", "if token == '{}': pass", "(token := '{}')",
    "auth = ('user', '{}')", "headers = {{'Authorization': 'Bearer {}'}}", "password = '''{}'''",
    "def f(password='{}'): pass", "secrets = ['{}']", "key = SecretStr('{}')", "password = 'x' + '{}'",
    "setattr(o, 'password', '{}')", "token = '{}'.encode()", "c = Client(api_key=wrap('{}'))",
]  # fmt: skip


@pytest.mark.parametrize(
    "source",
    ["password = 'Auth0000'", "password = 'secret_pass'", "login(password='password')",
     "d = {'api_key': 'Token_12'}", "key = SecretStr('Auth0000')", "if token == 'Auth0000': pass"],
)  # fmt: skip
def test_secret_in_format_of_secret_name_is_masked(source: str) -> None:
    redactor = Redactor({})
    redactor.add_source(source)
    secret = source.split("'")[-2]
    assert redactor.mask(f"ValueError: {secret}!") == f"ValueError: {MASK}!"


@pytest.mark.parametrize(
    "source",
    ["key_env = 'OPENAI_API_KEY'", "api_key = get('api_key')", "if key == 'password': pass",
     "token = config.get('hf_token', None)", "load(key_env='HF_TOKEN')"],
)  # fmt: skip
def test_secret_name_as_value_is_not_masked(source: str) -> None:
    redactor = Redactor({})
    redactor.add_source(source)
    name = source.split("'")[1]
    assert redactor.mask(f"KeyError: no {name} here") == f"KeyError: no {name} here"


@pytest.mark.parametrize("source", GIVEN)
def test_literals_assigned_to_secret_names_are_masked_everywhere(source: str) -> None:
    redactor = Redactor({})
    source = source.format(SECRET)
    redactor.add_source(source)
    assert SECRET not in redactor.mask(source, is_program=True)
    assert SECRET not in redactor.mask(f"ValueError: {SECRET} is wrong, {SECRET}!")
    assert "Paris" in redactor.mask("Paris")


@pytest.mark.parametrize(
    "text",
    [
        "PASSWORD={}", "export API_KEY={}", "!curl --token {} host", "password: {}", "x --api-key={}",
        '{{"api_key": "{}"', "-H 'X-Api-Key: {}'", "postgres://bob:{}@host/db", "https://{}@host",
        "?access_token={}&x=1", "password = '{}", "Cookie: session={}", "bad: x=1, password={}",
    ],
)  # fmt: skip
def test_secrets_outside_of_python_are_masked(text: str) -> None:
    assert SECRET not in Redactor({}).mask(text.format(SECRET))


def test_unquoted_password_in_message_is_masked() -> None:
    trace = (
        "Traceback:\n  File 'x', line 1\n    login(password=entered)\nError: password=swordfish\n"
    )
    masked = Redactor({}).mask(trace)
    assert "login(password=entered)" in masked
    assert "swordfish" not in masked


@pytest.mark.parametrize(
    "names",
    [{"password": SECRET}, {"config": {"db": {"password": SECRET}}}, {"api_keys": [SECRET, "x"]},
     {"credentials": {"user": SECRET}}, {"token": SECRET.encode()}, {"cookies": ({"a": SECRET},)}],
)  # fmt: skip
def test_values_of_notebook_are_masked(names: dict[str, Any]) -> None:
    redactor = Redactor({})
    redactor.add_values(names)
    assert SECRET not in redactor.mask(f"ValueError: no such user: {SECRET}")


def test_values_of_environment_and_typed_keys_are_masked() -> None:
    redactor = Redactor({"SERVICE_TOKEN": SECRET, "TOWN": "Paris-on-Seine"}, ["roses-in-june"])
    assert (
        redactor.mask(f"{SECRET} roses-in-june Paris-on-Seine") == f"{MASK} {MASK} Paris-on-Seine"
    )


def test_escaped_secret_is_masked() -> None:
    secret = 'it\'s ü/&\n"quoted" words'
    redactor = Redactor({"PASSWORD": secret})
    for written in (secret, repr(secret), "it%27s%20%C3%BC%2F%26%0A%22quoted%22%20words"):
        assert "quoted" not in redactor.mask(f"at {written} end")


_values = st.text(string.ascii_letters + string.digits + "-_!$%&/+", min_size=8, max_size=40)


# A value in capitals counts as the name of an environment variable.
_values = _values.filter(lambda secret: not re.fullmatch("[A-Z_]+", secret))


@given(_values, st.sampled_from(SECRET_NAMES), st.text(max_size=40), st.text(max_size=40))
def test_every_value_of_secret_name_is_masked(
    secret: str, name: str, before: str, after: str
) -> None:
    redactor = Redactor({})
    redactor.add_values({name: secret})
    assert secret not in redactor.mask(before + secret + after)
    redactor = Redactor({})
    redactor.add_source(f"x = {{{name!r}: {secret!r}}}")
    assert secret not in redactor.mask(before + secret + after)


@given(st.text(max_size=400))
def test_any_text_is_accepted(text: str) -> None:
    redactor = Redactor({})
    redactor.add_source(text)
    masked = redactor.mask(text)
    assert redactor.mask(masked, is_program=True).count(MASK) >= text.count(MASK)


@pytest.mark.parametrize(
    "piece",
    ["password=", "password='", '"""', 'password="""', "key" * 30, "a-" * 50, "eyJ", "key: a | ", "--key ", "x://",
     "-----BEGIN PRIVATE KEY-----", "A1" * 30, " ", "password: [", "((", "key:", "a: b = "],
)  # fmt: skip
def test_time_is_linear_in_length_of_text(piece: str) -> None:
    text = piece * (200_000 // len(piece)) + "("
    began = time.process_time()
    Redactor({}).mask(text)
    assert time.process_time() - began < 5
