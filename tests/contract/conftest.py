"""One of each backend, ready to be asked: in this process with a model, else with a server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from llm_magic.backends import registry
from llm_magic.session import Session
from tests.echo_package import install
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
    greedy: dict[str, Any] = field(default_factory=lambda: {"temperature": 0})

    def load(self, model: str | None = None, **more: Any) -> None:
        """Load its model, or another."""
        self.session.load(model or self.model, backend=self.name, **self.options, **more)

    def slowly(self) -> None:
        """Make its answers last for seconds."""
        if self.server is not None:
            self.server.pace = 0.5
        if self.name == "echo":
            self.load(pause=0.5)


@pytest.fixture(scope="session")
def echo_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder where the example package is installed."""
    return install(tmp_path_factory.mktemp("echo"))


@pytest.fixture
def echo_installed(echo_package: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let this process find the example package during a test."""
    monkeypatch.syspath_prepend(echo_package)
    registry.refresh()
    yield
    monkeypatch.undo()
    registry.refresh()


@pytest.fixture(scope="session")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny model that repeats some letters until a limit, which loads in no time."""
    from tests.local_models import parrot

    folder = tmp_path_factory.mktemp("contract") / "endless"
    return parrot(folder, "abcdef", ends=False, max_position_embeddings=8192)


@pytest.fixture
def under(request: pytest.FixtureRequest) -> Iterator[Under]:
    """Return the backend that the test is parametrized with."""
    name = request.param
    with ExitStack() as stack:
        session = Session(settings())
        stack.callback(session.close)
        if name == "local":
            folder = str(request.getfixturevalue("endless"))
            case = Under(name, session, folder, "./there-is-no-such-folder")
        elif name == "llamacpp":
            case = Under(name, session, None, "./there-is-no-such-file.gguf")
        elif name == "echo":
            request.getfixturevalue("echo_installed")
            case = Under(name, session, "parrot", "parrotx", greedy={})
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
