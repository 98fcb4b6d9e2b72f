"""What a server says when it does not answer: error bodies of all shapes, as one line; pure."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

_LONGEST = 300
_TITLE = re.compile(r"<title[^>]*>(.*?)</title>", re.IGNORECASE | re.DOTALL)
_TOO_LONG = re.compile(
    r"context.{0,20}(length|window|size)|too many tokens|too long|exceeds? .{0,40}(context|tokens)",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A server's own words in one line, and the part of the request that they are about."""

    text: str
    parameter: str = ""

    @property
    def about_length(self) -> bool:
        """Whether the prompt is longer than the model reads."""
        return bool(_TOO_LONG.search(self.text))


def read(body: bytes) -> Refusal:
    """Read an error body: JSON of OpenAI, FastAPI or Ollama, a page of a proxy, or plain text."""
    text = body.decode("utf-8", "replace")
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError):
        return Refusal(one_line(_page(text)))
    return from_object(value)


def from_object(value: Any) -> Refusal:
    """Read an error object, as it stands in a body or in the middle of a stream."""
    if isinstance(value, dict):
        for name in ("error", "detail", "message"):
            if value.get(name):
                inner = from_object(value[name])
                return Refusal(inner.text, inner.parameter or str(value.get("param") or ""))
    if isinstance(value, list) and value and isinstance(value[0], dict):
        # FastAPI: [{"loc": ["body", "stream_options"], "msg": "extra fields not permitted"}]
        where = [str(part) for part in value[0].get("loc", ()) if part != "body"]
        reason = str(value[0].get("msg", ""))
        return Refusal(one_line(f"{'.'.join(where)}: {reason}"), where[0] if where else "")
    return Refusal(one_line(str(value)))


def one_line(text: str) -> str:
    """Return `text` in one line of bearable length, without its full stop."""
    text = " ".join(text.split())
    return (text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …").rstrip(".")


def _page(text: str) -> str:
    """Return the title of an HTML page; its body is markup for a browser."""
    if "<" not in text[:200]:
        return text
    title = _TITLE.search(text)
    return title.group(1) if title else ""
