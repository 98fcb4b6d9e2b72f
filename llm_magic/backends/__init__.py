"""The backends by name, imported on first use."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import cast

from llm_magic.backends.base import Backend
from llm_magic.config import Settings
from llm_magic.errors import OptionError, did_you_mean
from llm_magic.keys import Keys

BACKENDS: Mapping[str, str] = {
    "local": "llm_magic.backends.local.backend:local",
    "ollama": "llm_magic.backends.ollama:ollama",
    "vllm": "llm_magic.backends.openai_compatible:vllm",
    "instructlab": "llm_magic.backends.openai_compatible:instructlab",
    "openai": "llm_magic.backends.openai_compatible:openai",
}


def create(name: str, settings: Settings, keys: Keys) -> Backend:
    """Import and build the backend called `name`; raises `OptionError` for an unknown one."""
    check_name(name)
    module, _, attribute = BACKENDS[name].partition(":")
    return cast(Backend, getattr(import_module(module), attribute)(settings, keys))


def check_name(name: str) -> None:
    """Raise `OptionError` for a name that is no backend's."""
    if name not in BACKENDS:
        raise OptionError(
            f"There is no backend {name!r}.{did_you_mean(name, BACKENDS)}"
            f" Known: {', '.join(BACKENDS)}."
        )
