"""From messages to chunks: template, prefill, decode, text; runs on the inference thread."""

from __future__ import annotations

import contextlib
import inspect
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers import GenerationConfig as TransformersConfig
from transformers.generation.streamers import BaseStreamer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from llm_magic.backends.local.detokenize import Detokenizer, StopText
from llm_magic.backends.local.loading import Loaded
from llm_magic.backends.local.turns import turn
from llm_magic.backends.local.worker import Cancelled
from llm_magic.config import GenerationConfig
from llm_magic.errors import OptionError, PromptTooLong, did_you_mean
from llm_magic.types import Chunk, FinishReason, Message, Usage

Emit = Callable[[Chunk], None]

# A prompt is read in pieces, so that a long one can be stopped: the piece is sized to take about
# this long, and a short prompt is read at once.
_PIECE_S = 0.2
_FIRST_PIECE, _LARGEST_PIECE = 256, 4096
# Options of `generate` that change what comes out of it, or that have a flag of their own.
_NOT_STREAMABLE = frozenset({
    "num_beams", "num_beam_groups", "num_return_sequences", "return_dict_in_generate",
    "output_scores", "output_logits", "output_attentions", "output_hidden_states", "use_cache",
    "max_length", "stop_strings", "streamer", "cache_implementation", "trust_remote_code",
    "prompt_lookup_num_tokens", "assistant_early_exit", "penalty_alpha", "dola_layers",
    "constraints", "force_words_ids",
})  # fmt: skip


class _Stopped(Exception):
    """Raised inside `generate` when the text reached a stop string."""


def encode(loaded: Loaded, messages: Sequence[Message]) -> torch.Tensor:
    """Return the prompt as token ids of shape (1, length), as the model's template writes it."""
    tokenizer = loaded.tokenizer
    turns = [{"role": m.role, "content": m.content} for m in messages]
    if tokenizer.chat_template is None:
        # A base model continues text: it gets the prompt as it is.
        text = "\n\n".join(m.content for m in messages)
        ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids
    else:
        ids = _apply_template(tokenizer, turns)
    on_device: torch.Tensor = ids.to(loaded.model.device)
    return on_device


def _apply_template(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]]) -> Any:
    from jinja2 import TemplateError

    def apply(turns: list[dict[str, str]]) -> Any:
        encoding: Any = tokenizer.apply_chat_template(
            turns,
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
            # Whether it is too long is ours to say.
            tokenizer_kwargs={"verbose": False},
        )
        return encoding.input_ids

    try:
        return apply(turns)
    except TemplateError:
        if turns[0]["role"] != "system" or len(turns) < 2:
            raise
        # Some templates (Gemma's) refuse a system turn: it goes in front of the first question.
        first, second, *rest = turns
        merged = {**second, "content": f"{first['content']}\n\n{second['content']}"}
        return apply([merged, *rest])


def check_extra(config: GenerationConfig) -> None:
    """Raise `OptionError` for a ``-p`` option that `generate` does not know or cannot stream."""
    ours = set(GenerationConfig.model_fields)
    known = set(vars(TransformersConfig())) - _NOT_STREAMABLE - ours
    known = {name for name in known if not name.startswith("_")}
    for name in config.extra:
        if name in ours:
            raise OptionError(f"{name} has an option of its own. Leave -p away and type that.")
        if name in _NOT_STREAMABLE:
            raise OptionError(f"-p {name} does not go with a streamed answer. Leave it away.")
        if name not in known:
            raise OptionError(
                f"Transformers has no generation option {name!r}.{did_you_mean(name, known)}"
            )


def stream(
    loaded: Loaded,
    messages: Sequence[Message],
    config: GenerationConfig,
    cancel: threading.Event,
    emit: Emit,
) -> None:
    """Answer `messages`, one chunk a token; raises `Cancelled` soon after the flag is set."""
    with turn(cancel), torch.inference_mode():
        ids = encode(loaded, messages)
        prompt_tokens = ids.shape[1]
        room = _room(loaded, prompt_tokens)
        emit(Chunk(usage=Usage(prompt_tokens, 0, 0)))
        options = generate_options(loaded.model, config, room)
        cache = _prefill(loaded.model, ids, cancel)
        stop = (*config.stop, *(loaded.model.generation_config.stop_strings or ()))
        emitter = Emitter(loaded, stop, cancel, emit)
        with _seeded(config.seed, loaded.model.device), contextlib.suppress(_Stopped):
            # `generate` comes from a mixin that the annotations of models do not show.
            generate: Any = loaded.model.generate
            generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=cache,
                streamer=emitter,
                **options,
            )
    emitter.finish(prompt_tokens, options["max_new_tokens"])


