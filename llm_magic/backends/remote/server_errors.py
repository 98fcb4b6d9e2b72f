"""Translates error responses and failed connections into exceptions with a one-line message.

The functions return exceptions and perform no I/O.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import socket
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from html import unescape
from typing import Any

from llm_magic.backends.remote.stream_decoders import whole_number
from llm_magic.config.api_keys import ApiKey
from llm_magic.config.commands import command, option
from llm_magic.config.providers import PROVIDERS
from llm_magic.config.server_address import ServerAddress
from llm_magic.errors import (
    AuthenticationFailed,
    ModelNotFound,
    OptionError,
    RequestFailed,
    ServerBusy,
    ServerError,
    ServerUnreachable,
    chained,
    did_you_mean,
)

_MAX_TEXT = 300
_MAX_NAMES = 8
# Longer values of Retry-After are not useful in a message, and may be infinite.
_MAX_WAIT_S = 7 * 24 * 3600.0
_TITLE = re.compile(r"<title[^>]*>(.*?)</title>", re.IGNORECASE | re.DOTALL)
_HTML = re.compile(r"\s*<(!doctype|html|head|body|title|h\d|p|div|center|\?xml)", re.IGNORECASE)
_CONTEXT_EXCEEDED = re.compile(
    r"context.{0,20}(length|window|size)|too many tokens|too long|exceeds? .{0,40}(context|tokens)",
    re.IGNORECASE,
)
# Gemini, xAI, and LiteLLM's proxy without a database answer a wrong key with status 400.
_WRONG_KEY = re.compile(
    r"^No connected db$|^(Incorrect|Invalid) API key|^API key not valid", re.IGNORECASE
)
# The message of a server that names the time of the next request: "Please try again in 1m7.2s".
_WAIT = re.compile(
    r"(?:try again|retry) (?:in|after) (?:(\d+)m)?(\d+(?:\.\d+)?) ?(ms|s)", re.IGNORECASE
)
_NAMES_LOG = re.compile(r"\blogs?\b", re.IGNORECASE)
_OVERLOADED = frozenset({408, 502, 503, 504, 529})
# uvicorn sends exactly this body with status 503 for connections beyond `limit_concurrency`, which is 1
# for InstructLab. Other servers use HTML, a line end or another text.
_UVICORN_BUSY = b"Service Unavailable"
# Ollama with a full queue, and llama.cpp's server during the load of its model.
_BUSY = re.compile(r"server busy|^Loading model$", re.IGNORECASE)
# Providers report an account without credit with status 400, 402, 403 or 429.
_CREDIT_CODES = {
    "insufficient_quota", "billing_hard_limit_reached", "credit_balance_exhausted",
    "enforced_spend_limit_reached",
}  # fmt: skip
_NO_CREDIT = re.compile(
    r"credit balance is too low|insufficient (balance|credits?|funds|quota)"
    r"|does ?n['o]t have any credits|(used|run out of) .{0,20}credits",
    re.IGNORECASE,
)
_WRONG_REGION = re.compile(
    r"(country|region|territory|location).{0,30} not (supported|available|allowed)"
    r"|not available in your (country|region)",
    re.IGNORECASE,
)
_EMPTY_STREAM_TYPES = {"text/event-stream", "application/x-ndjson", ""}


@dataclass(frozen=True, slots=True)
class ErrorResponse:
    """The content of an error response.

    Attributes:
        text: The message of the server in one line.
        parameter: The field of the request that the message is about.
        code: The kind of the error, such as ``unsupported_parameter``.
        lengths: The token counts of the prompt and of the context window.
        is_busy: Whether the server is processing other requests.
    """

    text: str
    parameter: str = ""
    code: str = ""
    lengths: tuple[int, int] | None = None
    is_busy: bool = False

    @property
    def exceeds_context(self) -> bool:
        """Whether the message is about a prompt that exceeds the context window."""
        return self.lengths is not None or bool(_CONTEXT_EXCEEDED.search(self.text))


# -- error responses ------------------------------------------------------------------------------


def parse_error_body(body: bytes) -> ErrorResponse:
    """Parse JSON of OpenAI, FastAPI or Ollama, an HTML page of a proxy, or plain text."""
    text = body.decode("utf-8", "replace")
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError):
        return ErrorResponse(one_line(_without_html(text)), is_busy=body == _UVICORN_BUSY)
    return parse_error(value)


def parse_error(value: Any, depth: int = 5) -> ErrorResponse:
    """Parse the JSON value of an error, from a body or from a stream."""
    if isinstance(value, dict) and depth:
        for name in ("error", "detail", "message"):
            if value.get(name):
                inner = parse_error(value[name], depth - 1)
                return dataclasses.replace(
                    inner,
                    parameter=inner.parameter or str(value.get("param") or ""),
                    code=inner.code or _code(value),
                    lengths=inner.lengths or _lengths(value),
                )
    if isinstance(value, list) and value and isinstance(value[0], dict) and "error" in value[0]:
        # Gemini sends a list of error objects.
        return parse_error(value[0], depth - 1)
    if isinstance(value, list) and value and isinstance(value[0], dict):
        # FastAPI: [{"loc": ["body", "stream_options"], "msg": "extra fields not permitted"}]
        location = value[0].get("loc")
        parts = location if isinstance(location, list) else ()
        path = [str(part) for part in parts if part != "body"]
        text = one_line(f"{'.'.join(path)}: {value[0].get('msg', '')}")
        return ErrorResponse(text, path[0] if path else "")
    if isinstance(value, str) and depth and value.lstrip().startswith("{"):
        # Ollama forwards the error body of its runner as a string.
        with contextlib.suppress(ValueError, RecursionError):
            return parse_error(json.loads(value), depth - 1)
    try:
        text = one_line(str(value))
    except RecursionError:
        text = ""
    return ErrorResponse(text, is_busy=bool(_BUSY.search(text)))


def _code(value: Mapping[str, Any]) -> str:
    """Return the code of an error, which Anthropic puts into its details."""
    details = value.get("details")
    nested = details.get("error_code") if isinstance(details, dict) else None
    return str(value.get("code") or nested or "")


def _lengths(value: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the token counts in llama.cpp's error for a prompt that exceeds the context."""
    prompt, context = (whole_number(value.get(name)) for name in ("n_prompt_tokens", "n_ctx"))
    return (prompt, context) if prompt and context else None


