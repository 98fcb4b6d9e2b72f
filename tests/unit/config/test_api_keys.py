"""API keys: where they come from, whom they are sent to, and that nothing shows them."""

from __future__ import annotations

import copy
import getpass
import pickle
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_magic.config.api_keys import ApiKey, ApiKeys
from llm_magic.errors import AuthenticationFailed, LLMMagicError, OptionError, ServerUnreachable
from llm_magic.session import Session
from tests.fault_server import CHAT, MODELS, FaultServer
from tests.scripted import settings
from tests.wire import error_answer, redirect

KEY = "sk-test-4f9b27c1d8e3a650"
NAME = "SOME_SERVERS_KEY"


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer(key=KEY) as running:
        yield running


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> Iterator[Session]:
    monkeypatch.delenv(NAME, raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    made = Session(settings())
    yield made
    made.close()


def load(session: Session, server: FaultServer, **more: Any) -> None:
    session.load("tiny", **{"backend": "openai", "base_url": server.url, **more})


def test_key_from_variable_is_sent_to_server(
    session: Session, server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(NAME, f"{KEY}\n")
    load(session, server, key_env=NAME)
    assert session.generate("hello you").text == "hello you"
    assert {r.headers["authorization"] for r in server.received} == {f"Bearer {KEY}"}


def test_missing_key_error_suggests_key_env(session: Session, server: FaultServer) -> None:
    with pytest.raises(
        AuthenticationFailed, match=r"requires an API key \(401\)\. .* --key-env NAME"
    ):
        load(session, server)
    assert "authorization" not in server.received[-1].headers


def test_rejected_key_error_names_variable(
    session: Session, server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = "sk-wrong-000"
    monkeypatch.setenv(NAME, wrong)
    server.will(MODELS, *error_answer(401, f"Incorrect API key provided: {wrong}."))
    with pytest.raises(AuthenticationFailed, match=f"rejected the key in {NAME}") as caught:
        load(session, server, key_env=NAME)
    assert wrong not in str(caught.value), "the server repeats it, we do not"
    assert "•••" in str(caught.value)


def test_key_is_not_sent_to_second_server(
    session: Session, server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(NAME, KEY)
    load(session, server, key_env=NAME)
    with FaultServer() as other:
        with pytest.raises(OptionError, match=f"is the key for {server.url} and is not sent"):
            load(session, other, key_env=NAME)
        assert other.received == []


def test_openai_api_key_is_sent_to_openai_only(
    session: Session, server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(AuthenticationFailed, match="requires an API key"):
        load(session, server)
    with pytest.raises(OptionError, match=r"for https://api\.openai\.com and is not sent"):
        load(session, server, key_env="OPENAI_API_KEY")
    assert not [r for r in server.received if "authorization" in r.headers]


def test_openai_api_key_is_sent_to_address_in_settings(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    session = Session(settings(openai_base_url=f"{server.url}/v1/"))
    session.load("tiny", backend="openai")
    session.close()
    assert server.received[-1].headers["authorization"] == f"Bearer {KEY}"


def test_openai_api_key_is_not_sent_to_address_in_env_file(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text(f"openai_base_url={server.url}\n")
    session = Session()
    with pytest.raises(AuthenticationFailed, match="requires an API key"):
        session.load("tiny", backend="openai")
    with pytest.raises(OptionError, match=r"not sent to .* OPENAI_BASE_URL in the environment"):
        session.load("tiny", backend="openai", key_env="OPENAI_API_KEY")
    assert not [r for r in server.received if "authorization" in r.headers]
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    session.load("tiny", backend="openai")
    assert session.generate("hi").text == "hi"
    session.close()


def test_redirects_are_not_followed(
    session: Session, server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(NAME, KEY)
    load(session, server, key_env=NAME)
    with FaultServer() as elsewhere:
        server.will(CHAT, *redirect(f"{elsewhere.url}{CHAT}?token={KEY}"))
        with pytest.raises(LLMMagicError, match="Redirects are not followed") as caught:
            session.generate("hello")
        assert elsewhere.received == []
    assert KEY not in str(caught.value)


def test_unset_variable_prompts_once(
    session: Session, server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions: list[str] = []

    def ask(question: str) -> str:
        questions.append(question)
        return KEY

    # As a kernel does it: its own function, in place of the terminal's.
    monkeypatch.setattr(getpass, "getpass", ask)
    load(session, server, key_env=NAME)
    load(session, server, key_env=NAME, name="again")
    assert questions == [f"Key for {server.url} ({NAME} is not set; Enter without a key cancels): "]
    assert session.generate("hi").text == "hi"


def test_key_in_the_env_file_is_not_read_and_reported(
    session: Session, server: FaultServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OTHER_KEY", KEY)
    (tmp_path / ".env").write_text(f"{NAME}=${{OTHER_KEY}}\n")
    questions: list[str] = []

    def ask(question: str) -> str:
        questions.append(question)
        return " "

    monkeypatch.setattr(getpass, "getpass", ask)
    with pytest.raises(OptionError, match=rf"^No key was entered\. .* set {NAME}\.$"):
        load(session, server, key_env=NAME)
    assert server.received == []
    assert questions[0].startswith(f"Keys are not read from .env. Key for {server.url} (")


def test_rejected_typed_key_prompts_again(
    session: Session, server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = ["sk-wrong", KEY]
    monkeypatch.setattr(getpass, "getpass", lambda _question: typed.pop(0))
    server.will(MODELS, *error_answer(401, "Who are you?"))
    with pytest.raises(
        AuthenticationFailed, match=f"typed in for {NAME} .* Load again to type another key"
    ):
        load(session, server, key_env=NAME)
    load(session, server, key_env=NAME)
    assert session.generate("hi").text == "hi"
    assert typed == []


def test_next_load_uses_new_value_of_variable(
    session: Session, server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(NAME, KEY)
    load(session, server, key_env=NAME)
    server.key = f"{KEY}-2"
    with pytest.raises(AuthenticationFailed, match="Correct the variable and load again"):
        session.generate("hi")
    monkeypatch.setenv(NAME, server.key)
    load(session, server, key_env=NAME)
    assert session.generate("hi").text == "hi"
    outcome = session.load_with_details("tiny", backend="openai", base_url=server.url, key_env=NAME)
    assert outcome.was_loaded


def test_unreachable_address_does_not_bind_key(
    session: Session, server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(NAME, KEY)
    with FaultServer() as gone:
        gone.stop()
        with pytest.raises(ServerUnreachable):
            load(session, gone, key_env=NAME)
    load(session, server, key_env=NAME)
    assert session.generate("hi").text == "hi"


def test_models_uses_key_of_loaded_model(
    session: Session, server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(NAME, KEY)
    load(session, server, key_env=NAME)
    assert [info.name for info in session.models("openai")] == ["tiny", "big"]
    monkeypatch.setenv("OTHER_KEY", "sk-other")
    server.key = "sk-other"
    assert [info.name for info in session.models("openai", key_env="OTHER_KEY")] == ["tiny", "big"]
    with pytest.raises(AuthenticationFailed):
        session.models("openai")


def test_invalid_openai_address_does_not_affect_other_backends(server: FaultServer) -> None:
    server.key = None
    session = Session(settings(openai_base_url="https://x.example/openai?api-version=preview"))
    session.load("tiny", backend="vllm", base_url=server.url)
    session.close()


def test_unset_variable_raises_without_prompt(
    session: Session, server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OptionError, match=f"{NAME} is not set, and you cannot be prompted"):
        load(session, server, key_env=NAME)

    def refuse(question: str) -> str:
        raise NotImplementedError("this frontend has no input")

    monkeypatch.setattr(getpass, "getpass", refuse)
    with pytest.raises(OptionError, match="be prompted for it here"):
        load(session, server, key_env=NAME)
    caught: list[BaseException] = []

    def elsewhere() -> None:
        with pytest.raises(OptionError, match="be prompted for it here") as error:
            load(session, server, key_env=NAME)
        caught.append(error.value)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert len(caught) == 1
    assert server.received == []


def test_typed_text_that_is_no_key_is_not_called_the_value_of_the_variable(
    session: Session, server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(getpass, "getpass", lambda _question: "%llm hi")
    with pytest.raises(OptionError, match="What you entered is not an API key: it contains spaces"):
        load(session, server, key_env=NAME)
    assert server.received == []


@pytest.mark.parametrize("secret", [" ", "two words", "line\nbreak", "schlüssel", "tab\tin it"])
def test_invalid_key_raises_without_showing_value(
    session: Session, server: FaultServer, monkeypatch: pytest.MonkeyPatch, secret: str
) -> None:
    monkeypatch.setenv(NAME, secret)
    with pytest.raises(OptionError, match=f"The value of {NAME} is not an API key") as caught:
        load(session, server, key_env=NAME)
    assert not secret.strip() or secret not in str(caught.value)


@pytest.mark.parametrize(
    "typed",
    [KEY, "a" * 41, "9lives", "", "sk-proj-1", "hf_aBcDeFgHiJkLmNoPqRsTuVwXyZaBcDeFg1",
     "ghp_aBcDeFgHiJkLmNoPqRsTuVwXyZ0123456789", "f" + "0123456789abcde" * 2 + "f"],
)  # fmt: skip
def test_key_passed_as_variable_name_is_not_repeated(session: Session, typed: str) -> None:
    with pytest.raises(OptionError, match="takes the name of an environment variable") as caught:
        session.load("tiny", backend="openai", key_env=typed)
    assert not typed or typed not in str(caught.value)


def test_key_is_masked_and_not_pickled() -> None:
    key = ApiKey(KEY, "https://host", NAME)
    shown = [repr(key), str(key), f"{key}", repr([key]), repr(vars(ApiKeys()))]
    assert KEY not in "".join(shown)
    assert key.header("https://host") == f"Bearer {KEY}"
    with pytest.raises(OptionError, match="not sent to http://host"):
        key.header("http://host")
    for take in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="cannot be pickled"):
            take(key)


def test_errors_do_not_contain_key(
    session: Session, server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(NAME, KEY)
    load(session, server, key_env=NAME)
    for status in (400, 401, 403, 404, 413, 422, 500):
        for _ in range(3 if status == 500 else 1):
            server.will(
                CHAT, *error_answer(status, f"What is {KEY}?", headers={"Retry-After": "0"})
            )
        with pytest.raises(LLMMagicError) as caught:
            session.generate("hello")
        shown = "".join(traceback.format_exception(caught.value)) + caught.value.details
        assert KEY not in shown + repr(caught.value) + repr(session) + repr(session.status())
    assert KEY not in repr(vars(session.loaded_model().backend))


def test_key_over_http_gets_warning(
    session: Session, server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(NAME, KEY)
    # A proxy stands for the way to a host that is not this machine.
    for proxy in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(proxy, server.url)
    monkeypatch.setenv("no_proxy", "")
    outcome = session.load_with_details(
        "tiny", backend="openai", base_url="http://far.example", key_env=NAME
    )
    assert any("in clear text" in note for note in outcome.notes)


def test_local_server_bypasses_proxy(
    session: Session, server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(NAME, KEY)
    with FaultServer() as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        load(session, server, key_env=NAME)
        outcome = session.load_with_details(
            "tiny", backend="openai", base_url=server.url, key_env=NAME
        )
        assert proxy.received == []
    assert not [note for note in outcome.notes if "clear text" in note]


@pytest.mark.parametrize(
    "repeated",
    [KEY, f"{KEY[:4]}****{KEY[-4:]}", f"{KEY[:5]}...", f"...{KEY[-3:]}", "sk-test-XXXXXXXXXXX3a650",
     f"{KEY[:12]}", KEY[4:], f"'{KEY[:3]}…{KEY[-2:]}'", f"key={KEY[:8]}•••"],
)  # fmt: skip
def test_scrub_masks_parts_of_key(repeated: str) -> None:
    message = ApiKey(KEY, "https://host", NAME).scrub(
        f"Incorrect API key provided: {repeated}. Sorry."
    )
    assert not {KEY[at : at + 4] for at in range(len(KEY) - 3)} & {
        message[at : at + 4] for at in range(len(message))
    }
    assert message.startswith("Incorrect API key provided: ")
    assert message.endswith(" Sorry.")


def test_scrub_keeps_other_text() -> None:
    message = "No model sk-test... but test-4 is... wait: see https://host/docs?x=1 **now** (4f9b)."
    scrubbed = ApiKey(KEY, "https://host", NAME).scrub(message)
    assert scrubbed == message.replace("sk-test...", "•••")
