"""Generation options under the names of `generate`, and what `generate` prepares from them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig as TransformersConfig
from transformers import PreTrainedModel
from transformers.generation import logits_process as processing
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
)

from llm_magic.backends.local import transformers_compat as compat
from llm_magic.config.settings import GenerationConfig
from llm_magic.errors import OptionError, PromptTooLong, did_you_mean

if TYPE_CHECKING:
    from llm_magic.backends.local.local_model import LocalModel

# Options of `generate` that change the type of its result, or that have a flag of their own.
_NOT_STREAMABLE = frozenset({
    "num_beams", "num_beam_groups", "num_return_sequences", "return_dict_in_generate",
    "output_scores", "output_logits", "output_attentions", "output_hidden_states", "use_cache",
    "max_length", "stop_strings", "streamer", "cache_implementation", "trust_remote_code",
    "prompt_lookup_num_tokens", "assistant_early_exit", "penalty_alpha", "dola_layers",
    "constraints", "force_words_ids",
})  # fmt: skip
_NUMBERS = frozenset({
    "min_length", "min_new_tokens", "max_time", "min_p", "top_h", "typical_p", "epsilon_cutoff",
    "eta_cutoff", "encoder_repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "guidance_scale", "num_assistant_tokens", "max_cache_len",
    "assistant_confidence_threshold", "max_matching_ngram_size", "assistant_lookbehind",
    "target_lookbehind", "assistant_ensemble_weight", "diversity_penalty", "prefill_chunk_size",
})  # fmt: skip
_BOOLEANS = frozenset({
    "do_sample", "renormalize_logits", "remove_invalid_values", "token_healing", "is_assistant",
    "low_memory", "disable_compile", "use_mtp",
})  # fmt: skip
_STRINGS = frozenset({"early_stopping", "num_assistant_tokens_schedule", "speculation_type"})
_MAX_VALUE_LENGTH = 40
# Below this the likeliest token is certain, and logits divided by it overflow float32.
_MIN_TEMPERATURE = 1e-5
# The decoding loop ends an answer at its last token and its length without these, which need tensors.
_USUAL_CRITERIA = (EosTokenCriteria, MaxLengthCriteria)
# These depend on each row alone, and not on where its prompt ends.
_SHAREABLE = (
    processing.EpsilonLogitsWarper, processing.EtaLogitsWarper,
    processing.InfNanRemoveLogitsProcessor, processing.LogitNormalization,
    processing.MinPLogitsWarper, processing.SuppressTokensLogitsProcessor,
    processing.TemperatureLogitsWarper, processing.TopHLogitsWarper, processing.TopKLogitsWarper,
    processing.TopPLogitsWarper, processing.TypicalLogitsWarper,
)  # fmt: skip


def check_extra(config: GenerationConfig) -> None:
    """Raise `OptionError` for a ``-p`` option that is unknown, not streamable or of a wrong type."""
    ours = set(GenerationConfig.model_fields)
    known = set(vars(TransformersConfig())) - _NOT_STREAMABLE - ours
    known = {name for name in known if not name.startswith("_")}
    for name, value in config.extra.items():
        if name in ours:
            raise OptionError(f"{name} has its own option. Use that option instead of -p.")
        if name in _NOT_STREAMABLE:
            raise OptionError(f"-p {name} cannot be used with a streamed answer. Remove it.")
        if name not in known:
            raise OptionError(
                f"Transformers has no generation option {name!r}.{did_you_mean(name, known)}"
            )
        _check_type(name, value)


def _check_type(name: str, value: object) -> None:
    if name in _BOOLEANS:
        is_right, expected = isinstance(value, bool), "true or false"
    elif name in _NUMBERS:
        is_right, expected = isinstance(value, Real) and not isinstance(value, bool), "a number"
    else:
        is_right = name in _STRINGS or not isinstance(value, str)
        expected = "a number, a list of numbers or an object"
    if value is not None and not is_right:
        shown = " ".join(repr(value).split())
        shown = shown if len(shown) <= _MAX_VALUE_LENGTH else f"{shown[:_MAX_VALUE_LENGTH]}…"
        raise OptionError(f"-p {name}={shown} is invalid. Expected {expected}.")


def generate_options(
    model: PreTrainedModel, config: GenerationConfig, tokens_left: int | None
) -> dict[str, Any]:
    """Return `config` as options of `generate`; what is None is left to the model."""
    limit = config.max_new_tokens or model.generation_config.max_new_tokens or tokens_left or 512
    options: dict[str, Any] = {"max_new_tokens": min(limit, tokens_left) if tokens_left else limit}
    # Fine-tuned models often disable the cache, as in training. `stop_strings` has the model's own.
    options |= {"use_cache": True, "stop_strings": None}
    own = bool(model.generation_config.do_sample) if config.temperature is None else True
    greedy = config.temperature is not None and config.temperature < _MIN_TEMPERATURE
    if not greedy and config.extra.get("do_sample", own):
        given = {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}
        options |= {name: value for name, value in given.items() if value is not None}
        options["do_sample"] = True
    else:
        # Transformers warns about sampling options that have no effect.
        options |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if config.repetition_penalty is not None:
        options["repetition_penalty"] = config.repetition_penalty
    if model.generation_config.pad_token_id is None:
        # Otherwise `generate` warns that it chose this by itself.
        end = model.generation_config.eos_token_id
        options["pad_token_id"] = end[0] if isinstance(end, list) else end
    return {**options, **config.extra}


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the generators for one answer; restores the random state of the process afterwards."""
    is_cuda, is_mps = device.type == "cuda", device.type == "mps"
    before = torch.mps.get_rng_state() if is_mps else None
    try:
        with torch.random.fork_rng(devices=[device] if is_cuda else []):
            # Not `torch.manual_seed`, which seeds every device there is.
            torch.default_generator.manual_seed(seed)
            if is_cuda:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            elif is_mps:
                torch.mps.manual_seed(seed)
            yield
    finally:
        if before is not None:
            torch.mps.set_rng_state(before)


