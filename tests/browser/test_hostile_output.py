"""The payloads in a real JupyterLab: nothing runs and nothing is fetched.

At the end, the same payloads are shown as plain Markdown, where they do run: a broken test would fail there.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.browser.lab import Lab
from tests.browser.panel import SCRIPTED, open_panel
from tests.browser.recorder import Recorder
from tests.until import until

pytestmark = pytest.mark.browser

_IMPORTS = """
from IPython.display import HTML, Markdown, display
from llm_magic.notebook.display.markdown import render
from tests.payloads import payloads
"""
_DRY_RUN = """
import pandas as pd
from llm_magic.notebook.display.tables import Table
from llm_magic.prompts.values_as_text import to_text
towns = pd.DataFrame({f"column{i}": range(40) for i in range(30)}, pd.Index(range(40), name="town"))
long = "Describe this table in plain English. " * 4
messages = [["system", long], ["user", f"{long}\\n\\n{to_text(towns)}"]]
Table(("", ""), messages, "nothing was sent", verbatim=True)
"""
# The number of lines of an element, and whether it scrolls.
_LINES = """box => {
    const range = document.createRange();
    range.selectNodeContents(box);
    const tops = [...range.getClientRects()].map(line => Math.round(line.top));
    return [new Set(tops).size, box.scrollWidth > box.clientWidth];
}"""
_SHOW = """
for name, text in payloads({leak!r}).items():
    display({show})
"""
ANSWER = r'''
## Fitting a line

Ordinary **least squares** minimises the *sum* of squared residuals, `rss`, over $n$ points
$(x_i, y_i)$[^1]. It costs between $5 and $10 to run; see [the manual](https://example.org/ols).

1. Centre the data, so that $\bar{x} = 0$.
2. Solve for the slope:

$$
\hat\beta_1 = \frac{\sum_{i=1}^{n} (x_i - \bar{x})(y_i - \bar{y})}{\sum_{i=1}^{n} (x_i - \bar{x})^2}
$$

   - with the intercept \(\hat\beta_0 = \bar y - \hat\beta_1 \bar x\)
   - and nothing else

In the terms of matrices:
\begin{align}
X^\top X \hat\beta &= X^\top y \\
\hat\beta &= (X^\top X)^{-1} X^\top y
\end{align}

- [x] centre
- [ ] solve, then check $R^2$

| Method | Cost | Exact? |
|:-------|-----:|:------:|
| `lstsq` | $O(nd^2)$ | yes |
| gradient descent | $O(ndk)$ | no |

```python
import numpy as np

@dataclass
class Line:
    """A fitted line."""
    slope: float = 0.0

def fit(x: np.ndarray, y: np.ndarray) -> Line:
    # Centre first: it is better conditioned.
    xc = x - x.mean()
    if not len(x):
        raise ValueError(f"no points in {x!r}")
    return Line(slope=float(xc @ y / (xc @ xc)))  # a long comment that does not fit into one line of it
```

> **Note** Outliers pull the line. ![a plot](https://plots.example/ols.png)

```bash
pip install numpy && echo "done: $HOME"
```

Read `help(np.linalg.lstsq)` next, or https://numpy.org/doc/stable/.

[^1]: Not all on one line, so that $x_i \ne x_j$ for some.
'''

_LETTERS = "abcdef0123" * 60
WIDE = f"""
{_LETTERS} https://example.org/{_LETTERS} `{_LETTERS}`

# {_LETTERS}

- {_LETTERS}

{"> " * 12}deep

|{" a column |" * 40}
|{"---|" * 40}
|{" b |" * 40}

```
{_LETTERS}
```

$$
a{" + a" * 200}
$$

Inline $b{" + b" * 100}$ and 100 items:

99. a
100. b
"""
# The outputs that are wider than their cell, and the boxes that scroll.
_WIDTHS = """area => {
    const wide = element => element.scrollWidth > element.clientWidth + 1;
    const outputs = [...area.querySelectorAll('.jp-OutputArea-output')];
    const boxes = '[style*="overflow-x"] > table, pre, div.mathjax_process, span.mathjax_process';
    return [outputs.filter(wide).length,
        [...area.querySelectorAll(boxes)].map(
            box => wide(box.tagName === 'TABLE' ? box.parentElement : box))];
}"""


def _touch_everything(lab: Lab) -> None:
    """Move over, focus and toggle every element, and give late scripts their time."""
    lab.page.evaluate(
        """() => document.querySelectorAll('.jp-OutputArea-output *').forEach(element =>
            ['mouseover', 'mouseenter', 'pointerover', 'focus', 'toggle', 'load', 'error'].forEach(
                name => element.dispatchEvent(new Event(name))))"""
    )
    lab.page.wait_for_timeout(3000)


def _pwned(lab: Lab) -> bool:
    return bool(lab.page.evaluate("() => window.__pwned !== undefined"))


def _assert_harmless(lab: Lab, recorder: Recorder) -> None:
    _touch_everything(lab)
    assert not _pwned(lab)
    assert recorder.requests == []
    output = lab.output(0).locator(".jp-OutputArea-output")
    active = "img, script, iframe, object, embed, form, link, style, meta, base, svg, video"
    active += ", input:not([type=checkbox]:disabled)"
    assert output.locator(f":is({active})").count() == 0
    assert output.locator("mjx-container :is(a, [id], [class*='jp-'])").count() == 0
    assert output.locator("mjx-container [style*='url']").count() == 0
    assert output.locator("a:not([href^='http'], [href^='mailto:'], [href^='#'])").count() == 0


@pytest.mark.usefixtures("page_is_left")
def test_what_the_package_renders_runs_nothing(lab: Lab, recorder: Recorder) -> None:
    shows = ("HTML(render(text))", "Markdown(text)")
    lab.open([_IMPORTS + _SHOW.format(leak=recorder.url, show=show) for show in shows])
    outputs = lab.run(0)
    assert {output["output_type"] for output in outputs} == {"display_data"}
    assert len(outputs) > 90
    _assert_harmless(lab, recorder)
    lab.reopen()
    assert len(lab.outputs(0)) == len(outputs)
    _assert_harmless(lab, recorder)
    # One of the payloads replaces the page, so there is no end of the cell to wait for.
    lab.start(1)
    until(lambda: bool(recorder.requests), "the test sees nothing", within=60)


_HOSTILE_ANSWERS = """
from tests.payloads import payloads
for text in payloads({leak!r}).values():
    backend.will(*whole_answer(text + "\\n\\n" + text))
