"""Rows of figures: medians with their spread, ratios, targets; as a table and as JSON."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from tests.benchmarks.rounds import Rounds

_PACKAGES = (
    "llm_magic", "torch", "transformers", "accelerate", "ipykernel", "ipython", "jupyter_client",
    "jupyter_ai_magics", "httpx", "openai",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Target:
    """What a median should reach: `sign` is ``<=`` or ``>=``."""

    sign: str
    limit: float

    def met(self, value: float) -> bool:
        """Whether `value` reaches it."""
        return value <= self.limit if self.sign == "<=" else value >= self.limit


@dataclass(frozen=True, slots=True)
class Row:
    """One figure, measured several times; no values mean that the peer is missing, see `note`."""

    name: str
    unit: str
    values: tuple[float, ...] = ()
    target: Target | None = None
    note: str = ""

    @property
    def median(self) -> float | None:
        """The value to quote."""
        return statistics.median(self.values) if self.values else None

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without one."""
        if self.target is None or self.median is None:
            return None
        return self.target.met(self.median)

    def as_dict(self) -> dict[str, Any]:
        """What JSON gets."""
        target = f"{self.target.sign} {self.target.limit:g}" if self.target else None
        return {
            "name": self.name, "unit": self.unit, "median": self.median,
            "min": min(self.values, default=None), "max": max(self.values, default=None),
            "values": list(self.values), "target": target, "met": self.met, "note": self.note,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Table:
    """The rows of one benchmark, and how busy others kept the machine meanwhile."""

    name: str
    title: str
    rows: tuple[Row, ...]
    others: tuple[float, ...]
    remark: str

    def text(self) -> str:
        """What people read."""
        width = max(len(row.name) for row in self.rows)
        lines = [f"{self.name}: {self.title}"]
        lines += [f"  {row.name:<{width}}  {_figures(row)}" for row in self.rows]
        lines.append(f"  ({self.remark})")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """What JSON gets."""
        return {
            "name": self.name, "title": self.title, "other_processes_cpu": list(self.others),
            "rows": [row.as_dict() for row in self.rows],
        }  # fmt: skip


def ratio(name: str, of: Sequence[float], to: Sequence[float], target: Target | None = None) -> Row:
    """The quotients of values measured side by side, repetition by repetition."""
    return Row(name, "x", tuple(a / b for a, b in zip(of, to, strict=True)), target)


def _figures(row: Row) -> str:
    if row.median is None:
        return row.note
    low, high, count = min(row.values), max(row.values), len(row.values)
    text = f"{_number(row.median):>8} {row.unit:<6} {_number(low)} to {_number(high)}, n={count}"
    if row.target is not None:
        verdict = "met" if row.met else "MISSED"
        text = f"{text:<46} {row.target.sign} {row.target.limit:g}: {verdict}"
    return f"{text}  {row.note}" if row.note else text


def _number(value: float) -> str:
    if abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


def measured(
    name: str, title: str, measure: Callable[[Rounds], Iterable[Row]], repeat: int
) -> Table:
    """Run one benchmark."""
    rounds = Rounds(repeat)
    rows = tuple(measure(rounds))
    return Table(name, title, rows, tuple(rounds.shares), rounds.remark)


def machine() -> dict[str, str]:
    """Where and with what the figures were taken."""
    about = {
        "taken": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": f"{_cpu_name()}, {os.cpu_count()} logical cores",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": platform.platform(),
        "python": platform.python_version(),
    }
    return about | {name: _version(name) for name in _PACKAGES}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def header(about: dict[str, str]) -> str:
    """The machine and the versions, in lines."""
    facts = [f"{name} {value}" for name, value in about.items() if name not in _PACKAGES]
    versions = [f"{name} {about[name]}" for name in _PACKAGES]
    return "\n".join([*facts, ", ".join(versions)])


def save(file: Path, about: dict[str, str], tables: Sequence[Table]) -> None:
    """Write everything that was measured as JSON."""
    content = {"machine": about, "benchmarks": [table.as_dict() for table in tables]}
    file.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
