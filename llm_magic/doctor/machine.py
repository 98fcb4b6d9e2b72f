"""Checks memory, GPUs, torch and disks."""

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

from llm_magic.doctor.finding import Finding, run_in_thread
from llm_magic.doctor.packages import installed
from llm_magic.errors import SettingsError
from llm_magic.text import human_bytes

_SMI_S, _TORCH_S, _DISK_S = 5.0, 60.0, 3.0
_MIN_FREE_DISK = 5_000_000_000
_PYTORCH = "pytorch.org/get-started/locally has the command for this machine"

# It runs in a child process: a broken torch can end the process that imports it, a working one takes
# seconds and 0.5 GB of memory, and a CUDA context takes as much memory of the GPU.
_TORCH_SCRIPT = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    has_cuda = torch.cuda.is_available()
mps = getattr(torch.backends, "mps", None)
print(json.dumps({
    "cuda": torch.version.cuda or torch.version.hip,
    "gpus": torch.cuda.device_count() if has_cuda else 0,
    "mps": bool(mps and mps.is_available()),
    "warnings": [str(w.message) for w in caught if "driver" in str(w.message).lower()],
}))
"""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU as its driver reports it; sizes in bytes, 0 if unknown."""

    name: str
    free: int
    total: int
    driver: str


async def check_machine() -> list[Finding]:
    """Return findings about the memory, the CPUs, the GPUs, and torch's access to them."""
    from llm_magic.backends.local.cpus import cpus

    memory = psutil.virtual_memory()
    text = f"{human_bytes(memory.available)} of {human_bytes(memory.total)} free"
    found = [Finding("memory", "ok", text), Finding("CPUs", "ok", str(cpus()))]
    gpus, problems = await _gpus()
    for number, gpu in enumerate(gpus):
        found.append(Finding(f"GPU {number}", "ok", f"{gpu.name}: {_memory(gpu)}"))
    return [*found, *problems, *await _check_torch(gpus)]


