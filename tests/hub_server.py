"""A small Hugging Face hub on a real socket, with a script and a memory.

It speaks what `huggingface_hub` 2.4 and `transformers` 5 ask for when they read a model: model
information, file lists, and files with HEAD, GET and Range. It never mentions Xet, so that
every byte travels over the plain HTTP that a test can slow down or cut.

    with HubServer({"tiny/llama": folder}) as hub:
        hub.script("tiny/llama", Faults(bytes_per_second=20_000))
        subprocess.run([sys.executable, "-c", code], env=hub.environment(tmp_path))
        assert hub.received("GET", "model.safetensors")
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub_pages import Repo, file_headers, model_info, part, tree

_API = re.compile(
    r"/api/models/(?P<repo>[\w.-]+(?:/(?!(?:revision|tree)/)[\w.-]+)?)"
    r"(?:/(?P<what>revision|tree)/(?P<revision>[^/]+)(?:/(?P<path>.+))?)?"
)
_FILE = re.compile(r"/(?P<repo>[\w.-]+(?:/[\w.-]+)?)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong with one repository; the last five concern the files that match `only`.

    A gated repository shows its information and its file list and refuses its files, as the real
    hub does: 401 without a token, 403 with a token that is not among `tokens`.
    """

    missing: bool = False
    gated: bool = False
    tokens: tuple[str, ...] = ()
    only: str = "*"  # "*" also covers requests for information, which are about no file
    errors: int = 0  # that many requests are answered with 500
    pause: float = 0.0  # seconds of silence between the headers of a file and its first byte
    bytes_per_second: int | None = None
    die_after: int | None = None  # the connection drops after that many bytes of a file ...
    deaths: int = 1  # ... that many times


@dataclass(frozen=True, slots=True)
class Request:
    """One request as it arrived; header names are in lower case."""

    method: str
    path: str
    headers: Mapping[str, str] = field(repr=False)


@dataclass(frozen=True, slots=True)
class _Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes = b""
    pause: float = 0.0
    bytes_per_second: int | None = None
    cut: int | None = None


