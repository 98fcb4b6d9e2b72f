"""The links of an answer: they go to the web or nowhere, and an image becomes a link to it.

An address in the text is a link, too, as on GitHub.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from markdown_it.token import Token

# A relative link reaches the files and commands of the Jupyter server, and `http:path` is relative.
# `https://bank.example@evil.example` leads to evil.example.
_URL = re.compile(
    r"https?://([a-z0-9._:\[\]-]+)(?:[/?#]|\Z)|mailto:[^\s/]", re.ASCII | re.IGNORECASE
)
# Quotes, brackets and the punctuation of Chinese and Japanese end an address.
_ENDS = (
    r"\s<>\"`|\\\u201c\u201d\u2018\u2019\u00ab\u00bb\u3001\u3002"
    r"\uff0c\uff1b\uff1a\uff01\uff1f\uff08\uff09\uff3b\uff3d\u3010\u3011\u300a\u300b\u300c\u300d\u300e\u300f"
)
_HOST = r"(?:https?://|www\.)[a-z0-9][a-z0-9.-]*+(?::[0-9]+)?+(?![\w@%\\-])"
_ADDRESS = re.compile(rf"(?<![a-z0-9_/@.-]){_HOST}(?:[/?#][^{_ENDS}]*)?", re.IGNORECASE)
_MAX_ADDRESS = 2_000  # The search for its end takes time that grows with the square.
_PUNCTUATION = "?!.,:;*_~'"


def is_safe(url: str) -> bool:
    """Return whether an address leads to the web or to a mail program."""
    return _URL.match(url) is not None


def sanitized(tokens: Sequence[Token], normalize: Callable[[str], str]) -> Iterator[Token]:
    """Yield the tokens of one block with safe links; `normalize` encodes an address."""
    in_link = is_open = False
    for token in tokens:
        if token.type == "link_open":
            in_link, href = True, str(token.attrs["href"])
            if is_open := is_safe(href):  # `[text]()` has an empty address
                token.attrs = _attributes(href)
                yield token
        elif token.type == "link_close":
            if is_open:
                yield token
            in_link = is_open = False
        elif token.type == "image":
            yield from _image_as_link(token, in_link)
        elif token.type == "text" and not in_link:
            yield from _with_addresses(token.content, normalize)
        else:
            yield token


def _attributes(href: str) -> dict[str, str | int | float]:
    return {"href": href, "rel": "noopener noreferrer nofollow", "target": "_blank"}


def _link(text: str, href: str) -> Iterator[Token]:
    from markdown_it.token import Token

    yield Token("link_open", "a", 1, attrs=_attributes(href))
    yield Token("text", "", 0, content=text)
    yield Token("link_close", "a", -1)


def _with_addresses(text: str, normalize: Callable[[str], str]) -> Iterator[Token]:
    """Yield text with a link for each address in it."""
    from markdown_it.token import Token

    end = 0
    for match in _ADDRESS.finditer(text):
        url = _without_punctuation(match[0])
        href = normalize(url if "://" in url else f"http://{url}")
        if len(url) > _MAX_ADDRESS or not is_safe(href):
            continue
        yield Token("text", "", 0, content=text[end : match.start()])
        yield from _link(url, href)
        end = match.start() + len(url)
    yield Token("text", "", 0, content=text[end:])


def _without_punctuation(url: str) -> str:
    """Return an address without the punctuation of the sentence around it."""
    if len(url) > _MAX_ADDRESS:
        return url
    while url[-1] in _PUNCTUATION or (
        url[-1] in ")]}" and url.count(url[-1]) > url.count("([{"[")]}".index(url[-1])])
    ):
        url = url[:-1]
    return url


def _image_as_link(image: Token, in_link: bool) -> Iterator[Token]:
    """Name the image and its host: a request for it would send the host what the model wrote in it."""
    from markdown_it.token import Token

    url, alt = str(image.attrs["src"]), image.content or "image"
    match = _URL.match(url)
    host = f" (image: {match[1]})" if match and match[1] else ""
    if in_link or match is None:  # links do not nest
        yield Token("text", "", 0, content=alt + host)
    else:
        yield from _link(alt + host, url)
