"""Weights and folders of other kinds than Stable Diffusion, told by what is in them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from unet.errors import InputError


class Kind(NamedTuple):
    """What something is, and what to do about it."""

    what: str
    cure: str


_LORA = Kind(
    "a LoRA, which changes a model and is none",
    "give the model that it was made for, and the LoRA with --lora",
)
_TRANSFORMER = Kind("of a diffusion transformer, not of a U-Net", "give a model with unet/")
_KEYS = {
    r"^lora_(unet|te\d?)_|[._]lora[._](A|B|up|down|mid|embedding|magnitude)|\.(hada|lokr)_w": _LORA,
}
_FILES = {
    "pytorch_lora_weights.safetensors": _LORA,
    "pytorch_lora_weights.bin": _LORA,
    "adapter_config.json": _LORA,
    "transformer": _TRANSFORMER,
}


def check_keys(keys: Iterable[str], where: Path) -> None:
    """Raises an InputError for the weights of another kind, with the key that tells it."""
    for key in keys:
        for mark, kind in _KEYS.items():
            if re.search(mark, key):
                raise InputError(
                    f"{where} is {kind.what}, as {key!r:.200} in it shows: {kind.cure}"
                )


def check_parts(folder: Path) -> None:
    """Raises an InputError for the folder of another kind, with the file that tells it."""
    for name, kind in _FILES.items():
        if (folder / name).exists():
            raise InputError(f"{folder} is {kind.what}, as {name} in it shows: {kind.cure}")