class _RefusedError(Exception):
    """Why a request gets no 200; the code is what `huggingface_hub` picks its error class by."""

    def __init__(self, status: int, code: str, message: str, commit: str = "") -> None:
        super().__init__(message)
        named = {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": commit}
        headers = {name: value for name, value in named.items() if value}
        self.reply = _json({"error": message}, status, headers)


class HubServer:
    """Serves folders as repositories while the `with` block lasts; `repos` may change meanwhile."""

    def __init__(self, repos: Mapping[str, Path | Repo]) -> None:
        self.repos = {
            name: repo if isinstance(repo, Repo) else Repo(repo) for name, repo in repos.items()
        }
        self.requests: list[Request] = []
        self._faults: dict[str, Faults] = {}
        self._spent: Counter[tuple[str, str]] = Counter()
        self._news = threading.Condition()
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.hang_up()
        self._server.server_close()
        # A double that fails in silence would make its tests pass or fail for the wrong reason.
        if error is None and self._server.failures:
            raise self._server.failures[0]

    def script(self, repo_id: str, faults: Faults) -> None:
        """From now on `repo_id` behaves like this; what is counted starts again at nought."""
        with self._news:
            self._faults[repo_id] = faults
            for kind in ("errors", "deaths"):
                self._spent[repo_id, kind] = 0

    def environment(self, home: Path) -> dict[str, str]:
        """The environment of a client process that uses this hub only and caches under `home`."""
        foreign = re.compile(r"HF_|HUGGING|TRANSFORMERS_|.*_proxy$", re.IGNORECASE)
        own = {name: value for name, value in os.environ.items() if not foreign.match(name)}
        quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return own | quiet | {"HF_ENDPOINT": self.url, "HF_HOME": str(home)}

    def received(self, method: str = "*", ending: str = "") -> list[Request]:
        """The requests so far with this method whose path, without the query, ends like this."""
        return [
            request
            for request in tuple(self.requests)
            if fnmatch(request.method, method) and urlsplit(request.path).path.endswith(ending)
        ]

    def wait_for(self, method: str, ending: str, timeout: float = 30.0) -> Request:
        """Block until such a request has arrived, and return the first one."""
        with self._news:
            if self._news.wait_for(lambda: self.received(method, ending), timeout):
                return self.received(method, ending)[0]
        raise TimeoutError(f"No {method} …{ending} within {timeout} s, only {self.requests}")

    def answer(self, request: Request) -> _Reply:
        """Record the request and return the response; called on the handler threads."""
        with self._news:
            self.requests.append(request)
            self._news.notify_all()
        url = urlsplit(request.path)
        try:
            if match := _FILE.fullmatch(url.path):
                return self._file(request, match["repo"], unquote(match["path"]), match["revision"])
            if match := _API.fullmatch(url.path):
                return self._information(match, parse_qs(url.query))
            raise _RefusedError(404, "", "Not found")
        except _RefusedError as refused:
            return refused.reply

    def _repo(self, repo_id: str, path: str, revision: str | None) -> tuple[Repo, Faults]:
        """The repository and what is wrong with it here and now, or the error response."""
        faults = self._faults.get(repo_id, Faults())
        repo = self.repos.get(repo_id)
        if repo is None or faults.missing:
            raise _RefusedError(404, "RepoNotFound", "Repository not found")
        if not fnmatch(path, faults.only):
            faults = Faults(gated=faults.gated, tokens=faults.tokens)
        if self._spend(repo_id, "errors", faults.errors):
            raise _RefusedError(500, "", "Internal Server Error")
        if revision is not None and not repo.has_revision(unquote(revision)):
            raise _RefusedError(404, "RevisionNotFound", "Invalid rev id")
        return repo, faults

    def _spend(self, repo_id: str, kind: str, budget: int) -> bool:
        with self._news:
            self._spent[repo_id, kind] += 1
            return self._spent[repo_id, kind] <= budget

    def _information(self, match: re.Match[str], query: Mapping[str, list[str]]) -> _Reply:
        path = unquote(match["path"] or "")
        repo, faults = self._repo(match["repo"], path, match["revision"])
        if match["what"] == "tree":
            entries = tree(repo, path, recursive=query.get("recursive") == ["true"])
            if entries is None:
                raise _RefusedError(404, "EntryNotFound", "Entry not found", repo.commit)
            return _json(entries)
        blobs = query.get("blobs") == ["true"]
        return _json(model_info(match["repo"], repo, gated=faults.gated, blobs=blobs))

    def _file(self, request: Request, repo_id: str, path: str, revision: str) -> _Reply:
        repo, faults = self._repo(repo_id, path, revision)
        _check_token(request, faults)
        file = repo.files().get(path)
        if file is None:
            raise _RefusedError(404, "EntryNotFound", "Entry not found", repo.commit)
        status, content, range_headers = part(file.read_bytes(), request.headers.get("range", ""))
        dies = request.method == "GET" and faults.die_after is not None
        return _Reply(
            status,
            file_headers(file, repo.commit) | range_headers,
            content,
            faults.pause,
            faults.bytes_per_second,
            faults.die_after if dies and self._spend(repo_id, "deaths", faults.deaths) else None,
        )


def _json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> _Reply:
    named = {"Content-Type": "application/json; charset=utf-8"}
    return _Reply(status, named | dict(headers or {}), json.dumps(value).encode())


def _check_token(request: Request, faults: Faults) -> None:
    if not faults.gated:
        return
    token = request.headers.get("authorization", "").removeprefix("Bearer ")
    if token not in faults.tokens:
        raise _RefusedError(403 if token else 401, "GatedRepo", "Access is restricted")


class _Server(ThreadingHTTPServer):
    """One thread per connection; all are hung up on and joined when the hub closes."""

    daemon_threads = False

    def __init__(self, hub: HubServer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub
        self.closing = threading.Event()
        self.failures: list[BaseException] = []
        self._open: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        # A client that goes away in the middle of an answer is what some tests are about.
        if error is not None and not isinstance(error, ConnectionError):
            self.failures.append(error)

    def hang_up(self) -> None:
        """Wake the threads that wait for a client or for a scripted pause."""
        self.closing.set()
        for request in tuple(self._open):
            with suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        named = {name.lower(): value for name, value in self.headers.items()}
        reply = self.server.hub.answer(Request(self.command, self.path, named))
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        if self.command != "HEAD":
            self._send(reply)

    def _send(self, reply: _Reply) -> None:
        self.server.closing.wait(reply.pause)
        for piece in self._paced(reply.body[: reply.cut], reply.bytes_per_second):
            self.wfile.write(piece)
        if reply.cut is not None:
            self.close_connection = True

    def _paced(self, content: bytes, bytes_per_second: int | None) -> Iterator[bytes]:
        if bytes_per_second is None:
            yield content
            return
        step = max(1, bytes_per_second // 20)
        for start in range(0, len(content), step):
            yield content[start : start + step]
            self.server.closing.wait(step / bytes_per_second)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing: `HubServer.requests` records the requests."""