def one_line(text: str) -> str:
    """Return `text` in one line of limited length, without control characters and full stop."""
    text = "".join(c if c.isprintable() else " " for c in text)
    text = " ".join(text.split())
    return (text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]} …").rstrip(".")


def _without_html(text: str) -> str:
    """Return the title of an HTML page; other text is unchanged."""
    if not _HTML.match(text):
        return text
    title = _TITLE.search(text)
    return unescape(title.group(1)) if title else ""


def status_error(
    address: ServerAddress,
    key: ApiKey | None,
    status: int,
    headers: Mapping[str, str],
    response: ErrorResponse,
    *,
    to_prompt: bool = True,
) -> ServerError:
    """Return the error for a response, to a prompt or other request, whose status is not a success."""
    origin = address.origin
    text = key.scrub(response.text) if key else response.text
    if 300 <= status < 400:
        return RequestFailed(
            f"{origin} redirects to {_redirect_target(headers.get('location', 'nowhere'))}. Redirects"
            " are not followed.",
            status=status,
        ).advise(f"If you trust that address, use it as {option('base_url')}.", "base_url")
    if account := _account_error(origin, status, response, text):
        return account
    if status in {401, 403} or (status == 400 and _WRONG_KEY.search(text)):
        return _authentication_error(address, key, status, text)
    retry_after, later = _next_try(headers.get("retry-after", ""), text)
    if status == 503 and response.is_busy:
        busy = f"{origin} is busy with other requests ({status})."
        return ServerBusy(busy, brief="busy", status=status, retry_after=retry_after).advise(
            f"Try again later, or increase {option('idle_timeout')} to wait longer.", "idle_timeout"
        )
    what = f"{_what_happened(origin, status)}{_reason(status, text)}"
    problem = f"{what} {_remedy(address, status, text, later)}".rstrip()
    error = _request_failed(problem, status, response, retry_after=retry_after)
    if status == 404 and to_prompt:
        listing = command("models", **(address.options or {"backend": address.backend}))
        return error.advise(f"Load a model that it has: {listing} lists them.", "model")
    if status == 405 or (status < 500 and not to_prompt and status not in {408, 429}):
        return error.advise(f"Check {option('base_url')}.", "base_url")
    if status < 500 and status not in {408, 429}:
        return error.advise("Check the options and -p; %%llm --dry-run shows what is sent.")
    return error


def _reason(status: int, text: str) -> str:
    """Return the status and the message of the server, as the end of a sentence."""
    # The title of a proxy's page: 502 Bad Gateway.
    text = text.removeprefix(f"{status} ")
    return f" ({status}): {text}." if text else f" ({status})."


