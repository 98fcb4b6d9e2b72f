"""Llamas of real size with random weights, on which speed and memory do not depend."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.gpu import devices
from tests.tiny_models import CHATML, byte_tokenizer

CONTEXT = 8192


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a Llama; embedding and output head are two matrices."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int = 128_256


# Llama 3.2 1B (with an output head of its own), Llama 3.1 8B.
ONE_B = Shape("1B", 2048, 16, 32, 8, 8192)
EIGHT_B = Shape("8B", 4096, 32, 32, 8, 14336)
# The wide middle makes a prompt take much more memory than the weights would suggest.
SMALL = Shape("small", 64, 2, 4, 2, 1 << 16, 4096)


def sized(shape: Shape) -> Shape:
    """Return `shape` on a GPU, and one that a CPU can do in moments elsewhere."""
    return shape if devices.ON_GPU else SMALL


def folder_of(shape: Shape, root: Path) -> Path:
    """Return a folder with such a model; built now if it is not there.

    ``LLM_MAGIC_TEST_MODELS`` names a root that outlives one run, so that tests and benchmarks
    can share what they build.
    """
    stored = os.environ.get("LLM_MAGIC_TEST_MODELS")
    folder = (Path(stored) if stored else root) / f"llama-{shape.name}"
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        build(shape, partial)
        partial.rename(folder)
    return folder


def build(shape: Shape, folder: Path) -> None:
    """Write model and tokenizer; the weights are drawn on the device, where that is quick."""
    tokenizer = wide_tokenizer(shape.vocabulary)
    config: Any = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(), torch.device(devices.NAME):
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    # So that answers run to their limit: a logit of zero is never among the highest.
    model.lm_head.weight.data[tokenizer.eos_token_id].zero_()
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder, max_shard_size="4GB")
    del model
    devices.free_garbage()


def wide_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Return the byte-level tokenizer of the tiny models, with a word for every other token."""
    small = byte_tokenizer(CHATML, CONTEXT)
    description = json.loads(small.backend_tokenizer.to_str())
    vocab = description["model"]["vocab"]
    vocab |= {f"Ġw{index}": index for index in range(len(small), vocabulary)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(description)),
        pad_token=small.pad_token,
        eos_token=small.eos_token,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = small.chat_template
    return tokenizer
