"""What must hold of a model's files before they are read, so that a refusal loses nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_magic.backends.local import memory
from llm_magic.backends.local.load_config import LocalLoadConfig
from llm_magic.errors import LoadFailed, OptionError, did_you_mean

_INDEX = "model.safetensors.index.json"
_TOKENIZERS = ("token*", "vocab*", "*.model", "*.tiktoken", "tekken.json")
# Heads that Transformers would exchange for one that generates, with nonsense for an answer.
_NO_GENERATORS = (
    "ForMaskedLM", "ForPreTraining", "Classification", "ForQuestionAnswering",
    "ForMultipleChoice", "ForNextSentencePrediction", "RewardModel",
)  # fmt: skip


def check_folder(
    name: str, folder: Path, config: LocalLoadConfig, about: Mapping[str, Any]
) -> None:
    """Raise in one line for a folder whose model must not or cannot be read; `about` is its config."""
    _check_weights(name, folder)
    if not _has_tokenizer(folder):
        raise LoadFailed(f"{name} has no tokenizer. Get its tokenizer.json and load again.")
    _check_kind(name, config, about)
    _check_attention(name, config, about)
    if "quantization_config" in about and config.quantization != "none":
        raise OptionError(f"{name} is quantized already. Leave -q away.")


def is_complete(folder: Path) -> bool:
    """Return whether all files of a model are there."""
    try:
        _check_weights(folder.name, folder)
    except LoadFailed:
        return False
    # Who asked for the model alone left a folder without one.
    return (folder / "config.json").is_file() and _has_tokenizer(folder)


def _has_tokenizer(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in _TOKENIZERS)


def _check_weights(name: str, folder: Path) -> None:
    """See that Transformers will find safetensors files, all of them, and read nothing else."""
    if not (folder / "model.safetensors").is_file():
        _check_shards(name, folder)
    for file in memory.weight_files(folder):
        if not memory.is_whole(file):
            raise LoadFailed(
                f"The weights of {name} are damaged: {file.resolve()} is not what its header says."
                " Delete it, get it again, and load again."
            )


def _check_shards(name: str, folder: Path) -> None:
    try:
        index: Any = json.loads((folder / _INDEX).read_text("utf-8"))
        shards = sorted(set(index["weight_map"].values()))
    except OSError:
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        why = (
            "only pickle files, which can run code when they are read" if pickled else "no weights"
        )
        raise LoadFailed(f"{name} has {why}. Choose a model with .safetensors files.") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise LoadFailed(f"{folder / _INDEX} is damaged. Delete it and load again.") from None
    # Transformers unpickles whatever an index names otherwise.
    if not all(shard.endswith(".safetensors") for shard in shards):
        raise LoadFailed(f"The index of {name} names other files than .safetensors. Do not use it.")
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise LoadFailed(
            f"{name} is not whole: {len(missing)} of {len(shards)} files of weights are missing"
            f" ({missing[0]}, …). Get them into {folder} and load again."
        )


def _check_kind(name: str, config: LocalLoadConfig, about: Mapping[str, Any]) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind, own_code = about.get("model_type"), about.get("auto_map") or {}
    if "AutoModelForCausalLM" in own_code:
        if config.trust_remote_code or kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            return
        raise LoadFailed(
            f"{name} comes with Python code of its own. If you trust it, add"
            " --trust-remote-code (and pin it with --revision)."
        )
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise LoadFailed(
            f"{name} is not a text-generation model that this Transformers version knows"
            f" (model_type {kind}). Choose another, or type: pip install -U transformers"
        )
    made_as = str((about.get("architectures") or [""])[0])
    if made_as.endswith(_NO_GENERATORS):
        raise LoadFailed(
            f"{name} is a {made_as}, which writes no text. Choose a text-generation model."
        )


def _check_attention(name: str, config: LocalLoadConfig, about: Mapping[str, Any]) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    wanted = config.attn
    known = {"eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()}
    if wanted is not None and wanted not in known and "/" not in wanted:
        raise OptionError(f"There is no --attn {wanted}.{did_you_mean(wanted, known)}")
    own = [about.get(key) for key in ("attn_implementation", "_attn_implementation")]
    if wanted is None and not config.trust_remote_code and any("/" in str(name) for name in own):
        raise LoadFailed(
            f"{name} wants code for its attention from the hub. Add --attn sdpa to do without,"
            " or --trust-remote-code if you trust it."
        )
