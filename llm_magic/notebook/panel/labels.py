"""Errors in the words of the panel: the labels of its controls in place of the options of magics."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping

from llm_magic.backends.registry import generation_specs, load_specs
from llm_magic.config.option_spec import OptionSpec

# What the panel has buttons for, or does by itself.
_PHRASES = (
    (r"Type %llm_load \(or %llm_load MODEL\)\.", "Choose a model and press Load."),
    (r"Name one: %llm_load MODEL(?: -b \S+)?\.", "Choose one in the field “Model”."),
    (r"run %llm_load \S+ -b \S+ --pull", "select --pull and press Load"),
    (r"(?:Type|Run) %llm_load(?: [^ ]+)?\.(?= |$)", "Load it again."),
    (r"Run %llm_models(?: -b \S+)? to list models\.", "Press Refresh list to see the models."),
    (r" \(%llm_status shows [a-z ]+\)", ""),
    (r"%llm_unload first", "unload the loaded model first"),
    (r" with %llm_unload", " with Unload"),
    (r"--trim leaves out the oldest, %llm_reset \S+ all\.", "Press Clear to start a new one."),
    (r", and --literal fills nothing", ""),
    (r"; --dry-run shows their notes", ""),
)
_FLAG = re.compile(r"(?P<add>\b[Aa]dd )?(?<![\w-])(?P<flag>--?[a-z][a-z-]*)(?: (?P<value>[\w.]+))?")


_WRONG = re.compile(r"^(?P<name>\w+)=(?P<value>\S+) must be (?P<allowed>.+)\.$")


def in_labels(text: str) -> str:
    """Return an error with the panel's labels and buttons where it names options and magics."""
    for pattern, replacement in _PHRASES:
        text = re.sub(pattern, replacement, text)
    wrong = _WRONG.match(text)
    spec = _by_name().get(wrong["name"]) if wrong is not None else None
    if wrong is not None and spec is not None and label(spec):
        return f"{label(spec)} must be {wrong['allowed']}, not {wrong['value']}."
    return _FLAG.sub(_labelled, text)


@functools.cache
def _by_name() -> Mapping[str, OptionSpec]:
    return {**load_specs(), **generation_specs()}


@functools.cache
def _by_flag() -> Mapping[str, OptionSpec]:
    return {flag: spec for spec in _by_name().values() for flag in spec.flags}


def label(spec: OptionSpec) -> str:
    """Return the text at the control of an option, or nothing if the panel has none for it."""
    # The control of a backend is the one that selects which others are shown.
    is_named = spec.is_number and spec.name in generation_specs()
    return (
        spec.label
        or ("Backend" if spec.name == "backend" else "")
        or (spec.name.replace("_", " ") if is_named else "")
    )


def _labelled(match: re.Match[str]) -> str:
    spec, value = _by_flag().get(match["flag"]), match["value"]
    if spec is None:
        return match[0]
    is_value = value is not None and (
        value in (*spec.choices, *spec.examples) or spec.name == "backend"
    )
    rest = "" if value is None or is_value or value == spec.metavar else f" {value}"
    if not label(spec):
        return f"{match[0].removesuffix(rest)} of %llm_load{rest}"
    verb = match["add"] or ""
    if verb:
        verb = "select " if spec.kind == "switch" else "fill in "
        verb = verb.capitalize() if match["add"][0] == "A" else verb
    return f"{verb}“{label(spec)}”{f' = {value}' if is_value else ''}{rest}"
