"""A real JupyterLab in a real Chromium: what a user sees, and what a page could do to the user.

Needs `apt-get install chromium` and `pip install -e '.[browser,demo]'`. Chromium never reaches
beyond this machine. One server, one browser and one window serve all tests: to load JupyterLab takes
longer than most of them. Each test, or each module, gets a new notebook and kernel; a test that leaves
something in the page leaves the page.
"""

from __future__ import annotations

import itertools
import os
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.request import urlopen

import pytest

from tests import without_grammars
from tests.browser.lab import Lab, Server
from tests.browser.recorder import Recorder, recording

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page, ViewportSize

_ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or "/usr/bin/chromium"
CHROMIUM_OPTIONS = (
    "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update "
    "--disable-sync --no-first-run --disable-dev-shm-usage "
    # Pages are short-lived: what loads them once is not worth optimizing.
    "--js-flags=--min-semi-space-size=64,--no-turbofan,--no-maglev"
)
_NUMBERS = itertools.count(1)
_SIZE: ViewportSize = {"width": 1200, "height": 1400}
# Cells outside of the view stay in the page; JupyterLab does not check for news or updates.
_LAB_SETTINGS = """{
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
    "@jupyterlab/apputils-extension:notification": {
        "checkForUpdates": false, "doNotDisturbMode": true, "fetchNews": "false"
    }
}"""


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Start `jupyter lab` with a home of its own, and stop it with its kernels."""
    home = tmp_path_factory.mktemp("jupyter")
    _install_wheel_data(home / "data", tmp_path_factory.mktemp("wheel"))
    with jupyter_lab(home) as server:
        yield server


def _install_wheel_data(data: Path, folder: Path) -> None:
    """Build the wheel of this checkout, and copy its files for Jupyter: the extension of JupyterLab."""
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=_ROOT, check=True, capture_output=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        for name in wheel.namelist():
            _, is_data, path = name.partition("/data/share/jupyter/")
            if is_data and not name.endswith("/"):
                target = data / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(wheel.read(name))


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Start Chromium."""
    try:  # here, because pytest reads this file for the other tests, too
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.fail("The browser tests need Playwright; type: pip install playwright")
    if not Path(CHROMIUM).exists():
        pytest.fail("The browser tests need Chromium; type: apt-get install -y chromium")
    with sync_playwright() as playwright:
        options = CHROMIUM_OPTIONS.split()
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


class _Window:
    """The window that tests share, until it is left."""

    def __init__(self, browser: Browser) -> None:
        self._browser = browser
        self._context: BrowserContext | None = None

    def page(self) -> Page:
        """Return its page, in the size that it has for each test."""
        if self._context is None:
            self._context = self._browser.new_context()
            self._context.new_page()
        page, *others = self._context.pages
        for opened in others:
            opened.close()
        page.set_viewport_size(_SIZE)
        return page

    def leave(self) -> None:
        """Close it; the next test gets another one."""
        if self._context is not None:
            self._context.close()
            self._context = None


@pytest.fixture(scope="session")
def window(browser: Browser) -> Iterator[_Window]:
    """Return the window that tests share."""
    window = _Window(browser)
    yield window
    window.leave()


@pytest.fixture
def lab(request: pytest.FixtureRequest, server: Server, window: _Window) -> Iterator[Lab]:
    """Return JupyterLab in the window that tests share; `lab.open([...])` comes first."""
    with _lab(request, server, window) as lab:
        yield lab


@contextmanager
def _lab(request: pytest.FixtureRequest, server: Server, window: _Window) -> Iterator[Lab]:
    failed = request.session.testsfailed
    lab = Lab(window.page(), server, f"test-{next(_NUMBERS)}.ipynb")
    yield lab
    if request.session.testsfailed > failed:  # It may have left anything.
        window.leave()
    lab.shut_down_kernels()


@pytest.fixture(scope="module")
def lab_of_module(request: pytest.FixtureRequest, server: Server, window: _Window) -> Iterator[Lab]:
    """Return `lab` for one notebook that all tests of a module share."""
    with _lab(request, server, window) as lab:
        yield lab


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    """Start a server that records what a page requests."""
    with recording() as running:
        yield running


@pytest.fixture
def page_is_left(window: _Window) -> Iterator[None]:
    """Leave the page after the test, for what stays in it: scripts that run. The next test loads it again."""
    yield
    window.page().goto("about:blank")


@contextmanager
def jupyter_lab(home: Path) -> Iterator[Server]:
    (home / "notebooks").mkdir()
    (home / "config" / "labconfig").mkdir(parents=True)
    (home / "config" / "labconfig" / "default_setting_overrides.json").write_text(_LAB_SETTINGS)
    server = Server(f"http://127.0.0.1:{_free_port()}", home / "notebooks")
    with (
        (home / "server.log").open("w") as log,
        subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *_lab_options(server)],
            env=_environment(home),
            stdout=log,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        try:
            _wait_until_up(server, process, home / "server.log")
            yield server
        finally:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                # It has ended all kernels, and waits for a thread of its own.
                process.kill()


def _lab_options(server: Server) -> list[str]:
    return [
        f"--ServerApp.port={server.url.rpartition(':')[2]}",
        f"--ServerApp.root_dir={server.folder}",
        "--ServerApp.port_retries=0",
        "--IdentityProvider.token=",
        "--ip=127.0.0.1",
        "--no-browser",
        "--allow-root",
        "--expose-app-in-browser",
        # Fixtures end kernels by plain HTTP requests.
        "--ServerApp.disable_check_xsrf=True",
    ]


def _environment(home: Path) -> dict[str, str]:
    return {
        **os.environ,
        # Not what is installed beside Python comes first: the extension of this checkout.
        "JUPYTER_PREFER_ENV_PATH": "0",
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_DATA_DIR": str(home / "data"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
        "IPYTHONDIR": str(home / "ipython"),
        "PYTHONPATH": without_grammars.path(_ROOT, os.environ.get("PYTHONPATH")),
    }


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _wait_until_up(server: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urlopen(f"{server.url}/api/status", timeout=5):
                return
        except OSError:  # a URLError, or what the connection itself raises
            time.sleep(0.2)
    pytest.fail(f"jupyter lab did not start:\n{log.read_text()[-3000:]}")
