"""Checks of packages, devices, servers and the notebook. Each finding has a fix."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from llm_magic.backends.registry import check_name
from llm_magic.config.env_file import read_env_file
from llm_magic.config.settings import Settings
from llm_magic.doctor import machine, servers
from llm_magic.doctor.finding import Finding
from llm_magic.doctor.notebook import KernelInfo, check_notebook
from llm_magic.doctor.packages import check_backends, check_packages
from llm_magic.errors import OptionError, SettingsError, did_you_mean
from llm_magic.session.event_loop import LoopThread

if TYPE_CHECKING:
    from llm_magic.session import Session

__all__ = ["Finding", "KernelInfo", "run_checks"]

Check = Callable[[], list[Finding] | Awaitable[list[Finding]]]


def run_checks(session: Session, kernel: KernelInfo | None = None) -> list[Finding]:
    """Return the findings of all checks; `kernel` is the kernel that this runs in, if any.

    The call takes some seconds, because it imports torch in a child process.
    """
    # Separate from the loop of the session, which may be blocked.
    loop = LoopThread("llm_magic-doctor-loop")
    try:
        return loop.run(_run_all(session, kernel))
    finally:
        loop.close()


async def _run_all(session: Session, kernel: KernelInfo | None) -> list[Finding]:
    settings, invalid = _settings(session)
    checks: dict[str, Check] = {
        "packages": check_packages,
        "backends": check_backends,
        "machine": machine.check_machine,
        "disks": machine.check_disks,
        "hub": servers.check_hub,
        "certificates": servers.check_certificates,
        "variables": _check_variables,
        "keys": lambda: servers.check_keys(session.keys),
    }
    if settings is not None:
        checks["servers"] = lambda: servers.check_servers(settings, session.keys, session.used)
    checks["notebook"] = lambda: check_notebook(kernel)
    groups = await asyncio.gather(*(_run(name, check) for name, check in checks.items()))
    return [*invalid, *(finding for group in groups for finding in group)]


def _settings(session: Session) -> tuple[Settings | None, list[Finding]]:
    """Return the settings, those of the environment if ``.env`` is invalid, and what is invalid."""
    fix = "correct that file or variable, then %llm_config --reset"
    try:
        settings = session.settings
    except SettingsError as error:
        return Settings.of_environment(), [Finding("settings", "problem", str(error), fix)]
    try:
        check_name(settings.backend, settings.backend)
    except OptionError as error:
        return settings, [Finding("settings", "problem", str(error), fix)]
    return settings, []


def _check_variables() -> list[Finding]:
    """Return a finding about variables that look like settings of this package and are none.

    Other programs have variables that start with ``LLM_``: only a similar name is a warning.
    """
    known = [str(field.validation_alias) for field in Settings.model_fields.values()]
    known += ["LLM_MAGIC_CACHE_DIR"]
    with contextlib.suppress(SettingsError):
        found = {name.upper() for name in (*os.environ, *read_env_file())}
        names = sorted(n for n in found - {*known} if n.startswith(("LLM_", "DEFAULT_LLM_")))
        near = {name: did_you_mean(name, known, count=1).strip() for name in names}
        if wrong := [
            f"{name} is not a setting. {advice}" for name, advice in near.items() if advice
        ]:
            fix = "rename it, then %llm_config --reset; ignore it if it is of another program"
            return [Finding("variables", "warn", " ".join(wrong), fix)]
        if names:
            text = f"of other programs, not of llm_magic: {', '.join(names)}"
            return [Finding("variables", "ok", text)]
    # An invalid file has a finding of its own.
    return []


async def _run(name: str, check: Check) -> list[Finding]:
    """Return the findings of a check; an exception in it becomes a finding."""
    try:
        found = check()
        return await found if inspect.isawaitable(found) else found
    except Exception as error:  # noqa: BLE001 - a broken installation raises anything
        text = f"could not be checked: {type(error).__name__}: {str(error)[:200]}"
        return [Finding(name, "problem", text, "fix that error, then run %llm_doctor again")]
