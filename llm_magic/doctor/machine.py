"""Memory, GPUs, torch and disks of this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from llm_magic.doctor.finding import Finding, apart
from llm_magic.doctor.packages import installed
from llm_magic.errors import SettingsError
from llm_magic.text.formatting import human_bytes

_SMI_S, _TORCH_S, _DISK_S = 5.0, 60.0, 3.0
_LITTLE = 5_000_000_000
_PYTORCH = "pytorch.org/get-started/locally says the command for this machine"

# In a child process: a broken torch can end the process that imports it, a whole one takes seconds
# and half a gigabyte, and a context on a GPU takes as much there.
_LOOK = """
import json, warnings
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    import torch
    there = torch.cuda.is_available()
mps = getattr(torch.backends, "mps", None)
print(json.dumps({
    "cuda": torch.version.cuda or torch.version.hip,
    "gpus": torch.cuda.device_count() if there else 0,
    "mps": bool(mps and mps.is_available()),
    "told": [str(w.message) for w in told if "driver" in str(w.message).lower()],
}))
"""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU as its driver sees it; bytes."""

    name: str
    free: int
    total: int
    driver: str


async def machine() -> list[Finding]:
    """Return the memory, the CPUs, and the GPUs with what torch can do with them."""
    from llm_magic.backends.local.cpus import cpus

    memory = psutil.virtual_memory()
    text = f"{human_bytes(memory.available)} of {human_bytes(memory.total)} free"
    gpus, wrong = await _gpus()
    shown = [Finding(f"GPU {i}", "ok", f"{gpu.name}: {_room(gpu)}") for i, gpu in enumerate(gpus)]
    found = [Finding("memory", "ok", text), Finding("CPUs", "ok", str(cpus()))]
    return [*found, *shown, *wrong, *await _torch(gpus), *_openmp()]


def _openmp() -> list[Finding]:
    """Return whether threads of torch take the CPU from other processes, and from the model."""
    from llm_magic.backends.local import openmp

    if not openmp.spins_unbounded():
        return []
    text = "torch was imported before %llm_load: answers on the CPU are slow beside busy processes"
    name = "GOMP_SPINCOUNT=1000" if sys.platform == "linux" else "KMP_BLOCKTIME=1"
    fix = f"restart the kernel and %llm_load before importing torch, or set {name} for the kernel"
    return [Finding("OpenMP", "warn", text, fix)]


