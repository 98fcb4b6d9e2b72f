"""Token ids to the chunks of an answer: their text up to a stop string, then the counts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tokenizers.decoders import DecodeStream
from transformers.generation.streamers import BaseStreamer

from llm_magic.backends.local.worker import Cancelled
from llm_magic.backends.reasoning import CLOSE_TAG, OPEN_TAG
from llm_magic.backends.stop_strings import ShownTokens, StopText
from llm_magic.config.settings import GenerationConfig
from llm_magic.text import counted
from llm_magic.types import Chunk, FinishReason, Progress, TokenLogprob, Usage

if TYPE_CHECKING:
    import torch
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    from llm_magic.backends.local.generation.distribution import TokenScores
    from llm_magic.backends.local.local_model import LocalModel

OPENS = (OPEN_TAG, "[THINK]", "<|START_THINKING|>")
CLOSES = (CLOSE_TAG, "[/THINK]", "<|END_THINKING|>")
# <|start|>assistant<|channel|>analysis<|message|>…<|end|>
_START, _CHANNEL, _MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
# The tokens at the end of a prompt that may contain an opening tag.
_TAIL = 8


class TokenStreamer:
    """Emits one chunk for each token of an answer, and one at its end."""

    def __init__(
        self, loaded: LocalModel, config: GenerationConfig, emit: Callable[[Chunk], None]
    ) -> None:
        stops = (*config.stop, *(loaded.model.generation_config.stop_strings or ()))
        self._stop = StopText(stops) if stops else None
        self._detokenizer = Detokenizer(loaded.tokenizer, loaded.reasoning_tokens)
        self._tokens = ShownTokens() if config.logprobs is not None else None
        self.texts = TokenTexts(loaded.tokenizer, loaded.token_texts)
        self._emit = emit
        self.token_count = 0
        self.last_token = -1
        # Whether the text has reached a stop string.
        self.stop_reached = False

    def report_prefill(self, read: int, unread: int) -> None:
        """Emit how many of the `unread` tokens of the prompt, which were not cached, are `read`."""
        detail = f"{read:,} of {counted(unread)}"
        self._emit(Chunk(progress=Progress("reading the prompt", read / unread, detail)))

    def append(self, token: int, scores: TokenScores | None = None) -> float:
        """Emit the text that `token` completes, with its `scores`; returns the time of the chunk."""
        self.last_token = token
        self.token_count += 1
        text = self._detokenizer.step(token)
        if scores is not None:
            self._add(token, text, scores)
        if self._stop is not None:
            text = self._stop.feed(text)
            self.stop_reached = self._stop.reached
        now = time.perf_counter()
        self._emit(Chunk(text=text, tokens=1, time=now, logprobs=self._shown(text)))
        return now

    def _add(self, token: int, text: str, scores: TokenScores) -> None:
        # A special token is no part of the text, but for the tags of the reasoning.
        if self._tokens is not None and (text or token not in self.texts.special):
            self._tokens.add(self.texts.described(text, scores))

    def _shown(self, text: str) -> tuple[TokenLogprob, ...]:
        """Return the tokens of the next part of the answer, if their probabilities are requested."""
        if self._tokens is None:
            return ()
        shown = self._tokens.feed(text)
        return shown + self._tokens.end() if self.stop_reached else shown

    def finish(self, reason: FinishReason, prompt_tokens: int, cached_tokens: int = 0) -> None:
        """Emit the text that was held back, the finish reason and the token counts."""
        text = self._detokenizer.flush()
        if self._tokens is not None:
            self._tokens.complete(text)
        if self._stop is not None:
            text = self._stop.feed(text) + self._stop.flush()
        usage, now = Usage(prompt_tokens, self.token_count, cached_tokens), time.perf_counter()
        logprobs = self._shown(text)
        self._emit(Chunk(text, finish_reason=reason, usage=usage, time=now, logprobs=logprobs))


class StopStringReached(Exception):
    """Raised inside `generate` to end it at a stop string."""


class GenerateStreamer(BaseStreamer):
    """The `streamer` of Transformers' own `generate`, which it can only leave by an exception."""

    def __init__(self, streamer: TokenStreamer, cancel: threading.Event) -> None:
        self._streamer, self._cancel = streamer, cancel
        self._has_prompt = False

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt first, then with each token."""
        if self._cancel.is_set():
            raise Cancelled
        if self._has_prompt:
            self._streamer.append(int(value.item()))
            if self._streamer.stop_reached:
                raise StopStringReached
        self._has_prompt = True

    def end(self) -> None:
        """Called at the end; `TokenStreamer.finish` also runs where `generate` was left early."""


class Detokenizer:
    """Decodes the tokens of one answer; holds bytes back until they are whole characters.

    Special tokens have no text, but those around reasoning have a tag.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, reasoning: ReasoningTokens | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._stream = DecodeStream(ids=[], skip_special_tokens=True)
        self._tags = _ReasoningTags(reasoning) if reasoning is not None else None
        # Tokens whose text was not returned; for tokenizers in Python these follow the first
        # `_returned`, whose text was.
        self._ids: list[int] = []
        self._returned = 0

    def step(self, token: int) -> str:
        """Return the text that `token` completes, at a constant cost; "" for a part of a character."""
        if self._backend is None:
            text = self._step_in_python(token)
        else:
            self._ids.append(token)
            try:
                text = self._stream.step(self._backend, token) or ""
            except Exception:  # noqa: BLE001 - it raises no narrower type
                text = self._restart()
            if text:
                self._ids.clear()
        return text if self._tags is None else self._tags.step(token, text)

    def _restart(self) -> str:
        """Return the text of tokens that are invalid together, and go on after them.

        Bytes that never become a character can invalidate the text before them:
        https://github.com/vllm-project/vllm/issues/17448
        """
        # With the tokens before: some decoders strip a space at the start of a text.
        self._stream = DecodeStream(ids=list(self._ids), skip_special_tokens=True)
        return self._decode(self._ids)

    def flush(self) -> str:
        """Return the rest: a part of a character becomes a replacement character."""
        if not self._ids:
            return ""
        returned, whole = self._decode(self._ids[: self._returned]), self._decode(self._ids)
        self._ids, self._returned = [], 0
        return whole[len(returned) :]

    def _step_in_python(self, token: int) -> str:
        """Decode a short window twice, for tokenizers that are written in Python."""
        self._ids.append(token)
        before = self._decode(self._ids[: self._returned])
        after = self._decode(self._ids)
        if after.endswith("\ufffd") or after == before:
            return ""
        # The window starts at tokens whose text was returned: some decoders strip leading spaces.
        self._ids = self._ids[self._returned :] if self._returned else self._ids
        self._returned = len(self._ids)
        return after[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""


class TokenTexts:
    """The texts of single tokens, as they continue a text; `known` keeps them for other answers."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, known: dict[int, str]) -> None:
        self._tokenizer, self._known = tokenizer, known

    @cached_property
    def special(self) -> frozenset[int]:
        """The tokens that are no text."""
        added: Any = getattr(self._tokenizer, "added_tokens_decoder", {})
        return frozenset(number for number, token in added.items() if token.special)

    @cached_property
    def _before(self) -> tuple[list[int], str]:
        # Some decoders strip the space at the start of a text.
        ids = list(self._tokenizer("a", add_special_tokens=False).input_ids)
        return ids, self._decode(ids)

    def text(self, token: int) -> str:
        """Return the text of a token; the name of one that is no text."""
        text = self._known.get(token)
        if text is None:
            ids, before = self._before
            whole = self._decode([*ids, token])
            is_next = whole.startswith(before)
            text = whole.removeprefix(before) if is_next else self._decode([token])
            self._known[token] = text
        return text

    def _decode(self, ids: list[int]) -> str:
        # Ten times as fast as the method of Transformers around it.
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            return str(self._tokenizer.decode(ids))
        return str(backend.decode(ids, skip_special_tokens=False))

    def described(self, text: str, scores: TokenScores) -> TokenLogprob:
        """Return a token of an answer, whose text there is `text`, with its probability."""
        likeliest = tuple((self.text(token), logprob) for token, logprob in scores.likeliest)
        return TokenLogprob(text, scores.logprob, likeliest)

    def of_text(
        self, tokens: Sequence[int], scores: Sequence[TokenScores]
    ) -> tuple[TokenLogprob, ...]:
        """Return the tokens of a whole text with their probabilities."""
        detokenizer = Detokenizer(self._tokenizer)
        texts = [detokenizer.step(token) for token in tokens]
        if texts:
            texts[-1] += detokenizer.flush()
        return tuple(map(self.described, texts, scores))


def opening_tag(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Return the opening tag if the token ids of a prompt end with the start of reasoning."""
    tail = str(tokenizer.decode(ids[-_TAIL:], skip_special_tokens=False))
    return OPEN_TAG if tail.rstrip().endswith(OPENS) else ""


def reasoning_pair(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int] | None:
    """Return the tokens that open and close reasoning; None if they are no tokens of their own."""
    added = tokenizer.get_added_vocab()
    pairs = ((added.get(start), added.get(end)) for start, end in zip(OPENS, CLOSES, strict=True))
    return next(
        ((start, end) for start, end in pairs if start is not None and end is not None), None
    )


@dataclass(frozen=True, slots=True)
class ReasoningTokens:
    """The special tokens of a tokenizer that enclose reasoning.

    `tags` are their texts, which `backends.reasoning` splits at. A header of OpenAI's channels starts
    with any of `headers` and ends with `message`; it has no text.
    """

    tags: dict[int, str]
    headers: frozenset[int]
    message: int

    @classmethod
    def find(cls, tokenizer: PreTrainedTokenizerBase) -> ReasoningTokens | None:
        """Return those of a tokenizer; None if it has none."""
        added: Any = getattr(tokenizer, "added_tokens_decoder", {})
        ids = {str(token): number for number, token in added.items() if token.special}
        tags = {ids[name]: OPEN_TAG for name in OPENS if name in ids}
        tags |= {ids[name]: CLOSE_TAG for name in CLOSES if name in ids}
        has_channels = _CHANNEL in ids and _MESSAGE in ids
        if not (tags or has_channels):
            return None
        headers = {ids[name] for name in (_START, _CHANNEL) if has_channels and name in ids}
        return cls(tags, frozenset(headers), ids.get(_MESSAGE, -1))


class _ReasoningTags:
    """Adds tags to the text of one answer where special tokens enclose reasoning."""

    def __init__(self, tokens: ReasoningTokens) -> None:
        self._tokens = tokens
        # The text of the current header; None outside of one.
        self._header: str | None = None
        self._in_reasoning = False

    def step(self, token: int, text: str) -> str:
        """Return the text of a token with the tags that belong there."""
        if token in self._tokens.headers:
            self._header = ""
            return text
        if self._header is None:
            return self._tokens.tags.get(token, "") + text
        if token != self._tokens.message:
            self._header += text
            return ""
        in_reasoning = self._header.strip().partition(" ")[0] in {"analysis", "commentary"}
        self._header = None
        before, self._in_reasoning = self._in_reasoning, in_reasoning
        if in_reasoning:
            return "\n\n" if before else OPEN_TAG
        return CLOSE_TAG if before else ""
