"""Errors in the words of the panel: the labels of its controls in place of the options of magics."""

from __future__ import annotations

import re
from collections.abc import Mapping

from llm_magic.backends import registry
from llm_magic.config.option_spec import OptionSpec
from llm_magic.errors import LLMMagicError, OptionError

# What the panel has buttons for, or does by itself.
_PHRASES = (
    (r"Run %llm_load \(or %llm_load MODEL\)\.", "Choose a model and press Load."),
    (r"Name one: %llm_load MODEL(?: -b \S+)?\.", "Choose one in the field “Model”."),
    (r"run %llm_load \S+ -b \S+ --pull", "select --pull and press Load"),
    (r"Run %llm_load(?: [^ ]+)?\.(?= |$)", "Load it again."),
    (r"Run %llm_models(?: -b \S+)? to list models\.", "Press Refresh list to see the models."),
    (r" \(%llm_status shows [a-z ]+\)", ""),
    (r"%llm_unload first", "unload the loaded model first"),
    (r" with %llm_unload", " with Unload"),
    (
        r"--trim drops the oldest, and %llm_reset \S+ deletes all\.",
        "press Clear to start a new one.",
    ),
    (r"; --dry-run shows their notes", ""),
)
_FLAG = re.compile(r"(?P<add>\badd )?(?<![\w-])(?P<flag>--?[a-z][a-z-]*)(?: (?P<value>[\w:]+))?")


def in_labels(error: LLMMagicError | str) -> str:
    """Return an error with the panel's labels and buttons where it names options and magics."""
    spec = _specs().get(error.option) if isinstance(error, OptionError) else None
    if isinstance(error, OptionError) and spec is not None and (label := _label(spec)):
        return f"{label}: {error.problem}"
    text = str(error)
    for pattern, replacement in _PHRASES:
        text = re.sub(pattern, replacement, text)
    return _FLAG.sub(_labelled, text)


def _specs() -> Mapping[str, OptionSpec]:
    return {**registry.load_specs(), **registry.generation_specs()}


def _label(spec: OptionSpec) -> str:
    """Return the text at the control of an option, or nothing if the panel has none for it."""
    if spec.name == "backend":
        return "Backend"
    is_number = spec.is_number and spec.name in registry.generation_specs()
    return spec.label or (spec.name.replace("_", " ") if is_number else "")


def _labelled(match: re.Match[str]) -> str:
    flag, value = match["flag"], match["value"]
    spec = next((spec for spec in _specs().values() if flag in spec.flags), None)
    if spec is None:
        return match[0]
    known = registry.names() if spec.name == "backend" else (*spec.choices, *spec.examples)
    # What follows may be a value, the word for one as in "add --key-env NAME", or the next word.
    next_word = "" if value is None or value in known or value.isupper() else f" {value}"
    given = f" = {value}" if value in known else ""
    label, verb = _label(spec), match["add"] or ""
    if not label:
        return f"{match[0].removesuffix(next_word)} {'to' if verb else 'of'} %llm_load{next_word}"
    if verb:
        verb = "select " if spec.kind == "switch" else "fill in "
    return f"{verb}“{label}”{given}{next_word}"
