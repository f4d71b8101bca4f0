"""What may change when a run is resumed: how it is trained, but not what it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from unet.errors import InputError
from unet.training.config_file import equal, field_types, load_config
from unet.training.options import BUDGETS, FitOptions
from unet.training.run import is_main_process

Options = TypeVar("Options", bound=FitOptions)

# Options of the loop that the saved state, and the order of the samples, depend on.
_FIXED = ("batch_size", "optimizer", "ema", "snapshots", "seed")
_MAY_CHANGE = {field.name for field in dataclasses.fields(FitOptions)}.difference(_FIXED)
_PATHS = (
    *("data", "val_data", "images", "masks", "synthetic", "unlabelled", "init"),
    *("condition", "joint", "latents", "text_encoder", "prior"),
)


def resumed(options: Options) -> Options:
    """The options of a run that is resumed with --resume; those of other runs unchanged. What is
    not given (None) is taken from the run. What differs is printed if it is about the loop (budget,
    learning rate and its schedule, device, precision, memory, workers, evaluations, logs), and
    refused if it is about the model or the data.

    Raises:
        InputError: names what is refused, and what the run was started with.
    """
    file = options.out / "config.yaml"
    if not options.resume or not file.is_file():
        return options
    kind = type(options)
    before: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(options)}
    before |= load_config(kind, file)
    names = [name for name in field_types(kind) if name not in ("out", "resume")]
    budget = [name for name in BUDGETS if getattr(options, name) is not None]
    open_ = [n for n in names if getattr(options, n) is None and not (budget and n in BUDGETS)]
    options = dataclasses.replace(options, **{name: before[name] for name in open_})
    changed = [name for name in names if not equal(getattr(options, name), before[name])]
    if refused := [name for name in changed if name not in _MAY_CHANGE]:
        _refuse(options, before, refused)
    if changed and is_main_process():
        now, was = (_flags(kind, _given(values, changed)) for values in (vars(options), before))
        print(f"continuing with {now} instead of {was}", flush=True)
    return options


def _refuse(options: FitOptions, before: Mapping[str, Any], names: list[str]) -> None:
    kind, run = type(options), options.out
    now, was = (
        _flags(kind, {name: values[name] for name in names}) for values in (vars(options), before)
    )
    text = (
        f"the run in {run} was started with {was}, not {now}: leave that out to resume it, or "
        "give another --out for a new run"
    )
    if hasattr(options, "init") and not {"init", "network", "width"} & set(names):
        text += f", with --init {run / 'model'} from the weights of this one"
    if any(name in _PATHS and before[name] is not None for name in names):
        text += f"; where the same files have moved, change their path in {run / 'config.yaml'}"
    raise InputError(text)


def _given(values: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """Those of the options that are not None, or all where each is."""
    found = {name: values[name] for name in names}
    return {name: value for name, value in found.items() if value is not None} or found


def _flags(kind: type, values: Mapping[str, Any]) -> str:
    """Options as on the command line."""
    hints, found = field_types(kind), []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if hints[name] is bool:
            found.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is None or value == ():
            found.append(f"no --{flag}")
        else:
            parts = value if isinstance(value, tuple) else (value,)
            found.append(f"--{flag} {' '.join(map(str, parts))}")
    return ", ".join(found)
