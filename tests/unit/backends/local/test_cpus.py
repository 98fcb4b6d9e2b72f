"""The CPUs that a process may use, and what torch makes of them; processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

import pytest

from llm_magic.backends.local import openmp
from llm_magic.backends.local.cpus import Cpus, cpu_quota

Way = Callable[[], AbstractContextManager[str]]
OPENMP = ("OMP_", "GOMP_", "KMP_", "MKL_")
GROUPS = Path("/sys/fs/cgroup/cpu")


# -- quotas ------------------------------------------------------------------------------------


def proc(folder: Path, groups: str, *mounts: str) -> Path:
    """Write what `cpu_quota` reads of a process; {} in a mount stands for `folder`."""
    (folder / "cgroup").write_text(groups)
    lines = [f"{31 + n} 23 0:28 {mount.format(folder)}\n" for n, mount in enumerate(mounts)]
    other = "23 1 0:21 / /proc rw,nosuid - proc proc rw\n"
    (folder / "mountinfo").write_text(other + "".join(lines))
    return folder


def group(folder: Path, *limits: str) -> None:
    """Make a cgroup: with one limit that of version 2, with two those of version 1."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ["cpu.max"] if len(limits) == 1 else ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
    for name, limit in zip(names, limits, strict=True):
        (folder / name).write_text(f"{limit}\n")


V2 = "/ {}/fs rw,relatime shared:9 - cgroup2 cgroup2 rw"
V1 = "/ {}/fs/cpu rw,relatime - cgroup cgroup rw,cpu,cpuacct"


@pytest.mark.parametrize(
    ("limit", "quota"), [("200000 100000", 2.0), ("150000 100000", 1.5), ("max 100000", None)]
)
def test_quota_of_version_2(tmp_path: Path, limit: str, quota: float | None) -> None:
    group(tmp_path / "fs/user.slice/kernel", limit)
    assert cpu_quota(proc(tmp_path, "0::/user.slice/kernel\n", V2)) == quota


def test_smallest_quota_up_the_tree_counts(tmp_path: Path) -> None:
    group(tmp_path / "fs/hub/pod/kernel", "400000 100000")
    group(tmp_path / "fs/hub/pod", "25000 10000")
    group(tmp_path / "fs/hub", "max 100000")
    assert cpu_quota(proc(tmp_path, "0::/hub/pod/kernel\n", V2)) == 2.5


@pytest.mark.parametrize(("limit", "quota"), [("200000", 2.0), ("-1", None)])
def test_quota_of_version_1(tmp_path: Path, limit: str, quota: float | None) -> None:
    group(tmp_path / "fs/cpu/docker/abc", limit, "100000")
    group(tmp_path / "fs/cpu/docker", "-1", "100000")
    groups = "9:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n0::/\n"
    assert cpu_quota(proc(tmp_path, groups, V1)) == quota


def test_quota_in_a_container(tmp_path: Path) -> None:
    group(tmp_path / "fs/cpu", "200000", "100000")
    mount = V1.replace("/ {}", "/docker/abc {}")
    assert cpu_quota(proc(tmp_path, "4:cpu,cpuacct:/docker/abc\n", mount)) == 2.0
    # A namespace of cgroups shows a path outside of what is mounted.
    assert cpu_quota(proc(tmp_path, "4:cpu,cpuacct:/../other\n", mount)) == 2.0


def test_quota_with_both_versions(tmp_path: Path) -> None:
    group(tmp_path / "fs/cpu/a", "300000", "100000")
    group(tmp_path / "unified/a", "max 100000")
    unified = "/ {}/unified rw - cgroup2 cgroup2 rw"
    assert cpu_quota(proc(tmp_path, "1:cpu:/a\n0::/a\n", V1, unified)) == 3.0


def test_mount_folder_with_a_space_in_its_name(tmp_path: Path) -> None:
    group(tmp_path / "my fs/a", "100000 100000")
    mount = "/ {}/my\\040fs rw - cgroup2 cgroup2 rw"
    assert cpu_quota(proc(tmp_path, "0::/a\n", mount)) == 1.0


@pytest.mark.parametrize("text", ["", "nonsense", "0 0", "100000", "x 100000"])
def test_unreadable_quota_is_none(tmp_path: Path, text: str) -> None:
    group(tmp_path / "fs/a", text)
    assert cpu_quota(proc(tmp_path, "0::/a\n", V2)) is None
    assert cpu_quota(tmp_path / "absent") is None


@pytest.mark.parametrize(
    ("found", "usable", "text"),
    [
        (Cpus(2, 2), 2, "2 CPUs"),
        (Cpus(64, 64, 2.0), 2, "2 of 64 CPUs usable (a quota of 2 CPUs)"),
        (Cpus(64, 8), 8, "8 of 64 CPUs usable (affinity)"),
        (Cpus(64, 4, 16.0), 4, "4 of 64 CPUs usable (affinity)"),
        (Cpus(64, 64, 1.5), 1, "1 of 64 CPUs usable (a quota of 1.5 CPUs)"),
        (Cpus(2, 2, 0.25), 1, "1 of 2 CPUs usable (a quota of 0.25 CPUs)"),
    ],
)
def test_usable_cpus(found: Cpus, usable: int, text: str) -> None:
    assert (found.usable, str(found)) == (usable, text)


# -- processes ---------------------------------------------------------------------------------

