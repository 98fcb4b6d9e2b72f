"""An answer while it is written, and at the end, as a person sees it."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_magic.notebook.display.markdown import render
from tests.browser.lab import Lab
from tests.browser.test_hostile_output import ANSWER

pytestmark = pytest.mark.browser

_SETUP = """
from llm_magic.notebook.magics import register
from llm_magic.session import Session
from tests.scripted import Pause, ScriptedBackend
backend = ScriptedBackend()
llm = Session(create=lambda _name: backend)
register(get_ipython(), llm)
%llm_load tiny
"""
_SCRIPT = """
import itertools, pathlib, threading, time
from tests.scripted import Hang, whole_answer
tokens = [text[start:start + 4] for start in range(0, len(text), 4)]
hang = Hang()
half = (text.index("import") + 30) // 4
paced = lambda part: itertools.chain.from_iterable((token, Pause(0.01)) for token in part)
backend.will(*paced(tokens[:half]), hang, *paced(tokens[half:]), *whole_answer())
def go_on():
    hang.reached.wait()
    while not pathlib.Path({file!r}).exists():
        time.sleep(0.05)
    hang.go.set()
threading.Thread(target=go_on).start()
"""
# In every frame that is painted: has the answer gone, shrunk, or a formula lost its form?
_OBSERVE = """() => {
    window.__observes = true;
    window.__frames = window.__gone = window.__shrunk = window.__raw = 0;
    let height = 0, formulas = 0;
    const look = () => {
        const area = document.querySelectorAll('.jp-Notebook .jp-Cell')[2]
            .querySelector('.jp-OutputArea-output');
        if (area && area.innerText.trim()) height = height || 1;
        if (area && height) {
            const typeset = area.querySelectorAll('mjx-container').length;
            window.__frames++;
            window.__gone += !area.innerText.trim();
            window.__shrunk += area.offsetHeight < height - 60;
            window.__raw += typeset < formulas;
            height = area.offsetHeight;
            formulas = typeset;
        }
        if (window.__observes) requestAnimationFrame(look);
    };
    requestAnimationFrame(look);
}"""


def _frames(lab: Lab, what: str) -> int:
    return int(lab.page.evaluate(f"() => window.__{what}"))


def test_answer_grows_in_one_output(lab: Lab, tmp_path: Path) -> None:
    go_on = tmp_path / "go on"
    script = f"text = {ANSWER!r}{_SCRIPT.format(file=str(go_on))}"
    lab.open([_SETUP, script, "%%llm\nExplain."])
    lab.run(0)
    lab.run(1)
    lab.start(2)
    output = lab.output(2)
    output.get_by_text("import").wait_for()
    for theme in ("Light", "Dark"):
        lab.theme(f"JupyterLab {theme}")
        lab.screenshot(tmp_path / f"midway-{theme.lower()}.png", 2)
    assert "tokens/s" not in lab.text(2)
    (midway,) = lab.outputs(2)
    go_on.touch()
    lab.wait(2)
    output.locator("mjx-container").nth(6).wait_for()
    for theme in ("Light", "Dark"):
        lab.theme(f"JupyterLab {theme}")
        lab.screenshot(tmp_path / f"end-{theme.lower()}.png", 2)
    (whole,) = lab.outputs(2)
    assert whole["output_type"] == "display_data"
    assert set(whole["data"]) == {"text/html", "text/plain"}
    html, plain = ("".join(whole["data"][kind]) for kind in ("text/html", "text/plain"))
    assert html.startswith(render(ANSWER.strip()))
    assert html.count("tokens/s") == 1
    assert plain.startswith(ANSWER.strip())
    assert "".join(midway["data"]["text/html"]).count("<pre") == 1


def test_update_of_an_answer_neither_flickers_nor_scrolls(lab: Lab) -> None:
    script = f"text = {ANSWER!r} * 3{_SCRIPT.format(file=lab.server.folder.as_posix())}"
    lab.open([_SETUP, script, "%%llm\nExplain.", "# the end"])
    lab.run(0)
    lab.run(1)
    lab.page.evaluate(_OBSERVE)
    lab.start(2)
    lab.output(2).get_by_text("import").first.wait_for()
    position = "document.querySelector('.jp-WindowedPanel-outer').scrollTop"
    lab.page.evaluate(f"() => {{ {position} = 100; }}")
    lab.wait(2)
    lab.page.wait_for_timeout(500)
    assert lab.page.evaluate(f"() => {position}") == 100
    lab.page.evaluate("() => { window.__observes = false; }")
    seen = {what: _frames(lab, what) for what in ("frames", "gone", "shrunk", "raw")}
    assert seen.pop("frames") > 20
    assert seen == {"gone": 0, "shrunk": 0, "raw": 0}