"""


@pytest.mark.usefixtures("page_is_left")
def test_hostile_text_in_a_panel_runs_nothing(lab: Lab, recorder: Recorder) -> None:
    show = "from llm_magic.notebook.panel import ControlPanel\npanel = ControlPanel(llm)\npanel.box"
    plain = f"import ipywidgets\nipywidgets.HTML(payloads({recorder.url!r})['img src'])"
    lab.open([SCRIPTED + _HOSTILE_ANSWERS.format(leak=recorder.url), show, _ASK_ALL, plain])
    lab.run(0)
    open_panel(lab, 1)
    assert lab.run(2, timeout=120) == []
    lab.page.wait_for_timeout(1000)
    _touch_everything(lab)
    assert not _pwned(lab)
    assert recorder.requests == []
    conversation = lab.output(1).locator(".llm-panel .llm-scroll")
    active = "img, script, iframe, object, embed, form, input, link, style, meta, base, svg, video"
    # Task lists have check boxes that cannot be clicked.
    harmless = "mjx-container *, input[type=checkbox]:disabled"
    found = conversation.locator(f":is({active}):not({harmless})")
    assert found.evaluate_all("all => all.map(one => one.outerHTML)") == []
    assert conversation.locator("mjx-container :is(a, [id], [class*='jp-'])").count() == 0
    assert (
        conversation.locator("a:not([href^='http'], [href^='mailto:'], [href^='#'])").count() == 0
    )
    # The same text as plain HTML does run.
    lab.start(3)
    until(lambda: bool(recorder.requests), "the test sees nothing")


# Every payload as question and as answer, and as a complaint, as the panel itself asks.
_ASK_ALL = """
import time
panel.asking.chat.value = True
for text in list(payloads().values()):
    assert panel.asking.ask(text)
    while llm.answering:
        time.sleep(0.01)
    panel.asking.message.show(text)
    panel.draw()
"""


def test_an_answer_is_typeset_follows_the_theme_and_fits_its_cell(lab: Lab, tmp_path: Path) -> None:
    lab.open([f"{_IMPORTS}HTML(render({ANSWER!r}))", f"HTML(render({WIDE!r}))", _DRY_RUN])
    lab.run(0)
    output = lab.output(0)
    output.locator("mjx-container").nth(9).wait_for()
    assert output.locator("mjx-container").count() == 10
    assert "between $5 and $10" in lab.text(0)
    assert [box.is_checked() for box in output.get_by_role("checkbox").all()] == [True, False]
    keyword = output.get_by_text("import", exact=True)
    colors = []
    for theme in ("JupyterLab Light", "JupyterLab Dark"):
        lab.theme(theme)
        lab.screenshot(tmp_path / f"{theme[11:].lower()}.png", 0)
        colors.append(keyword.evaluate("element => getComputedStyle(element).color"))
    assert colors == ["rgb(0, 128, 0)", "rgb(76, 175, 80)"]
    lab.run(1)
    lab.output(1).locator("mjx-container").nth(1).wait_for()
    for width in (1200, 600):
        lab.page.set_viewport_size({"width": width, "height": 1400})
        lab.page.wait_for_timeout(300)
        until(lambda: lab.output(1).evaluate(_WIDTHS) == [0, [True] * 4], f"too wide at {width}")
    assert lab.output(1).get_by_text("deep").bounding_box()["width"] > 100  # type: ignore[index]
    lab.run(2)
    dry_run = lab.output(2)
    dry_run.get_by_text("nothing was sent").wait_for()
    excess = "cell => cell.scrollWidth - cell.clientWidth"
    prose, rows = dry_run.locator("td").nth(1), dry_run.locator("td > div")
    for width in (1200, 600):
        lab.page.set_viewport_size({"width": width, "height": 1400})
        lab.page.wait_for_timeout(300)
        until(lambda: dry_run.evaluate(excess) == 0, f"too wide at {width}")
        # The rows of the table are not wrapped but scroll; the prose is wrapped.
        until(lambda: [row.evaluate(_LINES) for row in rows.all()] == [[23, True]], "wrapped rows")
        lines, scrolls = prose.evaluate(_LINES)
        assert lines > 1
        assert not scrolls
    lab.screenshot(tmp_path / "dry_run_dark.png", 2)
    lab.theme("JupyterLab Light")
    lab.screenshot(tmp_path / "dry_run_light.png", 2)
