"""The device that a command line names."""

from __future__ import annotations

import torch

from unet.errors import InputError


def pick_device(name: str) -> torch.device:
    """The device of that name; auto: a GPU where there is one."""
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {name} cannot be used here: {reason}") from error
    return device
