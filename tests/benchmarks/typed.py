"""Answers with a structure or with token probabilities, compared with free answers of the same model.

The cost of a constraint is that of one that allows everything, so that both answers have the same tokens,
without speculative decoding; it is measured between the starts of two forward passes. An answer to a
schema of ten fields may use all that a free one uses, and the text that the schema forces. Labels are
compared with one forward pass of plain Transformers for each label.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Iterator, Mapping
from typing import Any

from tests.benchmarks.inside import PROMPT, load_bare, loaded_model
from tests.benchmarks.notebook import loaded_kernel
from tests.benchmarks.report import Row, Target, ratio
from tests.benchmarks.rounds import Rounds
from tests.kernels import Kernel

_TOKENS = 96
# One of so many rows is computed again.
_COMPARED = 4
_ANYTHING = r"(?s:.*)"
_WAYS: Mapping[str, dict[str, Any]] = {
    "free": {},
    "a structure that allows everything": {"regex": _ANYTHING},
    "--logprobs 5": {"logprobs": 5},
}
# Bounded, so that a small model comes to the end.
_WORD, _NUMBER = {"type": "string", "maxLength": 30}, {"type": "integer"}
_FIELDS: Mapping[str, Any] = {
    "name": _WORD, "born": _NUMBER, "birthplace": _WORD, "nationality": _WORD, "profession": _WORD,
    "employer": _WORD, "married": {"type": "boolean"}, "children": _NUMBER,
    "languages": {"type": "array", "items": _WORD, "maxItems": 3}, "died": _NUMBER,
}  # fmt: skip
_SCHEMA = {"type": "object", "properties": _FIELDS, "required": list(_FIELDS)}
_TEXT = (
    "Grace Brewster Murray Hopper was born in New York City in 1906 and died in 1992. The American"
    " computer scientist spoke English and French, served in the United States Navy, was married to"
    " Vincent Hopper, and had no children. She wrote one of the first compilers. Describe her."
)
_LABELS = ["positive", "negative", "neutral", "mixed"]
_QUESTION = "Is this review positive, negative, neutral or mixed? {item}"
_THINGS = (
    "kettle", "film", "phone", "hotel", "novel", "bicycle", "lamp", "concert", "jacket", "restaurant",
)  # fmt: skip
_OPINIONS = (
    "is a joy to use", "broke after a week", "is all right", "looks good, but is far too loud",
    "exceeded all my hopes", "is a waste of money", "came on Tuesday", "was good until the end",
    "could not be better", "made me angry",
)  # fmt: skip


def measure(rounds: Rounds) -> Iterator[Row]:
    """Run free and constrained answers in turn in one kernel, then the labels in float32 in another."""
    with loaded_kernel() as kernel:
        kernel.ok("from tests.benchmarks import typed")
        yield from _cost(kernel, rounds)
        yield from _speed(kernel, rounds)
    with loaded_kernel("%llm_load --dtype float32") as kernel:
        kernel.ok("from tests.benchmarks import typed\nfound = typed.choices()", timeout=900)
        passes, difference = kernel.value("found")
    yield Row("--choice, 4 labels: forward passes", "a row", (passes,), Target("<=", 1.2))
    name = "--choice: probabilities, from those of Transformers"
    yield Row(name, "", (difference,), Target("<=", 1e-4))


def _cost(kernel: Kernel, rounds: Rounds) -> Iterator[Row]:
    taken = rounds.in_turn(
        {
            name: lambda about=about: _value(kernel, f"typed.token_ms({about})")  # type: ignore[misc]
            for name, about in _WAYS.items()
        }
    )
    for name, values in taken.items():
        yield Row(f"{name}: a token, p50", "ms", values)
    free, constrained, reported = taken.values()
    name = "a structure that allows everything / free: a token, p50"
    yield ratio(name, constrained, free, Target("<=", 1.03))
    yield ratio("--logprobs 5 / free: a token, p50", reported, free, Target("<=", 1.05))


def _speed(kernel: Kernel, rounds: Rounds) -> Iterator[Row]:
    taken = rounds.run(lambda: _figures(kernel))
    for name, unit in (("schema of 10 fields", "tok/s"), ("free", "tok/s")):
        yield Row(name, unit, taken[name])
    yield Row("schema of 10 fields: forward passes a token", "", taken["passes"])
    name = "schema of 10 fields / free: tokens/s"
    yield ratio(name, taken["schema of 10 fields"], taken["free"], Target(">=", 1.15))


def _figures(kernel: Kernel) -> Mapping[str, float]:
    return dict(_value(kernel, "typed.speeds()"))


def _value(kernel: Kernel, call: str) -> Any:
    kernel.ok(f"found = {call}", timeout=300)
    return kernel.value("found")


# --- what runs in the kernels ---


@contextlib.contextmanager
def _passes() -> Iterator[list[float]]:
    """Collect when each forward pass of the loaded model starts, in seconds of its thread."""
    moments: list[float] = []
    handle = loaded_model().model.register_forward_pre_hook(
        lambda _model, _args: moments.append(time.thread_time())
    )
    try:
        yield moments
    finally:
        handle.remove()


@contextlib.contextmanager
def _no_speculation() -> Iterator[None]:
    from llm_magic.backends.local.generation import generate as module

    generate: Any = module
    usual = generate.drafter
    generate.drafter = lambda *_: None
    try:
        yield
    finally:
        generate.drafter = usual


def token_ms(about: dict[str, Any]) -> float:
    """Return the median of the CPU time of the inference thread for a token, in milliseconds."""
    from llm_magic import llm
    from llm_magic.errors import InvalidReply

    fixed: dict[str, Any] = {"temperature": 0, "repetition_penalty": 1, "max_new_tokens": _TOKENS}
    with _no_speculation(), _passes() as moments, contextlib.suppress(InvalidReply):
        # The constrained answer is cut off at the limit, as the free one is.
        llm.generate(PROMPT, **fixed, **about)
    steps = [after - before for before, after in itertools.pairwise(moments)]
    # The first one reads the prompt.
    assert len(steps) == _TOKENS - 1, f"{len(steps)} passes"
    return statistics.median(steps[1:]) * 1000


def speeds() -> dict[str, float]:
    """Return the tokens a second of an answer to a schema and of a free one that is as long."""
    from llm_magic import llm

    with _passes() as moments:
        reply = llm.generate(_TEXT, schema=_SCHEMA, temperature=0, max_new_tokens=400)
    tokens = reply.usage.completion_tokens
    assert tokens is not None
    free = llm.generate(_TEXT, temperature=0, max_new_tokens=tokens)
    found = {"schema of 10 fields": reply, "free": free}
    rates = {name: each.timing.tokens_per_s or 0.0 for name, each in found.items()}
    return {**rates, "passes": len(moments) / tokens}


def choices() -> tuple[float, float]:
    """Return the forward passes a row of a map with labels, and how far a probability is from that of
    Transformers at most."""
    from llm_magic import llm

    rows = [f"The {thing} {opinion}." for thing in _THINGS for opinion in _OPINIONS]
    with _passes() as moments:
        replies = llm.map(_QUESTION, rows, choice=_LABELS)
    model, _tokenizer = load_bare(dtype="float32")
    differences = [
        _difference(model, rows[number], replies[number])
        for number in range(0, len(rows), _COMPARED)
    ]
    return len(moments) / len(rows), max(differences)


def _difference(model: Any, row: str, reply: Any) -> float:
    """Return the largest difference of a probability of a reply from one pass for each label in quotes."""
    import torch

    from llm_magic import llm

    loaded = loaded_model()
    # Replies of a map do not hold what was sent.
    sent = llm.generate(_QUESTION.replace("{item}", row), choice=_LABELS).messages
    ids = loaded.prompt_encoder.encode(sent)
    sums = []
    for label in _LABELS:
        tokens = loaded.tokenizer(f'"{label}"', add_special_tokens=False).input_ids
        with torch.inference_mode():
            logits = model(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1]
        logs = logits.double().log_softmax(-1)
        sums.append(logs.gather(-1, torch.tensor(tokens)[:, None]).sum())
    expected = torch.stack(sums).softmax(-1).tolist()
    differences = (
        abs(reply.probabilities[label] - probability)
        for label, probability in zip(_LABELS, expected, strict=True)
    )
    return float(max(differences))
