"""A Transformers model in the memory of this process, and what the backend stores with it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llm_magic.backends.local import memory
from llm_magic.types import ModelInfo

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    from llm_magic.backends.local.files.sources import Source
    from llm_magic.backends.local.generation.chat_template import PromptEncoder
    from llm_magic.backends.local.generation.constraint import Grammars
    from llm_magic.backends.local.generation.cuda_graph import StaticDecoder
    from llm_magic.backends.local.generation.model_runner import PrefillChunkSize
    from llm_magic.backends.local.generation.prefix_cache import PrefixCache
    from llm_magic.backends.local.generation.token_streamer import ReasoningTokens
    from llm_magic.backends.local.transformers_compat import ModelTraits


@dataclass(slots=True)
class LocalModel:
    """A loaded model. Only the backend stores references to it, so that `unload` can free it.

    `reasoning_tokens` is None where its tokenizer has none. `assistant` is the smaller model that
    proposes tokens. `token_texts` are the texts of single tokens that were needed so far.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    info: ModelInfo
    source: Source
    prefix_cache: PrefixCache
    prefill_chunk_size: PrefillChunkSize
    static_decoder: StaticDecoder
    prompt_encoder: PromptEncoder
    reasoning_tokens: ReasoningTokens | None
    traits: ModelTraits
    grammars: Grammars
    assistant: PreTrainedModel | None = None
    token_texts: dict[int, str] = field(default_factory=dict)

    @property
    def decoding(self) -> str:
        """How the model decodes, as ``%llm_status`` shows it."""
        reason = self.traits.fallback_reason
        if reason is not None:
            return f"fast path off, generate of Transformers ({reason})"
        return self.static_decoder.description

    @property
    def modules(self) -> list[PreTrainedModel]:
        """The model and its assistant."""
        return [self.model] if self.assistant is None else [self.model, self.assistant]

    def weight_bytes(self) -> Counter[str]:
        """Return the bytes of the weights by device."""
        tensors = (t for m in self.modules for t in (*m.parameters(), *m.buffers()))
        return memory.bytes_by_device(tensors)

    def free_caches(self) -> None:
        """Free the caches, which make later answers faster and are not needed for them."""
        self.prefix_cache.clear()
        self.static_decoder.clear()
