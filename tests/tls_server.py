"""A server that uses https and lists one model, on a real socket."""

from __future__ import annotations

import contextlib
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import trustme


class Models(BaseHTTPRequestHandler):
    """Lists the model ``tiny`` at every path."""

    def do_GET(self) -> None:
        """Send the list."""
        body = b'{"data": [{"id": "tiny"}]}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Write nothing."""


@contextlib.contextmanager
def tls_server(authority: trustme.CA, port: int = 0) -> Iterator[str]:
    """Yield the address of a server whose certificate is one of `authority`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost", "127.0.0.1").configure_cert(context)
    with ThreadingHTTPServer(("127.0.0.1", port), Models) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        # A client that leaves in the handshake is what is tested, and nothing to print.
        server.handle_error = lambda *_about: None  # type: ignore[method-assign]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"https://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()
