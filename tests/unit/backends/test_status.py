"""The status of the manager, from any thread, and the backends of its models."""

from __future__ import annotations

import asyncio
import threading

import pytest

from llm_magic.backends.manager import BackendManager, Status
from llm_magic.config.settings import GenerationConfig, LoadConfig
from llm_magic.errors import LoadFailed, OptionError
from llm_magic.types import MemoryUse, Message, Progress
from tests.scripted import ScriptedBackend, scripted_session

CONFIG = LoadConfig()


def test_status_has_what_the_product_promises() -> None:
    with scripted_session(load=False) as (session, _):
        status = session.status()
        assert (status.backend_type, status.active_model, status.status) == (
            "local",
            None,
            "Inactive",
        )
        assert (status.memory, status.backend_details, status.models) == (None, {}, ())
        session.load("org/tiny")
        status = session.status()
        assert (status.active_model, status.status, status.last_error) == ("tiny", "Ready", None)
        assert status.generation_config == GenerationConfig()
        assert status.backend_details == {
            "source": "/models/org/tiny", "device": "cpu", "dtype": "bfloat16",
            "quantization": "none",
        }  # fmt: skip
        assert [info.size for info in status.models] == [269_000_000]
        assert (status.progress, status.memory) == (None, MemoryUse(2000))


def test_progress_is_seen_from_another_thread_while_a_load_runs() -> None:
    with scripted_session(load=False) as (session, backend):
        backend.reports = {"check": [Progress("looking")], "load": [Progress("reading", 0.5)]}
        for stage, seen in (("check", Progress("looking")), ("load", Progress("reading", 0.5))):
            hang = backend.hang(stage)  # type: ignore[arg-type]
            session.load_later("tiny")
            assert hang.reached.wait(5)
            found: list[Status] = []
            thread = threading.Thread(target=lambda found=found: found.append(session.status()))
            thread.start()
            thread.join(5)
            assert [(s.status, s.progress, s.models) for s in found] == [("Loading", seen, ())]
            assert session.progress == seen
            hang.go.set()
            assert session.generate("?").text == "?"
            assert session.status().progress is None
            session.unload()


def test_progress_of_a_failed_load_is_gone() -> None:
    with scripted_session(load=False) as (session, backend):
        backend.reports["load"] = [Progress("reading", 0.5)]
        backend.trouble["load"] = LoadFailed("damaged")
        with pytest.raises(LoadFailed):
            session.load("a")
        assert (session.progress, session.status().status) == (None, "Failed")


def test_an_unknown_backend_is_an_error_and_blocks_nothing() -> None:
    def create(name: str) -> ScriptedBackend:
        if name != "local":
            raise OptionError(f"There is no backend {name!r}.")
        return ScriptedBackend()

    async def main() -> None:
        manager = BackendManager(create)
        with pytest.raises(OptionError, match="no backend 'olama'"):
            await manager.load("a", CONFIG.replace(backend="olama"))
        await manager.load("a", CONFIG)
        assert manager.state == "Ready"

    asyncio.run(main())


def test_status_is_read_while_another_backend_is_created() -> None:
    class Busy(ScriptedBackend):
        """A backend whose memory takes so long to read that another one is created meanwhile."""

        def memory(self) -> MemoryUse:
            asyncio.run(manager.models(CONFIG.replace(backend="ollama")))
            return super().memory()

    manager = BackendManager(lambda name: Busy() if name == "local" else ScriptedBackend())
    asyncio.run(manager.load("a", CONFIG))
    assert manager.snapshot(GenerationConfig(), "local").active_model == "a"


def test_models_are_found_with_their_own_backend() -> None:
    async def main() -> None:
        made: dict[str, ScriptedBackend] = {}

        def create(name: str) -> ScriptedBackend:
            return made.setdefault(name, ScriptedBackend())

        manager = BackendManager(create)
        await manager.load("a", CONFIG.replace(backend="one"))
        await manager.load("b", CONFIG.replace(backend="two"), keep=True)
        messages = [Message("user", "one two three")]
        chunks = [
            c async for c in manager.find("a").backend.stream("a", messages, GenerationConfig())
        ]
        assert "".join(chunk.text for chunk in chunks) == "one two three"
        assert (len(made["one"].requests), len(made["two"].requests)) == (1, 0)
        assert (await manager.find("b").backend.count("b", messages)).prompt_tokens == 3
        assert [info.name for info in await manager.models(LoadConfig(backend="two"))] == [
            "big",
            "tiny",
        ]
        await manager.aclose()
        assert [made[name].events[-1] for name in ("one", "two")] == ["close", "close"]
        assert (manager.state, manager.snapshot(GenerationConfig(), "x").backend_type) == (
            "Inactive", "x",
        )  # fmt: skip

    asyncio.run(main())
