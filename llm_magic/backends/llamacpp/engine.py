"""One model in llama.cpp, through the server of the package xllamacpp.

xllamacpp always listens for HTTP. Here it listens on a Unix socket in a private folder that is deleted
at once, with a random key, so that nothing can connect. Requests are calls in this process.
"""

from __future__ import annotations

import secrets
import tempfile
import threading
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from llm_magic.backends.llamacpp.engine_config import EngineConfig
from llm_magic.backends.local import openmp
from llm_magic.backends.local.worker import Cancelled

# Its threads are throttled while others use the CPUs, or where that is impossible, always.
with nullcontext() if openmp.can_throttle() else openmp.bounded_spin():
    import xllamacpp

# Of the path of a Unix socket on every system.
_LONGEST_PATH = 100
_NO_LOG = -1


class Engine:
    """A loaded model. One thread at a time can call it."""

    def __init__(self, file: Path, config: EngineConfig) -> None:
        """Load a file; raises `RuntimeError` if llama.cpp cannot.

        xllamacpp holds the GIL meanwhile. The caller reads the file before, so that it is in memory.
        """
        self.config = config
        # A folder of `tempfile` can be opened by this user only.
        with tempfile.TemporaryDirectory(prefix="llm_magic-", ignore_cleanup_errors=True) as folder:
            if len(folder) > _LONGEST_PATH:
                raise RuntimeError(f"the path of the temporary folder {folder} is too long")
            self._server = xllamacpp.Server(_parameters(file, config, f"{folder}/s.sock"))

    def chat(
        self,
        body: dict[str, Any],
        on_chunk: Callable[[dict[str, Any]], None],
        cancel: threading.Event,
    ) -> None:
        """Answer a request of the chat completions API; `on_chunk` gets each object of the reply.

        Raises what `on_chunk` raises, which ends the answer, and `Cancelled` soon after `cancel` is set.
        """
        errors: list[BaseException] = []

        def receive(chunk: dict[str, Any]) -> bool:
            """Return whether to stop: exceptions do not pass through llama.cpp."""
            try:
                if cancel.is_set():
                    raise Cancelled
                on_chunk(chunk)
            except BaseException as error:  # noqa: BLE001 - raised below
                errors.append(error)
            return bool(errors)

        self._server.handle_chat_completions({**body, "stream": True}, receive)
        if errors:
            raise errors.pop()

    def close(self) -> None:
        """Free the model and end its threads."""
        with suppress(AttributeError):
            del self._server


def version() -> str:
    """Return the version of xllamacpp."""
    return str(xllamacpp.__version__)


def devices() -> list[str]:
    """Return the devices that llama.cpp puts a model on."""
    names = [str(device["name"]) for device in xllamacpp.get_device_info()]
    return [name for name in names if name != "CPU"] or ["cpu"]


def _parameters(file: Path, config: EngineConfig, socket: str) -> Any:
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx, parameters.n_parallel = config.context, 1
    parameters.n_batch = parameters.n_ubatch = config.batch
    for threads in (parameters.cpuparams, parameters.cpuparams_batch):
        threads.n_threads = config.threads
    parameters.cache_ram_mib = config.cache_bytes >> 20
    # Of a mapped file, weights that llama.cpp rearranges would take memory twice.
    parameters.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_NONE
    # The warm-up would take place with the GIL held.
    parameters.warmup = False
    parameters.verbosity = _NO_LOG
    parameters.hostnames = [socket]
    parameters.api_keys = [secrets.token_urlsafe(32)]
    parameters.n_threads_http = 1
    parameters.ui = parameters.endpoint_slots = False
    parameters.offline = True
    return parameters
