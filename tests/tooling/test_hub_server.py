"""The hub double tested with another project's client: the installed `huggingface_hub`.

The client runs in a process of its own, as it reads `HF_ENDPOINT` and `HF_HOME` when imported.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import urlopen

import pytest

from tests.hub_pages import COMMIT, Repo
from tests.hub_server import Faults, HubServer

if TYPE_CHECKING:
    from tests.tiny_models import Architecture

WEIGHTS = bytes(range(256)) * 400


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A repository without a model in it; most of the protocol does not care."""
    folder = tmp_path / "repo"
    (folder / "extra" / "deep").mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "extra" / "deep" / "notes.txt").write_text("two folders down")
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    return folder


@pytest.fixture
def hub(folder: Path) -> Iterator[HubServer]:
    with HubServer({"tiny/llama": folder}) as hub:
        yield hub


class Client:
    """Runs Python in a new process with the address of the hub; the code leaves its result in `out`."""

    def __init__(self, hub: HubServer, home: Path) -> None:
        self.environment = hub.environment(home)

    def start(self, code: str) -> subprocess.Popen[str]:
        program = f"import json, huggingface_hub as hf\nout = None\n{code}\nprint(json.dumps(out))"
        return subprocess.Popen(
            [sys.executable, "-c", program],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, code: str) -> Any:
        with self.start(code) as process:
            answer, complaints = process.communicate(timeout=120)
        assert process.returncode == 0, complaints
        return json.loads(answer.splitlines()[-1])


@pytest.fixture
def client(hub: HubServer, tmp_path: Path) -> Client:
    return Client(hub, tmp_path / "home")


def test_a_snapshot_is_the_folder_and_is_fetched_once(
    hub: HubServer, client: Client, folder: Path
) -> None:
    fetch = "out = hf.snapshot_download('tiny/llama')"
    snapshot = Path(client.run(fetch))
    assert snapshot.name == COMMIT
    for name, original in Repo(folder).files().items():
        assert (snapshot / name).read_bytes() == original.read_bytes()
    assert len(hub.received("GET", "/resolve/" + COMMIT + "/model.safetensors")) == 1

    seen = len(hub.requests)
    offline = "hf.snapshot_download('tiny/llama', local_files_only=True)"
    again = client.run(f"out = [{offline}, hf.snapshot_download('tiny/llama')]")
    assert again == [str(snapshot)] * 2
    assert [request.path for request in hub.requests[seen:]] == [
        "/api/models/tiny/llama/revision/main"
    ]


