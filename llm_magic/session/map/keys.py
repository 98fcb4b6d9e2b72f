"""What identifies a row: what is sent, the model that answers, and the settings of the answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_magic.backends.manager import LoadedModel
    from llm_magic.config.settings import GenerationConfig
    from llm_magic.types import Message

# Half of a SHA-256: enough to distinguish rows, and half of the memory.
KEY_BYTES = 16


class Keys:
    """Makes the keys of the rows of one map.

    A key is the start of the SHA-256 of canonical JSON. Above temperature 0 equal rows have different
    answers: the key of the second of them contains that it is the second one, and so on.
    """

    def __init__(self, loaded_model: LoadedModel, config: GenerationConfig) -> None:
        options = loaded_model.backend.sent_options(loaded_model.name, config)
        # The keys of files that were saved before these options existed stay the same.
        unset = {name for name in ("structure", "logprobs") if getattr(options, name) is None}
        sent = options.model_dump(mode="json", exclude=unset)
        common = {"model": identity(loaded_model), "options": sent}
        self._common = hashlib.sha256(_canonical(common))
        # Whether equal rows have equal answers.
        self.merges = config.temperature == 0
        self._counts: dict[bytes, int] = {}

    def key(self, messages: Sequence[Message]) -> bytes:
        """Return the key of the next row, which sends `messages`."""
        digest = self._common.copy()
        digest.update(_canonical([[message.role, message.content] for message in messages]))
        key = digest.digest()[:KEY_BYTES]
        if self.merges:
            return key
        count = self._counts.get(key, 0)
        self._counts[key] = count + 1
        if not count:
            return key
        return hashlib.sha256(key + str(count).encode()).digest()[:KEY_BYTES]


def identity(loaded_model: LoadedModel) -> dict[str, Any]:
    """Return what identifies a loaded model; an address of a server contains no credentials."""
    info, config = loaded_model.info, loaded_model.config
    found: dict[str, Any] = {
        "backend": config.backend,
        "model": info.source or loaded_model.requested or info.name,
        "revision": info.revision,
        "quantization": info.quantization,
        "dtype": info.dtype,
    }
    if info.server:
        details = loaded_model.backend.details(loaded_model.name)
        return found | {"server": details.get("server", info.server), "digest": info.digest}
    folder = Path(info.folder)
    if folder.parent.name == "snapshots":
        # In the cache of the Hugging Face hub: the same on every machine.
        found |= {"model": folder.parent.parent.name, "revision": folder.name}
    elif info.where == "bundled":
        found["model"] = Path(info.source).name
    size = _weights_size(folder) if info.folder else info.size
    return found | {"size": size, "special_tokens": getattr(config, "special_tokens", None)}


def _weights_size(folder: Path) -> int:
    """Return the bytes of the files with weights. In memory they may have another size on other CPUs."""
    return sum(file.stat().st_size for file in sorted(folder.glob("*.safetensors")))


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii")
