"""Control characters from models and servers: what a kernel sends to a frontend's terminal text."""

from __future__ import annotations

from tests.hostile import HostileServer, assert_harmless, walk
from tests.kernels import Ran, kernel


def _terminal_text(ran: Ran) -> str:
    """Return what a frontend that is a terminal shows of a cell, and what nbclient prints of it."""
    streams = [o["text"] for o in ran.outputs if o["type"] == "stream"]
    plain = [o["data"].get("text/plain", "") for o in ran.outputs if o["type"] != "stream"]
    return "\n".join([*streams, *plain, ran.error, *ran.traceback])


def test_every_magic_in_a_kernel_sends_no_controls() -> None:
    with HostileServer() as server, kernel(VLLM_BASE_URL=server.url) as k:
        k.ok("%load_ext llm_magic\nfrom llm_magic import llm")
        for code, error in walk(server.url):
            ran = k.run(code)
            assert ran.ename == error, ran.text
            assert_harmless(_terminal_text(ran))
            if code == "%%llm \nHello":
                assert ran.text.startswith("␛[2J"), ran.text