def current_generator(device: torch.device) -> torch.Generator:
    """Return a generator that continues the random numbers of the process on a device."""
    if device.type == "cuda":
        state = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state = torch.mps.get_rng_state()
    else:
        state = torch.default_generator.get_state()
    generator = torch.Generator(device)
    generator.set_state(state)
    return generator


def eos_token_ids(model: PreTrainedModel, options: dict[str, Any]) -> frozenset[int]:
    """Return the tokens that end an answer with these options of `generate`."""
    value = options.get("eos_token_id", model.generation_config.eos_token_id)
    if value is None:
        return frozenset()
    return frozenset(value if isinstance(value, list | tuple) else (value,))


def max_new_tokens_left(loaded: LocalModel, prompt_tokens: int) -> int | None:
    """Return how many tokens the context has left; None for a model without a limit."""
    context = loaded.info.context_length
    if context is None:
        return None
    if prompt_tokens >= context:
        raise PromptTooLong.measured(loaded.info.name, prompt_tokens, context)
    return context - prompt_tokens


@dataclass(frozen=True, slots=True)
class GenerateInputs:
    """What `generate` prepares before it decodes; `arguments` are those of `forward`.

    Besides its last token and its length, one of `criteria` may end an answer.
    """

    arguments: dict[str, Any]
    processors: LogitsProcessorList
    do_sample: bool
    criteria: StoppingCriteriaList

    def shared(self) -> GenerateInputs | None:
        """Return the inputs for sequences that share their steps; None if they cannot share one.

        Without a cache: that of a batch changes.
        """
        processors = LogitsProcessorList()
        for each in self.processors:
            if type(each) is processing.RepetitionPenaltyLogitsProcessor:
                # Without the count of padding, which is that of one prompt: our padding is no new token.
                each = processing.RepetitionPenaltyLogitsProcessor(each.penalty)
            elif type(each) not in _SHAREABLE:
                return None
            processors.append(each)
        if any(type(criterion) is not MaxTimeCriteria for criterion in self.criteria):
            return None
        arguments = {n: x for n, x in self.arguments.items() if n not in compat.CACHE_NAMES}
        return dataclasses.replace(self, arguments=arguments, processors=processors)


def prepare(model: PreTrainedModel, ids: torch.Tensor, options: dict[str, Any]) -> GenerateInputs:
    """Return what `generate` prepares for a prompt of shape (1, length), without decoding."""
    prepared: list[GenerateInputs] = []

    def decode(
        _model: object,
        input_ids: torch.Tensor,
        *,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: TransformersConfig,
        **arguments: Any,
    ) -> torch.Tensor:
        others = [each for each in stopping_criteria if not isinstance(each, _USUAL_CRITERIA)]
        inputs = GenerateInputs(
            arguments,
            logits_processor,
            bool(generation_config.do_sample),
            StoppingCriteriaList(others),
        )
        prepared.append(inputs)
        return input_ids

    # `generate` comes from a mixin that the annotations of models do not show.
    generate: Any = model.generate
    attention_mask = torch.ones_like(ids)
    generate(input_ids=ids, attention_mask=attention_mask, custom_generate=decode, **options)
    return prepared[0]
