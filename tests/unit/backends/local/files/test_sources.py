"""Where models on this machine are found: embedded, a folder, a .gguf file, a folder of models."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from llm_magic.backends.local import load_plan, memory
from llm_magic.backends.local.files import gguf, sources
from llm_magic.errors import LLMMagicError, LoadFailed, ModelNotFound, OptionError, OutOfMemory
from llm_magic.session import Session
from tests.local_models import SMOLLM2_BYTES, edited, local_session
from tests.scripted import settings
from tests.tiny_gguf import write_gguf
from tests.tiny_models import tiny_llama, truncated_weights


class Wire:
    """Records every address that this process looks up or connects to, from any library."""

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
    """Fail a test during which anything is sent, such as a request for a newer version."""
    wire.calls.clear()
    wire.on = True
    yield
    wire.on = False
    assert wire.calls == []


pytestmark = pytest.mark.usefixtures("no_noise")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as people have them."""
    folder = tmp_path_factory.mktemp("models")
    tiny_llama(folder / "alpha")
    truncated_weights(folder / "damaged")
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
def test_default_model_is_embedded_and_loads_fast(session: Session, model_cache: Path) -> None:
    info = session.load()
    assert (info.name, info.where) == ("SmolLM2-135M-Instruct", "bundled")
    assert info.size == SMOLLM2_BYTES
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
    assert session.load_with_details().notes == ()


@pytest.mark.usefixtures("no_network")
def test_second_load_of_the_same_model_does_nothing(session: Session) -> None:
    first = session.load()
    result = session.load_with_details("SmolLM2-135M-Instruct")
    assert (result.was_loaded, result.info) == (True, first)


