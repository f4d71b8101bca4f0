"""Images out of a trained model: `ImageSampler`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from diffusion.data import to_uint8
from diffusion.denoiser import Clipped, Denoiser
from diffusion.editing import (
    ITERATIONS,
    inpaint,
    invert,
    repaint_timesteps,
    sdedit,
    sdedit_timesteps,
    slerp,
)
from diffusion.guidance import Guided
from diffusion.model import DiffusionUNet
from diffusion.options import SamplingOptions
from diffusion.prediction import DenoiserLike
from diffusion.samplers import Step, count_evaluations, finish, get_sampler, sample
from diffusion.schedule import CLEAN, SEEDS, NoiseSchedule, NoiseSource
from unet.errors import InputError

Images = NDArray[np.uint8]  # (N, H, W, C)
Classes = Sequence[int | None]  # of each image; None: any
# Of a batch: its places in the run, its seeds and its classes.
Run = Callable[[range, Sequence[int], Classes], Iterator[Step]]

JUMP, REPEATS = 5, 4  # of RePaint (arXiv 2201.09865), whose 10 and 10 are for 250 steps


@dataclass(frozen=True)
class Plan:
    """How a batch of images is made, and what it takes."""

    run: Run
    steps: int
    evaluations: int
    """Evaluations of the network for each batch; guidance makes each twice as large."""
    once: int = 0
    """Evaluations before the first batch."""


class ImageSampler:
    """A trained model with the settings of a sampling run.

    Args:
        model: as `diffusion.training` saves it: its `info` holds the noise schedule, the kind of
            prediction, the size of the images, and the names of the classes.

    Raises:
        InputError: settings that do not fit the model, such as more steps than noise levels.
    """

    def __init__(self, model: DiffusionUNet, options: SamplingOptions) -> None:
        self.model, self.options = model.eval(), options
        self.schedule = NoiseSchedule.from_dict(_known(model, "schedule"))
        self.height, self.width = _known(model, "size")
        self.classes: list[str] = model.info.get("classes") or []
        self.timesteps = self.schedule.timesteps(options.steps, options.spacing)
        self.sampler_options: dict[str, Any] = {}
        if options.sampler == "ddim":
            self.sampler_options["eta"] = options.eta
        elif options.sampler == "ddpm":
            self.sampler_options["variance"] = options.variance
        get_sampler(options.sampler, self.sampler_options)
        self.denoiser = self._denoiser()
        if options.variance == "learned" and model.out_channels == self.channels:
            raise InputError(
                "--variance learned is for models that were trained with --learn-variance: choose "
                "fixed-small or fixed-large"
            )

    @property
    def channels(self) -> int:
        return self.model.config.in_channels

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _denoiser(self) -> DenoiserLike:
        options, model = self.options, self.model
        denoiser: DenoiserLike = Denoiser(model, self.schedule, _known(model, "prediction"))
        if options.guidance != 1:
            if not self.classes:
                raise InputError(
                    f"--guidance {options.guidance} needs a model that knows classes, and this one "
                    "was trained without: leave it out"
                )
            null = torch.tensor([model.config.classes - 1], device=self.device)
            denoiser = Guided(
                denoiser,
                options.guidance,
                {"classes": null},
                rescale=options.guidance_rescale,
                interval=options.guidance_interval,
            )
        return denoiser if options.clip == "none" else Clipped(denoiser, options.clip)

    def class_index(self, name: str) -> int:
        """The index of a class by its name.

        Raises:
            InputError: the model does not know it.
        """
        if name not in self.classes:
            known = f"knows {', '.join(self.classes)}" if self.classes else "was trained without"
            raise InputError(f"class {name!r} is none of the model's, which {known}")
        return self.classes.index(name)

    def conditioning(self, classes: Classes) -> dict[str, Tensor]:
        """What the network is given for images of these classes; None: of any."""
        if not self.model.config.classes:
            return {}
        null = self.model.config.classes - 1
        indices = [null if c is None else c for c in classes]
        return {"classes": torch.tensor(indices, device=self.device)}

    # ------------------------------------------------------------------------------------------
    # Plans: what a batch starts from

    def from_noise(self) -> Plan:
        """Images out of nothing but noise."""

        def run(places: range, seeds: Sequence[int], classes: Classes) -> Iterator[Step]:
            source = NoiseSource(seeds)
            return sample(
                self.denoiser, self._noise(source), self.timesteps, **self._given(source, classes)
            )

        return self._plan(run, self.timesteps)

    def variants(self, image: Tensor, strength: float) -> Plan:
        """Images out of an image (1, C, H, W) in noise: see `editing.sdedit`."""

        def run(places: range, seeds: Sequence[int], classes: Classes) -> Iterator[Step]:
            images, given = (
                image.expand(len(seeds), -1, -1, -1),
                self._given(NoiseSource(seeds), classes),
            )
            return sdedit(self.denoiser, images, self.timesteps, strength, **given)

        return self._plan(run, sdedit_timesteps(self.timesteps, strength))

    def inpainted(self, image: Tensor, mask: Tensor) -> Plan:
        """An image (1, C, H, W), of which the masked part is made anew: see `editing.inpaint`."""

        def run(places: range, seeds: Sequence[int], classes: Classes) -> Iterator[Step]:
            images, given = (
                image.expand(len(seeds), -1, -1, -1),
                self._given(NoiseSource(seeds), classes),
            )
            given |= {"jump": JUMP, "repeats": REPEATS}
            return inpaint(self.denoiser, images, mask, self.timesteps, **given)

        return self._plan(run, repaint_timesteps(self.timesteps, JUMP, REPEATS))

    def between(self, first: Tensor, last: Tensor, count: int, label: int | None) -> Plan:
        """`count` images between two (1, C, H, W), both among them (DDIM, appendix D.5).

        Both are encoded by DDIM's inversion, mixed on the sphere, and decoded by DDIM, whatever the
        sampler, since nothing else comes back to where it started.
        """
        given: dict[str, Any] = {"conditioning": self.conditioning([label])}
        ends: list[Tensor] = []

        def run(places: range, seeds: Sequence[int], classes: Classes) -> Iterator[Step]:
            if not ends:
                ends.extend(
                    finish(invert(self.denoiser, end, self.timesteps, **given))
                    for end in (first, last)
                )
            share = torch.linspace(0, 1, count)[list(places)].to(first).view(-1, 1, 1, 1)
            return sample(
                self.denoiser, slerp(ends[0], ends[1], share), self.timesteps, "ddim", **given
            )

        steps = len(self.timesteps)
        return Plan(run, steps, steps, once=2 * ITERATIONS * steps)

    def _plan(self, run: Run, timesteps: Sequence[float]) -> Plan:
        downs = sum(t > to for t, to in pairwise([*timesteps, CLEAN]))
        return Plan(run, downs, count_evaluations(self.options.sampler, timesteps))

    def _noise(self, source: NoiseSource) -> Tensor:
        x = source.draw((self.channels, self.height, self.width)).to(self.device)
        return x.contiguous(memory_format=torch.channels_last)

    def _given(self, source: NoiseSource | None, classes: Classes) -> dict[str, Any]:
        return {
            "sampler": self.options.sampler,
            "noise": source,
            "conditioning": self.conditioning(classes),
            **self.sampler_options,
        }

    # ------------------------------------------------------------------------------------------
    # Images

    def batches(
        self,
        count: int,
        classes: Classes | None = None,
        *,
        first: int = 0,
        plan: Plan | None = None,
        on_step: Callable[[Step], object] | None = None,
    ) -> Iterator[Images]:
        """Images `first` to `first + count` of the seed, uint8 (B, H, W, C), as they get ready.

        Args:
            classes: the class of each image; none given: any.
            plan: what they start from; none given: noise.
            on_step: called after each step of each batch.
        """
        plan, labels = plan or self.from_noise(), list(classes or [None] * count)
        seeds = image_seeds(self.options.seed, count, first)
        for start in range(0, count, self.options.batch_size):
            part = slice(start, start + self.options.batch_size)
            for step in plan.run(range(count)[part], seeds[part], labels[part]):
                if on_step is not None:
                    on_step(step)
            yield to_bytes(step.x)

    def __call__(self, count: int, classes: Classes | None = None) -> Images:
        """All of the first images of the seed, uint8 (N, H, W, C)."""
        return np.concatenate(list(self.batches(count, classes)))

    def appearing(
        self, count: int, classes: Classes | None = None, *, first: int = 0
    ) -> list[Images]:
        """The first images as they appear: the noise, and what it has become after each step."""
        seeds = image_seeds(self.options.seed, count, first)
        frames = [to_bytes(self._noise(NoiseSource(seeds)))]
        steps = self.from_noise().run(range(count), seeds, classes or [None] * count)
        return frames + [to_bytes(step.x) for step in steps]


def image_seeds(seed: int, count: int, first: int = 0) -> list[int]:
    """A seed for each image of a run: consecutive ones, from a place that the run's seed gives."""
    start = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return [(start + first + i) % SEEDS for i in range(count)]


def to_bytes(x: Tensor) -> Images:
    """Images (B, C, H, W) in [-1, 1] as uint8 (B, H, W, C); what lies outside is clamped."""
    return rearrange(to_uint8(x), "b c h w -> b h w c").cpu().numpy()


def _known(model: DiffusionUNet, key: str) -> Any:
    if key not in model.info:
        raise InputError(
            f"the model's config.json has no {key!r} in its info: it was not made by train_ddpm.py"
        )
    return model.info[key]
