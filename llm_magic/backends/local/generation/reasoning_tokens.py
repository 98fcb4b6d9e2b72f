"""Reasoning that models write between special tokens, or whose prompt begins it.

Decoded text has no special tokens, and `backends.reasoning` splits it at tags. So the special tokens
around reasoning are written as tags, and the headers of OpenAI's channels are omitted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llm_magic.backends.reasoning import CLOSE_TAG as _CLOSE
from llm_magic.backends.reasoning import OPEN_TAG as _OPEN

if TYPE_CHECKING:
    import torch
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

_OPENS = (_OPEN, "[THINK]", "<|START_THINKING|>")
_CLOSES = (_CLOSE, "[/THINK]", "<|END_THINKING|>")
# <|start|>assistant<|channel|>analysis<|message|>…<|end|>
_START, _CHANNEL, _MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
# The tokens at the end of a prompt that may contain an opening tag.
_TAIL = 8


def opening_tag(tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor) -> str:
    """Return the opening tag if a prompt of shape (1, length) ends with the start of reasoning."""
    tail = str(tokenizer.decode(ids[0, -_TAIL:].tolist(), skip_special_tokens=False))
    return _OPEN if tail.rstrip().endswith(_OPENS) else ""


class ReasoningTags:
    """Adds tags to the text of one answer where special tokens enclose reasoning."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        special: Any = getattr(tokenizer, "added_tokens_decoder", {})
        ids = {str(token): number for number, token in special.items() if token.special}
        self._tags = {ids[name]: _OPEN for name in _OPENS if name in ids}
        self._tags |= {ids[name]: _CLOSE for name in _CLOSES if name in ids}
        self._headers: tuple[int, ...] = ()
        self._message = -1
        if _CHANNEL in ids and _MESSAGE in ids:
            self._headers = tuple(ids[name] for name in (_START, _CHANNEL) if name in ids)
            self._message = ids[_MESSAGE]
        # The text of the current header; None outside of one.
        self._header: str | None = None
        self._in_reasoning = False

    def step(self, token: int, text: str) -> str:
        """Return the text of a token with the tags that belong there."""
        if token in self._headers:
            self._header = ""
            return text
        if self._header is None:
            return self._tags.get(token, "") + text
        if token != self._message:
            self._header += text
            return ""
        in_reasoning = self._header.strip().partition(" ")[0] in {"analysis", "commentary"}
        self._header = None
        before, self._in_reasoning = self._in_reasoning, in_reasoning
        if in_reasoning:
            return "\n\n" if before else _OPEN
        return _CLOSE if before else ""
