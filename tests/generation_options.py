"""A value for every generation option that is not its default."""

from __future__ import annotations

from typing import Any

EVERY: dict[str, Any] = {
    "max_new_tokens": 9, "temperature": 0.2, "top_p": 0.8, "top_k": 7, "repetition_penalty": 1.3,
    "seed": 11, "stop": ["END", "\n"], "logprobs": 3,
}  # fmt: skip
