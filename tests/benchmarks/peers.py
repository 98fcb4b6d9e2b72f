"""Who is measured beside us: where each lives, how it is started, which version it is.

A peer that is missing is a row with the command to type.
"""

from __future__ import annotations

import importlib.metadata
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.kernels import ROOT


@dataclass(frozen=True, slots=True)
class Peer:
    """One package that does what we do; `home` is its environment, or None for the one that runs.

    `started` is for people: which API of it is measured. `install` is what to type where it is
    missing.
    """

    package: str
    started: str
    install: str
    home: Path | None = None

    @property
    def python(self) -> Path:
        """The interpreter of an environment of its own."""
        assert self.home is not None, f"{self.package} runs in this environment"
        return self.home / "bin" / "python"

    @property
    def version(self) -> str | None:
        """Which version is installed; None where it is missing."""
        found = importlib.metadata.Distribution.discover(name=self.package, path=self._folders())
        return next((distribution.version for distribution in found), None)

    @property
    def missing(self) -> str:
        """What to type to get it; empty where it is installed."""
        return "" if self.version else f"missing: {self.install}"

    def _folders(self) -> list[str]:
        if self.home is None:
            return sys.path
        return [str(folder) for folder in self.home.glob("lib/python*/site-packages")]


def _peer(package: str, started: str, name: str) -> Peer:
    return Peer(package, started, f"scripts/install-peers {name}", ROOT / ".peers" / name)


def _server(package: str, started: str, name: str) -> Peer:
    return Peer(package, started, f"scripts/install-servers {name}", ROOT / ".servers" / name)


def _extra(package: str, started: str, extra: str) -> Peer:
    return Peer(package, started, f"pip install -e '.[{extra}]'")


PEERS = {
    "transformers": _extra("transformers", "generate and pipeline in a kernel", "local"),
    "xllamacpp": _extra("xllamacpp", "%llm_load -b llamacpp", "gguf"),
    "openai": _extra("openai", "its client in a kernel or a program", "test"),
    "transformers serve": _server("transformers", "a server of its own", "transformers"),
    "llama.cpp": _server("llama_cpp_python", "python -m llama_cpp.server", "llamacpp"),
    "vLLM": _server("vllm", "vllm serve", "vllm"),
    "litellm": _peer("litellm", "its client in a program", "litellm"),
    "jupyter_ai_magics": _peer("jupyter_ai_magics", "a kernel of its own", "jupyter-ai"),
    "jupyter_ai_magic_commands": _peer(
        "jupyter_ai_magic_commands", "%%ai in a kernel of its own", "jupyter-ai"
    ),
}


def versions() -> dict[str, str]:
    """Return the version of every peer by its name."""
    return {name: peer.version or "missing" for name, peer in PEERS.items()}


def listing() -> str:
    """Return a line a peer: its version, how it is started, and what to type where it is missing."""
    return "\n".join(
        f"{name:<26} {peer.version or '':<10} {peer.missing or peer.started}"
        for name, peer in PEERS.items()
    )
