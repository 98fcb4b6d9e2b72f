"""What is installed and running, what is not well, and what mends it; every check for itself."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from llm_magic.backends.registry import check_name
from llm_magic.config.settings import Settings
from llm_magic.doctor import machine, servers
from llm_magic.doctor.finding import Finding
from llm_magic.doctor.notebook import Kernel, notebook
from llm_magic.doctor.packages import packages
from llm_magic.errors import OptionError, SettingsError
from llm_magic.session.event_loop import LoopThread

if TYPE_CHECKING:
    from llm_magic.session import Session

__all__ = ["Finding", "Kernel", "examine"]


def examine(session: Session, kernel: Kernel | None = None) -> list[Finding]:
    """Return what was found, in the order of a table; `kernel` is the one this runs in, if any.

    It takes as long as the slowest check: some seconds, in which torch is tried in another process.
    """
    # A loop of its own: what is wrong with the session's must not keep it from being told.
    loop = LoopThread("llm_magic-doctor-loop")
    try:
        return loop.run(_examined(session, kernel))
    finally:
        loop.close()


async def _examined(session: Session, kernel: Kernel | None) -> list[Finding]:
    settings, wrong = _settings(session)
    groups: list[tuple[str, Awaitable[list[Finding]]]] = [
        ("packages", _now(packages)),
        ("machine", machine.machine()),
        ("disks", machine.disks()),
        ("hub", servers.hub()),
        ("certificates", _now(servers.certificates)),
        ("keys", _now(lambda: servers.secrets(session.keys))),
    ]
    if settings is not None:
        groups.append(("servers", servers.servers(settings, session.keys, session.used)))
    groups.append(("notebook", _now(lambda: notebook(kernel))))
    found = await asyncio.gather(*(_guarded(name, group) for name, group in groups))
    return [*wrong, *(finding for group in found for finding in group)]


def _settings(session: Session) -> tuple[Settings | None, list[Finding]]:
    fix = "correct that file or variable, then %llm_config --reset"
    try:
        settings = session.settings
    except SettingsError as error:
        found = [Finding("settings", "problem", str(error), fix)]
        return Settings.of_environment(), found
    try:
        check_name(settings.backend, settings.backend)
    except OptionError as error:
        return settings, [Finding("settings", "problem", str(error), fix)]
    return settings, []


async def _now(check: Callable[[], list[Finding]]) -> list[Finding]:
    return check()


async def _guarded(name: str, group: Awaitable[list[Finding]]) -> list[Finding]:
    """Turn a check that breaks into a finding: the others are still wanted."""
    try:
        return await group
    except Exception as error:  # noqa: BLE001 - a broken installation raises anything
        text = f"could not be checked: {type(error).__name__}: {str(error)[:200]}"
        return [Finding(name, "problem", text, "look at what is named there")]
