"""What a batch of samples starts from: noise, an image in noise, a masked image, two images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion.data.conditions import Ask, Asked
from diffusion.model import DiffusionUNet
from diffusion.process.editing import (
    ITERATIONS,
    inpaint,
    invert,
    repaint_timesteps,
    sdedit,
    sdedit_timesteps,
    slerp,
)
from diffusion.process.noise import NoiseSource
from diffusion.process.prediction import DenoiserLike
from diffusion.process.samplers import (
    SamplerName,
    Step,
    count_evaluations,
    finish,
    sample,
)
from diffusion.process.schedule import CLEAN
from diffusion.stable.autoencoder import Autoencoder

# The class of each image, its text, or the picture (K, H, W) it is made from, or two; None: any.
Wanted = Sequence[Ask]
# Of a batch: its places in the run, its seeds and what is wanted.
Run = Callable[[range, Sequence[int], Wanted], Iterator[Step]]

JUMP, REPEATS = 5, 4  # of RePaint (arXiv 2201.09865), whose 10 and 10 are for 250 steps


@dataclass(frozen=True)
class Plan:
    """How a batch of images is made, and how many evaluations it needs."""

    run: Run
    steps: int
    evaluations: int
    """Evaluations of the network for each batch; guidance makes each twice as large."""
    once: int = 0
    """Evaluations before the first batch."""


class Plans:
    """The plans of a trained model with the settings of a sampling run.

    Args:
        denoiser: guided and clipped as the run asks for.
        timesteps: of the run, descending.
        sampler, options: the sampler's name, and what it is given.
        size: height and width of the images.
        autoencoder: of a model that works in latents.
    """

    def __init__(
        self,
        model: DiffusionUNet,
        denoiser: DenoiserLike,
        timesteps: Sequence[float],
        sampler: SamplerName,
        options: Mapping[str, Any],
        size: tuple[int, int],
        autoencoder: Autoencoder | None,
    ) -> None:
        self.model, self.denoiser, self.timesteps = model, denoiser, timesteps
        self.sampler, self.options = sampler, options
        self.size, self.autoencoder = size, autoencoder

    def from_noise(self) -> Plan:
        """Images from noise alone.

        Images of pictures smaller than the model's images get the model's size, and are to be
        cropped.
        """

        def run(places: range, seeds: Sequence[int], wanted: Wanted) -> Iterator[Step]:
            source, size = NoiseSource(seeds), self.canvas(wanted)
            x = self.noise(source, size)
            asked = [padded(w, size) for w in wanted]
            steps = sample(self.denoiser, x, self.timesteps, **self._given(source, asked))
            holed = (condition := self.model.condition) is not None and condition.kind == "hole"
            return around_holes(steps, asked) if holed else steps

        return self._plan(run, self.timesteps)

    def variants(self, image: Tensor, strength: float) -> Plan:
        """Images out of an image (1, C, H, W) in noise: see `editing.sdedit`."""
        image = self._encoded(image)

        def run(places: range, seeds: Sequence[int], wanted: Wanted) -> Iterator[Step]:
            images = image.expand(len(seeds), -1, -1, -1)
            given = self._given(NoiseSource(seeds), wanted)
            return sdedit(self.denoiser, images, self.timesteps, strength, **given)

        return self._plan(run, sdedit_timesteps(self.timesteps, strength))

    def inpainted(self, image: Tensor, mask: Tensor) -> Plan:
        """An image (1, C, H, W), of which the masked part is made anew: see `editing.inpaint`."""
        image = self._encoded(image)
        if self.autoencoder:  # all latents that a masked pixel belongs to
            mask = F.max_pool2d(mask.float(), self.autoencoder.factor) > 0

        def run(places: range, seeds: Sequence[int], wanted: Wanted) -> Iterator[Step]:
            images = image.expand(len(seeds), -1, -1, -1)
            given = self._given(NoiseSource(seeds), wanted) | {"jump": JUMP, "repeats": REPEATS}
            return inpaint(self.denoiser, images, mask, self.timesteps, **given)

        return self._plan(run, repaint_timesteps(self.timesteps, JUMP, REPEATS))

    def between(self, first: Tensor, last: Tensor, count: int, wanted: Ask) -> Plan:
        """`count` images between two (1, C, H, W), both among them (DDIM, appendix D.5).

        Both are encoded by DDIM's inversion, mixed on the sphere, and decoded by DDIM, whatever the
        sampler, since nothing else comes back to where it started. A level without signal, from
        which no image comes back, is left out.
        """
        level = self.denoiser.schedule.level
        timesteps = [t for t in self.timesteps if level(t).signal > 0]
        first, last = self._encoded(first), self._encoded(last)
        given: dict[str, Any] = {"conditioning": self.model.conditioning([wanted])}
        ends: list[Tensor] = []

        def run(places: range, seeds: Sequence[int], wanted: Wanted) -> Iterator[Step]:
            if not ends:
                ends.extend(
                    finish(invert(self.denoiser, end, timesteps, **given)) for end in (first, last)
                )
            share = torch.linspace(0, 1, count)[list(places)].to(first).view(-1, 1, 1, 1)
            return sample(self.denoiser, slerp(ends[0], ends[1], share), timesteps, "ddim", **given)

        steps = len(timesteps)
        return Plan(run, steps, steps, once=2 * ITERATIONS * steps)

    def _plan(self, run: Run, timesteps: Sequence[float]) -> Plan:
        downs = sum(t > to for t, to in pairwise([*timesteps, CLEAN]))
        evaluations = count_evaluations(
            self.sampler, timesteps, self.denoiser.schedule, **self.options
        )
        return Plan(run, downs, evaluations)

    def canvas(self, wanted: Wanted) -> tuple[int, int]:
        """Height and width to draw on: those of the pictures, but at least the model's."""
        height, width = made_size(wanted[0], self.size)
        return max(height, self.size[0]), max(width, self.size[1])

    def noise(self, source: NoiseSource, size: tuple[int, int] | None = None) -> Tensor:
        """Noise for images of that height and width; None: of the model's."""
        size = self.autoencoder.size(*self.size) if self.autoencoder else size or self.size
        x = source.draw((self.model.image_channels, *size)).to(self._device)
        return x.contiguous(memory_format=torch.channels_last)

    def _encoded(self, image: Tensor) -> Tensor:
        """The image, or the mean of its latents."""
        return self.autoencoder.encode(image)[0].to(self._device) if self.autoencoder else image

    def _given(self, source: NoiseSource, wanted: Wanted) -> dict[str, Any]:
        return {
            "sampler": self.sampler,
            "noise": source,
            "conditioning": self.model.conditioning(wanted),
            **self.options,
        }

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device


def around_holes(run: Iterable[Step], wanted: Sequence[Asked]) -> Iterator[Step]:
    """The steps of a run of images with holes, of which the last one leaves the given pixels as
    they are: the network only comes near to them.
    """
    for step in run:
        x = step.x
        if step.t == CLEAN:
            x = x.clone()
            for made, asked in zip(x, wanted, strict=True):
                if (picture := asked.read()) is not None:
                    *image, hole = picture.to(made)
                    seen = made[: len(image)]  # before the codes of a mask
                    seen.copy_(torch.where(hole > 0, seen, torch.stack(image)))
        yield replace(step, x=x)


def made_size(wanted: Ask, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of what is made: those of its picture, or of the model's images."""
    picture = Asked.of(wanted).picture
    return size if picture is None else (picture.shape[-2], picture.shape[-1])


def padded(wanted: Ask, size: tuple[int, int]) -> Asked:
    """What is wanted, its picture repeated at the lower and right edges up to a size."""
    asked = Asked.of(wanted)
    if (picture := asked.read()) is None:
        return asked
    more = (0, size[1] - picture.shape[-1], 0, size[0] - picture.shape[-2])
    return asked._replace(picture=F.pad(picture[None], more, mode="replicate")[0])
