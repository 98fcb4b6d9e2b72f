"""The generation options under the names of Transformers' ``generate``."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, PreTrainedModel

from llm_magic.backends.local.backend import LocalTransformersBackend
from llm_magic.backends.local.generation.parameters import generate_options
from llm_magic.config.settings import GenerationConfig
from tests.generation_options import EVERY
from tests.tiny_models import tiny_llama

# Applied around `generate`: they set the generators, end the stream, and read the logits.
APPLIED_ELSEWHERE = {"seed", "stop", "logprobs"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    folder: Path = tiny_llama(tmp_path_factory.mktemp("models") / "tiny")
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    return loaded


@pytest.mark.parametrize("name", sorted(EVERY.keys() - APPLIED_ELSEWHERE))
def test_supported_option_reaches_generate(name: str, model: PreTrainedModel) -> None:
    spelled = LocalTransformersBackend.option_names[name]
    options = generate_options(model, GenerationConfig(**EVERY), 100)
    assert options[spelled] == EVERY[name]


def test_extra_options_reach_generate(model: PreTrainedModel) -> None:
    assert generate_options(model, GenerationConfig(extra={"min_p": 0.1}), 100)["min_p"] == 0.1
