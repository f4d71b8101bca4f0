"""Where the two tasks meet: loading a model of either, and starting one from the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion.data.pixels import WHOLE, ValueRange, known_ranges
from diffusion.initial import (
    PREDICTION,
    find_start,
    fitting,
    image_channels,
    is_lora,
    noise_of,
    on_latents,
    their_unet,
)
from diffusion.model import DiffusionUNet
from diffusion.process.prediction import Prediction, get_prediction
from diffusion.process.schedule import NoiseSchedule
from diffusion.text import WordEncoder
from segmentation.model import SegmentationUNet
from unet.errors import InputError
from unet.weights.crossing import only_token, plain, without_conditioning
from unet.weights.folder import FolderModel, load_strictly, read_config
from unet.weights.start import Start, read_start
from unet.words import counted

TIMESTEP = 0.05  # of all, at which a diffusion model looks at images: docs/experiments.md
_BY_BETAS = ("linear", "scaled-linear", "cosine", "sigmoid")

KINDS: dict[str, type[FolderModel]] = {m.task: m for m in (SegmentationUNet, DiffusionUNet)}
_COMMANDS = {"segmentation": "seg", "diffusion": "ddpm"}


def read_model(folder: Path) -> FolderModel:
    """The model of a folder, of whichever task.

    Raises:
        InputError: no model folder, or one of a task that is not ours.
    """
    task = read_config(folder)["task"]
    if task not in KINDS:
        raise InputError(f"the task '{task}' is unknown: a model is for {' or '.join(KINDS)}")
    return KINDS[task].from_pretrained(folder)


def segmentation_start(path: str | None, timestep: float = TIMESTEP) -> Start | None:
    """The start of a segmentation that --init names; None where it names nothing.

    A diffusion model becomes the network that it is at one timestep, with no class and the empty
    text. There it sees an image in [-1, 1] times the signal of that timestep, and so does the
    segmentation.

    Args:
        path: the folder of a model of either task, or of a diffusers U-Net or pipeline.
        timestep: as a share of all timesteps, from 0 to 1; for flow and edm, whose timesteps are
            spread otherwise, the level of the cosine schedule there.

    Raises:
        InputError: no such model, or one whose trunk does not cross: it works on latents, or reads
            texts of many tokens.
    """
    if path is None:
        return None
    start = find_start(path) if their_unet(path) or is_lora(path) else read_start(path)
    if not start.config.time:
        return start
    schedule, prediction = noise_of(path, start) or (NoiseSchedule(kind="linear"), PREDICTION)
    rule = get_prediction(prediction, schedule)
    if masks := {"target", "joint"} & start.info.keys():
        also = " with its images" if "joint" in masks else ""
        raise InputError(
            f"--init {path} makes masks{also}, and a segmentation starts from a diffusion model of "
            "images: give one without --target mask and --joint"
        )
    channels = image_channels(start)
    if on_latents(path, start):
        raise InputError(
            f"--init {path} works on latents of {counted(channels, 'channel')}, not on pixels: "
            "start from a diffusion model of images"
        )
    start = fitting(start, channels, {})
    t = round(timestep * (schedule.steps - 1))
    if schedule.kind not in _BY_BETAS:
        cosine = NoiseSchedule(kind="cosine", steps=schedule.steps)
        t = round(schedule.timestep(cosine.level(t).sigma))
    told, signal = _seen(schedule, rule, t)
    context = _empty_text(start)
    try:
        if start.config.context_channels is not None:
            only_token(context, start.config.context_channels)
    except InputError as error:
        raise InputError(f"--init {path} cannot start a segmentation: {error}") from error
    ranges = known_ranges(start.info)
    start = start.changed(
        plain(start.config),
        lambda config, trunk: without_conditioning(config, trunk, t=told, context=context),
        f"as it is at timestep {t}",
    )
    return replace(start, info=_pixels(signal, channels, ranges), crossed=True)


def what_it_starts(path: str) -> dict[str, str]:
    """For each task how a training starts from the model of a folder, or why none does."""
    found = {}
    for task, start_of in (("segmentation", segmentation_start), ("diffusion", find_start)):
        try:
            start = start_of(path)
            assert start is not None
            start.read()
            found[task] = f"{start.where}: unet-train-{_COMMANDS[task]} --init {path}"
        except InputError as error:
            found[task] = f"no: {error}"
    return found


def _seen(schedule: NoiseSchedule, rule: Prediction, t: int) -> tuple[float, float]:
    """A network's input for a timestep, and the factor of the images that it is shown there."""
    image = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    rates = schedule.rates(t, image)
    shown, told = rule.inputs(rates[0] * image, torch.tensor([t]), *rates)
    return told.item(), shown.item()


def _pixels(signal: float, channels: int, ranges: Mapping[str, ValueRange]) -> Mapping[str, Any]:
    """The normalisation of a segmentation that scales images as diffusion does, times a signal.

    With the values v from a to b: signal (2 (v - a) / (b - a) - 1) = (v - mean) / std, with the
    middle of the values as mean and their half span over the signal as std.
    """
    dtype, values = next(iter(ranges.items()), ("uint8", WHOLE["uint8"]))
    sides = list(zip(*values.each(channels), strict=True))
    mean = [(high + low) / 2 for low, high in sides]
    std = [(high - low) / 2 / signal for low, high in sides]
    return {"normalisation": {"mean": mean, "std": std, "dtype": dtype}}


def _empty_text(start: Start) -> Tensor | None:
    """The tokens (L, C) of no text, of a model with a text encoder of its own."""
    if start.info.get("text") is None:
        return None
    encoder = WordEncoder.from_dict(start.info["text"]).eval()
    state = start.read()
    own = {k.removeprefix("text."): v for k, v in state.items() if k.startswith("text.")}
    load_strictly(encoder, own, start.where)
    with torch.no_grad():
        return encoder.encode([""]).context[0]
