"""Models in the memory of this process: what is kept with each, how they come and go."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass

from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from llm_magic.backends.base import LoadPlan, Report
from llm_magic.backends.local import loader, memory
from llm_magic.backends.local import transformers_compat as compat
from llm_magic.backends.local.generation.chat_template import Encoder
from llm_magic.backends.local.generation.fast_path import FastPath
from llm_magic.backends.local.generation.kv_cache import Pace, first_pace
from llm_magic.backends.local.generation.prefix_cache import Prefixes
from llm_magic.backends.local.holders import Watch
from llm_magic.backends.local.load_plan import Ready
from llm_magic.errors import OptionError
from llm_magic.types import ModelInfo, Unloaded


@dataclass(slots=True)
class Loaded:
    """A resident model; never leaves the backend, so that unloading can free it.

    `assistant` is the smaller model that guesses ahead of it; both have a pace of reading.
    `why_plain` is why Transformers' own loop answers; None where that of this package does.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    info: ModelInfo
    prefixes: Prefixes
    pace: Pace
    fast: FastPath
    encoder: Encoder
    assistant: PreTrainedModel | None = None
    why_plain: str | None = None

    @property
    def decoding(self) -> str:
        """How the model decodes, as ``%llm_status`` shows it."""
        if self.why_plain is not None:
            return f"fast path off, generate of Transformers ({self.why_plain})"
        return self.fast.how

    def held(self) -> Counter[str]:
        """Return the bytes of its weights by device."""
        models = filter(None, (self.model, self.assistant))
        return memory.by_device(t for m in models for t in (*m.parameters(), *m.buffers()))

    def give_room(self) -> None:
        """Free what is kept only to be faster."""
        self.prefixes.clear()
        self.fast.clear()


def bring_in(
    plan: LoadPlan, ready: Ready, report: Report, cancel: threading.Event, *, keep: bool
) -> Loaded:
    """Load a checked model, and the assistant it was asked for with; `keep` keeps prefixes."""
    model, tokenizer = loader.load(ready.folder, ready.config, ready.device, report, cancel)
    why_plain = compat.why_plain(model)
    if why_plain is not None and (ready.assistant is not None or ready.config.compile):
        option = "--compile" if ready.assistant is None else "--assistant"
        raise OptionError(
            f"{option} needs the fast path, which {plan.name} cannot use: {why_plain}."
            f" Load it without {option}."
        )
    assistant = None
    if ready.assistant is not None:
        assistant = _assistant(plan, ready, tokenizer, report, cancel)
    fast = FastPath(model, compiled=ready.config.compile)
    if why_plain is None:
        fast.warm_up(report, cancel)
    base = ModelInfo(
        plan.name,
        "local",
        where=ready.source.where,
        source=str(ready.source.path or ready.folder),
        folder=str(ready.folder),
        revision=ready.config.revision,
    )
    return Loaded(
        model,
        tokenizer,
        loader.describe(model, base, ready.config),
        _prefixes(model, ready.device) if keep else Prefixes(0),
        first_pace(model.num_parameters(), ready.device),
        fast,
        Encoder(tokenizer, control_tokens=ready.config.special_tokens),
        assistant,
        why_plain,
    )


def _assistant(
    plan: LoadPlan,
    ready: Ready,
    tokenizer: PreTrainedTokenizerBase,
    report: Report,
    cancel: threading.Event,
) -> PreTrainedModel:
    assert ready.assistant is not None
    asked = f"--assistant {ready.config.assistant}"
    model, own = loader.load(ready.assistant, ready.config, ready.device, report, cancel)
    if own.get_vocab() != tokenizer.get_vocab():
        raise OptionError(
            f"{asked} has another vocabulary than {plan.name}."
            " Choose a smaller model of the same family."
        )
    if compat.why_plain(model) or not compat.can_roll_back(compat.new_cache(model)):
        raise OptionError(f"{asked} cannot take back a guess. Choose a model without states.")
    return model


def _prefixes(model: PreTrainedModel, device: str) -> Prefixes:
    about, dtype = model.config.to_dict(), str(model.dtype).removeprefix("torch.")
    return Prefixes(memory.prefix_budget(about, dtype, memory.free_bytes(device)))


def let_go(box: list[Loaded]) -> Unloaded:
    """Drop a model; it comes in a list so that no caller's frame holds it too."""
    loaded = box.pop()
    before = memory.memory_use()
    info = loaded.info
    # Accelerate's hooks wrap `forward` and refer back to the model.
    from accelerate.hooks import remove_hook_from_module

    models = list(filter(None, (loaded.model, loaded.assistant)))
    for model in models:
        remove_hook_from_module(model, recurse=True)
    watch = Watch(models)
    del loaded, model, models
    holders = watch.holders()
    # What a name in the notebook refers to is no garbage, but a cycle can hold weights, too.
    memory.give_back(collect=bool(holders))
    if holders:
        holders = watch.holders()
    return Unloaded(info.name, info.size or 0, before, memory.memory_use(), holders)
