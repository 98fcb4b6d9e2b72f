"""What the frontend sends with a cell: its id, deleted cells; clicks while a cell runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from llm_magic.session.cell_keys import Cell

if TYPE_CHECKING:
    from comm.base_comm import BaseComm, CommManager
    from IPython.core.interactiveshell import InteractiveShell

# The comm that labextension/llm_magic.js opens with the ids of outputs that a page has not seen the end of.
_COMM = "llm_magic.outputs"


def reach_busy_kernels() -> bool:
    """Return whether this kernel handles a click while a cell runs: ipykernel 7.1 to 7.3 do."""
    try:
        major, minor = map(int, version("ipykernel").split(".")[:2])
    except (PackageNotFoundError, ValueError):
        return False
    return major == 7 and 1 <= minor <= 3


def running_cell(shell: InteractiveShell) -> Cell | None:
    """Return the running cell from the frontend's request, or None outside of a kernel's cells."""
    parent = _request(shell)
    header = parent.get("header", {})
    if header.get("msg_type") != "execute_request":
        return None
    cell_id = parent.get("metadata", {}).get("cellId") or ""
    return Cell(str(cell_id), str(parent["content"]["code"]), str(header["msg_id"]))


def deleted_cells(shell: InteractiveShell) -> list[str]:
    """Return the ids of cells that were deleted since the last run, if the frontend sends them."""
    deleted = _request(shell).get("metadata", {}).get("deletedCells")
    return [str(cell) for cell in deleted] if isinstance(deleted, list) else []


def serve_outputs(shell: InteractiveShell, send_again: Callable[[Iterable[str]], None]) -> None:
    """Call `send_again` with the ids of the outputs that a page asks for after it was loaded again."""
    if (comms := _comm_manager(shell)) is not None:
        comms.register_target(_COMM, functools.partial(_serve, send_again))


def stop_serving_outputs(shell: InteractiveShell) -> None:
    """Undo `serve_outputs`."""
    if (comms := _comm_manager(shell)) is not None:
        comms.targets.pop(_COMM, None)


def _serve(
    send_again: Callable[[Iterable[str]], None], comm: BaseComm, message: dict[str, Any]
) -> None:
    send_again(message["content"]["data"]["display_ids"])
    comm.close()


def _comm_manager(shell: InteractiveShell) -> CommManager | None:
    return getattr(getattr(shell, "kernel", None), "comm_manager", None)


def _request(shell: InteractiveShell) -> dict[str, Any]:
    get_parent = getattr(shell, "get_parent", None)
    return get_parent() or {} if get_parent is not None else {}
