"""Messages to token ids, by the chat template of the model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from llm_magic.backends.local.generation.special_tokens import SpecialTokens, Turn
from llm_magic.types import Message

if TYPE_CHECKING:
    import torch
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    from llm_magic.backends.local.local_model import LocalModel


def encode(loaded: LocalModel, messages: Sequence[Message]) -> torch.Tensor:
    """Return `messages` as token ids of shape (1, length) on the device of the model."""
    import torch

    return torch.tensor([loaded.prompt_encoder.encode(messages)], device=loaded.model.device)


class PromptEncoder:
    """Encodes messages with the chat template of a tokenizer, or as plain text where it has none."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, control_tokens: bool = False) -> None:
        """`control_tokens` lets special tokens in messages act as control tokens, not as text."""
        self._tokenizer: Any = tokenizer
        has_template = tokenizer.chat_template is not None
        self._apply = partial(_apply, tokenizer) if has_template else None
        render = partial(_apply, tokenizer, tokenize=False) if has_template else None
        self._special = None if control_tokens else SpecialTokens(tokenizer, render)

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of a prompt."""
        special = self._special
        if special is not None and not special.occur_in(m.content for m in messages):
            special = None
        if self._apply is None:
            # A base model continues text.
            text = "\n\n".join(m.content for m in messages)
            if special is not None:
                return special.encode_text(text)
            return list(self._tokenizer(text, verbose=False).input_ids)
        turns = [{"role": m.role, "content": m.content} for m in messages]
        return special.encode_turns(turns) if special is not None else list(self._apply(turns))


def _apply(tokenizer: Any, turns: list[Turn], *, tokenize: bool = True) -> Any:
    """Return the token ids of a conversation, or its text without `tokenize`."""
    from jinja2 import TemplateError

    options: dict[str, Any] = {"tokenize": tokenize, "return_dict": False}
    if tokenize:
        # No warning about the length, see `max_new_tokens_left`.
        options["tokenizer_kwargs"] = {"verbose": False}
    apply = partial(tokenizer.apply_chat_template, add_generation_prompt=True, **options)
    try:
        return apply(turns)
    except TemplateError:
        if turns[0]["role"] != "system" or len(turns) < 2:
            raise
        # Some templates (Gemma's) raise for a system turn: put its text before the first question.
        first, second, *later = turns
        merged = {**second, "content": f"{first['content']}\n\n{second['content']}"}
        return apply([merged, *later])
