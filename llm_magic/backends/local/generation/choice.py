"""The labels of a choice as tokens, and their probabilities by the logits of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Labels:
    """The labels of a choice, each with its tokens.

    Where one label starts another one, as "New" starts "New York", the end of the answer is part of
    each label: `ends` are the tokens that end an answer, else it is empty.
    """

    texts: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    ends: tuple[int, ...]

    @classmethod
    def encode(
        cls, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, eos_token_ids: Sequence[int]
    ) -> Labels:
        """Return labels with the tokens that a tokenizer makes of each."""
        tokens = tuple(tuple(tokenizer(text, add_special_tokens=False).input_ids) for text in texts)
        one_starts_another = any(a != b and b[: len(a)] == a for a in tokens for b in tokens)
        return cls(tuple(texts), tokens, tuple(eos_token_ids) if one_starts_another else ())

    @property
    def read(self) -> list[list[int]]:
        """The tokens of each label that have to be read to know the probability of all."""
        return [list(label if self.ends else label[:-1]) for label in self.tokens]

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

    def _log(self, label: Sequence[int], first: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return the logarithm of the probability of a label among all texts."""
        logs = torch.cat([first[None], rows]).double().log_softmax(-1)
        total = logs[torch.arange(len(label)), torch.tensor(label)].sum()
        return total + logs[-1, list(self.ends)].logsumexp(-1) if self.ends else total


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
