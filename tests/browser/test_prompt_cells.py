"""The extension of JupyterLab: prompts are no Python, so they are not highlighted as Python."""

from __future__ import annotations

import pytest

from tests.browser.lab import Lab
from tests.until import until

pytestmark = pytest.mark.browser

_TEXT = "for each item in this list, return None if it is not a class, and import nothing"
_KEYWORDS = {"for", "in", "return", "None", "if", "is", "not", "class", "and", "import"}

_STYLED = """cell => [...cell.querySelectorAll(".cm-line span")].filter(span => {
    const style = getComputedStyle(span);
    return style.fontWeight === "700" || style.textDecorationLine !== "none";
}).map(span => span.innerText)"""


def keywords(lab: Lab, index: int) -> set[str]:
    """Return the Python keywords that a cell highlights."""
    spans = lab.cell(index).locator(".cm-line span").all_inner_texts()
    return {text for span in spans for text in [span.strip()] if text in _KEYWORDS}


def styled(lab: Lab, index: int) -> set[str]:
    """Return the texts of a cell that are bold or underlined."""
    found: list[str] = lab.cell(index).evaluate(_STYLED)
    return set(found)


def put(lab: Lab, index: int, source: str) -> None:
    """Replace the text of a cell."""
    lab.page.evaluate(
        "([i, text]) => window.jupyterapp.shell.currentWidget.content.widgets[i]"
        ".model.sharedModel.setSource(text)",
        [index, source],
    )


def test_prompts_are_not_highlighted_as_python(lab: Lab) -> None:
    prompts = [
        f"%%llm\n{_TEXT}",
        f"\n  \n%%llm -t 0 -o reply\n{_TEXT}",
        f"  %%llm\n{_TEXT}",
    ]
    others = [
        _TEXT,
        f"# What IPython runs as Python.\n%%llm\n{_TEXT}",
        f"%%llm_other\n{_TEXT}",
        f"%%time\n{_TEXT}",
        f"x = 1\n%%llm\n{_TEXT}",
    ]
    lab.open([*prompts, *others])
    cells = range(len(prompts) + len(others))
    expected = [set[str]() if i < len(prompts) else _KEYWORDS for i in cells]
    until(lambda: [keywords(lab, i) for i in cells] == expected, "highlighting")

    # References are no links; the rest is Markdown.
    put(lab, 0, "%%llm\nIs **bold** from {rows[0][1]} better than {df['x']}?")
    until(lambda: styled(lab, 0) == {"**", "bold"}, str(styled(lab, 0)))

    # The magic line is removed, and written again.
    put(lab, 0, _TEXT)
    put(lab, 3, prompts[0])
    until(lambda: keywords(lab, 0) == _KEYWORDS, "Python again")
    until(lambda: keywords(lab, 3) == set(), "a prompt now")
    # A new cell, and a page that is loaded again.
    lab.activate(7)
    lab.command("notebook:insert-cell-below")
    put(lab, 8, prompts[1])
    until(lambda: keywords(lab, 8) == set(), "a new prompt")
    lab.reopen()
    until(lambda: [len(keywords(lab, i)) for i in (0, 3, 8)] == [len(_KEYWORDS), 0, 0], "reopened")
