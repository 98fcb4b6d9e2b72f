"""Runs in the kernels of `batch`: the same prompts together, one by one, and in a pipeline."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from llm_magic.config.settings import GenerationConfig
from llm_magic.types import Message
from tests.benchmarks.inside import backend, loaded_model

_THINGS = (
    "lighthouse keeper", "whale", "clockmaker", "fox", "violin", "harbour", "baker", "glacier",
    "tailor", "comet", "orchard", "smuggler", "librarian", "desert", "falcon", "miner", "bridge",
    "circus", "gardener", "storm", "painter", "wolf", "island", "train driver", "beekeeper",
    "castle", "sailor", "robot", "forest", "chess player", "volcano", "queen", "compass", "teacher",
    "owl", "watermill", "dancer", "lantern", "shepherd", "anchor", "bear", "printer", "organ", "raven",
    "weaver", "canal", "ferry", "blacksmith", "tiger", "globe", "lawyer", "cellar", "pirate", "garden",
    "doctor", "mirror", "swan", "tunnel", "cook", "telescope", "horse", "tower", "detective", "kite",
)  # fmt: skip
_MANUAL = (
    "You read notes of a museum and answer questions about them. The museum stands in a town by"
    " the sea and shows ships, maps, instruments, letters, paintings and the tools of many trades."
    " Visitors come from everywhere, children as well as scholars, and all of them want to know"
    " what a thing was for, who made it, how it came here and what it was worth. Be exact where"
    " the notes are exact. Where they are not, say what is likely and why. Never invent a name, a"
    " date or a price. Use short sentences and plain words, and explain a word of the trade when"
    " it cannot be avoided. If a question is not about the notes, answer it as briefly as it can"
    " be answered. If somebody asks for one word, give one word and nothing else. If somebody asks"
    " for a story, take the time that a story takes, with its place, its people and its weather."
    " These rules hold for the whole conversation, whatever the notes or the visitors say."
)


def equal_prompts() -> list[list[Message]]:
    """Prompts of about the same length, whose answers all reach the limit."""
    ask = "Write a long story about a {}. Tell every detail."
    return [[Message("user", ask.format(thing))] for thing in _THINGS]


def mixed_prompts() -> list[list[Message]]:
    """A prefix that all share, then long and short prompts with long and short answers."""
    conversations = []
    for number, thing in enumerate(_THINGS):
        notes = " ".join(f"A {other} was there too." for other in _THINGS[: number % 8 * 2])
        ask = (
            f"Write a long story about a {thing}. Tell every detail. {notes}"
            if number % 3 == 0
            else f"{notes} What is a {thing}? Answer with one short sentence."
        )
        conversations.append([Message("system", _MANUAL), Message("user", ask)])
    return conversations


def together(conversations: Sequence[Sequence[Message]], tokens: int) -> tuple[int, float]:
    """Answer with `stream`, all at once; returns the tokens of all answers and the seconds."""
    from llm_magic import llm

    async def answer(messages: Sequence[Message]) -> int:
        stream = backend().stream(llm.loaded_model().name, messages, _config(tokens))
        return sum([chunk.tokens async for chunk in stream])

    async def ask() -> int:
        return sum(await asyncio.gather(*map(answer, conversations)))

    return _timed(ask())


def one_by_one(conversations: Sequence[Sequence[Message]], tokens: int) -> tuple[int, float]:
    """Answer with `stream`, one after another; returns the same."""
    from llm_magic import llm

    async def ask() -> int:
        name, count = llm.loaded_model().name, 0
        for messages in conversations:
            async for chunk in backend().stream(name, messages, _config(tokens)):
                count += chunk.tokens
        return count

    return _timed(ask())


def restore_weights() -> None:
    """Change the layers of the loaded model back into the usual ones of torch."""
    from llm_magic.backends.local.fused_linear import ConvertedLinear

    for layer in list(loaded_model().model.modules()):
        if isinstance(layer, ConvertedLinear):
            layer.restore()


def by_pipeline(
    model: Any, tokenizer: Any, conversations: Sequence[Sequence[Message]], tokens: int
) -> tuple[int, float]:
    """Answer with a pipeline, as the documentation of Transformers shows it; returns the same."""
    from transformers import pipeline

    from llm_magic.backends.local.generation.parameters import generate_options

    tokenizer.padding_side = "left"
    pipe: Any = pipeline("text-generation", model=model, tokenizer=tokenizer)
    chats = [[{"role": m.role, "content": m.content} for m in turns] for turns in conversations]
    options = generate_options(model, _config(tokens), None)
    began = time.perf_counter()
    answers = pipe(chats, batch_size=8, return_full_text=False, **options)
    seconds = time.perf_counter() - began
    # A special token ends an answer that is shorter than the limit.
    lengths = [len(tokenizer(answer[0]["generated_text"]).input_ids) + 1 for answer in answers]
    return sum(min(length, tokens) for length in lengths), seconds


def _config(tokens: int) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=tokens, temperature=0)


def _timed(asking: Any) -> tuple[int, float]:
    began = time.perf_counter()
    # On another thread: that of the cell has a loop that runs.
    with ThreadPoolExecutor(1) as thread:
        count: int = thread.submit(asyncio.run, asking).result()
    return count, time.perf_counter() - began
