"""The backends by name, found through the entry-point group ``llm_magic.backends``.

Names come from package metadata and import nothing; a backend is imported when it is used or when
its options are shown. A backend that cannot be imported raises only when it is used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import Distribution, EntryPoint, entry_points
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypedDict

from llm_magic.backends.base import Backend
from llm_magic.config import providers
from llm_magic.config.api_keys import ApiKeys
from llm_magic.config.commands import command, either
from llm_magic.config.commands import option as spelled
from llm_magic.config.option_spec import OptionSpec, specs
from llm_magic.config.server_address import parse_url
from llm_magic.config.settings import (
    GenerationOptions,
    LoadConfig,
    ReadSettings,
    ServerLoadConfig,
    SessionConfig,
    Settings,
)
from llm_magic.errors import BackendUnavailable, ModelNotFound, OptionError, did_you_mean
from llm_magic.text import counted
from llm_magic.types import ModelInfo

GROUP = "llm_magic.backends"
_PACKAGE = "llm_magic"
# What people write for a server: no name of a model starts so.
_ADDRESS = re.compile(r"https?://|(localhost|127\.0\.0\.1):\d+(/|$)", re.IGNORECASE)
_OLLAMA_PORT, _HUB = ":11434", "https://huggingface.co/"
# A message names at most so many backends that have an option.
_MOST_NAMED = 4


class LoadOptions(TypedDict, total=False):
    """The load options of this package's backends as keyword arguments; a test keeps them equal."""

    backend: str
    base_url: str | None
    key_env: str | None
    pull: bool
    idle_timeout: float | None
    concurrency: int | None
    device: str
    quantization: str
    dtype: str
    revision: str | None
    trust_remote_code: bool
    attn: str | None
    assistant: str | None
    special_tokens: bool
    compile: bool
    context: int | None


@functools.cache
def _found() -> Mapping[str, tuple[EntryPoint, ...]]:
    """Return the entry points by name: this package's first, then the others in alphabetical order."""
    own = _of_source_checkout()
    installed = [p for p in entry_points(group=GROUP) if not own or _package(p) != _PACKAGE]
    installed.sort(key=lambda p: (_package(p) != _PACKAGE, p.name))
    found: dict[str, tuple[EntryPoint, ...]] = {}
    for point in [*own, *installed]:
        found[point.name] = (*found.get(point.name, ()), point)
    return MappingProxyType(found)


def _of_source_checkout() -> list[EntryPoint]:
    """Return this package's entry points as its ``pyproject.toml`` declares them; none if installed.

    The metadata of an editable install is as old as the last ``pip install``, and may lack them.
    """
    file = Path(__file__).parents[2] / "pyproject.toml"
    try:
        project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
        points: Mapping[str, str] = project["entry-points"][GROUP]
    except (OSError, ValueError, KeyError):
        return []
    if project["name"] != _PACKAGE:
        return []
    return [EntryPoint(name, value, GROUP) for name, value in points.items()]


def _package(point: EntryPoint) -> str:
    return _name_of(point.dist) if point.dist is not None else _PACKAGE


@functools.cache
def _name_of(distribution: Distribution) -> str:
    """Return the name of a package, which is parsed from its metadata each time."""
    return distribution.name


def names() -> tuple[str, ...]:
    """Return the names of all backends; imports none of them."""
    return tuple(_found())


def refresh() -> None:
    """Find the backends again: packages may have been installed or removed since."""
    importlib.invalidate_caches()
    for cached in (_found, _name_of, backend_class, load_specs, generation_specs, session_specs):
        cached.cache_clear()


def check_name(name: str, default: str | None = None) -> None:
    """Raise `OptionError` for a name that no backend has; `default` is the one of the settings."""
    if name not in _found():
        refresh()
    if name not in _found():
        source = "LLM_BACKEND_TYPE: there" if name == default else "There"
        meant = providers.named(name)
        similar = f' Did you mean "{meant}"?' if meant else did_you_mean(name, names())
        advice = similar or f" Available: {', '.join(names())}."
        raise OptionError(f"{source} is no backend {name!r}.{advice}")


@functools.cache
def backend_class(name: str) -> type[Backend]:
    """Import a backend; raises `BackendUnavailable` if its package is broken."""
    check_name(name)
    point, *others = _found()[name]
    if others:
        packages = " and ".join(_package(p) for p in (point, *others))
        raise BackendUnavailable(
            f"The packages {packages} both have a backend {name!r}. Uninstall one of them and restart."
        )
    try:
        found = point.load()
    except Exception as error:  # noqa: BLE001 - the code of another package runs here
        raise BackendUnavailable(
            f"The backend {name!r} of the package {_package(point)} cannot be imported"
            f" ({type(error).__name__}: {error}). Upgrade or uninstall that package and restart."
        ) from None
    if not isinstance(found, type) or not issubclass(found, Backend) or found.name != name:
        raise BackendUnavailable(
            f"The entry point {name!r} of the package {_package(point)} must be a subclass of"
            f" llm_magic.backends.base.Backend with name = {name!r}; it is {point.value}."
        )
    return found


