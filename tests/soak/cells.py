"""The kinds of cells that are interrupted: what runs, and where its text is shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# "view": the answer is drawn; "stdout": it is written; "none": the cell shows no answer.
Shown = Literal["view", "stdout", "none"]


@dataclass(frozen=True)
class Kind:
    """One kind of cell; what is in braces in its code is filled in for each run."""

    name: str
    code: str
    shown: Shown = "none"
    # Run first, without an interrupt.
    before: str = ""

    @property
    def answers(self) -> bool:
        """Whether the cell produces one answer, which `llm.last` must hold afterwards."""
        return self.shown != "none" or self.name in {"generate", "agenerate", "assignment"}

    @property
    def in_background(self) -> bool:
        """Whether a job may run when the cell has ended."""
        return "llm --bg" in self.code + self.before


_OPTIONS = "-m {model} --max-new-tokens 100"
_ARGUMENTS = '"{prompt}", model="{model}", max_new_tokens=100'

KINDS = (
    Kind("cell", f"%%llm {_OPTIONS}\n{{prompt}}", "view"),
    Kind("line", f"%llm {_OPTIONS} {{prompt}}", "view"),
    Kind("assignment", f"x = %llm {_OPTIONS} {{prompt}}", "view"),
    Kind("plain", f"%%llm --plain {_OPTIONS}\n{{prompt}}", "stdout"),
    Kind("chat", f"%%llm -c talk --trim {_OPTIONS}\n{{prompt}}", "view"),
    Kind("code", f"%%llm -f code {_OPTIONS}\n{{prompt}}", "view"),
    Kind("generate", f"reply = llm.generate({_ARGUMENTS})"),
    Kind(
        "stream",
        f"for chunk in llm.stream({_ARGUMENTS}):\n    print(chunk.text, end='', flush=True)",
        "stdout",
    ),
    Kind("agenerate", f"reply = await llm.agenerate({_ARGUMENTS})"),
    Kind(
        "astream",
        f"async for chunk in llm.astream({_ARGUMENTS}):\n    print(chunk.text, end='', flush=True)",
        "stdout",
    ),
    Kind(
        "gather",
        f"replies = await asyncio.gather(*(llm.agenerate({_ARGUMENTS}) for _ in range(3)))",
    ),
    Kind("background", f"%%llm --bg {_OPTIONS}\n{{prompt}}"),
    Kind("wait", "%llm_wait", before=f"%%llm --bg -o job {_OPTIONS}\n{{prompt}}"),
    Kind("await job", "await job", before=f"%%llm --bg -o job {_OPTIONS}\n{{prompt}}"),
    Kind("job result", "job.result()", before=f"%%llm --bg -o job {_OPTIONS}\n{{prompt}}"),
    Kind("loop", f"for _ in range(3):\n    llm.generate({_ARGUMENTS})"),
    Kind(
        "load later", "%llm -m spare {prompt}", "view",
        before="forget()\n%llm_load {folder} --keep --name spare --bg",
    ),
    Kind("dry run", f"%%llm --dry-run {_OPTIONS}\n{{prompt}}"),
    Kind("load local", "%llm_load {folder} --keep --name spare", before="forget()"),
    Kind("load server", "%llm_load {spare} --keep --name spare", before="forget()"),
    Kind("load in Python", "llm.load({load}, keep=True, name='spare')", before="forget()"),
    Kind(
        "unload", "%llm_unload spare",
        before="forget()\n%llm_load {folder} --keep --name spare",
    ),
    Kind("models", "%llm_models -b openai --base-url {url}"),
    Kind("status", "%llm_status"),
    Kind("config", "%llm_config temperature=0.5"),
    Kind("jobs", "%llm_jobs"),
    Kind("doctor", "%llm_doctor"),
)  # fmt: skip
