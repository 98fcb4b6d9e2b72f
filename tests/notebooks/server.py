"""A little OpenAI-compatible server with a real model behind it: the one that 03_servers talks to.

    EXAMPLE_KEY=open-sesame python -m tests.notebooks.server

It serves the bundled model with this package's own session, to requests that have the key; without
the variable, to every request of this machine.
"""

from __future__ import annotations

import argparse
import contextlib
import hmac
import json
import os
import sys
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

from llm_magic import llm
from llm_magic.session.requests import AskOptions
from llm_magic.errors import LLMMagicError
from llm_magic.types import Chunk, Message, ModelInfo, Usage

KEY = "EXAMPLE_KEY"  # the variable that holds it, here and in the notebook
_HOST = "127.0.0.1"
_MODELS, _CHAT = "/v1/models", "/v1/chat/completions"
_OPTIONS = ("temperature", "top_p", "top_k", "repetition_penalty", "seed", "stop")


class ExampleServer(ThreadingHTTPServer):
    """Serves one model; questions that come at the same time are answered at the same time."""

    daemon_threads = True

    def __init__(self, port: int, model: ModelInfo, key: str) -> None:
        super().__init__((_HOST, port), _Handler)
        self.model = model
        self.key = key


class _Handler(BaseHTTPRequestHandler):
    server: ExampleServer

    def do_GET(self) -> None:
        """List the model."""
        if not self._refused(_MODELS):
            model = self.server.model
            entry = {"id": model.name, "object": "model", "max_model_len": model.context_length}
            self._answer(200, {"object": "list", "data": [entry]})

    def do_POST(self) -> None:
        """Answer a question, as a stream."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self._refused(_CHAT):
            return
        request: dict[str, Any] = json.loads(body)
        if request["model"] != self.server.model.name:
            self._refuse(404, f"The model {request['model']} does not exist.")
            return
        try:
            messages = [Message(m["role"], m["content"]) for m in request["messages"]]
            chunks = llm.stream(messages, **_options(request))
        except LLMMagicError as error:
            self._refuse(400, str(error))
            return
        self._head(200, "text/event-stream")
        # Where the client has left, the model stops with the loop.
        with contextlib.suppress(ConnectionError):
            for event in _events(request["model"], chunks):
                self.wfile.write(f"data: {event}\n\n".encode())

    def _refused(self, path: str) -> bool:
        """Refuse wrong addresses and wrong keys; returns whether it did."""
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.server.key and not hmac.compare_digest(given.encode(), self.server.key.encode()):
            self._refuse(401, "That is not the key.")
        elif self.path != path:
            self._refuse(404, f"There is no {self.path} here.")
        else:
            return False
        return True

    def _refuse(self, status: int, why: str) -> None:
        self._answer(status, {"error": {"message": why}})

    def _answer(self, status: int, value: object) -> None:
        self._head(status, "application/json")
        self.wfile.write(json.dumps(value).encode())

    def _head(self, status: int, kind: str) -> None:
        """Begin an answer that ends with the connection, as HTTP/1.0 has it."""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet."""


def _options(request: Mapping[str, Any]) -> AskOptions:
    """Return the options of a request, under our own names."""
    options = {name: request[name] for name in _OPTIONS if request.get(name) is not None}
    return cast(AskOptions, {"max_new_tokens": request.get("max_tokens"), **options})


def _events(model: str, chunks: Iterator[Chunk]) -> Iterator[str]:
    """Yield the events of an answer: its words, how it ended, what it took."""
    for chunk in chunks:
        choice = {"index": 0, "delta": {"content": chunk.text}, "finish_reason": chunk.finish_reason}
        usage = {"usage": _usage(chunk.usage)} if chunk.usage else {}
        yield json.dumps({"model": model, "choices": [choice], **usage})
    yield "[DONE]"


def _usage(usage: Usage) -> dict[str, int | None]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
    }


def main() -> int:
    """Serve until Ctrl+C; prints the address, once it is ready."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8000, help="0 takes one that is free")
    port = parser.parse_args().port
    # Rounded less: the same words come, whether a question is answered alone or among others.
    model = llm.load(dtype="float32")
    with ExampleServer(port, model, os.environ.get(KEY, "")) as server:
        sys.stdout.write(f"{model.name} is at http://localhost:{server.server_port}\n")
        sys.stdout.flush()
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
