"""`unet`: lists the commands, and runs one as `unet train-seg ...`. Does not import torch."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import Annotated, Any, Union, get_type_hints

import tyro

import unet_diffusion
from segmentation.options import RECIPES, SegmentationOptions
from unet.errors import InputError
from unet.training.cli import COMPLETION, completable, complete, stdout_is_closed

COMMANDS = {
    "Segmentation": ("train-seg", "predict-seg", "eval-seg", "crossval-seg"),
    "Diffusion": ("train-ddpm", "sample-ddpm", "eval-ddpm", "train-classifier", "txt2img"),
    "Both": ("ema", "export", "describe", "app", "demo"),
}
NAMES = tuple(name for names in COMMANDS.values() for name in names)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that `argv` names, by default ``sys.argv[1:]``, and returns its status.

    Without one, or with ``--help``, it lists them. An unknown command is one sentence on stderr,
    which names the nearest one, and status 2.
    """
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    dashed = name.replace("_", "-")
    if dashed in NAMES:
        status: int = module(dashed).command(rest)
        return status
    try:
        if dashed in COMPLETION:
            complete(every_command(), [dashed, *rest], "unet")  # which raises SystemExit
        if name not in ("--help", "-h", "--version"):
            raise InputError(unknown(name))
        version = f"unet-diffusion {unet_diffusion.__version__}"
        print(version if name == "--version" else listing(), flush=True)
        return 0
    except BrokenPipeError:
        if not stdout_is_closed():
            raise
        return 141
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def unknown(name: str) -> str:
    """The message for an unknown command or option of `unet`."""
    option = name.startswith("-")
    known = ("--help", "--version", *COMPLETION) if option else NAMES
    match = difflib.get_close_matches(name.replace("_", "-"), known, n=1)
    end = f"did you mean {match[0]}?" if match else "unet --help lists the commands"
    return f"there is no {'option' if option else 'command'} {name}; {end}"


def module(name: str) -> ModuleType:
    """The module of a command."""
    return import_module(f"unet_diffusion.{name.replace('-', '_')}")


def listing() -> str:
    """The commands with a line each, from the beginning of the docstring of the module."""
    lines = ["usage: unet COMMAND [OPTIONS], or unet-COMMAND [OPTIONS]"]
    for title, names in COMMANDS.items():
        lines += ["", title]
        for name in names:
            lines.append(f"  {name:18}{(module(name).__doc__ or '').partition(':')[0]}")
    return "\n".join([*lines, "", "unet COMMAND --help lists the options of a command."])


def every_command() -> Any:
    """The commands as subcommands of tyro, for the completion of a shell, with the options of
    each."""
    kinds = []
    for name in NAMES:
        options = get_type_hints(module(name).main)["options"]
        recipes = RECIPES if issubclass(options, SegmentationOptions) else None
        kinds.append(Annotated[completable(options, recipes), tyro.conf.subcommand(name)])
    return Union[tuple(kinds)]  # noqa: UP007  # whose members are known only when it runs
