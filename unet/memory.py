"""The memory of the process, and errors when it runs out."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
# Messages without an OutOfMemoryError: of the CPU, CUDA's libraries, and Apple's GPUs.
_NO_MEMORY = ("allocate memory", "STATUS_ALLOC_FAILED", "out of memory")
PREDICTED = 2**25  # bytes of the largest block that a prediction keeps


def keep_freed_memory(largest: int = 2**30) -> None:
    """Lets the process keep the memory that it frees for later use, in blocks of up to `largest`.

    A training step on a CPU takes and frees the same large maps again and again. glibc gives such
    blocks back to the kernel at once, which then clears every page anew: a sixth of a step. A
    prediction by wide convolutions is no faster for it, and took half as much again for the maps
    of its tiles, so it keeps blocks of up to `PREDICTED` bytes. Other C libraries, which have no
    `mallopt` or ignore it, are left as they are.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # TypeError: on Windows
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, largest)
        libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of PyTorch, NumPy or Python says that memory ran out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(words in text for words in _NO_MEMORY)


def give_back(device: torch.device) -> None:
    """Frees the GPU memory that PyTorch keeps for later use, and what is no longer used."""
    import torch

    gc.collect()
    empty = getattr(torch.get_device_module(device), "empty_cache", None)  # a CPU has none
    if empty:
        empty()


def kept_for_backward(forward: Callable[[], Any], parameters: Iterable[Any]) -> int:
    """Bytes that a forward pass keeps for the backward pass, beside the parameters."""
    import torch

    known = {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = forward()
    del result  # not before: freed memory would be counted once for all that lies there
    return sum(kept.values())
