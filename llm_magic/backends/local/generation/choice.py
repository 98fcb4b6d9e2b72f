"""The labels of a choice as tokens, and their probabilities by the logits of a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Labels:
    """The labels of a choice, each with its tokens.

    Each label is in quotes, as in JSON: so it is clear where one ends that another one starts with, as
    "New" and "New York". Without quotes a model would rather begin a sentence, and small ones choose worse.
    """

    texts: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]

    @classmethod
    def encode(cls, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Labels:
        """Return labels with the tokens that a tokenizer makes of each."""
        quoted = (json.dumps(text, ensure_ascii=False) for text in texts)
        tokens = tuple(tuple(tokenizer(one, add_special_tokens=False).input_ids) for one in quoted)
        return cls(tuple(texts), tokens)

    @property
    def read(self) -> list[list[int]]:
        """The tokens of each label that have to be read to know the probability of all."""
        return [list(label[:-1]) for label in self.tokens]

    def probabilities(self, first: torch.Tensor, others: Sequence[torch.Tensor]) -> list[float]:
        """Return the probability of each label, given that the answer is one of them.

        Args:
            first: The logits after the prompt, of shape (vocabulary,).
            others: For each label the logits after the tokens of `read`, of shape (tokens, vocabulary).
        """
        sums = [
            self._log(label, first, rows) for label, rows in zip(self.tokens, others, strict=True)
        ]
        values: list[float] = torch.stack(sums).softmax(-1).tolist()
        return values

    @staticmethod
    def _log(label: Sequence[int], first: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return the logarithm of the probability of a label among all texts."""
        logs = torch.cat([first[None], rows]).double().log_softmax(-1)
        return logs[torch.arange(len(label)), torch.tensor(label)].sum()


def read_separately(
    model: PreTrainedModel, ids: torch.Tensor, continuations: Sequence[Sequence[int]]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the logits after a prompt of shape (1, length), and after each token of continuations of it.

    For models whose cache cannot be shared: reads the prompt once for each continuation.
    """
    first, others = torch.empty(0), []
    for tokens in continuations:
        row = torch.cat([ids, ids.new_tensor([list(tokens)], dtype=ids.dtype)], dim=-1)
        outputs = model(input_ids=row, use_cache=False, return_dict=True)
        logits = outputs.logits[0, ids.shape[1] - 1 :].float().cpu()
        first = logits[0]
        others.append(logits[1:])
    return first, others
