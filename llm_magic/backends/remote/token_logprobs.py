"""The probabilities of tokens in requests and replies, as OpenAI, llama.cpp, vLLM and Ollama write them."""

from __future__ import annotations

import codecs
import math
from typing import Any

from llm_magic.types import TokenLogprob

# The field of the option `logprobs`, and the one that has to be true beside it.
TOP, ENABLED = "top_logprobs", "logprobs"


def requested(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a request that report probabilities, given those of all options.

    llama.cpp reports nothing where no alternatives are requested: `TokenReader` drops the one.
    """
    if TOP not in fields:
        return {}
    return {ENABLED: True, TOP: max(1, fields[TOP])}


class TokenReader:
    """Handles incrementally reading the tokens of one reply with their probabilities."""

    def __init__(self, count: int | None) -> None:
        """`count` is how many of the likeliest tokens were requested; None reads nothing."""
        self._count = count
        # The bytes of one character may be those of several tokens.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def read(self, entries: object) -> tuple[TokenLogprob, ...]:
        """Return the tokens of a list of entries; omits entries in an unknown format."""
        if self._count is None or not isinstance(entries, list):
            return ()
        found = (self._token(entry) for entry in entries if isinstance(entry, dict))
        return tuple(token for token in found if token is not None)

    def _token(self, entry: dict[str, Any]) -> TokenLogprob | None:
        logprob, text = _number(entry.get("logprob")), entry.get("token")
        data: Any = entry.get("bytes")
        if logprob is None or not isinstance(text, str):
            return None
        if _is_bytes(data):
            text = self._decoder.decode(bytes(data))
        listed = entry.get("top_logprobs")
        alternatives = [
            (one["token"], its)
            for one in (listed if isinstance(listed, list) else ())
            if isinstance(one, dict) and isinstance(one.get("token"), str)
            if (its := _number(one.get("logprob"))) is not None
        ]
        return TokenLogprob(text, logprob, tuple(alternatives[: self._count]))


def _number(value: object) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and not math.isnan(value) else None  # type: ignore[arg-type]


def _is_bytes(value: object) -> bool:
    return isinstance(value, list) and all(type(one) is int and 0 <= one < 256 for one in value)
