"""Token ids to text, one token at a time and at a constant cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llm_magic.backends.local.generation.reasoning_tokens import ReasoningTags

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase


class Detokenizer:
    """Decodes the tokens of one answer; holds bytes back until they are whole characters."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._tags = ReasoningTags(tokenizer)
        self._stream: Any = self._new_stream() if self._backend is not None else None
        # Tokens whose text was not returned; for tokenizers in Python these follow the first
        # `_returned`, whose text was.
        self._ids: list[int] = []
        self._returned = 0

    def step(self, token: int) -> str:
        """Return the text that `token` completes; empty for a part of a character.

        Special tokens have no text, but those around reasoning have a tag.
        """
        return self._tags.step(token, self._text(token))

    def _text(self, token: int) -> str:
        if self._stream is None:
            return self._step_in_python(token)
        self._ids.append(token)
        try:
            text = self._stream.step(self._backend, token) or ""
        except Exception:  # noqa: BLE001 - it raises no narrower type
            # Bytes that never become a character can invalidate the text before them:
            # https://github.com/vllm-project/vllm/issues/17448
            text = self._decode(self._ids)
            # With the tokens before: some decoders strip a space at the start of a text.
            self._stream = self._new_stream(self._ids)
        if text:
            self._ids.clear()
        return text

    def flush(self) -> str:
        """Return the rest: a part of a character becomes a replacement character."""
        returned, whole = self._decode(self._ids[: self._returned]), self._decode(self._ids)
        self._ids, self._returned = [], 0
        return whole[len(returned) :]

    @staticmethod
    def _new_stream(before: Sequence[int] = ()) -> Any:
        from tokenizers.decoders import DecodeStream

        return DecodeStream(ids=list(before), skip_special_tokens=True)

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
