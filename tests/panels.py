"""A control panel without a page: pressed, set and read as a frontend does it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from html import unescape
from html.parser import HTMLParser
from typing import Any

from ipywidgets import Dropdown, Widget

from llm_magic.notebook.panel import ControlPanel
from llm_magic.session import Session
from tests.scripted import ScriptedBackend, scripted_session
from tests.until import until


@dataclass
class Scripted:
    """A panel, its session, and the backend that answers it."""

    panel: ControlPanel
    session: Session
    backend: ScriptedBackend


@contextlib.contextmanager
def scripted_panel(load: bool = True, **settings: object) -> Iterator[Scripted]:
    """Give a panel on a scripted session, and take every widget away afterwards."""
    with scripted_session(load, **settings) as (session, backend):
        panel = ControlPanel(session)
        until(lambda: "models." in panel.loading.result.value)
        yield Scripted(panel, session, backend)
    close_widgets()


def close_widgets() -> None:
    """Take every widget away: they are kept by id, for the pages that may ask for them."""
    Widget.close_all()


def press(button: Widget) -> None:
    """Click as a page does, once the button is there: it sends nothing for one that is off."""
    until(lambda: not button.disabled, f"{button.description} is off")
    until(lambda: button.layout.display != "none", f"{button.description} is not there")
    _arrives(button, {"method": "custom", "content": {"event": "click"}})


def put(control: Widget, value: object) -> None:
    """Change a value as a page does."""
    state = {"value": value}
    if isinstance(control, Dropdown):
        # A page identifies the choices by their index.
        state = {"index": control.options.index(value)}
    _arrives(control, {"method": "update", "state": state, "buffer_paths": []})


def send(panel: ControlPanel, text: str) -> None:
    """Type a prompt and press Ctrl+Enter."""
    put(panel.asking.prompt, text)
    content = {"do": "send", "id": "1", "text": text}
    _arrives(panel.asking.prompt, {"method": "custom", "content": content})


def _arrives(widget: Widget, data: dict[str, Any]) -> None:
    widget._handle_msg({"content": {"data": data}, "buffers": []})


def visible_text(html: str) -> str:
    """Return the visible text of HTML."""
    reader = _Reader()
    reader.feed(html)
    return " ".join("".join(reader.texts).split())


def shown_error(panel: ControlPanel) -> str:
    """Return the error that a panel shows at one of its controls, or nothing."""
    sections = (panel.loading, panel.settings, panel.asking, panel.jobs)
    messages = [section.message for section in sections]
    messages += panel.settings.errors.values()
    errors = [visible_text(message.value) for message in messages]
    errors += [number.error for number in panel.settings.numbers.values()]
    shown = [error for error in errors if error]
    assert len(shown) < 2, shown
    return "".join(shown)


def copied_text(panel: ControlPanel) -> str:
    """Return what the button at the newest answer copies, or nothing where there is none."""
    found = re.search(r' data-source="([^"]*)"', panel.asking.answer.value)
    return unescape(found[1]) if found else ""


def is_idle(panel: ControlPanel) -> bool:
    """Return whether a panel shows that nothing is being answered."""
    return not panel.asking.prompt.disabled and panel.asking.stop.disabled


def everything(panel: ControlPanel) -> list[str]:
    """Return all the HTML of a panel."""
    sections = (panel.loading, panel.settings, panel.asking, panel.jobs)
    own = [panel.status, panel.loading.result, *(section.message for section in sections)]
    return [w.value for w in [*own, panel.asking.note, panel.asking.turns, panel.asking.answer]]


def harm(html: str, *, typeset: bool = False) -> list[str]:
    """Return what a panel's HTML contains but must not; `typeset` where MathJax reads all of it."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    return [*reader.harm, *(text for text in reader.typeset if typeset)]


_TAGS = (
    "a blockquote br code div em h1 h2 h3 h4 h5 h6 hr li ol p pre s span strong table tbody td th "
    "thead tr ul details summary progress meter input label sub sup kbd"
)
_VOID_TAGS = {"br", "hr", "input"}
_ATTRIBUTES = {
    "href": r"(?:https?://[a-z0-9[]|mailto:)[^\s\"<>]*",
    "style": r"(?:[a-z0-9:;,.() #%-]|var\([a-z0-9-]+, #[0-9a-f]+\))*",
    "class": (
        r"(?:llm-[A-Za-z-]+ ?)+|task-list-item-checkbox|language-[a-z0-9+#-]+"
        r"|(?:mathjax|tex2jax)_[a-z0-9_ ]+"
    ),
    "start": r"\d+",
    "dir": "rtl|ltr",
    # Task lists have check boxes that cannot be clicked.
    "type": "checkbox",
    **dict.fromkeys(("checked", "disabled"), r"checked|disabled"),
    **dict.fromkeys(("rel", "target", "role", "aria-live", "min", "max", "high"), r"[a-z0-9._ ]+"),
    **dict.fromkeys(("aria-label", "value", "data-source"), r"(?s:.*)"),
}
_TEX = re.compile(r"\$|\\\(|\\\[|\\begin")


class _Reader(HTMLParser):
    """Collects the text of HTML, and the tags and attributes that are not allowed."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.harm: list[str] = []
        self.typeset: list[str] = []
        self._open: list[tuple[str, str]] = [("", "all")]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in _TAGS.split():
            self.harm.append(f"<{tag}>")
        for name, value in attrs:
            allowed = _ATTRIBUTES.get(name)
            plain = allowed and re.fullmatch(allowed, value or "", re.IGNORECASE)
            if not plain or ("url(" in (value or "") and name == "style"):
                self.harm.append(f"<{tag} {name}={value!r}>")
        if tag == "input" and "disabled" not in dict(attrs):
            self.harm.append("<input> that is not disabled")
        if tag in _VOID_TAGS:
            self.texts.append(" ")
            return
        if tag not in {"span", "a", "code", "em", "strong"}:
            self.texts.append(" ")
        classes, how = dict(attrs).get("class") or "", self._open[-1][1]
        if "_ignore" in classes or tag in {"pre", "code"}:
            how = "nothing"
        elif "_process" in classes:
            how = "checked"
        self._open.append((tag, how))

    def handle_endtag(self, tag: str) -> None:
        if tag not in _VOID_TAGS and self._open.pop()[0] != tag:
            self.harm.append(f"</{tag}>")

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        # test_markdown checks what the renderer passes to MathJax.
        if self._open[-1][1] == "all" and _TEX.search(data):
            self.typeset.append(data)
