"""The device under test: its memory, and how to fill it."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import time
from collections.abc import Iterator

import psutil
import torch

NAME = os.environ.get("LLM_MAGIC_TEST_DEVICE", "cuda")
ON_GPU = NAME.startswith("cuda")
LABEL = f"cuda:{torch.device(NAME).index or 0}" if ON_GPU else NAME

_MIB = 1 << 20


def synchronize() -> None:
    """Wait until the device has finished its work."""
    if ON_GPU:
        torch.cuda.synchronize(NAME)


def free_garbage() -> None:
    """Wait for the device, and free memory without references."""
    gc.collect()
    synchronize()
    if ON_GPU:
        torch.cuda.empty_cache()


def allocated() -> int:
    """Return the bytes of all tensors on the device."""
    if ON_GPU:
        return torch.cuda.memory_allocated(NAME)
    # By type: the class attribute of a lazy module runs code.
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def comes_back_to(size: int, patience_s: float = 20) -> bool:
    """Wait until the tensors on the device take `size` bytes: other threads may still free some."""
    deadline = time.monotonic() + patience_s
    while allocated() != size and time.monotonic() < deadline:
        time.sleep(0.1)
        free_garbage()
    return allocated() == size


def reserved() -> int:
    """Return the bytes that torch has reserved; the memory of the process on a CPU."""
    if ON_GPU:
        return torch.cuda.memory_reserved(NAME)
    return int(psutil.Process().memory_info().rss)


def random_state() -> list[bytes]:
    """Return the state of the random generators."""
    states = [torch.get_rng_state()]
    if ON_GPU:
        states.append(torch.cuda.get_rng_state(NAME))
    return [bytes(state.numpy()) for state in states]


@contextlib.contextmanager
def ballast(leave: int) -> Iterator[None]:
    """Fill the device up to `leave` bytes."""
    if not ON_GPU:
        with _less_address_space(leave):
            yield
        return
    free_garbage()
    free, _total = torch.cuda.mem_get_info(NAME)
    weight = torch.empty(max(free - leave, 0) // _MIB * _MIB, dtype=torch.uint8, device=NAME)
    try:
        yield
    finally:
        del weight
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _less_address_space(leave: int) -> Iterator[None]:
    """Limit the growth of this process to `leave` bytes."""
    assert sys.platform == "linux"
    import resource

    free_garbage()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + leave, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def versions() -> str:
    """Return the names and versions of the device and its software."""
    import transformers

    chip = torch.cuda.get_device_name(NAME) if ON_GPU else "CPU"
    cuda = f", CUDA {torch.version.cuda}" if ON_GPU else ""
    return f"{chip}, torch {torch.__version__}{cuda}, transformers {transformers.__version__}"
