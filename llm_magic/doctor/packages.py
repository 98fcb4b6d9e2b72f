"""Checks the versions of installed packages, and that the backends among them can be imported."""

from __future__ import annotations

import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, requires, version

from llm_magic.backends import registry
from llm_magic.doctor.finding import Finding
from llm_magic.errors import BackendUnavailable

_CORE = ("ipython", "pydantic", "aiohttp")
_EXTRAS = {
    "local": ("torch", "transformers", "accelerate", "safetensors", "gguf"),
    "gguf": ("xllamacpp", "gguf"),
    "quantization": ("bitsandbytes",),
    "panel": ("ipywidgets", "anywidget"),
}
_OPTIONAL = ("flash-attn", "nest-asyncio", "nest-asyncio2")
_MIN_VERSION = re.compile(r"^([A-Za-z0-9._-]+).*?>=\s*([0-9.]+)")


def check_packages() -> list[Finding]:
    """Return findings about Python, the requirements, each extra, and other relevant packages."""
    found = [
        Finding("python", "ok", f"{platform.python_version()} at {sys.executable}"),
        Finding("llm_magic", "ok", installed("llm_magic") or "run from source, not installed"),
        _check_group("core", _CORE, "llm_magic"),
    ]
    found += [_check_group(name, names, f"llm_magic[{name}]") for name, names in _EXTRAS.items()]
    present = [f"{name} {v}" for name in _OPTIONAL if (v := installed(name))]
    missing = [name for name in _OPTIONAL if not installed(name)]
    text = ", ".join([*present, *([f"not installed: {', '.join(missing)}"] if missing else [])])
    return [*found, Finding("optional", "ok", text)]


def check_backends() -> list[Finding]:
    """Return a finding for each backend whose package cannot be imported."""
    fix = "upgrade or uninstall that package, restart the kernel"
    found = []
    for name in registry.names():
        try:
            registry.backend_class(name)
        except BackendUnavailable as error:
            found.append(Finding(name, "problem", str(error), fix))
    return found


def installed(name: str) -> str | None:
    """Return the version of a package, or None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _check_group(name: str, packages: tuple[str, ...], requirement: str) -> Finding:
    """Return a finding about the packages that `pip install requirement` installs."""
    minimum = _min_versions()
    versions = {package: installed(package) for package in packages}
    missing = [package for package, found in versions.items() if found is None]
    outdated = [
        f"{package} {found} is older than {minimum[package]}"
        for package, found in versions.items()
        if found is not None and package in minimum and _release(found) < _release(minimum[package])
    ]
    text = ", ".join(f"{package} {found}" for package, found in versions.items() if found)
    fix = f"pip install -U '{requirement}'"
    if outdated:
        return Finding(name, "problem", f"{', '.join(outdated)} ({text})", fix)
    if missing:
        absent = f"not installed: {', '.join(missing)}"
        return Finding(name, "warn", f"{absent} ({text})" if text else absent, fix)
    return Finding(name, "ok", text)


def _min_versions() -> dict[str, str]:
    """Return the minimum versions that llm_magic requires; none if it is not installed."""
    try:
        lines = requires("llm_magic") or []
    except PackageNotFoundError:
        return {}
    matches = filter(None, map(_MIN_VERSION.match, lines))
    return {match[1].lower(): match[2].rstrip(".") for match in matches}


def _release(text: str) -> tuple[int, ...]:
    """Return the release part of a version as numbers: (2, 13) for 2.13.0+cpu and 2.13rc1."""
    release = re.match(r"\d+(?:\.\d+)*", text)
    numbers = [int(part) for part in release[0].split(".")] if release else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
