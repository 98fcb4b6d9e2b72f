"""``%llm_doctor``: check the installation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from IPython.core.magic import magics_class

from llm_magic.notebook.magics.base import SessionMagics, line_magic

if TYPE_CHECKING:
    from llm_magic.doctor import KernelInfo
    from llm_magic.notebook.display.tables import Table


@magics_class
class DoctorMagics(SessionMagics):
    """The magic that checks the installation."""

    @line_magic
    def llm_doctor(self, line: str) -> Table:
        """Check the installation, devices, caches and servers."""
        from llm_magic import doctor
        from llm_magic.notebook.display import messages

        self.parse("llm_doctor", line, fill=False)
        return messages.doctor_table(doctor.run_checks(self.session, self._kernel()))

    def _kernel(self) -> KernelInfo:
        from llm_magic.doctor import KernelInfo

        owner = self.shell.magics_manager.magics["cell"].get("llm")
        is_ours = isinstance(getattr(owner, "__self__", None), SessionMagics)
        kernel = getattr(self.shell, "kernel", None)
        return KernelInfo(
            owner="" if is_ours else str(getattr(owner, "__module__", "unknown")),
            in_kernel=kernel is not None,
            subshells=bool(getattr(kernel, "_supports_kernel_subshells", False)),
        )