# The backend imports torch before it finds that there is no such model.
LOAD = """
import gc, json, os
from concurrent.futures import ThreadPoolExecutor
{first}
from llm_magic import llm
from llm_magic.errors import LoadFailed
from llm_magic.backends.local.cpus import cpus
def openmp():
    return {{name: value for name, value in os.environ.items() if name.startswith({openmp})}}

environment = openmp()
try:
    llm.load({no_weights!r})
except LoadFailed:
    pass
import torch
threads = torch.get_num_threads()
llm.close()
with ThreadPoolExecutor() as fresh:
    after = fresh.submit(torch.get_num_threads).result()
print(json.dumps({{
    "changed": openmp() != environment, "threads": threads, "usable": cpus().usable,
    "after": after, "gc": gc.isenabled(),
}}))
"""


Load = Callable[..., tuple[dict[str, object], str]]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Return what imports torch by a load in a process of its own.

    It returns what that found, and libgomp's lines.
    """
    # Found before torch is imported; that it has no weights is found after that.
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return partial(_load, tmp_path)


def _load(folder: Path, first: str = "", **environment: str) -> tuple[dict[str, object], str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(OPENMP)}
    child = subprocess.run(
        [sys.executable, "-c", LOAD.format(first=first, openmp=OPENMP, no_weights=str(folder))],
        env={**own, "OMP_DISPLAY_ENV": "VERBOSE", **environment},
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    found: dict[str, object] = json.loads(child.stdout)
    assert found["changed"] is False
    return found, child.stderr


@contextmanager
def one_cpu_by_affinity() -> Iterator[str]:
    one = min(os.sched_getaffinity(0))
    yield f"os.sched_setaffinity(0, {{{one}}})"


@contextmanager
def one_cpu_by_quota() -> Iterator[str]:
    made = GROUPS / f"llm_magic-test-{os.getpid()}"
    made.mkdir()
    try:
        (made / "cpu.cfs_period_us").write_text("100000")
        (made / "cpu.cfs_quota_us").write_text("100000")
        yield f"open('{made}/cgroup.procs', 'w').write(str(os.getpid()))"
    finally:
        made.rmdir()


# Only root may make cgroups, and only where their files are not read-only.
WAYS: list[Way] = [one_cpu_by_affinity, *([one_cpu_by_quota] if os.access(GROUPS, os.W_OK) else [])]


@pytest.mark.parametrize("way", WAYS)
def test_torch_uses_the_usable_cpus_and_spins_briefly(load: Load, way: Way) -> None:
    with way() as enter:
        found, printed = load(enter)
    assert "GOMP_SPINCOUNT = '10000'" in printed
    assert (found["usable"], found["threads"]) == (1, 1)
    if way is one_cpu_by_quota:
        assert found["after"] == len(os.sched_getaffinity(0)), "closing restores what torch had"


def test_variables_of_the_user_are_not_changed(load: Load) -> None:
    with WAYS[-1]() as enter:
        found, printed = load(f"{enter}\ngc.disable()", GOMP_SPINCOUNT="77", OMP_NUM_THREADS="2")
    assert found["gc"] is False
    assert "GOMP_SPINCOUNT = '77'" in printed
    if WAYS[-1] is one_cpu_by_quota:  # MKL takes no more threads than an affinity has CPUs
        assert found["threads"] == 2


def test_torch_imported_first_keeps_its_threads(load: Load) -> None:
    one = min(os.sched_getaffinity(0))
    first = f"os.sched_setaffinity(0, {{{one}}})\nimport torch\ntorch.set_num_threads(3)"
    found, printed = load(first)
    assert found["gc"] is True
    assert "GOMP_SPINCOUNT = '10000'" not in printed
    assert found["threads"] == 3


@pytest.mark.parametrize(
    ("environment", "variables"),
    [
        ({}, {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "1"}),
        ({"GOMP_SPINCOUNT": "5", "OMP_NUM_THREADS": "4"}, {"KMP_BLOCKTIME": "1"}),
        ({"KMP_BLOCKTIME": "0"}, {"GOMP_SPINCOUNT": "10000"}),
        ({"KMP_LIBRARY": "throughput"}, {"GOMP_SPINCOUNT": "10000"}),
        ({"OMP_WAIT_POLICY": "active"}, {}),
    ],
)
def test_spin_variables_respect_those_of_the_user(
    environment: dict[str, str], variables: dict[str, str]
) -> None:
    assert openmp.spin_variables(environment) == variables


def test_child_gets_a_number_of_threads_for_a_smaller_quota() -> None:
    assert openmp.child_variables({}, Cpus(64, 64, 2.0))["OMP_NUM_THREADS"] == "2"
    assert "OMP_NUM_THREADS" not in openmp.child_variables({}, Cpus(64, 8))
    assert "OMP_NUM_THREADS" not in openmp.child_variables(
        {"OMP_NUM_THREADS": "5"}, Cpus(8, 8, 1.0)
    )
    assert openmp.child_variables({"OMP_WAIT_POLICY": "active"}, Cpus(2, 2)) == {}


BESIDE = """
import os, subprocess, sys, time
from pathlib import Path
import torch
from llm_magic.backends.local import openmp

def threads():
    return len(list(Path("/proc/self/task").iterdir()))

def wait_for(condition, work=lambda: time.sleep(0.05)):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        work()

square = torch.ones(512, 512)
square @ square
before = threads()
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
with openmp.throttle_beside_others():
    watched = threads()
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        wait_for(lambda: threads() == watched + 1, lambda: square @ square)
        busy.kill()
    wait_for(lambda: threads() == watched)
print(watched - before, threads() - before)
"""


def test_spinning_is_throttled_beside_a_busy_process_and_not_afterwards() -> None:
    own = {name: value for name, value in os.environ.items() if not name.startswith(OPENMP)}
    child = subprocess.run(
        [sys.executable, "-c", BESIDE], env={**own, "OMP_NUM_THREADS": "2"},
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert (child.stderr, child.stdout) == ("", "1 0\n")
