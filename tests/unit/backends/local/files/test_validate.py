"""Models that cannot or must not be loaded: an error of one line, and the loaded model stays."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llm_magic.backends.registry import LoadOptions
from llm_magic.errors import LLMMagicError, LoadFailed, MissingDependency, OptionError
from llm_magic.session import Session
from tests import tiny_models
from tests.local_models import edited, local_session, parrot, reweighted
from tests.tiny_models import tiny_llama

UP = "model.layers.0.mlp.up_proj.weight"


pytestmark = pytest.mark.usefixtures("no_noise")


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    with local_session() as session:
        session.load(str(parrot(tmp_path_factory.mktemp("models") / "earlier", "abc")))
        yield session


def refused(session: Session, folder: Path, **options: Any) -> LLMMagicError:
    """Try to load a folder beside the earlier model, which has to stay as it is."""
    with pytest.raises(LLMMagicError) as caught:
        # Were it loaded all the same, the next tests would talk to it.
        session.unload(session.load(str(folder), keep=True, **options).name)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is caught.value.__context__ is None
    assert session.generate("x", temperature=0, repetition_penalty=1).text == "abc"
    return caught.value


def without_weights(folder: Path) -> Path:
    (tiny_llama(folder) / "model.safetensors").unlink()
    return folder


def without_tokenizer(folder: Path) -> Path:
    for file in tiny_llama(folder).glob("token*"):
        file.unlink()
    return folder


def sentencepiece_only(folder: Path) -> Path:
    (without_tokenizer(folder) / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\0\0\0\0")
    return edited(folder, "tokenizer_config.json", tokenizer_class="LlamaTokenizer")


def without_a_shard(folder: Path) -> Path:
    min(tiny_llama(folder, sharded=True).glob("model-*")).unlink()
    return folder


def with_a_pickle_in_the_index(folder: Path) -> Path:
    weights = load_file(tiny_llama(folder) / "model.safetensors")
    torch.save(weights, folder / "weights.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "weights.bin")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    return folder


def with_an_invalid_config(folder: Path) -> Path:
    (tiny_llama(folder) / "config.json").write_text("{oops")
    return folder


def masked_language_model(folder: Path) -> Path:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    BertForMaskedLM(config).save_pretrained(without_weights(folder))
    return folder


def config_of(**changes: object) -> Callable[[Path], Path]:
    return lambda folder: edited(tiny_llama(folder), "config.json", **changes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (tiny_models.pickle_only, "m has only pickle files, and reading them can run code."),
        (without_weights, "m has no weights. Choose a model with .safetensors files."),
        (without_a_shard, "m is incomplete: 1 of 5 weight files are missing"),
        (with_a_pickle_in_the_index, "The index of m lists files that are not .safetensors."),
        (tiny_models.truncated_weights, "The weights of m are damaged"),
        (with_an_invalid_config, "config.json cannot be read"),
        (masked_language_model, "m is a BertForMaskedLM, which does not generate text."),
        (config_of(model_type="t5"), "m is not a text-generation model"),
        (config_of(model_type="zork"), "(model_type zork)"),
        (config_of(attn_implementation="kernels-community/x"), "Add --attn sdpa to load it without"),
        (config_of(_attn_implementation="who/knows"), "Add --attn sdpa to load it without"),
        (config_of(num_attention_heads="four"), "'num_attention_heads'"),
        (lambda folder: reweighted(tiny_llama(folder), drop=UP), f"weights are missing ({UP}"),
        (
            lambda folder: reweighted(tiny_llama(folder), add={UP: torch.zeros(3, 3)}),
            "do not match its config.json",
        ),
        (without_tokenizer, "m has no tokenizer. Get its tokenizer.json and load again."),
    ],
)  # fmt: skip
def test_unloadable_model_states_the_reason(
    session: Session, tmp_path: Path, make: Callable[[Path], Path], message: str
) -> None:
    error = refused(session, make(tmp_path / "m"))
    assert isinstance(error, LoadFailed)
    assert message in str(error)


def test_tokenizer_that_needs_a_package_names_it(session: Session, tmp_path: Path) -> None:
    error = refused(session, sentencepiece_only(tmp_path / "m"))
    assert isinstance(error, MissingDependency)
    assert "pip install sentencepiece tiktoken" in str(error)


@pytest.mark.parametrize("damage", ["damaged", "gone", "pickled"])
def test_bad_files_are_found_before_the_loaded_model_is_freed(
    session: Session, tmp_path: Path, damage: str
) -> None:
    folder = {
        "damaged": tiny_models.truncated_weights,
        "gone": without_a_shard,
        "pickled": tiny_models.pickle_only,
    }[damage](tmp_path / "m")
    with pytest.raises(LoadFailed):
        session.load(str(folder))
    assert session.status().active_model == "earlier"


def test_code_of_a_model_runs_only_with_the_option(session: Session, tmp_path: Path) -> None:
    folder = tiny_models.remote_code(tmp_path / "m")
    error = refused(session, folder)
    assert str(error) == (
        "m contains its own Python code. If you trust it, add --trust-remote-code"
        " (and pin it with --revision)."
    )
    assert not tiny_models.imported(folder)
    loaded = session.load(str(folder), keep=True, trust_remote_code=True)
    assert tiny_models.imported(folder)
    reply = session.generate("x", max_new_tokens=3)
    session.unload("m")
    assert (loaded.name, reply.model) == ("m", "m")
    assert reply.usage.completion_tokens
    # For one load.
    refused(session, folder)


def test_custom_generate_code_is_not_run(session: Session, tmp_path: Path) -> None:
    folder = parrot(tmp_path / "m", "xyz")
    marker = tmp_path / "ran"
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(
        f"open({str(marker)!r}, 'w')\ndef generate(model, **options): raise SystemExit\n"
    )
    session.load(str(folder), keep=True)
    text = session.generate("x", temperature=0, repetition_penalty=1).text
    session.unload("m")
    assert text == "xyz"
    assert not marker.exists()


def test_quantizing_a_quantized_model_is_an_error(session: Session, tmp_path: Path) -> None:
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    folder = config_of(quantization_config=stored)(tmp_path / "m")
    error = refused(session, folder, quantization="4bit")
    assert isinstance(error, OptionError)
    assert str(error) == "m is already quantized. Omit -q."


def test_missing_quantizer_is_named(session: Session, tmp_path: Path) -> None:
    folder = config_of(quantization_config={"quant_method": "gptq", "bits": 4})(tmp_path / "m")
    error = refused(session, folder)
    assert isinstance(error, MissingDependency)
    assert str(error).count("pip install") == 1
    assert "optimum" in str(error)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"attn": "sdpaa"}, OptionError, '--attn sdpaa does not exist. Did you mean "sdpa"'),
        ({"attn": "flash_attention_2"}, MissingDependency, "FlashAttention2"),
    ],
)
def test_unavailable_attention_is_an_error(
    session: Session,
    tmp_path: Path,
    options: LoadOptions,
    kind: type[LLMMagicError],
    message: str,
) -> None:
    error = refused(session, tiny_llama(tmp_path / "m"), **options)
    assert isinstance(error, kind)
    assert message in str(error)
    assert "llm_magic[local]" not in str(error)


def test_superfluous_weights_are_ignored(session: Session, tmp_path: Path) -> None:
    folder = reweighted(parrot(tmp_path / "m", "xyz"), add={"score.weight": torch.zeros(2, 2)})
    session.load(str(folder), keep=True)
    text = session.generate("x", temperature=0, repetition_penalty=1).text
    session.unload("m")
    assert text == "xyz"


def test_files_that_are_not_read_do_not_count(session: Session, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "m")
    # As Mistral's folders have it: everything once more in another form.
    (folder / "consolidated.safetensors").write_bytes(b"not even a header")
    info = session.load(str(folder), keep=True)
    session.unload("m")
    assert info.size is not None


# The load is refused before torch is imported, which would end the process in the first case.
REFUSED_EARLY = """
import os, sys
from llm_magic.errors import LLMMagicError
from llm_magic.session import Session
from tests.scripted import settings
session = Session(settings())
sys.path[:] = [os.path.abspath(path) for path in sys.path]
{before}
try:
    session.load()
except LLMMagicError as error:
    print(type(error).__name__, error, "torch" in sys.modules)
session.close()
"""
GONE = "import tempfile; folder = tempfile.mkdtemp(); os.chdir(folder); os.rmdir(folder)"


@pytest.mark.parametrize(
    ("flag", "before", "message"),
    [
        ("-O", GONE, "LoadFailed The working folder no longer exists. Change to another one"
         " (import os; os.chdir(os.path.expanduser('~'))) and load again. False"),
        ("-OO", "", "LoadFailed Local models cannot be loaded under python -OO (PYTHONOPTIMIZE=2):"
         " Transformers needs docstrings. Restart the kernel without it. False"),
    ],
    ids=["working folder is gone", "OO"],
)  # fmt: skip
def test_process_that_cannot_import_torch_is_an_early_error(
    flag: str, before: str, message: str
) -> None:
    code = REFUSED_EARLY.format(before=before)
    ran = subprocess.run([sys.executable, flag, "-c", code], capture_output=True, text=True)
    assert (ran.stdout, ran.returncode) == (f"{message}\n", 0), ran.stderr
