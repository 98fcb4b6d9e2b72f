"""Where models on this machine are found: embedded, a folder, a .gguf file, a folder of models."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import IncompleteSnapshotError
from huggingface_hub.utils import _xet

from llm_magic.backends.local import memory
from llm_magic.backends.local.files import gguf, hub, sources
from llm_magic.backends.local.worker import Cancelled
from llm_magic.errors import LLMMagicError, LoadFailed, ModelNotFound, OutOfMemory
from llm_magic.session import Session
from tests.local_models import edited, listening, local_session
from tests.tiny_gguf import write_gguf
from tests.tiny_models import broken_weights, tiny_llama


class Wire:
    """Hears of every address that this process looks up or connects to, from any library."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.on = False
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if self.on and event in {"socket.connect", "socket.getaddrinfo", "socket.sendto"}:
            self.calls.append(f"{event}{args}")


@pytest.fixture(scope="module")
def wire() -> Wire:
    return Wire()


@pytest.fixture
def no_network(wire: Wire) -> Iterator[None]:
    """Nothing may be sent: not the model's name, not a question for a newer version."""
    wire.calls.clear()
    wire.on = True
    yield
    wire.on = False
    assert wire.calls == []


@pytest.fixture(autouse=True)
def no_noise() -> Iterator[None]:
    with listening() as noise:
        yield
    assert noise == []


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as people have them."""
    folder = tmp_path_factory.mktemp("models")
    tiny_llama(folder / "alpha")
    broken_weights(folder / "damaged")
    for name, files in {"one": ["tiny.gguf"], "two": ["a.gguf", "b.gguf"], "none": []}.items():
        (folder / name).mkdir()
        for file in files:
            write_gguf(folder / name / file)
    (folder / "notes.txt").write_text("not a model")
    return folder


@pytest.fixture(scope="module")
def session(models: Path, model_cache: Path) -> Iterator[Session]:
    with local_session(models_folder=models) as session:
        yield session


@pytest.mark.usefixtures("no_network")
def test_the_default_is_embedded_and_loads_fast_the_second_time(
    session: Session, model_cache: Path
) -> None:
    info = session.load()
    assert (info.name, info.where) == ("SmolLM2-135M-Instruct", "embedded")
    assert info.size == 269_030_272
    assert info.context_length == 8192
    assert session.generate("What is the capital of France?", temperature=0).text == (
        "The capital of France is Paris."
    )
    file = gguf.embedded_file()
    assert file is not None
    assert info.source == str(file)
    assert gguf.converted_folder(file).is_relative_to(model_cache)
    assert (gguf.converted_folder(file) / "model.safetensors").is_file()
    session.unload()
    assert session.load_and_tell().notes == ()


@pytest.mark.usefixtures("no_network")
def test_asking_again_for_the_same_does_nothing(session: Session) -> None:
    first = session.load()
    result = session.load_and_tell("SmolLM2-135M-Instruct")
    assert (result.already, result.info) == (True, first)


@pytest.mark.usefixtures("no_network")
def test_a_folder_is_found_by_path_and_by_name(
    session: Session, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for wanted in (str(models / "alpha"), f"{models}/alpha/", "alpha"):
        info = session.load(wanted, keep=False)
        assert (info.name, info.where, info.source) == ("alpha", "folder", str(models / "alpha"))
    monkeypatch.chdir(models)
    assert session.load("./alpha").source == str(models / "alpha")
    monkeypatch.setenv("HOME", str(models))
    assert session.load("~/alpha").source == str(models / "alpha")


@pytest.mark.usefixtures("no_network")
def test_a_gguf_file_is_converted_once_however_it_is_named(session: Session, models: Path) -> None:
    file = models / "one" / "tiny.gguf"
    first = session.load_and_tell(str(file))
    folder = gguf.converted_folder(file)
    assert first.notes == (f"Converted once to {folder}",)
    assert (first.info.name, first.info.where) == ("tiny", "gguf")
    assert session.generate("x", max_new_tokens=3).usage.completion_tokens
    for wanted in (str(models / "one"), "one/tiny.gguf", "one"):
        session.unload_all()
        again = session.load_and_tell(wanted)
        assert (again.info.source, again.notes) == (str(file), ())
    session.unload_all()
    os.truncate(folder / "tokenizer.json", 0)
    os.truncate(folder / "model.safetensors", 5000)
    assert session.load_and_tell(str(file)).notes == first.notes
    assert session.generate("x", max_new_tokens=3).usage.completion_tokens


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("wanted", "kind", "message"),
    [
        ("{}/two", ModelNotFound, "two holds 2 .gguf files. Load one of them: a.gguf, b.gguf."),
        ("{}/none", ModelNotFound, "none holds no model: it has no config.json and no .gguf file."),
        ("./alpah", ModelNotFound, "There is no file or folder './alpah'. Did you mean \"alpha\""),
        ("{}/alpha/x.gguf", ModelNotFound, "There is no file or folder"),
        ("{}/notes.txt", LoadFailed, "notes.txt is not a GGUF file"),
        ("{}/alpha/model.safetensors", ModelNotFound, "is one file of a model. Load its folder: "),
        ("damaged", LoadFailed, "The weights of damaged are damaged"),
    ],
)  # fmt: skip
def test_what_is_no_model_is_said_in_one_line(
    session: Session, models: Path, wanted: str, kind: type[LLMMagicError], message: str
) -> None:
    with pytest.raises(kind) as caught:
        session.load(wanted.format(models))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("no_network")
def test_what_could_be_loaded_is_listed(session: Session, models: Path) -> None:
    # A damaged model does not hide the others.
    write_gguf(models / "loose.gguf")
    (models / "lfs").mkdir()
    (models / "lfs" / "config.json").write_text("{}")
    (models / "lfs" / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    (models / "garbled").mkdir()
    (models / "garbled" / "config.json").write_text("{")
    (models / "garbled" / "model.safetensors").write_bytes(b"\5\0\0\0\0\0\0\0hello world")
    found = {info.name: info for info in session.models()}
    assert found["SmolLM2-135M-Instruct"].where == "embedded"
    assert {"alpha", "damaged", "loose.gguf", "lfs", "garbled"} <= found.keys()
    assert found["alpha"].size == sum(
        file.stat().st_size for file in (models / "alpha").glob("*.safetensors")
    ) - header_of(models / "alpha" / "model.safetensors")
    assert found["alpha"].context_length == 512
    assert found["loose.gguf"].size == (models / "loose.gguf").stat().st_size


def header_of(file: Path) -> int:
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


def test_the_folder_of_models_comes_from_the_environment(
    models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("LLM_", "DEFAULT_"))]:
        if name != "LLM_MAGIC_CACHE_DIR":
            monkeypatch.delenv(name)
    monkeypatch.setenv("LOCAL_MODELS_DIR", str(models))
    monkeypatch.setenv("DEFAULT_MODEL_NAME_OR_PATH", "alpha")
    session = Session()
    try:
        assert session.load().source == str(models / "alpha")
    finally:
        session.close()


def test_what_cannot_be_read_hides_nothing_else(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "whole")
    (tmp_path / "gone.gguf").symlink_to(tmp_path / "nowhere.gguf")
    broken = tiny_llama(tmp_path / "broken")
    (broken / "model.safetensors").unlink()
    (broken / "model.safetensors").symlink_to(tmp_path / "nowhere")
    with local_session(models_folder=tmp_path) as session:
        assert "whole" in {info.name for info in session.models()}
        with pytest.raises(ModelNotFound, match=r"Did you mean .*whole"):
            session.load("./whol")


def test_a_gguf_file_that_will_not_fit_is_not_converted_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setenv("LLM_MAGIC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(memory, "free_bytes", lambda _device: gguf.converted_size(file) - 1)
    with local_session() as session, pytest.raises(OutOfMemory):
        session.load(str(file))
    assert not list((tmp_path / "cache").glob("converted/*"))


def test_a_cached_model_lacks_only_what_no_model_needs(
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


def test_a_full_disk_is_no_missing_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object, **_options: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device", "/cache/blob")

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    found = hub.HubModel("org/m", None, 10, 10, ())
    with pytest.raises(LoadFailed, match=r"cache \(/cache/blob\): No space left .* HF_HUB_CACHE"):
        hub.download(found, lambda _progress: None, lambda: False)


def test_a_download_that_is_stopped_ends_however_the_client_says_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its threads mind no exception of a progress bar; they are told to abort."""
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


@pytest.mark.parametrize("stated", [-1, 0, 10**30, float("inf"), float("nan"), "many", True, [512]])
def test_context_length_that_cannot_be_one_is_unknown(tmp_path: Path, stated: object) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    edited(folder, "config.json", max_position_embeddings=stated)
    assert sources.context_length(folder) is None
    edited(folder, "config.json", max_position_embeddings=10_485_760)
    assert sources.context_length(folder) == 10_485_760


def test_model_without_context_limit_answers(session: Session, tmp_path: Path) -> None:
    folder = edited(tiny_llama(tmp_path / "m"), "config.json", max_position_embeddings=-1)
    info = session.load(str(folder))
    assert info.context_length is None
    assert session.generate("Hi", max_new_tokens=3).usage.completion_tokens == 3
