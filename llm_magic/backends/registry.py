"""The backends by name, imported on first use."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import cast

from llm_magic.backends.base import Backend
from llm_magic.config.api_keys import ApiKeys
from llm_magic.config.settings import ReadSettings, Settings
from llm_magic.errors import OptionError, did_you_mean
from llm_magic.types import ModelInfo

BACKENDS: Mapping[str, str] = {
    "local": "llm_magic.backends.local.backend:local",
    "ollama": "llm_magic.backends.remote.ollama:ollama",
    "vllm": "llm_magic.backends.remote.openai_compatible:vllm",
    "instructlab": "llm_magic.backends.remote.openai_compatible:instructlab",
    "openai": "llm_magic.backends.remote.openai_compatible:openai",
}


def create(name: str, settings: ReadSettings, keys: ApiKeys) -> Backend:
    """Import and build the backend called `name`; raises `OptionError` for an unknown one.

    `settings` returns those of the moment: ``%llm_config --reset`` reads them anew.
    """
    check_name(name, settings().backend)
    module, _, attribute = BACKENDS[name].partition(":")
    return cast(Backend, getattr(import_module(module), attribute)(settings, keys))


def local_model_names(settings: Settings) -> list[ModelInfo]:
    """Return the models on this disk by name, without creating a backend; used by completion."""
    from llm_magic.backends.local.files import sources

    return sources.names(settings.models_folder)


def check_name(name: str, usual: str | None = None) -> None:
    """Raise `OptionError` for a name that is no backend's; `usual` is the one of the settings."""
    if name not in BACKENDS:
        source = "LLM_BACKEND_TYPE: there" if name == usual else "There"
        raise OptionError(
            f"{source} is no backend {name!r}.{did_you_mean(name, BACKENDS)}"
            f" Known: {', '.join(BACKENDS)}."
        )
