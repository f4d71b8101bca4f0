"""Reads files of `torch.save` without running code in them, in no more memory than their size."""

from __future__ import annotations

import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from mmap import ACCESS_READ, mmap
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from unet.errors import InputError, said


class _Unread:
    """Stands for what Lightning saves beside the weights: takes everything, and holds nothing."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


# By these names PyTorch makes what stands on the left: none of theirs is imported or run.
_HARMLESS: list[Any] = [
    (OrderedDict, "lightning_fabric.utilities.data.AttributeDict"),
    (OrderedDict, "lightning.fabric.utilities.data.AttributeDict"),
    (OrderedDict, "pytorch_lightning.utilities.parsing.AttributeDict"),
    (_Unread, "argparse.Namespace"),
    (_Unread, "pathlib.PosixPath"),
    (_Unread, "pathlib._local.PosixPath"),
    *(
        (_Unread, f"{library}.callbacks.{name}")
        for library in ("pytorch_lightning", "lightning.pytorch")
        for name in ("early_stopping.EarlyStopping", "model_checkpoint.ModelCheckpoint")
    ),
]


def load_pickle(file: Path, what: str, *, mapped: bool = False) -> Any:
    """Tensors, numbers, strings, and lists and dictionaries of them, on the CPU.

    Args:
        what: what the file should be, for messages.
        mapped: tensors are read when they are used, which files of PyTorch before 1.6 do not allow.

    Raises:
        InputError: an unreadable file, a pickle with code in it, or one that unpacks to more.
    """
    try:
        archive = zipfile.is_zipfile(file)
        if archive:
            _check_members(file)
        elif file.stat().st_size:
            with file.open("rb") as opened, mmap(opened.fileno(), 0, access=ACCESS_READ) as whole:
                _check_calls(whole)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a file is read whole or refused
            with torch.serialization.safe_globals(_HARMLESS):
                return torch.load(
                    file, map_location="cpu", weights_only=True, mmap=mapped and archive
                )
    except UnpicklingError as error:
        called = re.search(r"GLOBAL ([\w.]+) was not", str(error))
        code = f"code in it ({called[1]:.200})" if called else "code in it, or damaged"
        raise InputError(
            f"{file} cannot be read as {what}: it is a pickle with {code}, and is not opened, "
            "since the code would run"
        ) from error
    except Exception as error:  # unpickling raises what a wrong byte leads it to, from any class
        raise InputError(f"{file} cannot be read as {what}: {said(error)}") from error


def load_by_name(file: Path) -> dict[str, Any]:
    """What a .ckpt, .pt, .pth or .bin holds by name; tensors are read when they are used.

    Raises:
        InputError: as `load_pickle`; another ending, or no dictionary.
    """
    if file.suffix not in (".ckpt", ".pt", ".pth", ".bin"):
        raise InputError(f"{file} is no checkpoint: give a .safetensors or a .ckpt file")
    try:
        found = load_pickle(file, "a checkpoint", mapped=True)
    except InputError as error:
        raise InputError(f"{error}: give its weights as .safetensors") from error.__cause__
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise InputError(f"{file} holds a {type(found).__name__} instead of weights by name")
    return found


def check_whole(state: Mapping[str, Any]) -> None:
    """Raises an InputError for a view that is larger than the file."""
    for key, value in state.items():
        if isinstance(value, Tensor) and value.nbytes > value.untyped_storage().nbytes():
            raise InputError(f"it holds less of {key} than its shape {tuple(value.shape)} says")


def _check_members(file: Path) -> None:
    """PyTorch packs nothing, and reads a packed tensor that is mapped as it stands there."""
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        for member in members:
            if member.filename.endswith(".pkl") and member.file_size <= file.stat().st_size:
                _check_calls(archive.read(member))
    packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
    if packed or sum(member.file_size for member in members) > file.stat().st_size:
        raise ValueError("PyTorch did not write this archive, which unpacks to more than it is")


def _check_calls(pickled: bytes | mmap) -> None:
    """PyTorch lets a pickle call bytearray(N), which takes any N bytes, and itself writes none."""
    if pickled.find(b"bytearray") >= 0:
        raise ValueError("it calls bytearray, which weights do not need")
