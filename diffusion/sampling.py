"""Images out of a trained model: `ImageSampler`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from diffusion.attention_maps import recorded_attention
from diffusion.autoencoder import Autoencoder
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
from diffusion.pixels import to_uint8
from diffusion.prediction import DenoiserLike
from diffusion.samplers import Step, count_evaluations, finish, get_sampler, sample
from diffusion.schedule import CLEAN, SEEDS, NoiseSchedule, NoiseSource
from diffusion.text import ClipText, WordEncoder
from unet.device import pick_device
from unet.errors import InputError
from unet.training.task import Processes

Images = NDArray[np.uint8]  # (N, H, W, C)
Wanted = Sequence[int | str | None]  # the class of each image, or its text; None: any
# Of a batch: its places in the run, its seeds and what is wanted.
Run = Callable[[range, Sequence[int], Wanted], Iterator[Step]]

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


def load_for_sampling(folder: str | Path, device: str) -> DiffusionUNet:
    """A model folder's network on the device of that name, laid out as convolutions like it."""
    model = DiffusionUNet.from_pretrained(folder).to(pick_device(device)).float()
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # stubs


class ImageSampler:
    """A trained model with the settings of a sampling run.

    Args:
        model: as `diffusion.training` saves it: its `info` holds the noise schedule, the kind of
            prediction, the size of the images, and the names of the classes. It is put into
            evaluation mode; its weights are left where they are, as it may be in training.
        autoencoder: of a model that works in latents; None: it is read from where training read it,
            and so is CLIP, where the model has its text from it.

    Raises:
        InputError: settings that do not fit the model, such as more steps than noise levels; an
            autoencoder or a CLIP that is not there any more.
    """

    def __init__(
        self,
        model: DiffusionUNet,
        options: SamplingOptions,
        autoencoder: Autoencoder | None = None,
    ) -> None:
        self.model, self.options = model.eval(), options
        self.autoencoder = autoencoder or self._read_parts()
        self.schedule = NoiseSchedule.from_dict(_known(model, "schedule"))
        self.height, self.width = model.size
        self.classes = model.classes
        self.timesteps = self.schedule.timesteps(options.steps, options.spacing)
        self.sampler_options: dict[str, Any] = {}
        if options.sampler == "ddim":
            self.sampler_options["eta"] = options.eta
        elif options.sampler == "ddpm":
            self.sampler_options["variance"] = options.variance
        get_sampler(options.sampler, self.sampler_options)
        self.denoiser = self._denoiser()
        if options.variance == "learned" and model.out_channels == model.config.in_channels:
            raise InputError(
                "--variance learned is for models that were trained with --learn-variance: choose "
                "fixed-small or fixed-large"
            )

    @property
    def channels(self) -> int:
        """Channels of the images."""
        found = self.autoencoder
        return found.image_channels if found else self.model.config.in_channels

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _read_parts(self) -> Autoencoder | None:
        """The autoencoder where the model works in latents; the model gets its CLIP, too."""
        info = self.model.info
        try:
            if "text_encoder" in info and self.model.text is None:
                clip = ClipText.from_pretrained(_folder(self.model, "text_encoder"))
                clip.model.to(self.device)
                use_clip(self.model, clip)
            if "autoencoder" in info:
                return Autoencoder.from_folder(_folder(self.model, "autoencoder"), self.device)
        except InputError as error:
            raise InputError(
                f"the model was trained with parts that cannot be read any more ({error}): use "
                "txt2img.py with the pipeline/ of its run"
            ) from error
        return None

    def _denoiser(self) -> DenoiserLike:
        options, model = self.options, self.model
        if options.guidance != 1 and not (self.classes or model.text):
            raise InputError(
                f"--guidance {options.guidance} needs a model that knows classes or captions, and "
                "this one was trained without: leave it out"
            )
        if options.negative and not model.text:
            raise InputError(
                f"--negative {options.negative!r} needs a model that was trained with captions, "
                "and this one was not: leave it out"
            )
        denoiser: DenoiserLike = Denoiser(model, self.schedule, _known(model, "prediction"))
        if options.guidance != 1:
            with torch.no_grad():
                null = model.conditioning([options.negative or None])
            denoiser = Guided(
                denoiser,
                options.guidance,
                null,
                rescale=options.guidance_rescale,
                interval=options.guidance_interval,
            )
        if options.clip == "none" or self.autoencoder:  # latents have no range
            return denoiser
        return Clipped(denoiser, options.clip)

    def class_index(self, name: str) -> int:
        """The index of a class by its name.

        Raises:
            InputError: the model does not know it.
        """
        if name not in self.classes:
            known = f"knows {', '.join(self.classes)}" if self.classes else "was trained without"
            raise InputError(f"class {name!r} is none of the model's, which {known}")
        return self.classes.index(name)

    @property
    def text(self) -> WordEncoder | ClipText:
        """The model's text encoder.

        Raises:
            InputError: it has none.
        """
        if self.model.text is None:
            raise InputError(
                "a --prompt needs a model that was trained with --captions, and this one was not"
            )
        return self.model.text

    # ------------------------------------------------------------------------------------------
    # Plans: what a batch starts from

    def from_noise(self) -> Plan:
        """Images out of nothing but noise."""

        def run(places: range, seeds: Sequence[int], wanted: Wanted) -> Iterator[Step]:
            source = NoiseSource(seeds)
            return sample(
                self.denoiser, self._noise(source), self.timesteps, **self._given(source, wanted)
            )

        return self._plan(run, self.timesteps)

    def variants(self, image: Tensor, strength: float) -> Plan:
        """Images out of an image (1, C, H, W) in noise: see `editing.sdedit`."""
        image = self._encoded(image)

        def run(places: range, seeds: Sequence[int], wanted: Wanted) -> Iterator[Step]:
            images, given = (
                image.expand(len(seeds), -1, -1, -1),
                self._given(NoiseSource(seeds), wanted),
            )
            return sdedit(self.denoiser, images, self.timesteps, strength, **given)

        return self._plan(run, sdedit_timesteps(self.timesteps, strength))

    def inpainted(self, image: Tensor, mask: Tensor) -> Plan:
        """An image (1, C, H, W), of which the masked part is made anew: see `editing.inpaint`."""
        image = self._encoded(image)
        if self.autoencoder:  # all latents that a masked pixel belongs to
            mask = F.max_pool2d(mask.float(), self.autoencoder.factor) > 0

        def run(places: range, seeds: Sequence[int], wanted: Wanted) -> Iterator[Step]:
            images, given = (
                image.expand(len(seeds), -1, -1, -1),
                self._given(NoiseSource(seeds), wanted),
            )
            given |= {"jump": JUMP, "repeats": REPEATS}
            return inpaint(self.denoiser, images, mask, self.timesteps, **given)

        return self._plan(run, repaint_timesteps(self.timesteps, JUMP, REPEATS))

    def between(self, first: Tensor, last: Tensor, count: int, wanted: int | str | None) -> Plan:
        """`count` images between two (1, C, H, W), both among them (DDIM, appendix D.5).

        Both are encoded by DDIM's inversion, mixed on the sphere, and decoded by DDIM, whatever the
        sampler, since nothing else comes back to where it started.
        """
        first, last = self._encoded(first), self._encoded(last)
        given: dict[str, Any] = {"conditioning": self.model.conditioning([wanted])}
        ends: list[Tensor] = []

        def run(places: range, seeds: Sequence[int], wanted: Wanted) -> Iterator[Step]:
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
        evaluations = count_evaluations(self.options.sampler, timesteps, self.schedule)
        return Plan(run, downs, evaluations)

    def _noise(self, source: NoiseSource) -> Tensor:
        size = self.height, self.width
        if self.autoencoder:
            size = self.autoencoder.size(*size)
        x = source.draw((self.model.config.in_channels, *size)).to(self.device)
        return x.contiguous(memory_format=torch.channels_last)

    def _encoded(self, image: Tensor) -> Tensor:
        """The image, or the mean of its latents."""
        return self.autoencoder.encode(image)[0].to(self.device) if self.autoencoder else image

    def _decoded(self, x: Tensor) -> Images:
        return to_bytes(self.autoencoder.decode(x) if self.autoencoder else x)

    def _given(self, source: NoiseSource | None, wanted: Wanted) -> dict[str, Any]:
        return {
            "sampler": self.options.sampler,
            "noise": source,
            "conditioning": self.model.conditioning(wanted),
            **self.sampler_options,
        }

    # ------------------------------------------------------------------------------------------
    # Images

    def batches(
        self,
        count: int,
        wanted: Wanted | None = None,
        *,
        first: int = 0,
        plan: Plan | None = None,
        on_step: Callable[[Step], object] | None = None,
        processes: Processes | None = None,
    ) -> Iterator[Images]:
        """Images `first` to `first + count` of the seed, uint8 (B, H, W, C), as they get ready.

        Args:
            wanted: the class or text of each image; none given: any.
            plan: what they start from; none given: noise.
            on_step: called after each step of each batch.
            processes: share the batches, of which only this one's are made: see `parts`.
        """
        plan, wanted = plan or self.from_noise(), list(wanted or [None] * count)
        seeds = image_seeds(self.options.seed, count, first)
        for part in self.parts(count, processes):
            chosen = slice(part.start, part.stop)
            for step in plan.run(part, seeds[chosen], wanted[chosen]):
                if on_step is not None:
                    on_step(step)
            yield self._decoded(step.x)

    def parts(self, count: int, processes: Processes | None = None) -> Sequence[range]:
        """The places of the images in each batch that this process makes."""
        return (processes or Processes()).batches(count, self.options.batch_size)

    def __call__(self, count: int, wanted: Wanted | None = None) -> Images:
        """All of the first images of the seed, uint8 (N, H, W, C)."""
        return np.concatenate(list(self.batches(count, wanted)))

    def appearing(
        self, count: int, wanted: Wanted | None = None, *, first: int = 0
    ) -> list[Images]:
        """The first images as they appear: the noise, and what it has become after each step."""
        seeds = image_seeds(self.options.seed, count, first)
        frames = [self._decoded(self._noise(NoiseSource(seeds)))]
        steps = self.from_noise().run(range(count), seeds, wanted or [None] * count)
        return frames + [self._decoded(step.x) for step in steps]

    def attending(
        self, wanted: Wanted, steps: tuple[int, int] | None = None, *, first: int = 0
    ) -> tuple[Images, Tensor]:
        """The first images for these texts, and where each word is looked at.

        Args:
            steps: (first, end) of the steps that count; None: all.

        Returns:
            The images (N, H, W, C) and `AttentionRecord.maps` (N, L, H, W).

        Raises:
            InputError: the model reads no text.
        """
        seeds = image_seeds(self.options.seed, len(wanted), first)
        counted = range(*steps) if steps else range(len(self.timesteps))
        with recorded_attention(self.model, len(wanted)) as record:
            record.paused = 0 not in counted
            run = self.from_noise().run(range(len(wanted)), seeds, wanted)
            for done, step in enumerate(run, start=1):
                record.paused, x = done not in counted, step.x
        return self._decoded(x), record.maps((self.height, self.width))


def image_seeds(seed: int, count: int, first: int = 0) -> list[int]:
    """A seed for each image of a run: consecutive ones, from a place that the run's seed gives."""
    start = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return [(start + first + i) % SEEDS for i in range(count)]


def use_clip(model: DiffusionUNet, clip: ClipText) -> None:
    """Lets a CLIP text model read for a model: beside it, neither trained nor saved with it."""
    model.text = clip


def to_bytes(x: Tensor) -> Images:
    """Images (B, C, H, W) in [-1, 1] as uint8 (B, H, W, C); what lies outside is clamped."""
    return rearrange(to_uint8(x), "b c h w -> b h w c").cpu().numpy()


def _folder(model: DiffusionUNet, key: str) -> str:
    name = model.info[key]
    if not isinstance(name, str):
        raise InputError(f"info.{key} in the model's config.json is {name!r:.200}, and no folder")
    return name


def _known(model: DiffusionUNet, key: str) -> Any:
    if key not in model.info:
        raise InputError(
            f"the model's config.json has no {key!r} in its info: it was not made by train_ddpm.py"
        )
    return model.info[key]
