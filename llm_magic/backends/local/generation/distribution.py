"""The probabilities of tokens in a model's own distribution: of its logits, before anything changes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class TokenScores:
    """The logarithm of the probability of a token, and the likeliest tokens at its place with theirs."""

    logprob: float
    likeliest: tuple[tuple[int, float], ...]

    def first(self, count: int) -> TokenScores:
        """Return the same with at most `count` of the likeliest tokens."""
        return TokenScores(self.logprob, self.likeliest[:count])


class Distribution:
    """The distribution over the next token, one row for each place; in float32."""

    def __init__(self, logits: torch.Tensor, count: int) -> None:
        """`logits` has the shape (rows, vocabulary); `count` of the likeliest tokens are found.

        Computed at once, before the caller masks the logits of tokens that it will not choose.
        """
        self._logits = logits
        scores = logits.float()
        self._normalizer = scores.logsumexp(-1, keepdim=True)
        self._values, self._ids = scores.topk(min(count, scores.shape[-1]))

    def scores(self, tokens: Sequence[int]) -> list[TokenScores]:
        """Return the scores of the token that was chosen in each row."""
        index = torch.tensor(tokens, device=self._logits.device)[:, None]
        values = torch.cat([self._logits.gather(-1, index).float(), self._values], dim=-1)
        rows = (values - self._normalizer).tolist()
        return [
            TokenScores(row[0], tuple(zip(ids, row[1:], strict=True)))
            for row, ids in zip(rows, self._ids.tolist(), strict=True)
        ]
