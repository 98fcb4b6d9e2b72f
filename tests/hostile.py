"""A server whose every text carries terminal escapes, a walk over all magics with it, and the check.

with HostileServer() as server:
    for code, error in walk(server.url):
        assert_harmless(whatever_the_cell_showed)
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable

from tests.exchange import Received
from tests.fault_server import CHAT, FaultServer
from tests.wire import Step, delta, error_answer, sse

# Clear the screen, set the clipboard, link, a C1 control sequence, ring, overwrite, reorder, hide.
ESCAPES = (
    "\x1b[2J\x1b]52;c;aGk=\x07\x1b]8;;http://evil.example\x1b\\link\x1b]8;;\x1b\\"
    "\x9b31m\x08\x08\rover\x7f\x00\u202egnp.exe\u2066\U000e0041"
)
MODEL = f"evil{ESCAPES}"
# As a magic line can be typed: what ends a line cannot be in it, and \x00 no cell takes.
TYPED = "\x1b[2J\x9b31m\x08\u202e"
_STYLE = re.compile(r"\x1b\[[0-9;]*m")
_CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\U000e0000-\U000e007f]"
)


class HostileServer(FaultServer):
    """Answers with escapes cut over chunks; ``fail`` in a question gets an error full of them."""

    def __init__(self) -> None:
        super().__init__({MODEL: {"max_model_len": 4096}, f"second{ESCAPES}\nloaded": {}})

    def answer(self, request: Received) -> Generator[Step, None, None]:
        """Answer by the question."""
        yield from self._hostile(request) or self._reply(request)

    def _hostile(self, request: Received) -> Iterable[Step] | None:
        if request.path != CHAT:
            return None
        question = request.json["messages"][-1]["content"]
        if "fail" in question:
            return error_answer(400, f"no{ESCAPES}\r\nsecond line")
        pieces = [*f"{ESCAPES}```python\nx = 1  # {ESCAPES}\n```\n{ESCAPES}"]
        reasoning = delta(reasoning_content=ESCAPES)
        return sse(reasoning, *(delta(p) for p in pieces), delta(finish="stop"))


def walk(url: str) -> list[tuple[str, str]]:
    """Return cells that use every magic on a hostile server, each with the error that it ends in.

    The notebook has the session as ``llm``.
    """
    server, chat = f"-b vllm --base-url {url}", f"'chat{TYPED}'"
    forms = ("", "--plain", "-f text", "-f code", "--quiet")
    return [
        (f"%llm_models {server}", ""),
        (f"%llm_load {server}", "OptionError"),
        (f"%llm_load unknown{TYPED} {server}", "ModelNotFound"),
        ("%llm_status", ""),
        (f"llm.load({MODEL!r}, backend='vllm', base_url={url!r}) and None", ""),
        (f"%llm_models {server}", ""),
        ("%llm_status", ""),
        ("llm", ""),
        *((f"%%llm {options}\nHello", "") for options in forms),
        ("%%llm -f json\nHello", "InvalidReply"),
        ("llm.last", ""),
        ("[llm.last]", ""),
        ("%llm_usage", ""),
        ("llm.usage()", ""),
        ("%llm_use", ""),
        (f"%llm_use nobody{TYPED}", "ModelNotLoaded"),
        (f"%llm_help nothing{TYPED}", "OptionError"),
        ("%llm_config stop=END", ""),
        (f"%llm_config system='Say{TYPED}'", ""),
        (f"%llm_config system Say{TYPED} it", "OptionError"),
        ("%llm_config", ""),
        (f"%%llm -c {chat}\nHello{TYPED}", "OptionError"),
        (f"%%llm -c talk\nHello{TYPED}", ""),
        ("%llm_chats", ""),
        ("%llm_chats talk", ""),
        (f"%llm_chats {chat}", "OptionError"),
        (f"%%llm -c talk --dry-run\nHello{TYPED}", ""),
        ("%llm fail", "RequestFailed"),
        ("%llm_explain", ""),
        (f"%llm {{no{TYPED}}} {{nowhere}}", ""),
        (f"%llm -m nobody{TYPED} Hello", "ModelNotLoaded"),
        (f"%llm_status {TYPED}", "OptionError"),
        ("%%llm --bg -o job\nHello", ""),
        ("%llm_wait", ""),
        ("job", ""),
        ("%%llm --bg\nfail", ""),
        ("%llm_wait", "RequestFailed"),
        ("%llm_jobs", ""),
        ("%llm_stop", ""),
        ("%llm_panel", ""),
        ("%llm_doctor", ""),
        (f"%llm_reset {chat}", "OptionError"),
        ("%llm_reset talk", ""),
        ("%llm_unload", ""),
    ]


def assert_harmless(shown: str) -> None:
    """See that a text has no control character, but for the colors of tracebacks."""
    found = _CONTROL.search(_STYLE.sub("", shown))
    assert found is None, f"{found[0]!r} in {shown!r}"