async def _gpus() -> tuple[list[Gpu], list[Finding]]:
    """Return the GPUs that the NVIDIA driver reports, and problems with the driver."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return [], []
    fields = "name,memory.free,memory.total,driver_version"
    command = [smi, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    fix = "restart the machine, or reinstall its NVIDIA driver"
    try:
        result = await run_in_thread(lambda: _run(command, _SMI_S), _SMI_S + 1)
    except (OSError, subprocess.SubprocessError, TimeoutError):
        return [], [Finding("GPU", "warn", "nvidia-smi does not respond", fix)]
    if result.returncode != 0:
        reason = " ".join(f"{result.stdout} {result.stderr}".split())[:200]
        return [], [Finding("GPU", "warn", f"nvidia-smi fails: {reason}", fix)]
    rows = [[cell.strip() for cell in line.split(",")] for line in result.stdout.splitlines()]
    return [Gpu(r[0], _mib(r[1]), _mib(r[2]), r[3]) for r in rows if len(r) == 4], []


def _memory(gpu: Gpu) -> str:
    if not gpu.total:
        return "its driver does not report its memory"
    return f"{human_bytes(gpu.free)} of {human_bytes(gpu.total)} free"


def _mib(text: str) -> int:
    # The value is [N/A] for GPUs that share the memory of the machine, and for MIG partitions.
    return int(text) << 20 if text.isdecimal() else 0


def _run(command: list[str], seconds: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=seconds, check=False, encoding="utf-8",
        errors="replace", stdin=subprocess.DEVNULL,
    )  # fmt: skip


async def _check_torch(gpus: list[Gpu]) -> list[Finding]:
    version = installed("torch")
    if version is None:
        return []
    try:
        Path.cwd()
    except OSError:
        # No load imports torch there.
        text, fix = (
            "the working folder no longer exists",
            "import os; os.chdir(os.path.expanduser('~'))",
        )
        return [Finding("torch", "problem", text, fix)]
    try:
        result = await run_in_thread(
            lambda: _run([sys.executable, "-c", _TORCH_SCRIPT], _TORCH_S), _TORCH_S + 1
        )
    except (OSError, subprocess.SubprocessError, TimeoutError):
        text = f"{version} was not imported within {_TORCH_S:.0f} s"
        return [
            Finding("torch", "warn", text, "run %llm_doctor again when the machine is less busy")
        ]
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
        fix = "pip install --force-reinstall torch, then restart the kernel"
        return [
            Finding("torch", "problem", f"{version} cannot be imported: {lines[-1][:200]}", fix)
        ]
    return [torch_finding(version, json.loads(result.stdout.splitlines()[-1]), gpus)]


def torch_finding(version: str, devices: dict[str, Any], gpus: list[Gpu]) -> Finding:
    """Compare the devices that torch can use with the GPUs that the driver reports."""
    if devices["gpus"]:
        count = "1 GPU" if devices["gpus"] == 1 else f"{devices['gpus']} GPUs"
        return Finding("torch", "ok", f"{version} for CUDA {devices['cuda']}, {count}")
    if devices["mps"]:
        return Finding("torch", "ok", f"{version}, the GPU of this Mac (mps)")
    if not gpus:
        return Finding("torch", "ok", f"{version}, on the CPU: no GPU found")
    if not devices["cuda"]:
        text = f"{version} is a CPU build, and there is a GPU ({gpus[0].name})"
        fix = f"pip install --force-reinstall torch ({_PYTORCH})"
        return Finding("torch", "problem", text, fix)
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all") in {"", "-1"}:
        text = f"{version}: CUDA_VISIBLE_DEVICES hides the GPUs"
        return Finding("torch", "warn", text, "unset CUDA_VISIBLE_DEVICES, restart the kernel")
    reason = f": {devices['warnings'][0][:160]}" if devices["warnings"] else ""
    driver = gpus[0].driver
    text = f"{version} for CUDA {devices['cuda']} cannot use the GPU with driver {driver}{reason}"
    fix = f"update the NVIDIA driver, or install torch for an older CUDA ({_PYTORCH})"
    return Finding("torch", "problem", text, fix)


async def check_disks() -> list[Finding]:
    """Return findings about the folders of model files and their free space."""
    return [await _check_disk(*folder) for folder in _folders()]


def _folders() -> list[tuple[str, Callable[[], Path], str]]:
    """Return the name of each folder, a function that returns it, and the variable that sets it."""
    from llm_magic.backends.local.files.gguf import cache_folder

    home = os.environ.get("HF_HOME") or Path(
        os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface"
    )
    hub = os.environ.get("HF_HUB_CACHE") or Path(home, "hub")
    return [
        ("hub cache", Path(hub).expanduser, "HF_HUB_CACHE"),
        ("llm_magic cache", cache_folder, "LLM_MAGIC_CACHE_DIR"),
    ]  # fmt: skip


async def _check_disk(name: str, find: Callable[[], Path], variable: str) -> Finding:
    fix = f"set {variable} to another folder"
    try:
        folder = find()
    except (RuntimeError, SettingsError) as error:  # ~name of an unknown user
        return Finding(name, "problem", str(error).rstrip("."), fix)
    try:
        free, is_writable = await run_in_thread(lambda: _disk_usage(folder), _DISK_S)
    except (OSError, TimeoutError) as error:
        reason = str(error) or f"no response within {_DISK_S:.0f} s"
        return Finding(name, "problem", f"{folder}: {reason}", fix)
    text = f"{folder}, {human_bytes(free)} free"
    if not is_writable:
        return Finding(name, "problem", f"{text}, not writable", fix)
    if free < _MIN_FREE_DISK:
        return Finding(name, "warn", text, f"free disk space, or {fix}")
    return Finding(name, "ok", text)


def _disk_usage(folder: Path) -> tuple[int, bool]:
    """Return the free bytes of a folder, and whether it is writable; it may not exist yet."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"{existing} is not a folder")
    return shutil.disk_usage(existing).free, os.access(existing, os.W_OK)
