"""How a command ends early: a mistake that the user can mend, a run that cannot go on, a signal."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

_LONGEST = 6000  # characters of a message: a file's name can have 4096
_EXTRAS = {  # a package that some part imports when it is used, and the extra that brings it
    "zarr": "zarr",
    "numcodecs": "zarr",
    "h5py": "hdf5",
    "nibabel": "medical",
    "pydicom": "medical",
    "datasets": "datasets",
    "pyarrow": "datasets",
    "onnx": "export",
    "onnxscript": "export",
    "onnxruntime": "export",
    "openvino": "openvino",
    "bioimageio": "bioimageio",
}


class InputError(ValueError):
    """A mistake in an argument, a config or a file: what, where, which value, how to mend it.

    The commands print it as one sentence and exit with status 2; any other exception keeps its
    traceback. The message is one line, whatever names and values are in it: line breaks become
    spaces, unprintable characters are escaped, and the middle of a very long message is left out.
    """

    def __init__(self, message: str) -> None:
        line = re.sub(r"\s*\n\s*", " ", message.strip())
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
        half = _LONGEST // 2
        super().__init__(text if len(text) <= _LONGEST else f"{text[:half]} ... {text[-half:]}")


@contextmanager
def as_keywords(*names: str) -> Iterator[None]:
    """For calls from Python: an InputError names batch_size instead of --batch-size.

    Args:
        names: of the keywords.
    """
    try:
        yield
    except InputError as error:
        flags = "|".join(name.replace("_", "-") for name in names)
        text = re.sub(rf"--({flags})(?![\w-])", lambda m: m[1].replace("-", "_"), str(error))
        raise InputError(text) from error


@contextmanager
def with_extras() -> Iterator[None]:
    """A missing package becomes an InputError with the command that installs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name not in _EXTRAS:
            raise
        lacks, install = "which is not installed", "pip install"
        if error.name != name:  # it is there, without a part of it
            lacks, install = f"in a version with {error.name}", "pip install --upgrade"
        raise InputError(
            f'it takes the package {name}, {lacks}: {install} "unet-diffusion[{_EXTRAS[name]}]"'
        ) from error


def is_address(path: object) -> bool:
    """Whether a path begins like an address, https://... or s3://..., and not like a drive, C:/."""
    return re.match(r"[a-z][a-z0-9+]+:/", str(path), re.IGNORECASE) is not None


def not_there(path: object, what: str = "file or folder") -> str:
    """The message for a path that does not exist; it recognises an address on the Web, and a `~`
    that no shell expanded, as behind a =.
    """
    if is_address(path):
        return "an address on the Web, but only local files are read: download it"
    if str(path).startswith("~"):
        home = os.path.expanduser(str(path))
        return f"no such {what}: only a shell expands ~, so give {home!r}"
    return f"no such {what}"


class RunError(RuntimeError):
    """A run that cannot go on though its input was accepted, such as a loss that became NaN.

    The commands print it as one sentence and exit with status 1.
    """


class DiskError(RunError):
    """A file of a run that cannot be written, as where the disk is full."""


def said(error: BaseException) -> str:
    """The first line of a library's exception message, or the exception's name if it has none."""
    return str(error).strip().partition("\n")[0][:300] or type(error).__name__


class Interrupted(SystemExit):
    """SIGINT or SIGTERM ended a run after its state was saved; the code is 128 + the signal."""
