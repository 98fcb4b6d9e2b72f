"""Holds an answer to its structure: which tokens may come next, by llguidance; on the inference thread."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from llm_magic.backends.local.generation import grammar
from llm_magic.backends.local.generation.token_streamer import reasoning_pair
from llm_magic.backends.reasoning import CLOSE_TAG
from llm_magic.errors import GenerationFailed
from llm_magic.types import Structure

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# The compiled grammars that are kept: the rows of a map have the same one.
_MAX_COMPILED = 16
# The tokens that an answer may have to start with.
_MAX_FORCED = 8192
_BLANKS = r"WS: /[ \n]{1,4}/"


class Constraint:
    """What may follow in one answer; follows it token by token."""

    def __init__(self, matcher: LLMatcher, vocabulary: int) -> None:
        """`vocabulary` is the number of tokens that have a bit in a mask."""
        self._matcher = matcher
        self._bits = np.zeros((vocabulary + 31) // 32, dtype=np.int32)

    @property
    def is_complete(self) -> bool:
        """Whether the answer so far has its structure; more may follow."""
        return self._matcher.is_accepting()

    def excluded(self, size: int) -> torch.Tensor:
        """Return which of `size` tokens cannot come next, as a mask in the memory of the CPU."""
        bits = self._bits
        self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        # Not llguidance's own function, which compiles at first use.
        unpacked = np.unpackbits(np.invert(bits).view(np.uint8), bitorder="little")
        excluded = torch.from_numpy(unpacked.view(np.bool_))
        missing = size - len(excluded)
        if missing > 0:
            excluded = torch.nn.functional.pad(excluded, (0, missing), value=True)
        return excluded[:size]

    def mask(self, scores: torch.Tensor) -> None:
        """Set the scores (…, vocabulary) of the tokens that cannot come next to minus infinity."""
        excluded = self.excluded(scores.shape[-1])
        scores.masked_fill_(excluded.to(scores.device, non_blocking=True), -torch.inf)

    @property
    def is_over(self) -> bool:
        """Whether nothing can follow."""
        return self._matcher.is_stopped()

    def append(self, token: int) -> None:
        """Follow the next token of the answer.

        Raises `GenerationFailed` where the structure is too complex to go on.
        """
        if not self._matcher.consume_token(token):
            reason = self._matcher.get_error().partition("\n")[0]
            raise GenerationFailed(
                f"The structure of the answer cannot be enforced any further: {reason}."
            )

    def forced(self, limit: int) -> list[int]:
        """Return at most `limit` tokens of the text that has to come next."""
        return self._matcher.compute_ff_tokens()[: max(limit, 0)]

    def valid(self, tokens: Sequence[int]) -> list[int]:
        """Return the tokens that may come next, up to the first one that may not."""
        tokens = list(tokens)
        return tokens[: self._matcher.validate_tokens(tokens)] if tokens else tokens


class Grammars:
    """Compiles structures for one model.

    The table of its tokens takes half a second, with the GIL held, and is made at first use.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, eos_token_ids: Sequence[int]
    ) -> None:
        """`vocabulary` is the number of tokens that the model has scores for."""
        self._tokenizer = tokenizer
        self._vocabulary = max(vocabulary, len(tokenizer))
        self._eos_token_ids = list(eos_token_ids)
        self._table: LLTokenizer | None = None
        self._compiled: dict[tuple[Structure, bool], LLMatcher] = {}

    def constraint(self, structure: Structure, *, in_reasoning: bool) -> Constraint:
        """Return the constraint of a new answer; `in_reasoning`: its prompt has opened the reasoning.

        Raises `OptionError` for a structure that cannot be expressed.
        """
        key = structure, in_reasoning
        matcher = self._compiled.get(key)
        if matcher is None:
            if len(self._compiled) >= _MAX_COMPILED:
                del self._compiled[next(iter(self._compiled))]
            self._compiled[key] = matcher = self._compile(structure, in_reasoning=in_reasoning)
        return Constraint(matcher.deep_copy(), self._vocabulary)

    def reasoning(self, *, in_reasoning: bool) -> Constraint | None:
        """Return the constraint of a reasoning alone; None for a model without reasoning."""
        text = self._reasoning(in_reasoning=in_reasoning)
        if text is None:
            return None
        from llguidance import LLMatcher

        lark = f"start: reasoning\n{text}"
        matcher = LLMatcher(self._tokens(), LLMatcher.grammar_from_lark(lark), log_level=0)
        return Constraint(matcher, self._vocabulary)

    def opens_reasoning(self, token: int) -> bool:
        """Return whether a token opens reasoning."""
        pair = reasoning_pair(self._tokenizer)
        return pair is not None and token == pair[0]

    def _compile(self, structure: Structure, *, in_reasoning: bool) -> LLMatcher:
        from llguidance import LLMatcher

        answer = json.loads(grammar.checked(structure))
        grammars = [answer]
        reasoning = self._reasoning(in_reasoning=in_reasoning)
        if reasoning is not None:
            start = (
                "start: reasoning WS? @answer"
                if in_reasoning
                else "start: (reasoning WS?)? @answer"
            )
            before = f"{start}\n{reasoning}\n{_BLANKS}"
            grammars = [{"lark_grammar": before}, {"name": "answer", **answer}]
        text = json.dumps({"grammars": grammars})
        matcher = LLMatcher(self._tokens(), text, log_level=0, limits=grammar.limits())
        if matcher.is_error():
            raise grammar.error(structure, matcher.get_error())
        first = matcher.deep_copy()
        if len(first.compute_ff_tokens()) > _MAX_FORCED or first.is_error():
            endless = "it starts with an endless text: an object requires itself"
            raise grammar.error(structure, endless)
        return matcher

    def _tokens(self) -> LLTokenizer:
        if self._table is None:
            from llguidance.hf import from_tokenizer

            # Its annotation is a class of which Transformers made another one.
            tokenizer: Any = self._tokenizer
            self._table = from_tokenizer(
                tokenizer, n_vocab=self._vocabulary, eos_token=self._eos_token_ids or None
            )
        return self._table

    def _reasoning(self, *, in_reasoning: bool) -> str | None:
        """Return the rules of the reasoning of an answer; None for a model without reasoning."""
        pair = reasoning_pair(self._tokenizer)
        if pair is not None:
            start, end = (f"<[{token}]>" for token in pair)
            return f"reasoning: {'' if in_reasoning else start} BODY {end}\nBODY: /(?s:.*)/"
        return f'reasoning[suffix="{CLOSE_TAG}"]: /(?s:.*)/' if in_reasoning else None