def create(name: str, settings: ReadSettings, keys: ApiKeys) -> Backend:
    """Import and create a backend; raises `OptionError` for an unknown name.

    `settings` returns the current settings: ``%llm_config --reset`` reads them again.
    """
    check_name(name, settings().backend)
    return backend_class(name)(settings, keys)


def check_model(model: str | None, backend: str | None, settings: Settings) -> None:
    """Raise an error for an address, or the name of a backend, in place of the name of a model.

    `backend` is the one that the load names, if it does.
    """
    if model is None:
        return
    if not isinstance(model, str) or not model:
        raise OptionError(
            f"{model!r} cannot be the name of a model. Write a name or a path, or neither for the default."
        )
    if _ADDRESS.match(model):
        raise _address_error(model, backend)
    folded = model.casefold()
    meant = folded if folded in _found() else providers.named(folded)
    if not meant or (backend or settings.backend) != "local" or providers.ollama_name(model):
        return
    if Path(model).exists() or model in {info.name for info in local_model_names(settings)}:
        return
    provider = providers.PROVIDERS.get(meant)
    title, key = (provider.title, provider.key_note) if provider else ("a backend", "")
    error = ModelNotFound(f"{model} is the name of {title}, not of a model.")
    raise error.advise(f"Run {command('load', 'MODEL', backend=meant)}{key}.", "backend", meant)


def _address_error(model: str, backend: str | None) -> OptionError:
    """Return the error for an address in place of the name of a model."""
    if model.startswith(_HUB):
        hub_id = "/".join(model.removeprefix(_HUB).split("/")[:2])
        error = OptionError(f"{_HUB}{hub_id} is the page of a model.")
        return error.advise(f"Run {command('load', hub_id)}.", "model")
    if backend is None or not issubclass(backend_class(backend).load_config, ServerLoadConfig):
        backend = "ollama" if _OLLAMA_PORT in model else "openai"
    url = parse_url(backend, model).url
    return OptionError(f"{url} is the address of a server, not a model.").advise(
        f"Run {command('load', 'MODEL', backend=backend, base_url=url)}", "base_url"
    )


def load_config(settings: Settings, options: Mapping[str, Any]) -> LoadConfig:
    """Return the checked options of a load over the defaults of `settings`.

    An option of another backend is an error, unless its value is the default there.
    """
    name = str(options.get("backend", settings.backend))
    check_name(name, settings.backend)
    config = settings.defaults(backend_class(name).load_config)
    own, known = type(config).model_fields, load_specs()
    given = {}
    for option, value in options.items():
        spec = known.get(option)
        if option in own or spec is None:
            given[option] = value
        elif value != spec.default and not spec.is_neutral(value):
            label = either(spec.flags[-1], option) if spec.flags else option
            flag = spelled("backend")
            fix = f"Add the {flag} that you mean, or remove it."
            fix = "Remove it." if "backend" in options else fix
            raise OptionError(
                f"{label} works only with {spelled('backend')} {_listed(spec.backends)},"
                f" not with {name}. {fix}"
            )
    return config.replace(**given)


def _listed(backends: Sequence[str]) -> str:
    """Return backends in a list that fits into a message."""
    count = len(backends) - _MOST_NAMED
    return ", ".join(backends[:_MOST_NAMED]) + (
        f" and {counted(count, 'other')}" if count > 0 else ""
    )


@functools.cache
def load_specs() -> Mapping[str, OptionSpec]:
    """Return the load options of all backends, each with the backends that have it."""
    merged = dict(_merged(lambda backend: specs(backend.load_config)))
    merged["backend"] = dataclasses.replace(merged["backend"], choices=names())
    return MappingProxyType(merged)


@functools.cache
def generation_specs() -> Mapping[str, OptionSpec]:
    """Return the generation options, each with the backends that support it."""
    return _merged(
        lambda backend: {n: s for n, s in specs(GenerationOptions).items() if backend.supports(n)}
    )


@functools.cache
def session_specs() -> Mapping[str, OptionSpec]:
    """Return the settings of a session: the generation options, and the system prompt."""
    return MappingProxyType({**specs(SessionConfig), **generation_specs()})


def _merged(
    options: Callable[[type[Backend]], Mapping[str, OptionSpec]],
) -> Mapping[str, OptionSpec]:
    """Return the options of all backends by name; the first backend with a flag keeps the flag."""
    merged: dict[str, OptionSpec] = {}
    flags: dict[str, str] = {}
    backends: list[type[Backend]] = []
    for name in names():
        # The error of a backend that cannot be imported is raised when it is used.
        with contextlib.suppress(BackendUnavailable):
            backends.append(backend_class(name))
    for backend in backends:
        for name, spec in options(backend).items():
            if all(flags.setdefault(flag, name) == name for flag in spec.flags):
                first = merged.setdefault(name, spec)
                merged[name] = dataclasses.replace(first, backends=(*first.backends, backend.name))
    for name, spec in merged.items():
        if len(spec.backends) == len(backends):
            merged[name] = dataclasses.replace(spec, backends=())
    return MappingProxyType(merged)


def local_model_names(settings: Settings) -> list[ModelInfo]:
    """Return the models on this disk by name, without creating a backend; used by completion."""
    from llm_magic.backends.local.files import sources

    return sources.names(settings.models_folder)
