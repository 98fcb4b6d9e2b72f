"""Language models in a notebook: ``%load_ext llm_magic``, then ``%llm_load`` and ``%%llm``.

``from llm_magic import llm`` gives Python code the same session that the magics use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from llm_magic.session import Session
    from llm_magic.types import Reply as Reply

    llm: Session

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Create ``llm``, or import `Reply`, on first use, so that the import of the package stays cheap."""
    if name == "llm":
        from llm_magic.session import kernel_session

        return kernel_session()
    if name == "Reply":
        from llm_magic.types import Reply

        return Reply
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), "llm", "Reply"]


def allow_nested_loops() -> None:
    """Make ``asyncio.run(...)`` work inside cells, by nest-asyncio2 (``pip install 'llm_magic[nested]'``).

    It patches asyncio for the whole process, so you have to call it yourself. It raises
    `EventLoopError` if that would lose queued cells.
    """
    from llm_magic.session.nested_asyncio import allow

    allow()


def load_ipython_extension(ip: InteractiveShell) -> None:
    """Register the magics; imports nothing heavy."""
    import warnings

    from llm_magic.notebook.magics import register
    from llm_magic.session import kernel_session
    from llm_magic.session.nested_asyncio import problem

    if found := problem():
        warnings.warn(str(found), stacklevel=2)

    register(ip, kernel_session())


def unload_ipython_extension(ip: InteractiveShell) -> None:
    """Remove the magics, free the models and close all connections; ``%reload_ext`` keeps them."""
    from llm_magic.notebook import reloading
    from llm_magic.notebook.magics import unregister

    if reloading.is_reload(ip):
        reloading.prepare(ip)
    else:
        unregister(ip)