def _room(loaded: Loaded, prompt_tokens: int) -> int | None:
    """Return how many tokens the answer may have at most."""
    context = loaded.info.context_length
    if context is None:
        return None
    if prompt_tokens >= context:
        raise PromptTooLong(
            f"The prompt has {prompt_tokens:,} tokens, {loaded.info.name} reads {context:,}."
            f" Shorten it by at least {prompt_tokens - context + 1:,}."
        )
    return context - prompt_tokens


def generate_options(
    model: PreTrainedModel, config: GenerationConfig, room: int | None
) -> dict[str, Any]:
    """Return our options under the names of `generate`; what is None is the model's own."""
    limit = config.max_new_tokens or model.generation_config.max_new_tokens or room or 512
    options: dict[str, Any] = {"max_new_tokens": min(limit, room) if room else limit}
    # Fine-tuned models often say no, as in training; a stop string of theirs is one of ours.
    options |= {"use_cache": True, "stop_strings": None}
    own = bool(model.generation_config.do_sample) if config.temperature is None else True
    if config.temperature != 0 and config.extra.get("do_sample", own):
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


def _prefill(model: PreTrainedModel, ids: torch.Tensor, cancel: threading.Event) -> Any:
    """Read a long prompt in pieces and return its cache; None leaves it whole to `generate`."""
    last = ids.shape[1] - 1
    if last <= _FIRST_PIECE or not _reads_in_pieces(model):
        return None
    mask = torch.ones_like(ids)
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    start, piece = 0, _FIRST_PIECE
    while start < last:
        if cancel.is_set():
            raise Cancelled
        began = time.perf_counter()
        stop = min(start + piece, last)
        model(
            input_ids=ids[:, start:stop],
            attention_mask=mask[:, :stop],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        if ids.device.type == "cuda":
            torch.cuda.synchronize(ids.device)
        share = _PIECE_S / max(time.perf_counter() - began, 1e-6)
        piece = max(32, min(int(piece * min(share, 2.0)), _LARGEST_PIECE))
        start = stop
    return cache


def _reads_in_pieces(model: PreTrainedModel) -> bool:
    """Whether the model keeps its cache as most do, and takes one that is made outside."""
    # Transformers has no public way to ask for these, nor a typed one.
    kind: Any = type(model)
    if kind._is_stateful or not kind._supports_default_dynamic_cache():
        return False
    if model.generation_config.cache_implementation not in {None, "dynamic", "hybrid"}:
        return False
    taken = inspect.signature(kind.forward).parameters.keys()
    return {"past_key_values", "logits_to_keep"} <= taken


@contextlib.contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Seed the generators for one answer, and leave the user's own random state as it was."""
    if seed is None:
        yield
        return
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        torch.manual_seed(seed)
        yield


class Emitter(BaseStreamer):
    """Gets every token from `generate`, and turns it into a chunk, or stops the work."""

    def __init__(
        self, loaded: Loaded, stop: Sequence[str], cancel: threading.Event, emit: Emit
    ) -> None:
        self._text = Detokenizer(loaded.tokenizer)
        self._stop = StopText(stop)
        self._cancel, self._emit = cancel, emit
        self._prompt_seen = False
        self._count = 0
        self._last = -1
        self._ends = _end_ids(loaded.model)

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt first, then one token at a time."""
        if self._cancel.is_set():
            raise Cancelled
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self._last = int(value.item())
        self._count += 1
        text = self._stop.feed(self._text.step(self._last))
        self._emit(Chunk(text=text, tokens=1, time=time.perf_counter()))
        if self._stop.reached:
            raise _Stopped

    def end(self) -> None:
        """Called by `generate`; `finish` does the work, also when `generate` was left early."""

    def finish(self, prompt_tokens: int, limit: int) -> None:
        """Emit what was held back, why it ended, and the counts."""
        ended = self._stop.reached or self._last in self._ends or self._count < limit
        reason: FinishReason = "stop" if ended else "length"
        self._emit(
            Chunk(
                text=self._stop.feed(self._text.flush()) + self._stop.flush(),
                finish_reason=reason,
                usage=Usage(prompt_tokens, self._count, 0),
                time=time.perf_counter(),
            )
        )


def _end_ids(model: PreTrainedModel) -> frozenset[int]:
    end = model.generation_config.eos_token_id
    return frozenset(end if isinstance(end, list) else () if end is None else (end,))
