"""Chooses how llama.cpp loads a model: the length of its context, its threads, and its batches."""

from __future__ import annotations

from dataclasses import dataclass

from llm_magic.backends.local import memory
from llm_magic.backends.local.files.gguf import Header
from llm_magic.errors import LoadFailed, OptionError

# llama.cpp reserves the memory of the whole context at the load: at most this share of what is free.
_CONTEXT_SHARE = 0.25
_SHORTEST_CONTEXT, _LONGEST_CONTEXT = 512, 16_384
# llama.cpp rounds up to whole multiples.
_CONTEXT_STEP = 256
# llama.cpp ends the process where a file states more.
_MOST_TOKENS = 2**30
# The batches in which a prompt is read. A cancellation is noticed between two.
_BATCHES = (16, 32, 64, 128, 256, 512)
_BATCH_S, _OPERATIONS_PER_S = 0.5, 30e9


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How a model is loaded.

    Attributes:
        context: The tokens of prompt and answer for which memory is reserved.
        threads: How many threads compute.
        batch: How many tokens of a prompt are read before a cancellation is noticed.
        context_bytes: The memory of the context.
        cache_bytes: The memory for prompts that were read before, besides the latest one.
    """

    context: int
    threads: int
    batch: int
    context_bytes: int
    cache_bytes: int

    @classmethod
    def for_model(
        cls, header: Header, threads: int, free: int, context: int | None, *, keep_prefixes: bool
    ) -> EngineConfig:
        """Return the configuration for a model where `free` bytes are free besides its weights.

        Raises `OptionError` if more tokens of `context` are requested than the model reads, and
        `LoadFailed` for a header with which llama.cpp would end the process.
        """
        token, stated = _token_bytes(header), _number(header, "context_length")
        if not (token and 0 < stated <= _MOST_TOKENS):
            raise LoadFailed(
                f"The header of the file is damaged: a context of {stated:,} tokens, and {token:,} bytes"
                " for each. Download it again."
            )
        affordable = int(free * _CONTEXT_SHARE) // token
        usual = min(max(affordable, _SHORTEST_CONTEXT), _LONGEST_CONTEXT)
        if context is not None and context > stated:
            raise OptionError(
                f"The model reads at most {stated:,} tokens. Use --context {stated} or less."
            )
        context = context or min(stated, usual)
        context = -(-context // _CONTEXT_STEP) * _CONTEXT_STEP
        cache = memory.prefix_limit(token * context, free) if keep_prefixes else 0
        speed = threads * _OPERATIONS_PER_S / max(2 * header.parameters, 1)
        batch = max((n for n in _BATCHES if n <= speed * _BATCH_S), default=_BATCHES[0])
        return cls(context, threads, batch, token * context, cache)


def _token_bytes(header: Header) -> int:
    """Return the bytes of one token in the key-value cache, which has 16 bits for a number."""
    heads = _number(header, "attention.head_count") or 1
    width = _number(header, "embedding_length") // heads
    key = _number(header, "attention.key_length") or width
    value = _number(header, "attention.value_length") or width
    kv_heads = _number(header, "attention.head_count_kv") or heads
    return 2 * _number(header, "block_count") * kv_heads * (key + value)


def _number(header: Header, name: str) -> int:
    """Return a count that the file states for its architecture; 0 if it is missing or invalid."""
    value = header.values.get(f"{header.values.get('general.architecture')}.{name}")
    return value if isinstance(value, int) and value > 0 else 0
