"""What a server says when it does not answer: statuses and bodies of all shapes, in one line; pure."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from html import unescape
from typing import Any

from llm_magic.backends.remote.stream_decoders import whole_number
from llm_magic.config.api_keys import ApiKey
from llm_magic.config.server_address import ServerAddress
from llm_magic.errors import (
    AuthenticationFailed,
    ModelNotFound,
    OptionError,
    RequestFailed,
    ServerBusy,
    ServerError,
    ServerUnreachable,
    did_you_mean,
)

_LONGEST = 300
_TITLE = re.compile(r"<title[^>]*>(.*?)</title>", re.IGNORECASE | re.DOTALL)
_MARKUP = re.compile(r"\s*<(!doctype|html|head|body|title|h\d|p|div|center|\?xml)", re.IGNORECASE)
_TOO_LONG = re.compile(
    r"context.{0,20}(length|window|size)|too many tokens|too long|exceeds? .{0,40}(context|tokens)",
    re.IGNORECASE,
)


# What systems report where a name has no address (EAI_NONAME, EAI_NODATA), and where no name server
# answers (EAI_AGAIN); the texts are those of glibc, musl, macOS and Windows.
_NO_HOST = re.compile(
    r"Errno -[25]\]|Errno (8|11001|11004)\]|Name or service not known|Name does not resolve"
    r"|No address associated|nodename nor servname|getaddrinfo",
    re.IGNORECASE,
)
_NO_NAME_SERVER = re.compile(
    r"Errno -3\]|Errno 11002\]|Temporary failure in name resolution", re.IGNORECASE
)
# LiteLLM's proxy without a database, to a key that is not its master key; to no key, it fails.
_KEY_UNKNOWN = "No connected db"
_CRASHED = {"", "Internal Server Error"}
# The whole body of a 503 with which uvicorn refuses connections beyond its `limit_concurrency`: InstructLab's
# server takes one at a time. What others write has markup, a line end, or other words.
_UVICORN_BUSY = b"Service Unavailable"
# Ollama with a full queue; llama.cpp's server while it loads its model.
_BUSY = re.compile(r"server busy|^Loading model$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ErrorResponse:
    """A server's own words in one line, and the part of the request that they are about.

    `lengths` is the tokens of the prompt and of the context, where the server counts them; `busy`
    is whether the server says that it works on other requests.
    """

    text: str
    parameter: str = ""
    lengths: tuple[int, int] | None = None
    busy: bool = False

    @property
    def is_about_length(self) -> bool:
        """Whether the prompt is longer than the model reads."""
        return bool(_TOO_LONG.search(self.text))


def read(body: bytes) -> ErrorResponse:
    """Read an error body: JSON of OpenAI, FastAPI or Ollama, a page of a proxy, or plain text."""
    text = body.decode("utf-8", "replace")
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError):
        return ErrorResponse(one_line(_page(text)), busy=body == _UVICORN_BUSY)
    return from_object(value)


def from_object(value: Any, depth: int = 5) -> ErrorResponse:
    """Read an error object, as it stands in a body or in the middle of a stream."""
    if isinstance(value, dict) and depth:
        for name in ("error", "detail", "message"):
            if value.get(name):
                inner = from_object(value[name], depth - 1)
                parameter = inner.parameter or str(value.get("param") or "")
                lengths = inner.lengths or _lengths(value)
                return ErrorResponse(inner.text, parameter, lengths, inner.busy)
    if isinstance(value, list) and value and isinstance(value[0], dict):
        # FastAPI: [{"loc": ["body", "stream_options"], "msg": "extra fields not permitted"}]
        found = value[0].get("loc")
        parts = found if isinstance(found, list) else ()
        where = [str(part) for part in parts if part != "body"]
        reason = str(value[0].get("msg", ""))
        return ErrorResponse(one_line(f"{'.'.join(where)}: {reason}"), where[0] if where else "")
    if isinstance(value, str) and depth and value.lstrip().startswith("{"):
        # Ollama passes the body of its runner's error on, as a string.
        with contextlib.suppress(ValueError, RecursionError):
            return from_object(json.loads(value), depth - 1)
    text = one_line(_words(value))
    return ErrorResponse(text, busy=bool(_BUSY.search(text)))


def _lengths(value: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return what llama.cpp counts in the error for a prompt that is too long."""
    prompt, context = (whole_number(value.get(name)) for name in ("n_prompt_tokens", "n_ctx"))
    return (prompt, context) if prompt and context else None