def _what_happened(origin: str, status: int) -> str:
    """Return what an error status of a server means."""
    if status == 429:
        return f"{origin} received too many requests"
    if status in _OVERLOADED:
        return f"{origin} is not ready or is overloaded"
    return f"{origin} failed" if status >= 500 else f"{origin} rejected the request"


def _remedy(address: ServerAddress, status: int | None, text: str, later: str) -> str:
    """Return what to do where only time or the server's log helps, unless the message has it."""
    if status == 429 or status in _OVERLOADED:
        return later
    if status is not None and status < 500:
        return ""
    if _NAMES_LOG.search(text):
        return ""
    return later if _is_hosted(address) else "Check the log of the server."


def _next_try(header: str, text: str) -> tuple[float | None, str]:
    """Return the seconds until a server accepts a request, and advice unless the message has it."""
    seconds, found = _retry_after(header), _WAIT.search(text)
    if found is not None:
        minutes, number, unit = found.groups()
        named = float(minutes or 0) * 60 + float(number) / (1000 if unit.lower() == "ms" else 1)
        return min(max(named, seconds or 0.0), _MAX_WAIT_S), ""
    known = seconds and seconds < _MAX_WAIT_S
    return seconds, f"Try again in {seconds:.0f} s." if known else "Try again later."


def _account_error(
    origin: str, status: int, response: ErrorResponse, text: str
) -> RequestFailed | None:
    """Return the error for an account without credit or a region without service; None for others."""
    reason = _reason(status, text)
    has_no_credit = response.code in _CREDIT_CODES or _NO_CREDIT.search(text) is not None
    if status == 402 or (status in {400, 403, 429} and has_no_credit):
        return RequestFailed(
            f"The account at {origin} has no credit left{reason} Add credit there, or load a model of"
            " another provider.",
            brief="no credit", status=status, is_temporary=False,
        )  # fmt: skip
    if status in {400, 403, 451} and (
        _WRONG_REGION.search(text) or "unsupported_country" in response.code
    ):
        return RequestFailed(
            f"{origin} is not available from this region{reason} Load a model of another provider.",
            brief="region", status=status, is_temporary=False,
        )  # fmt: skip
    return None


def stream_error(
    address: ServerAddress, key: ApiKey | None, value: Mapping[str, Any]
) -> RequestFailed:
    """Return the error for an error object in a stream."""
    response = parse_error(value)
    text = key.scrub(response.text) if key else response.text
    inner = value.get("error")
    code = inner.get("code") if isinstance(inner, dict) else value.get("code")
    status = 503 if response.is_busy else whole_number(code)
    remedy = _remedy(address, status, text, _next_try("", text)[1])
    message = f"{address.origin} stopped with an error: {text}. {remedy}".rstrip()
    return _request_failed(message, whole_number(code), response, brief="an error")


def _request_failed(
    message: str,
    status: int | None,
    response: ErrorResponse,
    *,
    brief: str = "",
    retry_after: float | None = None,
) -> RequestFailed:
    error = RequestFailed(
        message, brief=brief, status=status, retry_after=retry_after, parameter=response.parameter
    )
    error.lengths, error.code = response.lengths, response.code
    may_exceed = status in {400, 413, 422, 500, None}
    error.exceeds_context = status == 413 or (may_exceed and response.exceeds_context)
    return error


def _authentication_error(
    address: ServerAddress, key: ApiKey | None, status: int, text: str
) -> AuthenticationFailed:
    origin, reason = address.origin, _reason(status, text)
    naming = option("key_env", "NAME")
    if key is not None:
        variable = f"typed in for {key.variable}" if key.is_typed else f"in {key.variable}"
        summary = f"{origin} rejected the key {variable}"
        retype, correct = "Load again to type another key.", "Correct the variable and load again."
        fix = retype if key.is_typed else correct
        if status == 403:
            summary = f"{origin} denied access with the key {variable}"
            fix = "Check what the key is allowed to use."
    elif status == 401:
        summary, reason = f"{origin} requires an API key", f" ({status})."
        fix = f"Store it in an environment variable and add {naming}."
        reason += _withheld(address)
    else:
        summary = f"{origin} denied access"
        fix = f"If it requires an API key, store it in an environment variable and add {naming}."
    error = AuthenticationFailed(f"{summary}{reason}", status=status)
    error.summary = summary
    return error.append(fix) if key is not None else error.advise(fix, "key_env")


