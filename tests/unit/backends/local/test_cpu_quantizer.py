"""Models that are quantized for the CPU while they are read: which weights, and how exactly."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from llm_magic.backends.local import cpu_linear, memory
from llm_magic.backends.local import transformers_compat as compat
from llm_magic.backends.local.cpu_quantized import Int4Linear, Int8Linear, QuantizedLinear
from llm_magic.backends.local.cpu_quantizer import CpuQuantizationConfig, complete
from llm_magic.backends.local.files.gguf import convert, embedded_file
from llm_magic.backends.local.fused_linear import FusedLinear
from tests.local_models import reweighted
from tests.tiny_models import Architecture, tiny

TEXT = (
    "The Eiffel Tower is a wrought-iron lattice tower on the Champ de Mars in Paris. It is named after"
    " the engineer whose company designed and built it from 1887 to 1889 as the centerpiece of a world's"
    " fair. Although some of the leading artists of the country criticized its design at first, it has"
    " become a symbol of France, and one of the most recognizable structures in the world. Nearly six"
    " million people visited it in 2022. It has three levels for visitors, with restaurants on the first"
    " and the second. The climb from the ground to the first level is over 300 steps."
)  # fmt: skip


def load(folder: Path, quantization: str | None) -> PreTrainedModel:
    """Return a model in bfloat16, quantized or packed as the loader does it."""
    config = None if quantization is None else CpuQuantizationConfig(quantization)
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype="bfloat16", device_map={"": "cpu"}, quantization_config=config
    )
    if quantization is not None:
        complete(model)
    cpu_linear.optimize(model)
    model.eval()
    assert isinstance(model, PreTrainedModel)
    return model


class Reference:
    """A text and what the real model in bfloat16 predicts after each of its tokens."""

    def __init__(self) -> None:
        file = embedded_file()
        assert file is not None
        self.folder = convert(file, report=lambda _progress: None, cancelled=lambda: False)
        self.ids = AutoTokenizer.from_pretrained(self.folder)(TEXT, return_tensors="pt").input_ids
        with torch.inference_mode():
            self.expected = log_probabilities(load(self.folder, None)(self.ids).logits)

    def divergence(self, logits: torch.Tensor) -> float:
        """Return the mean Kullback-Leibler divergence of other predictions."""
        got = log_probabilities(logits)
        return float((self.expected.exp() * (self.expected - got)).sum(-1).mean())


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    return logits[0].float().log_softmax(-1)


@pytest.fixture(scope="module")
def reference(model_cache: Path) -> Reference:
    return Reference()


# These weights were stored in 4 bits before, so that both lose as little.
@pytest.mark.parametrize(
    ("quantization", "kinds"),
    [("8bit", {Int8Linear: 61}), ("4bit", {Int4Linear: 60, Int8Linear: 1})],
)
def test_real_model_predicts_nearly_the_same(
    reference: Reference, quantization: str, kinds: dict[type, int]
) -> None:
    model = load(reference.folder, quantization)
    # Queries, keys and values, and gate and up, of 30 layers.
    expected = kinds | {FusedLinear: 150}
    assert Counter(type(m) for m in model.modules() if isinstance(m, nn.Linear)) == expected
    with torch.inference_mode():
        assert reference.divergence(model(reference.ids).logits) < 0.006
        assert reference.divergence(in_pieces(model, reference.ids)) < 0.006


def in_pieces(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits of a text of which few tokens are read at once, as the kernels multiply them."""
    parts, cache = [], {compat.cache_name(model): compat.new_cache(model)}
    for start in range(0, ids.shape[1], 8):
        parts.append(model(ids[:, start : start + 8], **cache, use_cache=True).logits)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "gpt2"])
def test_every_matrix_that_fits_is_quantized(
    tmp_path: Path, name: Architecture, quantization: str
) -> None:
    folder = tiny(tmp_path, name, hidden=128)
    usual, model = load(folder, None), load(folder, quantization)
    head = model.get_output_embeddings()
    left = [m for m in model.modules() if type(m) is nn.Linear or isinstance(m, Conv1D)]
    # The vocabulary of these models is no multiple of 16.
    assert [m for m in left if m is not head] == []
    kinds = {type(m) for m in model.modules() if isinstance(m, QuantizedLinear) and m is not head}
    assert kinds == {Int8Linear if quantization == "8bit" else Int4Linear}
    ids = torch.arange(40).view(1, 40) % model.config.vocab_size
    with torch.inference_mode():
        expected, got = usual(ids).logits.float(), model(ids).logits.float()
    bound = 0.05 if quantization == "8bit" else 0.3
    assert (got - expected).std() < bound * expected.std()


def with_own_head(folder: Path) -> Path:
    """Make a model whose head is not its embedding, with a vocabulary that the kernels multiply."""
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_head_of_its_own_has_8_bits_and_no_copy(tmp_path: Path, quantization: str) -> None:
    model = load(with_own_head(tmp_path), quantization)
    assert type(model.lm_head) is Int8Linear
    estimate = memory.weight_bytes(tmp_path, "bfloat16", quantization)
    assert memory.head_copy_bytes(tmp_path, "bfloat16") == 0
    assert model.get_memory_footprint() == pytest.approx(estimate, rel=0.03)


def test_missing_weight_is_reported(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    reweighted(with_own_head(tmp_path), drop=name)
    # With `output_loading_info` it returns a pair, unlike its annotation.
    pair: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=CpuQuantizationConfig("4bit"), output_loading_info=True
    )
    assert pair[1]["missing_keys"] == {name}


def test_state_is_that_of_the_usual_model(tmp_path: Path) -> None:
    usual, model = load(with_own_head(tmp_path), None), load(tmp_path, "8bit")
    state = model.state_dict()
    assert state.keys() == usual.state_dict().keys()
    for name, value in usual.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=0.001)