def _words(value: Any) -> str:
    try:
        return str(value)
    except RecursionError:
        # What is nested deeper than anybody writes it says nothing.
        return ""


def one_line(text: str) -> str:
    """Return `text` in one line of bearable length, without its full stop."""
    # Controls can make a terminal show something else than what is there.
    text = "".join(c if c.isprintable() else " " for c in text)
    text = " ".join(text.split())
    return (text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …").rstrip(".")


def _page(text: str) -> str:
    """Return the title of an HTML page; its body is markup for a browser."""
    if not _MARKUP.match(text):
        return text
    title = _TITLE.search(text)
    return unescape(title.group(1)) if title else ""


def not_there(address: ServerAddress, why: str, start: str) -> ServerUnreachable:
    """Return the error for a connection that did not come about; `start` says how to start it."""
    why = one_line(why)
    if "CERTIFICATE" in why:
        return ServerUnreachable(
            f"The certificate of {address.origin} is not trusted ({why}). Is it the right server? An"
            " authority of your own goes into the environment variable SSL_CERT_FILE.",
            brief="certificate",
        )
    if "SSL" in why:
        return ServerUnreachable(
            f"{address.origin} does not speak https ({why}). Check --base-url.", brief="no https"
        )
    if _NO_NAME_SERVER.search(why):
        return ServerUnreachable(
            f"The host of {address.host_port} could not be looked up: no name server answers. Check the"
            " network, then --base-url.",
            brief="no name server",
        )
    if _NO_HOST.search(why):
        return ServerUnreachable(
            f"There is no host {address.host_port}. Check --base-url.", brief="unknown host"
        )
    return ServerUnreachable(
        f"Nothing listens at {address.origin}. {start}", brief="nothing listens"
    )


def no_proxy(address: ServerAddress, proxy: str, why: str) -> ServerUnreachable:
    """Return the error for a way through a proxy that did not come about."""
    scheme = address.url.partition(":")[0].upper()
    host = address.host_port.rpartition(":")[0] or address.host_port
    said = one_line(why)
    if _NO_NAME_SERVER.search(said):
        what = (
            f"The proxy {proxy} could not be looked up: no name server answers. Check the network,"
        )
        return ServerUnreachable(f"{what} then {scheme}_PROXY.", brief="proxy")
    what = f"The proxy {proxy} leads to no connection to {address.origin}"
    if _NO_HOST.search(said):
        what = f"There is no host {proxy}, the proxy on the way to {address.origin}"
    elif said:
        what += f" ({said})"
    return ServerUnreachable(
        f"{what}. Correct {scheme}_PROXY, or set NO_PROXY={host} if no proxy is needed.",
        brief="proxy",
    )


_REFUSED = "Check the options and -p; %%llm --dry-run shows what is sent."


def explain(
    address: ServerAddress,
    key: ApiKey | None,
    status: int,
    headers: Mapping[str, str],
    refusal: ErrorResponse,
) -> ServerError:
    """Return the error for a status that is no answer."""
    origin = address.origin
    said = key.scrub(refusal.text) if key else refusal.text
    because = f": {said}" if said else ""
    if 300 <= status < 400:
        return RequestFailed(
            f"{origin} sends its callers on to {_address(headers.get('location', 'nowhere'))}."
            " Redirects are not followed; give that address with --base-url if you trust it.",
            status=status,
        )
    if status in {401, 403} or (status == 400 and said == _KEY_UNKNOWN):
        return _key_rejected(address, key, status, because)
    wait = _seconds(headers.get("retry-after", ""))
    later = "Try again later."
    if wait and wait < _LONGEST_WAIT_S:
        later = f"Try again in {wait:.0f} s."
    if status == 503 and refusal.busy:
        message = (
            f"{origin} is busy with other requests ({status}). Try again later, or wait"
            " longer for it with --idle-timeout."
        )
        return ServerBusy(message, brief="busy", status=status, retry_after=wait)
    if status == 429:
        message = f"{origin} has had too many requests ({status}){because}. {later}"
    elif status in {502, 503, 504} or status == 408:
        message = f"{origin} is not ready or overloaded ({status}){because}. {later}"
    elif status >= 500:
        message = f"{origin} failed ({status}){because}. Its own log says why."
        if status == 500 and key is None and said in _CRASHED:
            message += " If it wants a key, name the variable that holds it: --key-env NAME."
    else:
        message = f"{origin} refused the request ({status}){because}. {_REFUSED}"
    error = RequestFailed(message, status=status, retry_after=wait, parameter=refusal.parameter)
    error.lengths = refusal.lengths
    return error


def _key_rejected(
    address: ServerAddress, key: ApiKey | None, status: int, because: str
) -> AuthenticationFailed:
    origin = address.origin
    if key is None and status == 401:
        message = (
            f"{origin} wants a key ({status}). Put it into an environment variable and name"
            " that: --key-env NAME."
        )
    elif key is None:
        message = (
            f"{origin} does not let you in ({status}){because}. If it wants a key, put that into an"
            " environment variable and name it: --key-env NAME."
        )
    else:
        whose = "that was typed in for" if key.is_typed else "in"
        mend = (
            "Load again to type another."
            if key.is_typed
            else "Give the variable the right one and load again."
        )
        message = f"{origin} refuses the key {whose} {key.variable} ({status}){because}. {mend}"
    return AuthenticationFailed(message, status=status)


def _address(text: str) -> str:
    # The query of a redirect can hold a token.
    scheme, _, rest = text.partition("?")[0].partition("#")[0].partition("://")
    host, slash, path = rest.partition("/")
    return one_line(f"{scheme}://{host.rpartition('@')[2]}{slash}{path}" if rest else scheme)


# What a header says beyond a week, or beyond all numbers, is no time to be shown.
_LONGEST_WAIT_S = 7 * 24 * 3600.0


def _seconds(text: str) -> float | None:
    """Read ``Retry-After``: seconds, or a date; None for anything else. At most a week."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = _until(text)
    return None if math.isnan(seconds) else min(max(0.0, seconds), _LONGEST_WAIT_S)


def _until(date: str) -> float:
    """Return the seconds until a date, NaN where it is none."""
    try:
        when = parsedate_to_datetime(date)
        when = when if when.tzinfo else when.replace(tzinfo=UTC)
        return (when - datetime.now(UTC)).total_seconds()
    except (ValueError, OverflowError, TypeError, IndexError):
        return math.nan


def is_too_long(error: RequestFailed) -> bool:
    """Return whether a server refused a prompt for its length."""
    asked_too_much = error.status in {400, 413, 422, 500, None}
    is_about_length = error.status == 413 or ErrorResponse(str(error)).is_about_length
    return error.lengths is not None or (asked_too_much and is_about_length)


def no_answer(address: ServerAddress, kind: str) -> RequestFailed:
    """Return the error for a body with nothing of an answer in it; `kind` is its content type."""
    if kind in {"text/event-stream", "application/x-ndjson", ""}:
        # llama-cpp-python's way to say that the prompt is too long.
        return RequestFailed(
            f"{address.origin} sent an empty answer. Is the prompt longer than its context?",
            brief="an empty answer",
        )
    return RequestFailed(
        f"{address.origin} sent no answer, but {one_line(kind)}. Is --base-url right?"
        " Is it the right kind of server?",
        brief="no answer",
    )


def compressed(address: ServerAddress, encoding: str) -> RequestFailed:
    """Return the error for a body that is compressed in a way that is not decoded."""
    return RequestFailed(
        f"{address.origin} compresses its answers ({one_line(encoding)}) although the request asks for"
        " none. Turn compression off in the server, or in the proxy before it.",
        brief="compressed",
    )


def too_large(address: ServerAddress, most: int) -> RequestFailed:
    """Return the error for a body that is larger than any answer."""
    return RequestFailed(
        f"{address.origin} sent more than {most >> 20} MiB in one piece. Is --base-url right?",
        brief="too large",
    )


def only_one(address: ServerAddress, names: Sequence[str]) -> str:
    """Return the one model of a server; raises where there is none or a choice."""
    if len(names) == 1:
        return names[0]
    has = f"It has: {_some(names)}" if names else "It lists none"
    raise OptionError(
        f"Which model of {address.host_port}? {has}. Type %llm_load MODEL -b {address.backend}."
    )


def unknown(address: ServerAddress, model: str, names: Sequence[str]) -> ModelNotFound:
    """Return the error for a model that the server does not have."""
    near = did_you_mean(model, names)
    if not near and names:
        near = f" It has: {_some(names)}{', …' if len(names) > 8 else ''}."
    return ModelNotFound(f"{address.host_port} has no model {model}.{near}")


def _some(names: Sequence[str]) -> str:
    """Return the first names of a list in one line; a server may give any text as a name."""
    return one_line(", ".join(names[:8]))