def _withheld(address: ServerAddress) -> str:
    """Return a sentence about a key in the environment that belongs to another address, or nothing."""
    provider = PROVIDERS.get(address.backend)
    if provider is None or not os.environ.get(provider.key_variable):
        return ""
    return (
        f" {provider.key_variable} is set, but it is sent only to {provider.title}, or to the address in"
        f" {provider.url_variable}."
    )


def _redirect_target(location: str) -> str:
    """Return the address of a redirect without user name, query and fragment, which can be secret."""
    scheme, _, remainder = location.partition("?")[0].partition("#")[0].partition("://")
    host, slash, path = remainder.partition("/")
    return one_line(f"{scheme}://{host.rpartition('@')[2]}{slash}{path}" if remainder else scheme)


def _retry_after(text: str) -> float | None:
    """Return the seconds of a ``Retry-After`` header, at most a week; None if it is invalid."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = _seconds_until(text)
    return None if math.isnan(seconds) else min(max(0.0, seconds), _MAX_WAIT_S)


def _seconds_until(date: str) -> float:
    """Return the seconds until a date, NaN if it is invalid."""
    try:
        when = parsedate_to_datetime(date)
        when = when if when.tzinfo else when.replace(tzinfo=UTC)
        return (when - datetime.now(UTC)).total_seconds()
    except (ValueError, OverflowError, TypeError, IndexError):
        return math.nan


# -- connections ----------------------------------------------------------------------------------


def connection_error(address: ServerAddress, error: BaseException, start: str) -> ServerUnreachable:
    """Return the error for a failed connection; `start` is how to start the server."""
    reason = one_line(str(error))
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            ServerUnreachable(
                f"The certificate of {address.origin} is not trusted ({error.verify_message}).",
                brief="certificate",
            )
            .advise(f"Check {option('base_url')}.", "base_url")
            .append("To trust your own certificate authority, set SSL_CERT_FILE.")
        )
    if isinstance(error, ssl.SSLError):
        if error.reason == "WRONG_VERSION_NUMBER":
            return scheme_error(address)
        return ServerUnreachable(
            f"{address.origin} does not support https ({reason}).", brief="no https"
        ).advise(f"Check {option('base_url')}.", "base_url")
    if isinstance(error, socket.gaierror):
        return _unknown_host(address, error)
    closed = ServerUnreachable(
        f"No server is listening at {address.origin}.", brief="no server", is_temporary=True
    )
    return with_start(closed, start)


def scheme_error(address: ServerAddress) -> ServerUnreachable:
    """Return the error for http at a port that uses https, and the reverse."""
    scheme, _, remainder = address.url.partition("://")
    if scheme == "http":
        problem = f"The server at {address.host_port} uses https, not http."
        error, right = ServerUnreachable(problem, brief="https"), f"https://{remainder}"
    else:
        problem = f"The server at {address.host_port} uses http, not https."
        error, right = ServerUnreachable(problem, brief="no https"), f"http://{remainder}"
    return error.advise(f"Use {option('base_url', right)}.", "base_url", right)


def _unknown_host(address: ServerAddress, error: socket.gaierror) -> ServerUnreachable:
    """Return the error for a host without an address; that of a provider is not misspelled."""
    if error.errno == socket.EAI_AGAIN:
        found = ServerUnreachable(
            f"Could not resolve the host of {address.host_port}: no DNS server responded.",
            brief="no DNS server",
        )
        advice = f"Check the network, then {option('base_url')}."
    else:
        found = ServerUnreachable(f"Host {address.host_port} not found.", brief="unknown host")
        advice = f"Check {option('base_url')}."
    if _is_hosted(address):
        return found.append("Check the network or the proxy.")
    return found.advise(advice, "base_url")


def _is_hosted(address: ServerAddress) -> bool:
    """Return whether this is the address of a hosted provider, not of a server program."""
    provider = PROVIDERS.get(address.backend)
    return (
        provider is not None
        and bool(provider.key_variable)
        and provider.url.startswith(address.origin)
    )


def with_start(error: ServerUnreachable, start: str) -> ServerUnreachable:
    """Append how to start the server, or what to check where that is unknown."""
    if start:
        return error.append(start)
    return error.advise(
        f"Check {option('base_url')}, and whether the server is running.", "base_url"
    )


def proxy_error(
    address: ServerAddress, proxy: str, reason: str, error: BaseException | None = None
) -> ServerUnreachable:
    """Return the error for a failed connection through a proxy; `error` is what `reason` describes."""
    variable = f"{address.url.partition(':')[0].upper()}_PROXY"
    host = address.host_port.rpartition(":")[0] or address.host_port
    lookup = next((e for e in chained(error) if isinstance(e, socket.gaierror)), None)
    if lookup is not None and lookup.errno == socket.EAI_AGAIN:
        return ServerUnreachable(
            f"Could not resolve the host of the proxy {proxy}: no DNS server responded. Check the"
            f" network, then {variable}.",
            brief="proxy",
        )
    if lookup is not None:
        problem = f"Proxy host {proxy} (for {address.origin}) not found"
    else:
        reason = one_line(reason)
        problem = f"The proxy {proxy} cannot connect to {address.origin}"
        problem += f" ({reason})" if reason else ""
    return ServerUnreachable(
        f"{problem}. Correct {variable}, or set NO_PROXY={host} if no proxy is needed.",
        brief="proxy",
    )


# -- unusable responses ---------------------------------------------------------------------------


def format_error(address: ServerAddress, path: str, body: bytes) -> RequestFailed:
    """Return the error for a successful response that is not JSON, such as the page of a web server."""
    text, url = body.decode("utf-8", "replace"), f"{address.url}{path}"
    if not _HTML.match(text):
        error = RequestFailed(f"{url} responds, but not like {address.backend}.", status=200)
        return error.advise(f"Check {option('base_url')}.", "base_url")
    title = one_line(_without_html(text))
    named = f' ("{title}")' if title else ""
    error = RequestFailed(f"{url} is a web page{named}, not the API of a server.", status=200)
    error.is_page = True
    return error.advise(
        f"Check the port and the path of {option('base_url')}, and whether a proxy responds instead.",
        "base_url",
    )


def no_reply_error(address: ServerAddress, content_type: str) -> RequestFailed:
    """Return the error for a successful response that contains no part of a reply."""
    if content_type in _EMPTY_STREAM_TYPES:
        # llama-cpp-python does this if the prompt exceeds its context.
        return RequestFailed(
            f"{address.origin} sent an empty reply. Check whether the prompt exceeds its context.",
            brief="an empty reply",
        )
    what = "a web page" if content_type == "text/html" else one_line(content_type)
    error = RequestFailed(f"{address.origin} sent no reply, but {what}.", brief="no reply")
    return error.advise(f"Check {option('base_url')} and {option('backend')}.", "base_url")


def missing_reply_error(address: ServerAddress, missing: str) -> RequestFailed:
    """Return the error for a response in the right format without a reply; `missing` is what it lacks."""
    log = "" if _is_hosted(address) else "check the log of the server, or "
    return RequestFailed(
        f"{address.origin} sent no answer: its response {missing}. Try again. If that does not"
        f" help, {log}load another model.",
        brief="no answer",
    )


def encoding_error(address: ServerAddress, encoding: str) -> RequestFailed:
    """Return the error for a response in a content encoding that is not supported."""
    return RequestFailed(
        f"{address.origin} compresses its responses ({one_line(encoding)}), although the request does"
        " not accept that. Turn compression off in the server or in its proxy.",
        brief="compressed",
    )


def size_error(address: ServerAddress, max_bytes: int) -> RequestFailed:
    """Return the error for a response of more than `max_bytes`."""
    return RequestFailed(
        f"{address.origin} sent more than {max_bytes >> 20} MiB in one response.", brief="too large"
    ).advise(f"Check {option('base_url')}.", "base_url")


# -- models ---------------------------------------------------------------------------------------


def single_model(address: ServerAddress, names: Sequence[str]) -> str:
    """Return the only model of a server; raises `OptionError` if there are none or several."""
    if len(names) == 1:
        return names[0]
    listed = f"lists {len(names)} models: {_joined(names)}" if names else "lists no models"
    error = OptionError(f"{address.host_port} {listed}.")
    raise error.advise(f"Name one: {command('load', 'MODEL', **address.options)}.", "model")


def model_not_found(address: ServerAddress, model: str, names: Sequence[str]) -> ModelNotFound:
    """Return the error for a model that a server does not have."""
    similar = did_you_mean(model, names)
    if not similar:
        similar = f" It has: {_joined(names)}." if names else " It lists no models."
    return ModelNotFound(f'Model "{model}" not found on {address.host_port}.{similar}')


def _joined(names: Sequence[str]) -> str:
    """Return the first names of a list in one line. A server can use any text as a name."""
    more = ", …" if len(names) > _MAX_NAMES else ""
    return f"{one_line(', '.join(names[:_MAX_NAMES]))}{more}"
