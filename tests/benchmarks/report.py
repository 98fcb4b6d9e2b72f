"""Rows of figures: medians with their spread, ratios, targets; as a table and as JSON."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from tests.benchmarks.rounds import Rounds

_PACKAGES = (
    "llm_magic", "torch", "transformers", "accelerate", "ipykernel", "ipython", "jupyter_client",
    "aiohttp", "httpx",
)  # fmt: skip

_FACTS = ("cpu", "memory", "system", "python", "device")


@dataclass(frozen=True, slots=True)
class Target:
    """What a median should reach: `sign` is ``<=`` or ``>=``."""

    sign: str
    limit: float

    def __str__(self) -> str:
        return f"{self.sign} {self.limit:g}"

    @classmethod
    def parsed(cls, text: str) -> Target:
        """Read what `str` writes."""
        sign, limit = text.split()
        return cls(sign, float(limit))

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
        target = str(self.target) if self.target else None
        return {
            "name": self.name, "unit": self.unit, "median": self.median,
            "min": min(self.values, default=None), "max": max(self.values, default=None),
            "values": list(self.values), "target": target, "met": self.met, "note": self.note,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Row:
        """Read what `as_dict` writes."""
        target = Target.parsed(row["target"]) if row["target"] else None
        return cls(row["name"], row["unit"], tuple(row["values"]), target, row["note"])


@dataclass(frozen=True, slots=True)
class Table:
    """The rows of one benchmark, when they were taken, and how busy others kept the machine."""

    name: str
    title: str
    rows: tuple[Row, ...]
    others: tuple[float, ...]
    remark: str
    noisy: bool
    taken: str

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
            "name": self.name, "title": self.title, "taken": self.taken,
            "other_processes_cpu": list(self.others), "remark": self.remark, "noisy": self.noisy,
            "rows": [row.as_dict() for row in self.rows],
        }  # fmt: skip

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Table:
        """Read what `as_dict` writes."""
        rows, others = map(Row.from_dict, table["rows"]), tuple(table["other_processes_cpu"])
        about = (table["remark"], table["noisy"], table["taken"])
        return cls(table["name"], table["title"], tuple(rows), others, *about)


def ratio(name: str, of: Sequence[float], to: Sequence[float], target: Target | None = None) -> Row:
    """The quotients of values measured side by side, repetition by repetition."""
    return Row(name, "x", tuple(a / b for a, b in zip(of, to, strict=True)), target)


def _figures(row: Row) -> str:
    if row.median is None:
        return row.note
    low, high, count = min(row.values), max(row.values), len(row.values)
    text = f"{number(row.median):>8} {row.unit:<6} {number(low)} to {number(high)}, n={count}"
    if row.target is not None:
        verdict = "met" if row.met else "MISSED"
        text = f"{text:<46} {row.target}: {verdict}"
    return f"{text}  {row.note}" if row.note else text


def number(value: float) -> str:
    """A figure with as many digits as can be meant."""
    if abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


def measured(
    name: str, title: str, measure: Callable[[Rounds], Iterable[Row]], repeat: int
) -> Table:
    """Run one benchmark; prints the rows that are complete if it ends early."""
    rounds, taken = Rounds(repeat), datetime.now(UTC).isoformat(timespec="seconds")
    rows: list[Row] = []

    def table() -> Table:
        shares = tuple(rounds.shares)
        return Table(name, title, tuple(rows), shares, rounds.remark, rounds.noisy, taken)

    try:
        for row in measure(rounds):
            rows.append(row)
    except BaseException:
        print(f"\n{table().text()}\n  (ended early: rows are missing)", flush=True)
        raise
    return table()


def machine() -> dict[str, str]:
    """Where and with what the figures are taken."""
    about = {
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


def header(about: Mapping[str, str]) -> str:
    """The machine and the versions, in lines."""
    facts = [f"{name} {value}" for name, value in about.items() if name in _FACTS]
    versions = [f"{name} {value}" for name, value in about.items() if name not in _FACTS]
    return "\n".join([*facts, ", ".join(versions)])


def save(file: Path, about: Mapping[str, str], tables: Iterable[Table]) -> None:
    """Write everything that was measured as JSON."""
    content = {"machine": about, "benchmarks": [table.as_dict() for table in tables]}
    file.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def saved(file: Path, about: Mapping[str, str]) -> list[Table]:
    """Read what earlier runs wrote; raises `ValueError` where they were other circumstances."""
    if not file.exists():
        return []
    content = json.loads(file.read_text("utf-8"))
    before = content["machine"]
    other = {name for name in {**about, **before} if about.get(name) != before.get(name)}
    if other:
        named = ", ".join(sorted(other))
        raise ValueError(f"{file} was taken with another {named}. Name another file.")
    return [Table.from_dict(table) for table in content["benchmarks"]]
