"""Encrypted connections: which certificates are trusted, and the errors for the others."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
import trustme

from llm_magic.errors import ServerUnreachable, SettingsError
from llm_magic.session import Session
from tests.scripted import settings
from tests.tls_server import Models, tls_server


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def url(authority: trustme.CA) -> Iterator[str]:
    """Return the address of a server whose certificate only `authority` vouches for."""
    with tls_server(authority) as address:
        yield address


@pytest.fixture
def session() -> Iterator[Session]:
    made = Session(settings())
    yield made
    made.close()


def test_certificate_of_unknown_authority_is_rejected(session: Session, url: str) -> None:
    with pytest.raises(
        ServerUnreachable, match=r"not trusted \(unable to get local .* SSL_CERT_FILE"
    ):
        session.load("tiny", backend="openai", base_url=url)


def test_authority_that_is_set_after_the_error_is_trusted(
    session: Session, authority: trustme.CA, url: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with pytest.raises(ServerUnreachable, match="SSL_CERT_FILE"):
        session.load("tiny", backend="openai", base_url=url)
    file = tmp_path / "authority.pem"
    authority.cert_pem.write_to_path(str(file))
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    assert session.load("tiny", backend="openai", base_url=url).name == "tiny"


def test_an_authority_of_ones_own_is_named_by_a_variable(
    authority: trustme.CA, url: str, tmp_path: Path
) -> None:
    file = tmp_path / "authority.pem"
    authority.cert_pem.write_to_path(str(file))
    code = f"from llm_magic import llm; print(llm.load('tiny', backend='openai', base_url={url!r}).name)"
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env={"PATH": "", "SSL_CERT_FILE": str(file), "PYTHONPATH": str(Path.cwd())},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.stdout.strip() == "tiny", ran.stderr


@pytest.mark.parametrize(
    "setting",
    [
        ("SSL_CERT_FILE", "none.pem", "No such file or directory"),
        ("SSL_CERT_FILE", ".", "Is a directory"),
        ("SSL_CERT_FILE", "empty.pem", "there is no certificate in it"),
        ("SSL_CERT_FILE", "garbage.pem", "there is no certificate in it"),
        ("SSL_CERT_DIR", "none", "there is no such folder"),
    ],
)
def test_certificates_that_cannot_be_read_are_named_by_their_variable(
    session: Session, authority: trustme.CA, url: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, setting: tuple[str, str, str],
) -> None:  # fmt: skip
    variable, name, reason = setting
    (tmp_path / "empty.pem").touch()
    (tmp_path / "garbage.pem").write_bytes(b"\xff-----BEGIN CERTIFICATE-----\0")
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.setenv(variable, str(tmp_path / name))
    with pytest.raises(SettingsError) as caught:
        session.load("tiny", backend="openai", base_url=url)
    message = str(caught.value)
    assert message.startswith(f"{variable}={tmp_path / name}: {reason}.")
    assert message.endswith(f"unset {variable}.")
    # Nothing of it is kept: the next load reads the variable again.
    authority.cert_pem.write_to_path(str(tmp_path / "authority.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
    assert session.load("tiny", backend="openai", base_url=url).name == "tiny"


def test_server_without_encryption_is_reported(session: Session) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Models) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        with pytest.raises(
            ServerUnreachable, match=r"uses http, not https\. Use --base-url http://127"
        ):
            session.load(
                "tiny", backend="openai", base_url=f"https://127.0.0.1:{server.server_port}"
            )
        server.shutdown()
        thread.join()
