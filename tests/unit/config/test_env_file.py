"""``.env`` files in all encodings and states: what is read of them, and the one line where they cannot be."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from IPython.core.completer import provisionalcompleter
from IPython.utils.capture import capture_output

from llm_magic.config.env_file import read_env_file
from llm_magic.config.settings import Settings
from llm_magic.errors import OptionError, SettingsError
from llm_magic.notebook.arguments.magic_options import MAGICS
from llm_magic.notebook.magics import register, unregister
from llm_magic.session import Session
from tests.shell import ipython

TEXT = '# Größe 🙂\nDEFAULT_LLM_TOP_K=7\r\nDEFAULT_MODEL_NAME_OR_PATH="modèle"\n'


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder, with none of the settings in the environment."""
    for name in list(os.environ):
        if name.startswith(("LLM_", "DEFAULT_LLM", "DEFAULT_MODEL")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings_of_editors_and_shells_are_read(encoding: str) -> None:
    Path(".env").write_bytes(TEXT.encode(encoding))
    settings = Settings.read()
    assert (settings.top_k, settings.model) == (7, "modèle")


def test_utf_16_big_endian_is_read() -> None:
    Path(".env").write_bytes(b"\xfe\xff" + TEXT.encode("utf-16-be"))
    assert Settings.read().top_k == 7


def test_names_ignore_case_and_empty_values_are_unset() -> None:
    Path(".env").write_text("default_llm_top_k=7\nDEFAULT_LLM_TOP_P=\nLLM_DEVICE\n")
    settings = Settings.read()
    assert (settings.top_k, settings.top_p, settings.device) == (7, 0.9, "auto")


def test_values_can_reference_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOST_OF_TEST", "example.org")
    Path(".env").write_text("PORT=81\nVLLM_BASE_URL=http://${HOST_OF_TEST}:${PORT}\n")
    assert Settings.read().vllm_base_url == "http://example.org:81"


def test_unknown_references_use_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAME_OF_TEST", "outer")
    Path(".env").write_text(
        "A=${NO_SUCH_NAME}|${NO_SUCH_NAME:-x}|${NAME_OF_TEST:-x}|${A}|$A|${A:b}\nNAME_OF_TEST=inner\n"
        "B=${NAME_OF_TEST}\nEMPTY\nC=${EMPTY:-x}\n"
    )
    read = read_env_file()
    assert read["A"] == "|x|outer||$A|${A:b}"
    assert (read["B"], read["EMPTY"], read["C"]) == ("inner", None, "")


def test_unbounded_expansion_raises(folder: Path) -> None:
    lines = [f"X{n}=${{X{n - 1}}}${{X{n - 1}}}" for n in range(1, 40)]
    Path(".env").write_text("\n".join(["X0=aaaaaaaaaa", *lines]))
    with pytest.raises(SettingsError) as caught:
        Settings.read()
    assert str(caught.value) == (
        f"After its ${{…}} references are replaced, {folder}/.env exceeds 1 MB, at X16."
        " Shorten the values that refer to each other."
    )


def test_many_references_take_seconds() -> None:
    began = time.monotonic()
    Path(".env").write_text("".join(f"A{n}=${{HOME}}\n" for n in range(8_000)))
    read_env_file()
    Path(".env").write_text("A=" + "${" * 100_000 + "\nB=" + "${:" * 100_000 + "}\n")
    read_env_file()
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("make", [lambda: None, Path(".env").mkdir], ids=["none", "folder"])
def test_missing_file_and_folder_have_no_variables(make: Callable[[], None]) -> None:
    make()  # `python -m venv .env` makes such a folder
    assert Settings.read().top_k == 50


def test_pipe_is_read() -> None:
    os.mkfifo(".env")
    writer = threading.Thread(target=Path(".env").write_text, args=("DEFAULT_LLM_TOP_K=7\n",))
    writer.start()
    assert Settings.read().top_k == 7
    writer.join()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"A=1\nB=caf\xe9\n", "line 2, is not UTF-8. Save the file as UTF-8."),
        (b"\xff\xfeA\x00=", "line 1, is not UTF-16. Save the file as UTF-8."),
        ("A=1\nB=2".encode("utf-16-le"), "line 1, is not text: it contains a NUL character. Save"),
        ("A=1".encode("utf-32"), "line 1, is not text: it contains a NUL character. Save"),
        (b"A=1\nB=a\0b\n", "line 2, is not text: it contains a NUL character. Save"),
    ],
)
def test_undecodable_file_raises_with_line_number(folder: Path, data: bytes, reason: str) -> None:
    Path(".env").write_bytes(data)
    with pytest.raises(SettingsError) as caught:
        Settings.read()
    assert str(caught.value).startswith(f"{folder}/.env, {reason}")


