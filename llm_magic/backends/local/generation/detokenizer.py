"""Token ids to text, one at a time and at a flat cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llm_magic.backends.local.generation.reasoning_tokens import Marks

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase


class Detokenizer:
    """Turns token ids into text; holds bytes back until they make whole characters."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._fast = getattr(tokenizer, "backend_tokenizer", None)
        self._marks = Marks(tokenizer)
        self._stream: Any = self._new_stream() if self._fast is not None else None
        # What was not shown yet; for slow tokenizers after the first `_read`, which were.
        self._ids: list[int] = []
        self._read = 0

    def step(self, token: int) -> str:
        """Return the text that `token` completes; empty for half characters.

        Of special tokens only those have one that stand around thoughts.
        """
        return self._marks.step(token, self._text(token))

    def _text(self, token: int) -> str:
        if self._stream is None:
            return self._step_slowly(token)
        self._ids.append(token)
        try:
            text = self._stream.step(self._fast, token) or ""
        except Exception:  # noqa: BLE001 - it raises nothing more special than that
            # Bytes that never become a character can take back what was whole before them:
            # https://github.com/vllm-project/vllm/issues/17448
            text = self._decode(self._ids)
            # With what was before: at the beginning of a text, some decoders strip a space.
            self._stream = self._new_stream(self._ids)
        if text:
            self._ids.clear()
        return text

    def flush(self) -> str:
        """Return what is left at the end: half a character, shown as a replacement character."""
        shown, rest = self._decode(self._ids[: self._read]), self._decode(self._ids)
        self._ids, self._read = [], 0
        return rest[len(shown) :]

    @staticmethod
    def _new_stream(before: Sequence[int] = ()) -> Any:
        from tokenizers.decoders import DecodeStream

        return DecodeStream(ids=list(before), skip_special_tokens=True)

    def _step_slowly(self, token: int) -> str:
        """Decode a short window twice, as tokenizers without a Rust core need it."""
        self._ids.append(token)
        before = self._decode(self._ids[: self._read])
        after = self._decode(self._ids)
        if after.endswith("\ufffd") or after == before:
            return ""
        # The window starts at the last tokens that were shown: some decoders strip leading spaces.
        self._ids = self._ids[self._read :] if self._read else self._ids
        self._read = len(self._ids)
        return after[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""
