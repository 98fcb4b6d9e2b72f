"""Which packages are installed at which version; nothing is imported for it."""

from __future__ import annotations

import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, requires, version

from llm_magic.doctor.finding import Finding

# What each extra of ours brings, and what is good to have.
_NEEDED = ("ipython", "pydantic", "httpx")
_EXTRAS = {
    "local": ("torch", "transformers", "accelerate", "safetensors", "gguf"),
    "quantization": ("bitsandbytes",),
    "panel": ("ipywidgets", "anywidget"),
}
_OPTIONAL = ("flash-attn", "nest-asyncio", "nest-asyncio2")
_SPECIFIER = re.compile(r"^([A-Za-z0-9._-]+).*?>=\s*([0-9.]+)")


def packages() -> list[Finding]:
    """Return Python, our own requirements, those of each extra, and what else matters."""
    found = [
        Finding("python", "ok", f"{platform.python_version()} at {sys.executable}"),
        Finding("llm_magic", "ok", installed("llm_magic") or "run from its source, not installed"),
        _group("core", _NEEDED, "llm_magic"),
    ]
    found += [_group(extra, names, f"llm_magic[{extra}]") for extra, names in _EXTRAS.items()]
    there = [f"{name} {has}" for name in _OPTIONAL if (has := installed(name))]
    absent = [name for name in _OPTIONAL if not installed(name)]
    text = ", ".join([*there, *([f"not installed: {', '.join(absent)}"] if absent else [])])
    return [*found, Finding("optional", "ok", text)]


def installed(name: str) -> str | None:
    """Return the version of a package, None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _group(extra: str, names: tuple[str, ...], wanted: str) -> Finding:
    least = _least_versions()
    versions = {name: installed(name) for name in names}
    missing = [name for name, has in versions.items() if has is None]
    old = [
        f"{name} {has} is older than {least[name]}"
        for name, has in versions.items()
        if has is not None and name in least and _numbers(has) < _numbers(least[name])
    ]
    text = ", ".join(f"{name} {has}" for name, has in versions.items() if has is not None)
    fix = f"pip install -U '{wanted}'"
    if old:
        return Finding(extra, "problem", f"{', '.join(old)} ({text})", fix)
    if missing:
        lacks = f"not installed: {', '.join(missing)}"
        return Finding(extra, "warn", f"{lacks} ({text})" if text else lacks, fix)
    return Finding(extra, "ok", text)


def _least_versions() -> dict[str, str]:
    """Return what our own metadata asks for at least; nothing where they are not installed."""
    try:
        lines = requires("llm_magic") or []
    except PackageNotFoundError:
        return {}
    found = filter(None, map(_SPECIFIER.match, lines))
    return {match[1].lower(): match[2].rstrip(".") for match in found}


def _numbers(text: str) -> tuple[int, ...]:
    """Return the release of a version as numbers: 2.13.0+cpu and 2.13rc1 are (2, 13)."""
    release = re.match(r"\d+(?:\.\d+)*", text)
    numbers = [int(part) for part in release[0].split(".")] if release else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