def test_information_has_sizes_revisions_and_kinds(client: Client, folder: Path) -> None:
    info, plain, names, shallow = client.run(
        "api = hf.HfApi()\n"
        "info = api.model_info('tiny/llama', files_metadata=True, revision='v1.0')\n"
        "out = [{s.rfilename: [s.size, s.blob_id, s.lfs and s.lfs.sha256]"
        "        for s in info.siblings} | {'sha': info.sha, 'gated': info.gated},\n"
        "       [s.size for s in api.model_info('tiny/llama').siblings],\n"
        "       api.list_repo_files('tiny/llama', revision=info.sha),\n"
        "       [[type(e).__name__, e.path] for e in api.list_repo_tree('tiny/llama', 'extra')]]"
    )
    git = subprocess.run(
        ["git", "hash-object", "config.json"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    assert info["config.json"] == [23, git.stdout.strip(), None]
    assert info["model.safetensors"][0] == len(WEIGHTS)
    assert len(info["model.safetensors"][2]) == 64
    assert (info["sha"], info["gated"]) == (COMMIT, False)
    assert plain == [None] * 3
    assert names == ["config.json", "extra/deep/notes.txt", "model.safetensors"]
    assert shallow == [["RepoFolder", "extra/deep"]]


ERRORS = """
from huggingface_hub import errors
def name(call, *args, **options):
    try:
        call(*args, **options)
    except Exception as error:
        return type(error).__name__
    return "nothing"
api = hf.HfApi()
"""


def test_error_responses_arrive_as_the_error_classes_of_the_client(
    hub: HubServer, client: Client
) -> None:
    hub.repos["tiny/gated"] = hub.repos["tiny/gone"] = hub.repos["tiny/llama"]
    hub.script("tiny/gated", Faults(gated=True, tokens=("hf_good",)))
    hub.script("tiny/gone", Faults(missing=True))
    names = client.run(
        ERRORS + "file = 'config.json'\n"
        "out = [name(hf.snapshot_download, 'tiny/gated'),\n"
        "       name(hf.hf_hub_download, 'tiny/gated', file),\n"
        "       name(hf.hf_hub_download, 'tiny/gated', file, token='hf_bad'),\n"
        "       name(hf.hf_hub_download, 'tiny/gated', file, token='hf_good'),\n"
        "       api.model_info('tiny/gated').gated,\n"
        "       name(api.model_info, 'tiny/gone'),\n"
        "       name(hf.snapshot_download, 'nobody/nothing'),\n"
        "       name(hf.hf_hub_download, 'nobody', file),\n"
        "       name(hf.snapshot_download, 'tiny/llama', revision='v9'),\n"
        "       name(hf.hf_hub_download, 'tiny/llama', file, revision='refs/pr/1'),\n"
        "       name(hf.hf_hub_download, 'tiny/llama', 'absent.json')]"
    )
    assert names[:5] == ["GatedRepoError"] * 3 + ["nothing", "manual"]
    assert names[5:8] == ["RepositoryNotFoundError"] * 3
    assert names[8:] == ["RevisionNotFoundError"] * 2 + ["RemoteEntryNotFoundError"]


def test_a_new_commit_is_noticed(hub: HubServer, client: Client, folder: Path) -> None:
    fetch = "out = hf.hf_hub_download('tiny/llama', 'config.json')"
    old = Path(client.run(fetch))
    (folder / "config.json").write_text('{"model_type": "qwen3"}')
    hub.repos["tiny/llama"] = replace(hub.repos["tiny/llama"], commit="f" * 40)
    new = Path(client.run(fetch))
    assert (old.parent.name, new.parent.name) == (COMMIT, "f" * 40)
    assert (old.read_bytes(), new.read_bytes()) == (
        b'{"model_type": "llama"}',
        b'{"model_type": "qwen3"}',
    )


def test_lost_connection_is_resumed_and_a_server_error_retried(
    hub: HubServer, client: Client
) -> None:
    hub.script("tiny/llama", Faults(only="*.safetensors", errors=1, die_after=70_000))
    # The client keeps only whole chunks of a broken answer, 10 MiB each by default.
    path = client.run(
        "import huggingface_hub.constants\n"
        "hf.constants.DOWNLOAD_CHUNK_SIZE = 1_000\n"
        "out = hf.hf_hub_download('tiny/llama', 'model.safetensors')"
    )
    assert Path(path).read_bytes() == WEIGHTS
    assert len(hub.received("HEAD", "model.safetensors")) == 2
    ranges = [request.headers.get("range") for request in hub.received("GET", "model.safetensors")]
    assert ranges == [None, "bytes=70000-"]


def test_an_interrupted_download_leaves_nothing_half_done(hub: HubServer, client: Client) -> None:
    hub.script("tiny/llama", Faults(only="*.safetensors", bytes_per_second=1_000))
    fetch = "out = hf.hf_hub_download('tiny/llama', 'model.safetensors')"
    with client.start(fetch) as process:
        hub.wait_for("GET", "model.safetensors")
        # More than once: the client ignores a signal at some moments. It may end without a message.
        while process.poll() is None:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=5)
    assert process.returncode != 0
    assert not list(Path(client.environment["HF_HOME"]).rglob("*.incomplete"))
    hub.script("tiny/llama", Faults())
    assert Path(client.run(fetch)).read_bytes() == WEIGHTS


def test_closing_waits_for_no_client_and_leaves_no_thread(folder: Path) -> None:
    before = threading.active_count()
    with HubServer({"tiny/llama": folder}) as hub:
        hub.script("tiny/llama", Faults(pause=600))
        response = urlopen(f"{hub.url}/tiny/llama/resolve/main/model.safetensors", timeout=30)
        started = time.monotonic()
    response.close()
    assert time.monotonic() - started < 60
    assert threading.active_count() == before


def test_a_real_model_is_loaded_and_generates_through_the_hub(
    hub: HubServer, tmp_path: Path
) -> None:
    # Here and not at the top: importing transformers takes seconds, and the rest does not need it.
    from tests.tiny_models import tiny_llama

    hub.repos["tiny/llama"] = Repo(tiny_llama(tmp_path / "llama"))
    hub.repos["tiny/sharded"] = Repo(tiny_llama(tmp_path / "sharded", sharded=True))
    text, same, prompt = Client(hub, tmp_path / "home").run(
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "def answer(name):\n"
        "    tokenizer = AutoTokenizer.from_pretrained(name)\n"
        "    model = AutoModelForCausalLM.from_pretrained(name)\n"
        "    chat = [{'role': 'user', 'content': 'Grüße 🦙'}]\n"
        "    tokens = tokenizer.apply_chat_template(\n"
        "        chat, add_generation_prompt=True, return_tensors='pt')['input_ids']\n"
        "    made = model.generate(tokens, max_new_tokens=5, do_sample=False)\n"
        "    return made[0, tokens.shape[1]:].tolist(), tokenizer.decode(tokens[0])\n"
        "(one, prompt), (other, _) = answer('tiny/llama'), answer('tiny/sharded')\n"
        "out = [one, other, prompt]"
    )
    assert text == same
    assert len(text) == 5
    assert prompt == "<|im_start|>user\nGrüße 🦙<|im_end|>\n<|im_start|>assistant\n"
    assert len(hub.received("GET", "model.safetensors")) == 1


@pytest.mark.parametrize(
    "architecture", ["qwen3", "gemma2", "gemma3_text", "mistral", "mamba", "gpt2"]
)
def test_every_tiny_architecture_loads_and_generates(
    architecture: Architecture, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.tiny_models import tiny

    folder = tiny(tmp_path / architecture, architecture)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokens = tokenizer("a prompt longer than the sliding window", return_tensors="pt")["input_ids"]
    made = model.generate(tokens, max_new_tokens=4, do_sample=False)
    assert made.shape[1] <= tokens.shape[1] + 4
    assert model.config.model_type == architecture


def test_each_bad_model_has_the_fault_of_its_name(tmp_path: Path) -> None:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from tests import tiny_models

    pickled = tiny_models.pickle_only(tmp_path / "pickled")
    assert not list(pickled.glob("*.safetensors*"))
    with pytest.raises(OSError, match="safetensors"):
        AutoModelForCausalLM.from_pretrained(pickled, use_safetensors=True)
    with pytest.raises(SafetensorError, match="incomplete"):
        AutoModelForCausalLM.from_pretrained(tiny_models.truncated_weights(tmp_path / "broken"))
    foreign = tiny_models.remote_code(tmp_path / "foreign")
    with pytest.raises(ValueError, match="custom code"):
        AutoModelForCausalLM.from_pretrained(foreign, trust_remote_code=False)
    assert not tiny_models.imported(foreign)