@pytest.mark.usefixtures("no_network")
def test_files_that_changed_and_another_folder_of_that_name_are_loaded(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = (tiny_llama(tmp_path / name / "mine", seed=7) for name in ("one", "two"))
    monkeypatch.chdir(one.parent)
    session.load("mine")
    assert session.load_with_details("./mine").info.source == str(one)
    assert session.load_with_details("./mine").was_loaded
    before = session.generate("x", temperature=0, max_new_tokens=8)
    tiny_llama(one, seed=8)
    result = session.load_with_details("mine")
    assert (result.was_loaded, result.info.source) == (False, str(one))
    assert session.generate("x", temperature=0, max_new_tokens=8) != before
    monkeypatch.chdir(two.parent)
    result = session.load_with_details("mine")
    assert (result.was_loaded, result.info.source) == (False, str(two))
    # What is loaded needs its files no more.
    shutil.rmtree(two)
    assert session.load_with_details("mine").was_loaded


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("model", [None, "alpha", "one"])
def test_revision_of_a_model_on_this_disk_is_an_error(session: Session, model: str | None) -> None:
    with pytest.raises(OptionError, match="--revision selects a version on the hub"):
        session.load(model, revision="main")


@pytest.mark.usefixtures("no_network")
def test_folder_is_found_by_path_and_by_name(
    session: Session, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for requested in (str(models / "alpha"), f"{models}/alpha/", "alpha"):
        info = session.load(requested, keep=False)
        assert (info.name, info.where, info.source) == ("alpha", "folder", str(models / "alpha"))
    monkeypatch.chdir(models)
    assert session.load("./alpha").source == str(models / "alpha")
    monkeypatch.setenv("HOME", str(models))
    assert session.load("~/alpha").source == str(models / "alpha")


@pytest.mark.usefixtures("no_network")
def test_gguf_file_is_converted_once_for_all_its_names(session: Session, models: Path) -> None:
    file = models / "one" / "tiny.gguf"
    first = session.load_with_details(str(file))
    assert first.notes == (
        f"Converted once to {gguf.converted_folder(file)}",
        "On a CPU, -b llamacpp generates two to four times as many tokens per second from a .gguf file, but"
        " reads long prompts more slowly.",
    )
    assert (first.info.name, first.info.where) == ("tiny", "gguf")
    assert session.generate("x", max_new_tokens=3).usage.completion_tokens
    for requested in (str(models / "one"), "one/tiny.gguf", "one"):
        session.unload_all()
        again = session.load_with_details(requested)
        assert (again.info.source, again.notes) == (str(file), ())


@pytest.mark.usefixtures("no_network")
def test_note_about_llamacpp_contains_how_to_install_it(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(load_plan, "find_spec", lambda name: name != "xllamacpp" and find(name))
    with local_session() as session:
        note = session.load_with_details(str(models / "one" / "tiny.gguf")).notes[-1]
    assert note.endswith('more slowly. To install it: pip install "llm_magic[gguf]"')


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("requested", "kind", "message"),
    [
        ("{}/two", ModelNotFound, "two contains 2 .gguf files. Load one of them: a.gguf, b.gguf."),
        ("{}/none", ModelNotFound, "none contains no model: it has no config.json and no .gguf file."),
        ("./alpah", ModelNotFound, "There is no file or folder './alpah'. Did you mean \"alpha\""),
        ("{}/alpha/x.gguf", ModelNotFound, "There is no file or folder"),
        ("{}/notes.txt", LoadFailed, "notes.txt is not a GGUF file"),
        ("{}/alpha/model.safetensors", ModelNotFound, "is one file of a model. Load its folder: "),
        ("damaged", LoadFailed, "The weights of damaged are damaged"),
    ],
)  # fmt: skip
def test_unusable_source_is_one_line(
    session: Session, models: Path, requested: str, kind: type[LLMMagicError], message: str
) -> None:
    with pytest.raises(kind) as caught:
        session.load(requested.format(models))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("no_network")
def test_available_models_are_listed(session: Session, models: Path) -> None:
    # A damaged model does not hide the others.
    write_gguf(models / "loose.gguf")
    (models / "lfs").mkdir()
    (models / "lfs" / "config.json").write_text("{}")
    (models / "lfs" / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    (models / "garbled").mkdir()
    (models / "garbled" / "config.json").write_text("{")
    (models / "garbled" / "model.safetensors").write_bytes(b"\5\0\0\0\0\0\0\0hello world")
    found = {info.name: info for info in session.models()}
    assert found["SmolLM2-135M-Instruct"].where == "bundled"
    assert {"alpha", "damaged", "loose.gguf", "lfs", "garbled"} <= found.keys()
    assert found["alpha"].size == sum(
        file.stat().st_size for file in (models / "alpha").glob("*.safetensors")
    ) - header_of(models / "alpha" / "model.safetensors")
    assert found["alpha"].context_length == 512
    assert found["loose.gguf"].size == (models / "loose.gguf").stat().st_size


def header_of(file: Path) -> int:
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


def test_local_folder_comes_from_the_environment(
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


@pytest.mark.parametrize("backend", ["local", "llamacpp"])
def test_default_model_of_another_backend_is_not_loaded(backend: str) -> None:
    session = Session(settings(backend="ollama", model="qwen3:0.6b"))
    try:
        assert session.load(backend=backend).where == "bundled"
    finally:
        session.close()


def test_models_in_the_folder_of_their_organization_are_listed(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "org" / "mine")
    with local_session(models_folder=tmp_path) as session:
        assert {"org/mine"} <= {info.name for info in session.models()}
        assert {"org/mine"} <= {info.name for info in session.known_models("local")}
        assert session.load("Org/Mine").source == str(folder)


def test_unreadable_entries_hide_no_others(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "whole")
    (tmp_path / "gone.gguf").symlink_to(tmp_path / "nowhere.gguf")
    damaged = tiny_llama(tmp_path / "damaged")
    (damaged / "model.safetensors").unlink()
    (damaged / "model.safetensors").symlink_to(tmp_path / "nowhere")
    with local_session(models_folder=tmp_path) as session:
        assert "whole" in {info.name for info in session.models()}
        with pytest.raises(ModelNotFound, match=r"Did you mean .*whole"):
            session.load("./whol")


def test_too_large_gguf_file_is_not_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setenv("LLM_MAGIC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(memory, "free_bytes", lambda _device: gguf.converted_size(file) - 1)
    with local_session() as session, pytest.raises(OutOfMemory):
        session.load(str(file))
    assert not list((tmp_path / "cache").glob("converted/*"))


@pytest.mark.parametrize("stated", [-1, 0, 10**30, float("inf"), float("nan"), "many", True, [512]])
def test_invalid_context_length_is_none(tmp_path: Path, stated: object) -> None:
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


# -- names for completion -----------------------------------------------------------------------


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def cached(hub_cache: Path, name: str, *files: str) -> Path:
    folder = hub_cache / f"models--{name.replace('/', '--')}" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    for file in files:
        (folder / file).touch()
    return folder


def names(folder: Path | None = None) -> set[str]:
    return {info.name for info in sources.names(folder)} - {gguf.EMBEDDED_NAME}


def test_names_include_cached_models_with_weights_only(hub_cache: Path) -> None:
    assert names() == set()
    cached(hub_cache, "org/one", "config.json", "model.safetensors")
    cached(hub_cache, "gpt2", "model-00001-of-00002.safetensors")
    cached(hub_cache, "org/tokenizer-only", "tokenizer.json")
    (hub_cache / "datasets--org--data" / "snapshots" / "abc").mkdir(parents=True)
    (hub_cache / "models--org--damaged").mkdir()
    assert names() == {"org/one", "gpt2"}


def test_hosted_name_of_a_model_on_this_machine_is_that_model(
    hub_cache: Path, tmp_path: Path
) -> None:
    tiny_llama(tmp_path / "models" / "gpt-4o")
    cached(hub_cache, "openai/gpt-4o", "model.safetensors")
    here = settings(models_folder=tmp_path / "models")
    for name in ("gpt-4o", "openai/gpt-4o"):
        sources.check_name(name, here)
    with pytest.raises(ModelNotFound, match="gpt-4o is a model of OpenAI") as raised:
        sources.check_name("gpt-4o", settings())
    assert (raised.value.option, raised.value.choice) == ("backend", "openai")
    with pytest.raises(ModelNotFound, match="gpt-4o-mini is a model of OpenAI"):
        sources.check_name("openai/gpt-4o-mini", here)


@pytest.mark.parametrize(
    "name",
    ["llama3.2", "qwen3", "gemma3", "mistral", "phi4", "deepseek-r1", "llama3.2:1b", "my:tag"],
)
def test_name_of_an_ollama_model_advises_its_backend(hub_cache: Path, name: str) -> None:
    with pytest.raises(ModelNotFound, match=f"Run %llm_load {name} -b ollama.$"):
        sources.check_name(name, settings())
    cached(hub_cache, name, "model.safetensors")
    sources.check_name(name, settings())


@pytest.mark.parametrize("name", ["ollama/llama3.2", "ollama:llama3.2", "Ollama/llama3.2:latest"])
def test_advice_for_an_ollama_model_has_no_prefix(hub_cache: Path, name: str) -> None:
    with pytest.raises(ModelNotFound, match=rf"Run %llm_load {name[7:]} -b ollama\.$"):
        sources.check_name(name, settings())


@pytest.mark.parametrize("name", ["gpt2", "mistralai/Mistral-7B", "llama3.2-tuned", "C:model"])
def test_other_names_are_not_ollama_models(hub_cache: Path, name: str) -> None:
    sources.check_name(name, settings())


def test_near_file_is_suggested(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "models" / "llama-small")
    with pytest.raises(ModelNotFound, match=r'Did you mean ".*/models/llama-small"\?$'):
        sources.check_name(f"{tmp_path}/models/llama-smal", settings())


def test_names_include_a_finished_download(hub_cache: Path) -> None:
    folder = cached(hub_cache, "org/one", "config.json")
    os.utime(folder, ns=(1, 1))
    assert names() == set()
    (folder / "model.safetensors").touch()
    assert names() == {"org/one"}


def test_names_include_the_local_folder(hub_cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    (folder / "with blanks").mkdir(parents=True)
    (folder / "with blanks" / "config.json").touch()
    (folder / "no model").mkdir()
    (folder / "small.gguf").touch()
    (folder / "notes.txt").touch()
    assert names(folder) == {"with blanks", "small.gguf"}
    assert names(tmp_path / "nowhere") == set()


def test_paths_start_as_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "models" / "mine" / "config.json").touch()
    (tmp_path / "models" / "more").mkdir()
    (tmp_path / "models" / ".hidden").mkdir()
    (tmp_path / "models" / "my file.gguf").touch()
    (tmp_path / "models" / "my notes.txt").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sources.paths("mod") == ["models/"]
    assert sources.paths("./mod") == ["./models/"]
    assert sources.paths("~/mod") == ["~/models/"]
    assert sources.paths("models/m") == ["models/mine", "models/more/", "models/my file.gguf"]
    assert sources.paths("models/.h") == ["models/.hidden/"]
    assert sources.paths(f"{tmp_path}/models/mi") == [f"{tmp_path}/models/mine"]
    assert sources.paths("org/model") == []


def test_names_of_a_large_cache_are_fast(hub_cache: Path) -> None:
    for number in range(300):
        cached(
            hub_cache,
            f"org/model-{number}",
            *(f"file-{part}" for part in range(10)),
            "m.safetensors",
        )
    assert len(names()) == 300
    began = time.process_time()
    assert len(names()) == 300
    assert time.process_time() - began < 1  # 30 ms on an idle machine