async def _gpus() -> tuple[list[Gpu], list[Finding]]:
    """Return the GPUs that the NVIDIA driver has, and what is wrong with it."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return [], []
    fields = "name,memory.free,memory.total,driver_version"
    command = [smi, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    fix = "restart the machine, or install its NVIDIA driver again"
    try:
        said = await apart(lambda: _run(command, _SMI_S), _SMI_S + 1)
    except (OSError, subprocess.SubprocessError, TimeoutError):
        return [], [Finding("GPU", "warn", "nvidia-smi is there and does not answer", fix)]
    if said.returncode != 0:
        why = " ".join(f"{said.stdout} {said.stderr}".split())[:200]
        return [], [Finding("GPU", "warn", f"nvidia-smi fails: {why}", fix)]
    rows = [[cell.strip() for cell in line.split(",")] for line in said.stdout.splitlines()]
    return [Gpu(r[0], _mib(r[1]), _mib(r[2]), r[3]) for r in rows if len(r) == 4], []


def _room(gpu: Gpu) -> str:
    if not gpu.total:
        return "its driver does not tell its memory"
    return f"{human_bytes(gpu.free)} of {human_bytes(gpu.total)} free"


def _mib(text: str) -> int:
    # [N/A] where a GPU shares the machine's memory, or is cut into pieces.
    return int(text) << 20 if text.isdecimal() else 0


def _run(command: list[str], seconds: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=seconds, check=False, encoding="utf-8",
        errors="replace", stdin=subprocess.DEVNULL,
    )  # fmt: skip


async def _torch(gpus: list[Gpu]) -> list[Finding]:
    has = installed("torch")
    if has is None:
        return []
    try:
        looked = await apart(lambda: _run([sys.executable, "-c", _LOOK], _TORCH_S), _TORCH_S + 1)
    except (OSError, subprocess.SubprocessError, TimeoutError):
        text = f"{has} did not come up within {_TORCH_S:.0f} s"
        return [Finding("torch", "warn", text, "%llm_doctor again when the machine is less busy")]
    if looked.returncode != 0:
        why = (looked.stderr.strip().splitlines() or [f"it ended with {looked.returncode}"])[-1]
        fix = "pip install --force-reinstall torch, then restart the kernel"
        return [Finding("torch", "problem", f"{has} cannot be imported: {why[:200]}", fix)]
    return [_devices(has, json.loads(looked.stdout.splitlines()[-1]), gpus)]


def _devices(has: str, seen: dict[str, Any], gpus: list[Gpu]) -> Finding:
    """Compare what torch can use with what the driver has."""
    if seen["gpus"]:
        count = "a GPU" if seen["gpus"] == 1 else f"{seen['gpus']} GPUs"
        return Finding("torch", "ok", f"{has} for CUDA {seen['cuda']}, sees {count}")
    if seen["mps"]:
        return Finding("torch", "ok", f"{has}, sees the GPU of this Mac (mps)")
    if not gpus:
        return Finding("torch", "ok", f"{has}, on the CPU: no GPU found")
    if not seen["cuda"]:
        text = f"{has} is a CPU build, and there is a GPU ({gpus[0].name})"
        fetch = "pip install --force-reinstall torch"
        return Finding("torch", "problem", text, f"{fetch} ({_PYTORCH})")
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all") in {"", "-1"}:
        text = f"{has}: CUDA_VISIBLE_DEVICES hides the GPUs"
        return Finding("torch", "warn", text, "unset CUDA_VISIBLE_DEVICES, restart the kernel")
    told = f": {seen['told'][0][:160]}" if seen["told"] else ""
    text = f"{has} for CUDA {seen['cuda']} cannot use the GPU with driver {gpus[0].driver}{told}"
    fix = f"update the NVIDIA driver, or install a torch for an older CUDA ({_PYTORCH})"
    return Finding("torch", "problem", text, fix)


async def disks() -> list[Finding]:
    """Return where models are kept, and the room there."""
    return [await _disk(name, folder, move) for name, folder, move in _folders()]


def _folders() -> list[tuple[str, Callable[[], Path], str]]:
    from llm_magic.backends.local.files.gguf import cache_folder

    home = os.environ.get("HF_HOME") or Path(
        os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface"
    )
    hub = os.environ.get("HF_HUB_CACHE") or Path(home, "hub")
    return [
        ("hub cache", Path(hub).expanduser, "HF_HUB_CACHE"),
        ("our cache", cache_folder, "LLM_MAGIC_CACHE_DIR"),
    ]  # fmt: skip


async def _disk(name: str, find: Callable[[], Path], move: str) -> Finding:
    fix = f"set {move} to another folder"
    try:
        folder = find()
    except (RuntimeError, SettingsError) as error:  # ~name of no user
        return Finding(name, "problem", str(error).rstrip("."), fix)

    def look() -> tuple[int, bool]:
        there = next(p for p in (folder, *folder.parents) if p.exists())
        if not there.is_dir():
            raise NotADirectoryError(f"{there} is not a folder")
        return shutil.disk_usage(there).free, os.access(there, os.W_OK)

    try:
        free, writable = await apart(look, _DISK_S)
    except (OSError, TimeoutError) as error:
        reason = str(error) or f"no answer within {_DISK_S:.0f} s"
        return Finding(name, "problem", f"{folder}: {reason}", fix)
    text = f"{folder}, {human_bytes(free)} free"
    if not writable:
        return Finding(name, "problem", f"{text}, not writable", fix)
    if free < _LITTLE:
        return Finding(name, "warn", text, f"make room, or set {move} to another folder")
    return Finding(name, "ok", text)