def test_large_file_is_not_read() -> None:
    with Path(".env").open("wb") as file:
        file.truncate(1 << 30)  # a hole, which takes no space
    with pytest.raises(SettingsError, match="is larger than 1 MB"):
        Settings.read()


def test_unreadable_file_raises_with_path(folder: Path) -> None:
    # Rights do not stop the root user, whose tests these may be: a loop of links stops everybody.
    Path(".env").symlink_to("sub/.env")
    (folder / "sub").symlink_to("sub")
    assert read_env_file() == {}
    Path("locked").mkdir()
    (folder / "locked" / ".env").write_text("A=1")
    (folder / "locked" / ".env").chmod(0)
    if os.geteuid() != 0:
        with pytest.raises(SettingsError, match="cannot be read: Permission denied"):
            read_env_file("locked/.env")


@given(st.binary())
def test_any_bytes_are_read_or_raise_one_line(data: bytes) -> None:
    Path(".env").write_bytes(data)
    problem = ""
    try:
        read_env_file()
    except SettingsError as error:
        problem = str(error)
    assert "\n" not in problem


INVALID = {
    "latin-1": ("# Größe".encode("latin-1"), {}),
    "utf-16 without a mark": ("A=1".encode("utf-16-le"), {}),
    "addresses": (b"", {"VLLM_BASE_URL": "http://a..b", "OLLAMA_BASE_URL": "http://x:99999"}),
    "folders": (b"", {"LOCAL_MODELS_DIR": "~nobody_x", "LLM_MAGIC_CACHE_DIR": "~nobody_x"}),
    "files": (b"", {"SSL_CERT_FILE": "/nowhere.pem", "LLM_MAGIC_CACHE_DIR": "/dev/null"}),
    "proxies": (
        b"",
        {"HTTP_PROXY": "foo://bar", "HTTPS_PROXY": "http://[::1", "NO_PROXY": "[::,ü"},
    ),
}
# What each magic needs on its line to get to the settings.
LINES = {
    "llm": "Hello", "llm_load": "-b vllm", "llm_models": "-b openai", "llm_reset": "", "llm_explain": "",
}  # fmt: skip


@pytest.mark.usefixtures("failing_torch")
@pytest.mark.parametrize("case", INVALID)
def test_every_magic_reports_invalid_settings_in_one_line(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, environment = INVALID[case]
    Path(".env").write_bytes(data)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    session = Session()
    with ipython() as shell:
        register(shell, session)
        for name in MAGICS:
            with capture_output() as shown:
                ran = shell.run_cell(f"%{name} {LINES.get(name, '')}")  # type: ignore[no-untyped-call]
            failed = ran.error_before_exec or ran.error_in_exec
            assert failed is None or len(shown.stdout.splitlines()) == 1, shown.stdout
            assert "could not be checked" not in shown.stdout
        line = "%llm_load -b vllm --base-url h"
        with provisionalcompleter(), capture_output() as shown:
            assert shell.Completer is not None
            list(shell.Completer.completions(line, len(line)))
            list(shell.Completer.completions("%llm_load ~nobody_x/", 20))
        assert shown.stdout + shown.stderr == ""
        unregister(shell)
    session.close()


@pytest.mark.parametrize("address", ["", "  "])
def test_empty_address_is_not_the_default_address(address: str) -> None:
    session = Session()
    try:
        for use in (session.models, partial(session.load, "tiny")):
            with pytest.raises(OptionError, match=r"^'' is not a server address\. Use"):
                use(backend="openai", base_url=address)
    finally:
        session.close()


def test_invalid_address_in_variable_raises_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BASE_URL", "http://a..b")
    session = Session()
    try:
        with pytest.raises(
            SettingsError, match=r"'http://a\.\.b' is not a server address.* VLLM_BASE_URL"
        ):
            session.models("vllm")
        with pytest.raises(OptionError, match=r"'http://c\.\.d' is not a server address") as caught:
            session.models("vllm", base_url="http://c..d")
        assert "VLLM_BASE_URL" not in str(caught.value)
    finally:
        session.close()
