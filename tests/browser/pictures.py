"""The pictures of the README and the notebooks, taken anew: ``scripts/take-pictures``.

From a real JupyterLab with the bundled model. Open them before you commit them.
"""

from __future__ import annotations

import io
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from tests.browser.conftest import CHROMIUM, CHROMIUM_OPTIONS, jupyter_lab
from tests.browser.lab import Lab, Server
from tests.browser.panel import open_panel
from tests.kernels import ROOT

IMAGES = ROOT / "notebooks" / "images"
_SECONDS = 1000  # Playwright counts milliseconds
_QUESTIONS = (
    "What is the capital of France?",
    "Write a Python function that returns the square of a number.",
)
# What is run before the film and in it.
_SETUP = ("%load_ext llm_magic\n%llm_load",)
_FILMED = (
    'task = "checks whether a number is even"',
    "%%llm -t 0 --repetition-penalty 1 -o reply\nWrite a Python function that {task}.",
    "print(reply.usage.completion_tokens, reply.finish_reason)\nprint(reply.code())",
)
_STILL_S = 0.7
# No cursor blinks, which would be a new frame each time.
_FILM_STYLE = ".cm-cursorLayer { display: none }"


def panel(lab: Lab, file: Path) -> None:
    """Load a model, ask it twice in the panel, and show that."""
    setting = "%llm_config temperature=0 repetition_penalty=1"
    lab.open(["%load_ext llm_magic", "%llm_load", setting, "%llm_panel"])
    # In all of the width that the page has, as beside its prompt.
    for name in ("application:toggle-left-area", "statusbar:toggle"):
        lab.command(name)
    for index in range(3):
        lab.run(index, timeout=300)
    shown = open_panel(lab, 3)
    shown.check("Keep the conversation").click()
    for question in _QUESTIONS:
        shown.ask(question)
        lab.page.wait_for_timeout(1 * _SECONDS)
        shown.at(".llm-copy").last.wait_for(timeout=120 * _SECONDS)
        # What was asked last is answered when the prompt takes another.
        lab.page.wait_for_function(
            "() => [...document.querySelectorAll('.llm-panel button')]"
            ".some(button => button.innerText === 'Stop' && button.disabled)",
            timeout=120 * _SECONDS,
        )
    lab.page.wait_for_timeout(1 * _SECONDS)
    shown.box.screenshot(path=file)


def streaming(lab: Lab, file: Path) -> None:
    """Film two cells, as fast as they are: an answer while it is generated, and its use in Python."""
    lab.open([*_SETUP, *_FILMED], "hello.ipynb")
    for side in ("left", "right"):
        lab.command("application:toggle-side-tabbar", side=side)
    lab.command("application:toggle-left-area")
    for index in range(len(_SETUP)):
        lab.run(index, timeout=300)
    lab.page.add_style_tag(content=_FILM_STYLE)
    frames: list[tuple[float, bytes]] = []
    for index in range(len(_SETUP), len(_SETUP) + len(_FILMED)):
        _film(lab, frames, _STILL_S)
        lab.start(index)
        _film(lab, frames, _STILL_S, partial(lab.is_running, index))
    frames.append((time.monotonic() + 3 * _STILL_S, frames[-1][1]))
    _save(frames, file)


def _film(
    lab: Lab,
    frames: list[tuple[float, bytes]],
    seconds: float,
    goes_on: Callable[[], bool] = lambda: False,
) -> None:
    """Add pictures of the page until `seconds` have passed and `goes_on` is false."""
    end = time.monotonic() + seconds
    while time.monotonic() < end or goes_on():
        frames.append((time.monotonic(), lab.page.screenshot()))


def _save(frames: list[tuple[float, bytes]], file: Path) -> None:
    """Write a moving picture that shows each frame until the next one; equal ones are one."""
    distinct = [
        frame
        for before, frame in zip([(0.0, b""), *frames], frames, strict=False)
        if before[1] != frame[1]
    ]
    ends = [*(when for when, _ in distinct[1:]), frames[-1][0]]
    first, *others = (Image.open(io.BytesIO(png)).convert("RGB") for _, png in distinct)
    first.save(
        file,
        save_all=True,
        append_images=others,
        duration=[
            round(1000 * (end - when)) for (when, _), end in zip(distinct, ends, strict=True)
        ],
        loop=0,
        lossless=True,
        method=6,
    )


PICTURES: dict[str, tuple[Callable[[Lab, Path], None], tuple[int, int]]] = {
    "streaming.webp": (streaming, (860, 600)),
    "panel.png": (panel, (1200, 1400)),
}


def main(names: Sequence[str]) -> int:
    """Take those of these names, or all of them; returns the exit code."""
    with tempfile.TemporaryDirectory(prefix="llm_magic-pictures-") as folder:
        home = Path(folder)
        with jupyter_lab(home) as server, sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=CHROMIUM, args=CHROMIUM_OPTIONS.split()
            )
            for name in names or PICTURES:
                take, size = PICTURES[name]
                _taken(browser, server, take, size, IMAGES / name)
            browser.close()
    return 0


def _taken(
    browser: Browser,
    server: Server,
    take: Callable[[Lab, Path], None],
    size: tuple[int, int],
    file: Path,
) -> None:
    with browser.new_context(viewport={"width": size[0], "height": size[1]}) as context:
        lab = Lab(context.new_page(), server)
        take(lab, file)
        lab.shut_down_kernels()
    sys.stdout.write(f"{file.name}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
