"""Errors in the words of the panel: labels and buttons in place of options and magics."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from llm_magic.backends import registry
from llm_magic.errors import (
    LLMMagicException,
    LoadInProgress,
    ModelNotLoaded,
    OutOfMemory,
    PromptTooLong,
)

# Instead of the advice of these errors, which is about magics or several options.
_ADVICE: Mapping[type[LLMMagicException], str] = MappingProxyType(
    {
        ModelNotLoaded: "Choose a model and press Load.",
        LoadInProgress: "Wait for it, then try again.",
        OutOfMemory: "Try another quantization, a smaller model or a shorter prompt, or Unload.",
        PromptTooLong: (
            "Shorten the prompt, lower “max new tokens”, or press Clear to start a new conversation."
        ),
    }
)
# At the controls of options that declare no label.
_LABELS = MappingProxyType({"backend": "Backend", "model": "Model", "system": "System prompt"})


def error_message(error: LLMMagicException) -> str:
    """Return what happened, and what to do in the panel."""
    label, own = _label(error.option), _ADVICE.get(type(error), "")
    if not error.advice:
        # With a label, that of an option with an invalid value.
        return f"{label}: {error.problem}" if label else str(error)
    check = f"Choose {error.choice} in “{label}”." if error.choice else f"Check “{label}”."
    advice = [check] if label else []
    advice += [own] if own else []
    return " ".join([error.problem, *(advice or [error.advice])])


def _label(option: str) -> str:
    """Return the text at the control of an option, or nothing if the panel has none for it."""
    generation = registry.generation_specs()
    spec = {**registry.load_specs(), **generation}.get(option)
    if option in _LABELS or spec is None:
        return _LABELS.get(option, "")
    is_number = spec.is_number and option in generation
    return spec.label or (option.replace("_", " ") if is_number else "")
