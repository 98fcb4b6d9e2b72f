"""Checks of a model's files before they are read and before another model is unloaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_magic.backends.local.files import safetensors
from llm_magic.backends.local.load_config import LocalLoadConfig
from llm_magic.errors import LoadFailed, OptionError, did_you_mean

_TOKENIZERS = ("token*", "vocab*", "*.model", "*.tiktoken", "tekken.json")
# Architectures that Transformers would load with a generation head of random weights.
_NOT_GENERATIVE = (
    "ForMaskedLM", "ForPreTraining", "Classification", "ForQuestionAnswering",
    "ForMultipleChoice", "ForNextSentencePrediction", "RewardModel",
)  # fmt: skip


def check_folder(
    name: str, folder: Path, config: LocalLoadConfig, model_config: Mapping[str, Any]
) -> None:
    """Raise an error if the model in `folder` cannot or must not be loaded."""
    _check_weights(name, folder)
    if not _has_tokenizer(folder):
        raise LoadFailed(f"{name} has no tokenizer. Get its tokenizer.json and load again.")
    _check_architecture(name, config, model_config)
    _check_attention(name, config, model_config)
    if "quantization_config" in model_config and config.quantization != "none":
        raise OptionError(f"{name} is already quantized.").advise("Omit -q.", "quantization")


def is_complete(folder: Path) -> bool:
    """Return whether a folder has all files of a model."""
    try:
        _check_weights(folder.name, folder)
    except LoadFailed:
        return False
    # The hub's cache may hold the weights without the tokenizer.
    return (folder / "config.json").is_file() and _has_tokenizer(folder)


def _has_tokenizer(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in _TOKENIZERS)


def _check_weights(name: str, folder: Path) -> None:
    """Check that the folder has all weights as safetensors, and that they are complete."""
    if not (folder / "model.safetensors").is_file():
        _check_shards(name, folder)
    for file in safetensors.weight_files(folder):
        if not safetensors.is_complete(file):
            raise LoadFailed(
                f"The weights of {name} are damaged: {file.resolve()} does not match its header."
                " Delete it, download it again, and load again."
            )


def _check_shards(name: str, folder: Path) -> None:
    try:
        shards = safetensors.indexed_files(folder)
    except OSError:
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        found = "only pickle files, and reading them can run code" if pickled else "no weights"
        raise LoadFailed(f"{name} has {found}. Choose a model with .safetensors files.") from None
    except ValueError:
        raise LoadFailed(f"{folder / safetensors.INDEX} is damaged. Download it again.") from None
    # Transformers would unpickle other files that the index names.
    if not all(shard.endswith(".safetensors") for shard in shards):
        raise LoadFailed(
            f"The index of {name} lists files that are not .safetensors. Choose another model."
        )
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise LoadFailed(
            f"{name} is incomplete: {len(missing)} of {len(shards)} weight files are missing"
            f" ({missing[0]}, …). Download them into {folder} and load again."
        )


def _check_architecture(
    name: str, config: LocalLoadConfig, model_config: Mapping[str, Any]
) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind, own_code = model_config.get("model_type"), model_config.get("auto_map") or {}
    if "AutoModelForCausalLM" in own_code:
        if config.trust_remote_code or kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            return
        raise LoadFailed(
            f"{name} contains its own Python code. If you trust it, add"
            " --trust-remote-code (and pin it with --revision)."
        )
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise LoadFailed(
            f"{name} is not a text-generation model that this version of Transformers supports"
            f" (model_type {kind}). Choose another, or run: pip install -U 'llm_magic[local]' transformers"
        )
    architecture = str((model_config.get("architectures") or [""])[0])
    if architecture.endswith(_NOT_GENERATIVE):
        raise LoadFailed(
            f"{name} is a {architecture}, which does not generate text. Choose a text-generation model."
        )


def _check_attention(name: str, config: LocalLoadConfig, model_config: Mapping[str, Any]) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    requested = config.attn
    known = {"eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()}
    if requested is not None and requested not in known and "/" not in requested:
        raise OptionError(f"--attn {requested} does not exist.{did_you_mean(requested, known)}")
    own = [model_config.get(key) for key in ("attn_implementation", "_attn_implementation")]
    if requested is None and not config.trust_remote_code and any("/" in str(name) for name in own):
        raise LoadFailed(
            f"{name} needs attention code from the hub. Add --attn sdpa to load it without,"
            " or --trust-remote-code if you trust it."
        )
