"""From messages to token ids, as the model's own template writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llm_magic.errors import PromptTooLong
from llm_magic.types import Message

if TYPE_CHECKING:
    import torch
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    from llm_magic.backends.local.resident import Loaded


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


def room(loaded: Loaded, prompt_tokens: int) -> int | None:
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
