"""One of each backend, ready to be asked: the local one with a real model, the others with a server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from echo_backend import EchoBackend

from llm_magic.session import Session
from tests.fault_server import CHAT, FaultServer
from tests.http_server import HttpServer
from tests.ollama_server import OllamaServer
from tests.scripted import settings

REMOTE = ("ollama", "vllm", "instructlab", "openai")
QUESTION = "one two three four five six"


@dataclass
class Under:
    """A backend under test: a session, how a model of it is loaded, and its server if it has one."""

    name: str
    session: Session
    model: str | None
    missing: str
    server: HttpServer | None = None
    chat: str = CHAT
    options: dict[str, Any] = field(default_factory=dict)
    echo: EchoBackend | None = None

    def load(self, model: str | None = None, **more: Any) -> None:
        """Load its model, or another."""
        self.session.load(model or self.model, backend=self.name, **self.options, **more)

    def slowly(self) -> None:
        """Make its answers last for seconds."""
        if self.server is not None:
            self.server.pace = 0.5
        if self.echo is not None:
            self.echo.pace = 0.5


@pytest.fixture
def under(request: pytest.FixtureRequest) -> Iterator[Under]:
    """Return the backend that the test is parametrized with."""
    name = request.param
    with ExitStack() as stack:
        echo = EchoBackend() if name == "echo" else None
        session = Session(settings(), create=(lambda _name: echo) if echo is not None else None)
        stack.callback(session.close)
        if name == "local":
            request.getfixturevalue("model_cache")
            case = Under(name, session, None, "./there-is-no-such-folder")
        elif echo is not None:
            case = Under(name, session, "parrot", "parrotx", echo=echo)
        else:
            double = OllamaServer() if name == "ollama" else FaultServer()
            server: HttpServer = stack.enter_context(double)
            chat = "/api/chat" if name == "ollama" else CHAT
            model = next(iter(double.models))
            case = Under(name, session, model, f"{model}x", server, chat, {"base_url": server.url})
        yield case


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the working folder, which has no ``.env``."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
