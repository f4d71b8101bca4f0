"""The report of a diffusion run: `report.png`, a sample out of noise as a strip and a GIF, a
table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from diffusion.judging.copies import nearest_neighbours
from diffusion.model import DiffusionUNet
from diffusion.options import SamplingOptions
from diffusion.pictures import Images, enlarged, grid, strip, write_gif
from diffusion.plans import Wanted
from diffusion.process.denoiser import Denoiser
from diffusion.process.noise import NoiseSource
from diffusion.process.schedule import NoiseSchedule
from diffusion.sampling import ImageSampler
from diffusion.stable.autoencoder import Autoencoder
from diffusion.stable.latents import Data, autoencoder_of
from unet.files.pictures import composite, fit_axis, marker_of, panel
from unet.files.writing import replacing, write_text
from unet.training.run import read_log

if TYPE_CHECKING:  # it takes half a second to import
    from matplotlib.axes import Axes

LEVELS = 10  # noise levels at which errors are given
# Each of the two counts is of images of up to 64 x 64: see `affordable`.
JUDGED = 64  # held-out images, and as many training images, for the errors
SHOWN, COMPARED = 36, 8  # samples, and those of them beside their nearest training images
LEAST = 4  # of either, however large they are
MOST_COMPARED, MOST_BYTES = 20_000, 2**28  # training images, and bytes of them
APPEARING, FRAMES = 4, 40  # samples in the strip and the GIF, and steps
TRAINING, HELD_OUT = "#0072b2", "#d55e00"


def write_report(
    run: Path,
    model: DiffusionUNet,
    data: Data,
    seed: int,
    together: int,
    picture: Path | None = None,
    samples: Images | None = None,
) -> Path:
    """Writes report.png, errors.json and samples/appearing.{png,gif} into a run folder.

    Args:
        together: images that go through the network at a time, at most.
        picture: where its samples go as a picture of their own.
        samples: as the sampler of these pictures makes them; None: they are made.

    Returns:
        The path of the report.
    """
    errors = level_errors(model, data, together)
    write_text(run / "errors.json", json.dumps(errors, indent=2) + "\n")
    autoencoder = autoencoder_of(data)
    sampler = preview_sampler(model, seed, together, autoencoder=autoencoder)
    wanted = shown_conditions(data)
    samples = sampler.shown(sampler(len(wanted), wanted) if samples is None else samples)
    if picture:
        with replacing(picture) as temporary:
            grid(samples).save(temporary, format="png")
    every = preview_sampler(model, seed, together, FRAMES, autoencoder)
    chosen = [i * len(wanted) // APPEARING for i in range(APPEARING)]
    frames = [every.shown(f) for f in every.appearing(APPEARING, [wanted[i] for i in chosen])]
    with replacing(run / "samples" / "appearing.png") as temporary:
        strip(frames).save(temporary, format="png")
    write_gif(run / "samples" / "appearing.gif", frames)
    path = run / "report.png"
    with replacing(path) as temporary:
        _figure(run, errors, samples, data).savefig(temporary, format="png")
    return path


def preview_sampler(
    model: DiffusionUNet,
    seed: int,
    together: int,
    steps: int | None = None,
    autoencoder: Autoencoder | None = None,
) -> ImageSampler:
    """The sampler of the pictures that a run shows.

    Its precision is "fp32" as the autocast of the training decides what the network computes in.

    Args:
        steps: at most as many as the model has noise levels are taken; None: the model's default.
        autoencoder: of a model that works in latents.
    """
    most = NoiseSchedule.from_dict(model.info["schedule"]).steps
    options = SamplingOptions(
        seed=seed,
        batch_size=min(SHOWN, together),
        steps=steps and min(steps, most),
        precision="fp32",
    )
    return ImageSampler(model, options, autoencoder)


def level_errors(model: DiffusionUNet, data: Data, together: int) -> dict[str, list[float]]:
    """The mean squared error of the predicted noise by noise level: comparable between models.

    Whatever the network predicts, its eps is judged (L_simple of DDPM, eq. 14, level by level), on
    held-out images and on as many training images, with the same noise.

    Returns:
        t, its signal and noise rates, and the errors "training" and, where images were held out,
        "held_out".
    """
    device = next(model.parameters()).device
    schedule = NoiseSchedule.from_dict(model.info["schedule"])
    denoiser = Denoiser(model, schedule, model.info["prediction"])
    levels = ((np.arange(LEVELS) + 0.5) / LEVELS * schedule.steps).astype(int).tolist()
    found: dict[str, list[float]] = {"t": levels}
    found["signal"] = [schedule.level(t).signal for t in levels]
    found["noise"] = [schedule.level(t).noise for t in levels]
    count = affordable(JUDGED, data.size)
    judged = {"training": spread(data.train, min(count, len(data.val) or count))}
    if data.val:
        judged["held_out"] = spread(data.val, count)
    for name, indices in judged.items():
        total = torch.zeros(LEVELS, device=device)
        for start in range(0, len(indices), together):
            part = indices[start : start + together]
            x0 = data.batch(part)[0].to(device)
            noise = NoiseSource(range(start, start + len(part))).draw(x0.shape[1:]).to(device)
            given = model.conditioning(data.conditions(part))
            with torch.inference_mode():
                for i, t in enumerate(levels):
                    eps = denoiser(schedule.q_sample(x0, t, noise), t, **given).eps
                    total[i] += (eps - noise).square().mean(dim=(1, 2, 3)).sum()
        found[name] = (total / len(indices)).tolist()
    return found


def _figure(run: Path, errors: dict[str, list[float]], samples: Images, data: Data) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    log = read_log(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []
    figure = Figure(figsize=(13, 12.5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(run.resolve().name)
    axes = figure.subplots(2, 2)
    _curves(axes[0, 0], log)
    _levels(axes[0, 1], errors)
    _picture(axes[1, 0], grid(samples), "samples of fixed seeds")
    near = nearest_panel(samples[:: max(1, len(samples) // COMPARED)][:COMPARED], data)
    _picture(axes[1, 1], near, "samples, and the nearest training images behind each")
    return figure


def shown_conditions(data: Data) -> Wanted:
    """What the samples of a run's pictures are to show: captions, held-out ones if there are any,
    or every class in order."""
    count = affordable(SHOWN, data.size)
    if data.captioned or getattr(data, "condition", None) is not None:
        asked = data.val or data.train
        return data.conditions([asked[i % len(asked)] for i in range(count)])
    return [i * len(data.classes) // count if data.classes else None for i in range(count)]


def affordable(count: int, size: tuple[int, int], least: int = LEAST) -> int:
    """How many images of (height, width) have the pixels of `count` images of 64 x 64.

    `count` at most and `least` at least: the pictures and figures of a run with large images would
    take longer than its training.
    """
    return min(count, max(least, count * 64**2 // (size[0] * size[1])))


def spread(indices: Sequence[int], count: int) -> list[int]:
    """`count` of the indices, evenly spread over them; all of them if they are fewer."""
    places = np.linspace(0, len(indices) - 1, min(count, len(indices))).round().astype(int)
    return [indices[i] for i in places]


def nearest_panel(samples: Images, data: Data, count: int = 4) -> Any:
    """Samples, each with the training images nearest to it pixel by pixel, to show memorisation."""
    most = min(MOST_COMPARED, MOST_BYTES // samples[0].size)
    training = data.images(spread(data.train, most))
    _, nearest = nearest_neighbours(samples, training, min(count, len(training)))
    return panel(
        [
            [enlarged(composite(image), 96) for image in (sample, *training[found])]
            for sample, found in zip(samples, nearest, strict=True)
        ]
    )


def _curves(axes: Axes, log: Sequence[dict[str, Any]]) -> None:
    """The losses from the first evaluation on, or from the end of the first quarter of the run:
    earlier ones would take most of the axis.
    """
    from matplotlib.ticker import MaxNLocator

    judged = [e["step"] for e in log if "val_loss" in e]
    first = min(*judged, max(e["step"] for e in log) // 4) if judged else 0
    seen: list[float] = []
    for key, name, style in (
        ("loss", "training batches", {"color": TRAINING, "alpha": 0.3}),
        ("val_seen", "training images, averaged weights", {"color": TRAINING, "marker": "o"}),
        ("val_loss", "held out, averaged weights", {"color": HELD_OUT, "marker": "o"}),
    ):
        points = [(e["step"], float(e[key])) for e in log if key in e]
        if points:
            steps, losses = zip(*points, strict=True)
            options: dict[str, Any] = {"label": name, "marker": marker_of(steps), **style}
            axes.plot(steps, losses, **options)
            seen += [loss for step, loss in points if step >= first]
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    _finish(axes, seen, "loss", "step")


def _levels(axes: Axes, errors: dict[str, list[float]]) -> None:
    for key, name, colour in (
        ("training", "training images", TRAINING),
        ("held_out", "held out", HELD_OUT),
    ):
        if key in errors:
            axes.plot(errors["t"], errors[key], "o-", color=colour, label=name)
    _finish(
        axes,
        [*errors["training"], *errors.get("held_out", [])],
        "mean squared error of the predicted noise",
        "noise level t",
    )


def _finish(axes: Axes, seen: Sequence[float], title: str, below: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(below)
    axes.grid(alpha=0.25)
    if seen:
        axes.legend()
        fit_axis(axes, np.array(seen))


def _picture(axes: Axes, picture: Any, title: str) -> None:
    axes.imshow(np.asarray(picture), interpolation="nearest")
    axes.set_title(title)
    axes.set_axis_off()
