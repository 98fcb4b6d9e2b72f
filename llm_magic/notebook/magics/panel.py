"""``%llm_panel``: show the control panel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from IPython.core.magic import magics_class

from llm_magic.errors import MissingDependency
from llm_magic.notebook.magics.base import SessionMagics, line_magic

if TYPE_CHECKING:
    from collections.abc import Sequence

    from IPython.core.interactiveshell import InteractiveShell

    from llm_magic.notebook.panel import ControlPanel
    from llm_magic.session import Session


# What a terminal shows, and a frontend without widgets.
_NO_PANEL = "The panel needs a notebook. Run %llm_help to list magics that do the same.\n"
_STATIC_TEXT = (
    "The llm_magic control panel. It needs widgets; %llm_help lists magics that do the same."
)


@magics_class
class PanelMagics(SessionMagics):
    """The magic for the control panel. All cells display the same one."""

    def __init__(self, shell: InteractiveShell, session: Session) -> None:
        super().__init__(shell, session)
        self.panel: ControlPanel | None = None

    def take_panel(self, before: Sequence[SessionMagics]) -> None:
        """Continue the panel of what was registered before for the same session."""
        for magics in before:
            if isinstance(magics, PanelMagics) and magics.session is self.session:
                self.panel = magics.panel

    @line_magic
    def llm_panel(self, line: str) -> None:
        """Show the control panel, in a notebook."""
        from llm_magic.notebook.display.live_output import is_notebook, write

        self.parse("llm_panel", line, fill=False)
        if not is_notebook(self.shell):
            write(_NO_PANEL)
            return
        if self.panel is None or self.panel.is_closed:
            self.panel = _new_panel(self.session, self.notebook_names)
        else:
            self.panel.loading.refresh()
        _show(self.panel)


def _new_panel(session: Session, names: Callable[[str], Mapping[str, Any]]) -> ControlPanel:
    missing = [name for name in ("ipywidgets", "anywidget") if find_spec(name) is None]
    if missing:
        raise MissingDependency(
            f"The panel needs {' and '.join(missing)}. Run: pip install 'llm_magic[panel]',"
            " then restart the kernel and reload the page."
        )
    from llm_magic.notebook.panel import ControlPanel

    return ControlPanel(session, names)


def _show(panel: ControlPanel) -> None:
    """Display a panel, and a static text for readers without a kernel."""
    from IPython.display import display

    static = {"text/html": panel.static_html(), "text/plain": _STATIC_TEXT}
    display(static, raw=True)  # type: ignore[no-untyped-call]
    # An empty text form: the default one is the repr of the widget, a page of markup.
    display({**panel.box._repr_mimebundle_(), "text/plain": ""}, raw=True)  # type: ignore[no-untyped-call]
