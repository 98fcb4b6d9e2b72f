"""The state machine: which models are loaded, which is active, and that invalid input unloads nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from llm_magic import errors
from llm_magic.backends.local.load_config import LocalLoadConfig
from llm_magic.backends.manager import BackendManager, LoadResult, Status
from llm_magic.config.settings import GenerationConfig
from llm_magic.errors import (
    LLMMagicError,
    LoadFailed,
    LoadInProgress,
    ModelNotFound,
    ModelNotLoaded,
    OptionError,
    OutOfMemory,
)
from llm_magic.types import Progress, Unloaded
from tests.scripted import Hang, ScriptedBackend

CONFIG = LocalLoadConfig()
Test = Callable[[BackendManager, ScriptedBackend], Coroutine[Any, Any, None]]


def on_a_loop(test: Test) -> Callable[[], None]:
    """Make a test of a coroutine function; it gets a manager and its backend."""

    async def limited() -> None:
        backend = ScriptedBackend()
        async with asyncio.timeout(5):
            await test(BackendManager(lambda _name: backend), backend)

    return lambda: asyncio.run(limited())


def look(manager: BackendManager) -> Status:
    return manager.snapshot(GenerationConfig(), "local")


def names(manager: BackendManager) -> list[str]:
    return [info.name for info in look(manager).models]


async def start_load(manager: BackendManager, hang: Hang, model: str) -> asyncio.Task[LoadResult]:
    """Start a load and wait until it hangs."""
    task = asyncio.ensure_future(manager.load(model, CONFIG))
    while not hang.reached.is_set():
        await asyncio.sleep(0.001)
    return task


@on_a_loop
async def test_from_inactive_to_ready_and_back(
    manager: BackendManager, backend: ScriptedBackend
) -> None:
    assert (manager.state, look(manager).active_model) == ("Inactive", None)
    hang = backend.hang("load")
    task = await start_load(manager, hang, "org/tiny")
    assert (manager.state, names(manager)) == ("Loading", [])
    hang.go.set()
    assert (await task).info.name == "tiny"
    assert (manager.state, look(manager).active_model) == ("Ready", "tiny")
    hang = backend.hang("unload")
    unloading = asyncio.ensure_future(manager.unload())
    await asyncio.sleep(0.01)
    assert manager.state == "Unloading"
    hang.go.set()
    assert (await unloading).name == "tiny"
    assert (manager.state, look(manager).active_model) == ("Inactive", None)


@on_a_loop
async def test_a_second_load_is_refused_and_not_queued(
    manager: BackendManager, backend: ScriptedBackend
) -> None:
    for stage in ("check", "load"):
        hang = backend.hang(stage)
        task = await start_load(manager, hang, "org/tiny")
        with pytest.raises(LoadInProgress, match="tiny is being loaded"):
            await manager.load("other", CONFIG)
        hang.go.set()
        await task
        await manager.unload()
    assert not [event for event in backend.events if "other" in event]


@on_a_loop
async def test_a_check_that_fails_loses_nothing(
    manager: BackendManager, backend: ScriptedBackend
) -> None:
    await manager.load("a", CONFIG)
    backend.trouble["check"] = OutOfMemory("b needs 9 GB, 1 GB is free.")
    with pytest.raises(OutOfMemory):
        await manager.load("b", CONFIG)
    status = look(manager)
    assert (status.status, status.active_model, names(manager)) == ("Ready", "a", ["a"])
    assert status.last_error == "b needs 9 GB, 1 GB is free."
    assert backend.events == ["check a", "load a", "check b"]
    assert manager.find().name == "a"


@on_a_loop
async def test_model_stays_loaded_if_the_next_one_cannot_be_verified(
    manager: BackendManager, backend: ScriptedBackend
) -> None:
    backend.trouble["verify"] = LoadFailed("The tokenizer of b is damaged.")
    await manager.load("a", CONFIG)  # nothing is lost if this one fails
    with pytest.raises(LoadFailed, match=r"^The tokenizer of b is damaged\.$"):
        await manager.load("b", CONFIG)
    assert (look(manager).status, look(manager).active_model) == ("Ready", "a")
    await manager.load("b", CONFIG, keep=True)
    assert backend.events == ["check a", "load a", "check b", "verify b", "check b", "load b"]


@on_a_loop
async def test_failed_first_load_is_reported_until_one_succeeds(
    manager: BackendManager, backend: ScriptedBackend
) -> None:
    with pytest.raises(ModelNotLoaded, match=r"^No model is loaded\. Run %llm_load"):
        manager.find()
    backend.trouble["check"] = ModelNotFound("There is no model b.")
    with pytest.raises(ModelNotFound):
        await manager.load("b", CONFIG)
    status = look(manager)
    assert (status.status, status.last_error) == ("Failed", "There is no model b.")
    with pytest.raises(ModelNotLoaded, match=r"the last load failed\. There is no model b\."):
        manager.find()
    backend.trouble.clear()
    await manager.load("b", CONFIG)
    assert (look(manager).status, look(manager).last_error) == ("Ready", None)


@on_a_loop
async def test_the_previous_model_goes_only_after_the_check(
    manager: BackendManager, backend: ScriptedBackend
) -> None:
    await manager.load("a", CONFIG)
    result = await manager.load("b", CONFIG)
    assert backend.events == ["check a", "load a", "check b", "unload a", "load b"]
    assert backend.leaving == [(), ("a",)]  # what the check may count as free
    assert [unloaded.name for unloaded in result.unloaded] == ["a"]
    assert names(manager) == ["b"]


@on_a_loop
async def test_a_load_that_fails_after_the_check_leaves_nothing(
    manager: BackendManager, backend: ScriptedBackend
) -> None:
    await manager.load("a", CONFIG)
    backend.trouble["load"] = LoadFailed("The weights of b are damaged.")
    with pytest.raises(LoadFailed):
        await manager.load("b", CONFIG)
    status = look(manager)
    assert (status.status, names(manager), status.active_model) == ("Failed", [], None)
    assert status.last_error == (
        "The weights of b are damaged. a was unloaded for it. To load a again: %llm_load a"
    )


@on_a_loop
async def test_failed_load_names_the_command_for_the_model_before_it(
    manager: BackendManager, backend: ScriptedBackend
) -> None:
    await manager.load("x", CONFIG)
    await manager.load("org/a", CONFIG.replace(quantization="4bit", compile=True), keep=True)
    backend.trouble["load"] = LoadFailed("No.")
    with pytest.raises(
        LoadFailed, match=r"^No\. x, a were unloaded for it\. To load a again: (.*)$"
    ) as e:
        await manager.load("b", CONFIG)
    assert str(e.value).endswith("%llm_load org/a -q 4bit --compile")


def every_error() -> list[type[LLMMagicError]]:
    """Return all classes of the error tree."""
    return [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, LLMMagicError)
    ]


@pytest.mark.parametrize("kind", every_error())
def test_error_of_load_keeps_its_class_and_attributes(kind: type[LLMMagicError]) -> None:
    @on_a_loop
    async def load_after_unload(manager: BackendManager, backend: ScriptedBackend) -> None:
        await manager.load("a", CONFIG)
        error = backend.trouble["load"] = kind("It broke.")
        for name, value in vars(error).items():
            setattr(error, name, value or "503")
        advice = "To load a again: %llm_load a"
        lost = {"problem": "It broke. a was unloaded for it.", "advice": f"503. {advice}"}
        before = vars(error) | lost
        with pytest.raises(kind) as caught:
            await manager.load("b", CONFIG)
        assert (type(caught.value), vars(caught.value)) == (kind, before)
        assert str(caught.value) == f"It broke. a was unloaded for it. {advice}"

    load_after_unload()


@on_a_loop
async def test_an_unload_while_a_model_is_loaded_is_refused(
    manager: BackendManager, backend: ScriptedBackend
) -> None:
    await manager.load("a", CONFIG)
    hang = backend.hang("check")
    loading = await start_load(manager, hang, "b")
    for refused in (manager.unload("a"), manager.unload_all()):
        with pytest.raises(LoadInProgress, match="b is being loaded"):
            await refused
    assert names(manager) == ["a"]
    hang.go.set()
    await loading


@on_a_loop
async def test_two_unloads_at_once_free_a_model_once(
    manager: BackendManager, backend: ScriptedBackend
) -> None:
    await manager.load("a", CONFIG)
    done = await asyncio.gather(manager.unload("a"), manager.unload("a"), return_exceptions=True)
    assert [type(outcome) for outcome in done] == [Unloaded, ModelNotLoaded]
    assert backend.events.count("unload a") == 1


@on_a_loop
async def test_unexpected_error_does_not_block_the_next_load(
    manager: BackendManager, backend: ScriptedBackend
) -> None:
    for stage in ("check", "load"):
        backend.trouble = {stage: RuntimeError("a bug")}
        with pytest.raises(RuntimeError, match="a bug"):
            await manager.load("a", CONFIG)
        assert (manager.state, look(manager).last_error) == ("Failed", "RuntimeError: a bug")
    backend.trouble.clear()
    await manager.load("a", CONFIG)
    assert manager.state == "Ready"


@on_a_loop
async def test_cancelling_a_check_leaves_all_as_it_was(
    manager: BackendManager, backend: ScriptedBackend
) -> None:
    for before, state in (([], "Inactive"), (["a"], "Ready")):
        for name in before:
            await manager.load(name, CONFIG)
        hang = backend.hang("check")
        task = await start_load(manager, hang, "b")
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()
        assert (manager.state, names(manager)) == (state, before)
        assert backend.events[-1] == "check b cancelled"
        assert look(manager).last_error is None
        backend.trouble.clear()


@on_a_loop
async def test_stopped_load_ends_the_report_of_an_earlier_failure(
    manager: BackendManager, backend: ScriptedBackend
) -> None:
    backend.trouble["check"] = ModelNotFound("There is no model b.")
    with pytest.raises(ModelNotFound):
        await manager.load("b", CONFIG)
    assert look(manager).last_error == "There is no model b."
    task = await start_load(manager, backend.hang("check"), "c")
    task.cancel()
    await asyncio.wait({task})
    assert (manager.state, look(manager).last_error) == ("Inactive", None)


@on_a_loop
async def test_cancelling_a_load_stops_it_and_waits(
    manager: BackendManager, backend: ScriptedBackend
) -> None:
    await manager.load("a", CONFIG)
    await manager.load("kept", CONFIG, keep=True)
    hang = backend.hang("load")
    task = asyncio.ensure_future(manager.load("b", CONFIG, keep=True))
    await asyncio.to_thread(hang.reached.wait, 5)
    task.cancel()
    await asyncio.wait({task})
    assert backend.events[-1] == "load b cancelled"
    assert (manager.state, look(manager).active_model) == ("Ready", "kept")
    hang = backend.hang("load")
    task = await start_load(manager, hang, "b")  # now the others had to go
    task.cancel()
    await asyncio.wait({task})
    assert (manager.state, names(manager), look(manager).progress) == ("Inactive", [], None)


@on_a_loop
async def test_stopped_load_that_ends_slowly_is_waited_for(
    manager: BackendManager, backend: ScriptedBackend
) -> None:
    hang = backend.hang("load", deaf=True)
    task = await start_load(manager, hang, "b")
    task.cancel()
    await asyncio.sleep(0.02)
    following = asyncio.ensure_future(manager.load("c", CONFIG))
    unload = asyncio.ensure_future(manager.unload_all())
    await asyncio.sleep(0.02)
    assert look(manager).progress == Progress("waiting for the end of the stopped load")
    hang.go.set()
    await asyncio.wait({task, following, unload})
    assert names(manager) == ["c"]
    assert isinstance(unload.exception(), LoadInProgress)
    assert backend.events[-3:] == ["load b cancelled", "check c", "load c"]


@on_a_loop
async def test_what_is_loaded_already_returns_at_once(
    manager: BackendManager, backend: ScriptedBackend
) -> None:
    first = await manager.load("org/a", CONFIG, name="alias")
    assert not first.was_loaded
    for requested in ("org/a", "alias", "/models/org/a"):
        again = await manager.load(requested, CONFIG)
        assert (again.was_loaded, again.info, again.unloaded) == (True, first.info, [])
    assert backend.events == ["check org/a", "load alias"]
    await manager.load("org/a", CONFIG.replace(quantization="4bit"))
    assert backend.events[2:] == ["check org/a", "unload alias", "load a"]
    await manager.load("org/a", CONFIG.replace(quantization="4bit"), name="other")
    assert names(manager) == ["other"]


@on_a_loop
async def test_asking_again_for_one_of_several_makes_it_active_and_the_others_go(
    manager: BackendManager, backend: ScriptedBackend
) -> None:
    for name in ("a", "b", "c"):
        await manager.load(name, CONFIG, keep=True)
    assert (await manager.load("a", CONFIG, keep=True)).unloaded == []
    assert (look(manager).active_model, names(manager)) == ("a", ["a", "b", "c"])
    gone = (await manager.load("b", CONFIG)).unloaded
    assert ([u.name for u in gone], names(manager)) == (["a", "c"], ["b"])
    assert (manager.state, look(manager).active_model) == ("Ready", "b")


@on_a_loop
async def test_the_default_model_is_the_same_one_however_it_is_named(
    manager: BackendManager, backend: ScriptedBackend
) -> None:
    assert (await manager.load(None, CONFIG)).info.name == "default"
    assert (await manager.load(None, CONFIG)).was_loaded
    assert (await manager.load("default", CONFIG)).was_loaded


@on_a_loop
async def test_a_name_that_is_taken_is_refused_before_anything_is_loaded(
    manager: BackendManager, backend: ScriptedBackend
) -> None:
    await manager.load("org/a", CONFIG)
    with pytest.raises(OptionError, match="name a is already used"):
        await manager.load("other/a", CONFIG, keep=True)
    assert (manager.state, names(manager)) == ("Ready", ["a"])
    assert "load a" not in backend.events[2:]
    await manager.load("other/a", CONFIG, name="a2", keep=True)
    assert (names(manager), look(manager).active_model) == (["a", "a2"], "a2")
    await manager.load("third/a", CONFIG)  # the other a leaves anyway
    assert names(manager) == ["a"]


@on_a_loop
async def test_unloading_the_active_model_makes_the_latest_other_one_active(
    manager: BackendManager, backend: ScriptedBackend
) -> None:
    for name in ("a", "b", "c"):
        await manager.load(name, CONFIG, keep=True)
    await manager.unload("a")
    assert (manager.state, look(manager).active_model) == ("Ready", "c")
    await manager.unload()
    assert look(manager).active_model == "b"
    with pytest.raises(
        ModelNotLoaded, match=r"^bb is not loaded\.( Did you mean \"b\"\?| Loaded models: b\.)$"
    ):
        await manager.unload("bb")
    assert [unloaded.name for unloaded in await manager.unload_all()] == ["b"]
    assert (manager.state, await manager.unload_all()) == ("Inactive", [])
    with pytest.raises(ModelNotLoaded):
        await manager.unload()
