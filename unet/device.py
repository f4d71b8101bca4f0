"""The device and the precision that a command line names."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from unet.errors import InputError, RunError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # but for auto


def pick_device(name: str) -> torch.device:
    """The device of that name; auto: a GPU where there is one, of several processes each its own.

    On an NVIDIA GPU, float32 matrix products use TF32 from now on, with a mantissa of 10 bits, as
    convolutions do by default.
    """
    if name == "auto":
        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        if device.type != "cpu" and torch.accelerator.device_count() > 1:
            device = torch.device(device.type, int(os.environ.get("LOCAL_RANK", 0)))
    else:
        try:
            device = torch.device(name)
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"--device {name} cannot be used here: {reason}") from error
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    return device


def pick_precision(name: str, device: torch.device) -> str:
    """What `accelerate` calls the precision; auto: bf16 where the processor computes in it."""
    if name == "auto":
        if device.type == "cuda":
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
        found: dict[str, bool] = (
            getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
        )
        return "bf16" if found.get("avx512_bf16") or found.get("amx_bf16") else "no"
    return "no" if name == "fp32" else name


@contextlib.contextmanager
def repeatable() -> Iterator[None]:
    """Makes PyTorch use only algorithms that give the same bits each time.

    Raises:
        RunError: an operation has none on its device, and is named.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which NVIDIA asks for
    before = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        operation, found, _ = str(error).partition(" does not have a deterministic")
        if not found:
            raise
        raise RunError(
            f"--deterministic: {operation} gives the same bits each time on no such device: leave "
            "it out, or choose another --loss or --network"
        ) from error
    finally:
        torch.set_deterministic_debug_mode(before)


def trained_precision(name: str, device: torch.device) -> torch.dtype | None:
    """The autocast type that a trained network computes in; None: its weights' float32.

    auto: bfloat16 on an NVIDIA GPU that supports it, as training does there; else float32,
    so that a CPU gives the same numbers as any other.

    Raises:
        InputError: an unknown name.
    """
    if name not in (known := ("auto", *DTYPES)):
        raise InputError(f"--precision {name!r} is unknown: choose from {', '.join(known)}")
    if name == "auto" and device.type != "cuda":
        return None
    return DTYPES.get(pick_precision(name, device))


def computing_in(
    dtype: torch.dtype | None, device: torch.device
) -> contextlib.AbstractContextManager[object]:
    """Autocast to that type; None: no change."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def training_format(device: torch.device) -> torch.memory_format:
    """How a network's weights, and so its maps, are laid out in memory while it is trained.

    channels_last, but for x86 processors without AVX-512: there oneDNN takes up to four times as
    long for the weights' gradients of such maps, if a batch has few images.
    """
    if device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        return torch.contiguous_format
    return torch.channels_last
