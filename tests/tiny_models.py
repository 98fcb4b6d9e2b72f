"""Tiny random chat models on disk, each built in a fraction of a second.

    tiny_llama(tmp_path / "llama", layers=4, chat_template=None)
    tiny(tmp_path / "mamba", "mamba")

The weights are noise, but the same noise for the same seed. The tokenizer has every byte, so
any text makes the round trip, and sampled text holds incomplete UTF-8, as that of real models.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

Architecture = Literal[
    "llama", "qwen3", "gemma2", "gemma3_text", "mistral", "mamba", "gpt2", "jamba", "granitemoehybrid",
    "lfm2", "phi3", "rwkv", "xlnet",
]  # fmt: skip

CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ("<|pad|>", "<|im_start|>", "<|im_end|>")

_MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("e", "r"), ("Ġ", "a"), ("o", "n")]

# Decoders of the Llama family share these names. A window shorter than a prompt makes the cache
# discard old positions, which those variants test: in all layers of Mistral and Gemma 3
# (at two layers), in every other one of Gemma 2.
_HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
_WINDOW = {"sliding_window": 16}
_EXTRAS: dict[Architecture, dict[str, Any]] = {
    "llama": _HEADS,
    "qwen3": _HEADS,
    "gemma2": _HEADS | _WINDOW,
    "gemma3_text": _HEADS | _WINDOW,
    "mistral": _HEADS | _WINDOW,
    "mamba": {"state_size": 8},
    "gpt2": {"n_head": 4},
    # Layers with a state beside layers with keys and values.
    "jamba": {
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 2, "attn_layer_period": 2,
        "attn_layer_offset": 1, "mamba_dt_rank": 4, "use_mamba_kernels": False,
    },
    "granitemoehybrid": {
        "num_attention_heads": 4, "num_key_value_heads": 2, "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "shared_intermediate_size": 64,
        "num_local_experts": 0,
    },
    "lfm2": {
        "num_attention_heads": 4, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"],
    },
    # Texts of more than 112 tokens are placed in another way than shorter ones.
    "phi3": {
        "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": None,
        "original_max_position_embeddings": 112,
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 1.0, "factor": 4.0,
            "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
        },
    },
    # No cache of Transformers: a state of their own kind.
    "rwkv": {"attention_hidden_size": 64},
    "xlnet": {"n_head": 4},
}  # fmt: skip


class Options(TypedDict, total=False):
    """The options of a tiny model; see `DEFAULTS`."""

    layers: int
    hidden: int
    max_position_embeddings: int
    chat_template: str | None
    seed: int
    sharded: bool


DEFAULTS: Options = {
    "layers": 2,
    "hidden": 64,
    "max_position_embeddings": 512,
    "chat_template": CHATML,
    "seed": 0,
    "sharded": False,
}


def tiny_llama(folder: Path, **changes: Unpack[Options]) -> Path:
    """A Llama of about 120,000 parameters with its tokenizer, in `folder`."""
    return tiny(folder, "llama", **changes)


def tiny(folder: Path, architecture: Architecture, **changes: Unpack[Options]) -> Path:
    """A random model of any of the architectures, with its tokenizer, in `folder`."""
    options: Options = {**DEFAULTS, **changes}
    tokenizer = byte_tokenizer(options["chat_template"], options["max_position_embeddings"])
    tokenizer.save_pretrained(folder)
    config = AutoConfig.for_model(
        architecture,
        vocab_size=len(tokenizer),
        num_hidden_layers=options["layers"],
        hidden_size=options["hidden"],
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **_sizes(architecture, options),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options["seed"])
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder, max_shard_size="100KB" if options["sharded"] else "1GB")
    return folder


def _sizes(architecture: Architecture, options: Options) -> dict[str, Any]:
    sizes = dict(_EXTRAS[architecture])
    # A state space and relative positions have no limit.
    if architecture not in {"mamba", "xlnet"}:
        sizes["max_position_embeddings"] = options["max_position_embeddings"]
    if architecture == "xlnet":
        sizes |= {"d_inner": 2 * options["hidden"], "d_head": options["hidden"] // sizes["n_head"]}
    elif architecture not in {"mamba", "gpt2"}:
        sizes["intermediate_size"] = 2 * options["hidden"]
    return sizes


def byte_tokenizer(chat_template: str | None, max_length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: 256 bytes, a few merges and the ChatML tokens."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet()) + [a + b for a, b in _MERGES]
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=_MERGES))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def pickle_only(folder: Path) -> Path:
    """A Llama whose weights exist as `pytorch_model.bin` only, which can run code when read."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama(folder))
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def truncated_weights(folder: Path) -> Path:
    """A Llama whose safetensors file ends halfway, as after a full disk or a lost connection."""
    weights = tiny_llama(folder) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    return folder


def remote_code(folder: Path) -> Path:
    """Make a model of an unknown type with Python code; `imported` returns whether that has run."""
    config_file = tiny_llama(folder) / "config.json"
    config = json.loads(config_file.read_text())
    config |= {
        "model_type": "tiny_remote",
        "architectures": ["TinyRemoteForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_tiny_remote.TinyRemoteConfig",
            "AutoModelForCausalLM": "modeling_tiny_remote.TinyRemoteForCausalLM",
        },
    }
    config_file.write_text(json.dumps(config, indent=2))
    code = _REMOTE_CODE.format(marker=str(_marker(folder)))
    (folder / "modeling_tiny_remote.py").write_text(code)
    return folder


def imported(folder: Path) -> bool:
    """Whether the Python of a `remote_code` folder has been run since it was written."""
    return _marker(folder).exists()


def _marker(folder: Path) -> Path:
    # Beside the folder, so that a hub that serves the folder does not serve the marker.
    return folder.resolve().with_name(f"{folder.name}.imported")


_REMOTE_CODE = """\
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

Path({marker!r}).touch()


class TinyRemoteConfig(LlamaConfig):
    model_type = "tiny_remote"


class TinyRemoteForCausalLM(LlamaForCausalLM):
    config_class = TinyRemoteConfig
"""
