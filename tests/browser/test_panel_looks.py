"""How the panel looks and sounds: widths, themes, names, keyboard."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import pytest

from tests.browser.lab import Lab
from tests.browser.panel import SCRIPTED, Panel, open_panel
from tests.until import until

pytestmark = pytest.mark.browser

_ANSWER = (
    "# A heading\n\nSome *words* and `code`.\n\n```python\n"
    f"def f():\n    return {'x' * 200!r}\n```\n\n| a | b |\n|---|---|\n| 1 | {'word ' * 40}|\n\n"
    f"{'unbroken' * 40}\n"
)
_INTERACTIVE = "button|checkbox|combobox|listbox|slider|spinbutton|textbox|meter|progressbar|link"


@pytest.fixture(scope="module")
def full(lab_of_module: Lab) -> Iterator[Panel]:
    """Return one panel with something everywhere: answer, code, chat, error, changed setting."""
    yield filled(lab_of_module)
    lab_of_module.theme("JupyterLab Light")


def filled(lab: Lab) -> Panel:
    """Open a panel and use every part of it."""
    scripts = (
        "from tests.scripted import Hang\nbackend.will('one', Hang())\n"
        f"backend.will(*whole_answer({_ANSWER!r}))"
    )
    lab.open([f"{SCRIPTED}\n{scripts}", "%llm_panel", f"%%llm --bg\nA job. {'long ' * 60}"])
    lab.run(0)
    lab.run(2)
    panel = open_panel(lab, 1)
    panel.button("Stop 1").wait_for()
    panel.check("Keep the conversation").click()
    panel.button("Clear").wait_for()
    panel.ask("A question? " + "long " * 60)
    panel.button("Put into next cell").wait_for()
    panel.number("temperature").fill("0.25")
    panel.number("max new tokens").fill("99999999")
    panel.number("max new tokens").press("Tab")
    panel.at(".llm-changed").nth(1).wait_for()
    panel.number("top k").fill("0")
    panel.number("top k").press("Tab")
    panel.box.get_by_role("alert").wait_for()
    return panel


def narrow(lab: Lab, width: int) -> None:
    """Make the page so wide, with nothing beside the notebook."""
    lab.page.set_viewport_size({"width": width, "height": 1200})
    lab.page.evaluate("() => window.jupyterapp.shell.collapseLeft()")
    lab.page.wait_for_timeout(500)


def assert_soon(panel: Panel, script: str, expected: object) -> None:
    """Wait until a script finds what is expected: a page lays itself out in its own time."""
    with contextlib.suppress(AssertionError):
        until(lambda: panel.box.evaluate(script) == expected)
    assert panel.box.evaluate(script) == expected


# What sticks out of the panel or of its field to the right, and texts that are cut off.
_TOO_WIDE = """box => {
    const right = box.getBoundingClientRect().right, found = [];
    const scrolls = element => element !== box && (
        ['auto', 'scroll'].includes(getComputedStyle(element).overflowX) || scrolls(element.parentElement));
    if (box.scrollWidth > box.clientWidth) found.push(`panel ${box.scrollWidth} > ${box.clientWidth}`);
    for (const element of box.querySelectorAll('*')) {
        const name = `${element.tagName}.${element.className} ${element.textContent.slice(0, 30)}`;
        if (!element.getClientRects().length) continue;
        const out = element.getBoundingClientRect().right > right + 1;
        if (out && !scrolls(element)) found.push(`out: ${name}`);
        const cut = element.matches('button, label, .widget-label')
            && element.scrollWidth > element.clientWidth + 1 && element.clientWidth > 0;
        if (cut) found.push(`cut: ${name} ${element.scrollWidth} > ${element.clientWidth}`);
    }
    for (const field of box.querySelectorAll('.llm-fields > *')) {
        const edge = field.getBoundingClientRect().right;
        for (const inner of field.querySelectorAll('*')) {
            const over = inner.getClientRects().length && inner.getBoundingClientRect().right > edge + 1;
            if (over) found.push(`over: ${inner.textContent.slice(0, 30)}`);
        }
    }
    return found;
}"""

# One line each, so that the sliders of a row are at one height.
_LABEL_HEIGHTS = """box => [...new Set([...box.querySelectorAll('.llm-number .llm-top')].map(
    label => Math.round(label.getBoundingClientRect().height)))]"""


@pytest.mark.parametrize("theme", ["JupyterLab Light", "JupyterLab Dark"])
def test_it_fits_narrow_and_wide_pages_in_both_themes(full: Panel, theme: str) -> None:
    panel, lab = full, full.lab
    lab.theme(theme)
    for width in (600, 760, 820, 900, 1000, 1500):
        narrow(lab, width)
        assert_soon(panel, _TOO_WIDE, [])
        assert_soon(panel, _LABEL_HEIGHTS, [17])
        assert panel.button("Load").is_visible()


# Text, and what is behind it: WCAG's contrast, which should be 4.5 or more.
_FAINT = """box => {
    const channels = colour => colour.match(/[\\d.]+/g).map(Number);
    const light = colour => {
        const [r, g, b] = colour.slice(0, 3).map(v => v / 255)
            .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const behind = element => {
        for (; element; element = element.parentElement) {
            const colour = channels(getComputedStyle(element).backgroundColor);
            if (colour.length === 3 || colour[3] === 1) return colour;
        }
        return [255, 255, 255];
    };
    const opacity = element => element
        ? Number(getComputedStyle(element).opacity) * opacity(element.parentElement) : 1;
    const contrast = (element, part) => {
        const colour = channels(getComputedStyle(element, part).color), under = behind(element);
        const share = (colour[3] ?? 1) * opacity(element);
        const seen = under.map((value, i) => share * colour[i] + (1 - share) * value);
        const [a, b] = [light(seen), light(under)];
        return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    };
    const found = [];
    for (const element of box.querySelectorAll('*')) {
        const own = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
        const text = element.placeholder?.trim() || (own && element.textContent.trim());
        if (!text || !element.getClientRects().length || element.disabled) continue;
        if (element.closest('pre, .llm-scroll') || element.matches('option')) continue;
        const ratio = contrast(element, element.placeholder ? '::placeholder' : undefined);
        if (ratio < 4.5) found.push(`${ratio.toFixed(1)}: ${text.slice(0, 40)}`);
    }
    return found;
}"""


@pytest.mark.parametrize("theme", ["JupyterLab Light", "JupyterLab Dark"])
def test_every_word_can_be_read_in_both_themes(full: Panel, theme: str) -> None:
    panel, lab = full, full.lab
    lab.theme(theme)
    lab.page.wait_for_timeout(500)
    assert_soon(panel, _FAINT, [])


def _names(panel: Panel) -> list[str]:
    tree = panel.box.aria_snapshot()
    return re.findall(rf'^\s*- (?:{_INTERACTIVE}) "([^"]+)"', tree, re.MULTILINE)


def test_every_control_has_a_name(full: Panel) -> None:
    panel, lab = full, full.lab
    for backend in ("ollama", "openai", "local"):
        panel.box.get_by_role("combobox", name="Backend").select_option(backend)
        lab.page.wait_for_timeout(400)
        tree = panel.box.aria_snapshot()
        assert re.findall(rf"^\s*- (?:{_INTERACTIVE})(?! \")[^\n]*$", tree, re.MULTILINE) == []
    expected = {"Load", "Send", "Prompt", "System prompt", "Model", "temperature", "Device"}
    until(lambda: expected <= set(_names(panel)), "a control is missing")
    names, tree = _names(panel), panel.box.aria_snapshot()
    assert len(set(names)) == len(names), "two controls have the same name"
    assert tree.count('img "changed"') == panel.at(".llm-changed .llm-mark").count() == 2
    assert tree.count('- img "') == 2, "a mark of an unchanged setting is read aloud"


# The name of the control that has the focus, and the width of the line around it.
_FOCUSED = """() => {
    const element = document.activeElement, style = getComputedStyle(element);
    if (!element.closest('.llm-panel')) return ['', ''];
    const name = element.ariaLabel || element.labels?.[0]?.textContent || element.textContent;
    return [name.trim(), `${style.outlineStyle} ${style.outlineWidth}`];
}"""


def test_tab_key_reaches_every_control_and_shows_where_it_is(full: Panel) -> None:
    panel, lab = full, full.lab
    panel.box.get_by_role("combobox", name="Backend").focus()
    reached: list[str] = []
    unmarked: list[str] = []
    for _ in range(60):
        name, outline = lab.page.evaluate(_FOCUSED)
        reached.append(name)
        if not name:
            break
        if outline != "solid 2px":
            unmarked.append(f"{name}: {outline}")
        lab.page.keyboard.press("Tab")
    assert unmarked == []
    expected = [
        "Backend",
        "Model",
        "Load",
        "System prompt",
        "Prompt",
        "Send",
        "temperature, slider",
        "temperature",
    ]
    positions = [reached.index(name) for name in expected]
    assert positions == sorted(positions), reached


def test_keys_on_buttons_boxes_and_lists_have_their_usual_effect(full: Panel) -> None:
    panel = full
    keep = panel.check("Keep the conversation")
    keep.focus()
    keep.press("Space")
    until(lambda: not keep.is_checked(), "Space does not change a box")
    reset = panel.button("Reset")
    reset.focus()
    reset.press("Enter")
    until(lambda: panel.number("temperature").input_value() == "0.7", "Enter presses no button")
    backend = panel.box.get_by_role("combobox", name="Backend")
    backend.focus()
    backend.press("ArrowDown")
    until(lambda: backend.input_value() == "llamacpp", "the arrow chooses nothing")
