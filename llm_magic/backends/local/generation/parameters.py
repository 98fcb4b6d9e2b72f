"""Our generation options under the names and with the meaning of ``generate``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from numbers import Real
from typing import Any

import torch
from transformers import GenerationConfig as TransformersConfig
from transformers import PreTrainedModel

from llm_magic.config.settings import GenerationConfig
from llm_magic.errors import OptionError, did_you_mean

# Options of `generate` that change what comes out of it, or that have a flag of their own.
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
_SWITCHES = frozenset({
    "do_sample", "renormalize_logits", "remove_invalid_values", "token_healing", "is_assistant",
    "low_memory", "disable_compile", "use_mtp",
})  # fmt: skip
_TEXTS = frozenset({"early_stopping", "num_assistant_tokens_schedule", "speculation_type"})
_LONGEST_VALUE = 40


def check_extra(config: GenerationConfig) -> None:
    """Raise `OptionError` for a ``-p`` option that `generate` does not have or cannot stream.

    A value of another type than that of the option is an error, too.
    """
    ours = set(GenerationConfig.model_fields)
    known = set(vars(TransformersConfig())) - _NOT_STREAMABLE - ours
    known = {name for name in known if not name.startswith("_")}
    for name, value in config.extra.items():
        if name in ours:
            raise OptionError(f"{name} has an option of its own. Leave -p away and type that.")
        if name in _NOT_STREAMABLE:
            raise OptionError(f"-p {name} does not go with a streamed answer. Leave it away.")
        if name not in known:
            raise OptionError(
                f"Transformers has no generation option {name!r}.{did_you_mean(name, known)}"
            )
        _check_type(name, value)


def _check_type(name: str, value: object) -> None:
    if name in _SWITCHES:
        is_right, expected = isinstance(value, bool), "true or false"
    elif name in _NUMBERS:
        is_right, expected = isinstance(value, Real) and not isinstance(value, bool), "a number"
    else:
        is_right = name in _TEXTS or not isinstance(value, str)
        expected = "a number, a list of numbers or an object"
    if value is not None and not is_right:
        shown = " ".join(repr(value).split())
        shown = shown if len(shown) <= _LONGEST_VALUE else f"{shown[:_LONGEST_VALUE]}…"
        raise OptionError(f"-p {name}={shown}: {expected} is expected.")


def generate_options(
    model: PreTrainedModel, config: GenerationConfig, room: int | None
) -> dict[str, Any]:
    """Return our options under the names of `generate`; what is None is the model's own."""
    limit = config.max_new_tokens or model.generation_config.max_new_tokens or room or 512
    options: dict[str, Any] = {"max_new_tokens": min(limit, room) if room else limit}
    # Fine-tuned models often say no, as in training; a stop string of theirs is one of ours.
    options |= {"use_cache": True, "stop_strings": None}
    own = bool(model.generation_config.do_sample) if config.temperature is None else True
    if not _is_greedy(config.temperature) and config.extra.get("do_sample", own):
        given = {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}
        options |= {name: value for name, value in given.items() if value is not None}
        options["do_sample"] = True
    else:
        # The sampling options must go, or Transformers warns that they have no effect.
        options |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if config.repetition_penalty is not None:
        options["repetition_penalty"] = config.repetition_penalty
    if model.generation_config.pad_token_id is None:
        # Only to keep `generate` from saying that it chose this by itself.
        end = model.generation_config.eos_token_id
        options["pad_token_id"] = end[0] if isinstance(end, list) else end
    return {**options, **config.extra}


# Below this the likeliest token is certain, and soon logits divided by it have no float32.
_LEAST_TEMPERATURE = 1e-5


def _is_greedy(temperature: float | None) -> bool:
    return temperature is not None and temperature < _LEAST_TEMPERATURE


@contextlib.contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Seed the generators for one answer, and leave the user's own random state as it was."""
    if seed is None:
        yield
        return
    with _as_it_was(device):
        # Not `torch.manual_seed`, which seeds every device there is.
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        elif device.type == "mps":
            torch.mps.manual_seed(seed)
        yield


@contextlib.contextmanager
def _as_it_was(device: torch.device) -> Iterator[None]:
    """Bring the random state of the CPU and of a device back afterwards."""
    before = torch.mps.get_rng_state() if device.type == "mps" else None
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        if before is not None:
            torch.mps.set_rng_state(before)


def end_ids(config: TransformersConfig) -> frozenset[int]:
    """Return the tokens that end an answer."""
    end: Any = config.eos_token_id
    return frozenset(end if isinstance(end, list) else () if end is None else (end,))
