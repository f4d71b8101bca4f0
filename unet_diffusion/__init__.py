"""The commands: a module for each, all listed and run by `unet` (main.py)."""

from __future__ import annotations


def __getattr__(name: str) -> str:
    if name == "__version__":
        # reading it takes as long as all else that a command imports for --help
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("unet-diffusion")
        except PackageNotFoundError:  # a clone that is not installed
            return "0+unknown"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
