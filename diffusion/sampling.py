"""Images out of a trained model: `ImageSampler`."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion.attention_maps import recorded_attention
from diffusion.data.conditions import Asked, ImageKind, Picture, Unread
from diffusion.data.pixels import Pixels, known_ranges
from diffusion.data.sources import saved_colour
from diffusion.initial import load_model
from diffusion.model import DiffusionUNet
from diffusion.options import SamplingOptions
from diffusion.plans import Plan, Plans, Wanted, made_size
from diffusion.process.denoiser import Clipped, Denoiser
from diffusion.process.guidance import Guided
from diffusion.process.noise import SEEDS, NoiseSource
from diffusion.process.prediction import DenoiserLike
from diffusion.process.samplers import CHURN, Step, get_sampler
from diffusion.process.schedule import NoiseSchedule
from diffusion.process.tiles import Tiled
from diffusion.stable.autoencoder import Autoencoder
from diffusion.stable.clip import ClipText
from diffusion.stable.lora import merge_loras
from diffusion.text import TextEncoder
from unet.device import computing_in, pick_device, trained_precision
from unet.errors import InputError
from unet.files.images import WHITE, Colour
from unet.files.pages import Array, Reading
from unet.training.task import Processes

Images = Array  # (N, H, W, C), of the type of the training images
STEPS, FEW_STEPS = 20, 4  # where none are given, and the model's info has none


def load_for_sampling(folder: str | Path, device: str, loras: Sequence[str] = ()) -> DiffusionUNet:
    """A model folder's network on the device of that name, laid out as convolutions like it.

    Args:
        loras: files to merge into its weights, see `merge_loras`.
    """
    model = load_model(folder).to(pick_device(device)).float()
    merge_loras(loras, model)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # stubs


class ImageSampler:
    """A trained model with the settings of a sampling run.

    Args:
        model: as `diffusion.training` saves it: its `info` holds the noise schedule, the kind of
            prediction, the size of the images, and the names of the classes. It is put into
            evaluation mode; its weights are left where they are, as it may be in training.
        autoencoder: of a model that works in latents; None: it is read from where training read it,
            and so is CLIP, where the model has its text from it.
        guide: the weaker model that `options.guide` names; None: it is read from there.

    Raises:
        InputError: settings that do not fit the model, such as more steps than noise levels; an
            autoencoder or a CLIP that is not there any more.
    """

    def __init__(
        self,
        model: DiffusionUNet,
        options: SamplingOptions,
        autoencoder: Autoencoder | None = None,
        guide: DiffusionUNet | None = None,
    ) -> None:
        options = with_defaults(options, model)
        assert options.sampler is not None
        assert options.steps is not None
        self.model, self.options, self.pixels = model.eval(), options, model.pixels
        self.autoencoder = autoencoder or self._read_parts()
        self.guide = guide
        if guide is None and options.guide is not None:
            self.guide = load_for_sampling(options.guide, str(self.device)).eval()
        self.schedule = NoiseSchedule.from_dict(_saved(model, "schedule"))
        self.height, self.width = model.size
        self.classes = model.classes
        strided = self.schedule.kind == "flow" or options.shift != 1 or options.sampler == "jump"
        spacing = options.spacing or ("trailing" if strided else "logsnr")
        self.timesteps = self.schedule.timesteps(options.steps, spacing, shift=options.shift)
        check_sampler(options, model)
        self.denoiser = self._denoiser()
        self.plans = Plans(
            model,
            self.denoiser,
            self.timesteps,
            options.sampler,
            sampler_options(options),
            model.size,
            self.autoencoder,
        )

    def with_options(self, options: SamplingOptions) -> ImageSampler:
        """The same model with other settings; its parts, and an unchanged guide, are not read
        again."""
        guide = self.guide if options.guide == self.options.guide else None
        return ImageSampler(self.model, options, self.autoencoder, guide)

    @property
    def channels(self) -> int:
        """Channels of what is made; of images with masks, the mask's value or colour is last."""
        if self.autoencoder:
            return self.autoencoder.image_channels
        codes = masks.channels if (masks := self.model.masks) else 0
        return self.model.image_channels - codes + self.mask_channels

    @property
    def mask_channels(self) -> int:
        """How many of these, the last ones, are the values of a mask."""
        return masks.depth if (masks := self.model.masks) else 0

    @property
    def _pictured(self) -> int:
        """Channels of the images; 0 where masks alone are made."""
        return self.channels - self.mask_channels

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _read_parts(self) -> Autoencoder | None:
        """The autoencoder where the model works in latents; the model gets its CLIP, too."""
        info = self.model.info
        if "text_encoder" in info and self.model.text is None:
            with _part_of(self.model, "text_encoder", "reads texts by the CLIP") as folder:
                clip = ClipText.from_pretrained(folder)
            clip.model.to(self.device)
            self.model.text = clip
        if "autoencoder" not in info:
            return None
        with _part_of(self.model, "autoencoder", "works on latents of the autoencoder") as folder:
            return Autoencoder.from_folder(folder, self.device)

    def _denoiser(self) -> DenoiserLike:
        options, model = self.options, self.model
        knows = self.classes or model.text or model.condition
        if options.guidance != 1 and not (knows or options.guide):
            raise InputError(
                f"--guidance {options.guidance} needs a model that knows classes, captions or a "
                "condition, and this one was trained without: leave it out, or give a --guide"
            )
        if options.negative and not model.text:
            raise InputError(
                f"--negative {options.negative!r} needs a model that was trained with captions, "
                "and this one was not: leave it out"
            )
        denoiser = self._denoiser_of(model)
        if options.guidance != 1:
            denoiser = Guided(
                denoiser,
                options.guidance,
                self._away(),
                rescale=options.guidance_rescale,
                interval=options.guidance_interval,
            )
        if model.any_size:
            denoiser = Tiled(denoiser, model.size, options.batch_size)
        if options.clip == "none" or self.autoencoder:  # latents have no range
            return denoiser
        return Clipped(denoiser, options.clip)

    def _denoiser_of(self, model: DiffusionUNet) -> DenoiserLike:
        """A model as a function of noisy images, in the precision asked for."""
        dtype = trained_precision(self.options.precision, self.device)
        network = partial(_computed, model, dtype)  # no closure, which could not be pickled
        schedule = NoiseSchedule.from_dict(_saved(model, "schedule"))
        return Denoiser(network, schedule, _saved(model, "prediction"))

    def _away(self) -> Mapping[str, Tensor] | DenoiserLike:
        """What guidance steers away from: a weaker model, or no class, text or picture."""
        if self.guide is None:
            with torch.no_grad():
                return self.model.conditioning([self.options.negative or None])
        check_guide(self.options, self.model, self.guide)
        return self._denoiser_of(self.guide)

    def class_index(self, name: int | str) -> int:
        """The index of a class by its name, or by itself.

        Raises:
            InputError: the model does not know it.
        """
        if name in self.classes:
            return self.classes.index(str(name))
        try:
            index = operator.index(name)  # type: ignore[arg-type]  # a name is none
        except TypeError:
            index = -1
        if not 0 <= index < len(self.classes):
            known = (
                f"knows {', '.join(self.classes)}"
                if self.classes
                else "was trained without classes"
            )
            raise InputError(f"class {name!r} is none of the model's, which {known}")
        return index

    def wanted(
        self,
        numbers: Sequence[int],
        classes: Sequence[int | str | None] = (),
        prompts: Sequence[str] = (),
        pictures: Sequence[Picture] = (),
    ) -> Wanted:
        """The class or text of each of these images of a run, and what it is made from, in turn;
        None: any.

        Args:
            numbers: of the images.
            classes: their names or indices.
            prompts: texts that images are to show. With neither, and without pictures, images are
                of every class in turn, where the model knows classes.
            pictures: (K, H, W) each, as `made_from` gives them.

        Raises:
            InputError: a class or texts that the model does not know; both of them; a text that is
                too long.
        """
        if self.model.condition is not None and not (classes or prompts or pictures):
            raise InputError(
                "the model makes images from pictures, and none is given (--condition, in Python "
                f"pictures): a file or several of {self.model.condition.said()}"
            )
        if classes and prompts:
            raise InputError("classes and prompts each say what an image shows: give one")
        chosen: Sequence[int | str | None] = [None]
        if self.classes and not pictures:
            chosen = range(len(self.classes))
        if classes:
            chosen = [None if name is None else self.class_index(name) for name in classes]
        if prompts:
            self.text.tokenize(prompts)  # which refuses what is too long
            chosen = prompts
        if not pictures:
            return [chosen[i % len(chosen)] for i in numbers]
        return [Asked(chosen[i % len(chosen)], pictures[i % len(pictures)]) for i in numbers]

    def made_from(self, file: Path, *, resize: bool = False) -> Unread:
        """The picture (K, H, W) in a file that an image of its size can be made from; its pixels
        are read when that image is made.

        Args:
            resize: to the size of the training images, as is done anyway where these were resized.

        Raises:
            InputError: a model without a condition; a file whose header says that it is no such
                picture; when it is read, one whose pixels are none.
        """
        condition = self.model.condition
        if condition is None:
            raise InputError(
                f"'{file}' is given to make an image from, but the model makes images from noise "
                "alone: train one with train-ddpm --condition"
            )
        size = None if self.model.any_size and not resize else (self.height, self.width)
        images = ImageKind(
            size=size,
            channels=self._pictured or self.channels,
            ranges=known_ranges(self.model.info),
            fine=self.pixels.fine,
            nodata=self.reading.nodata,
            background=self.background,
        )
        return condition.unread(file, images)

    @property
    def reading(self) -> Reading:
        """How the training images were read, from the model's `info`."""
        return Reading.from_dict(self.model.info.get("reading", {}))

    @property
    def background(self) -> Colour | None:
        """The colour under transparent pixels, as in training; None: alpha is a channel."""
        if self._pictured == 4 and self.model.info.get("alpha", True):
            return None
        try:
            return saved_colour(self.model.info.get("background")) or WHITE
        except ValueError as error:
            raise InputError(f"the model's background is damaged: {error}") from error

    def sizes(self, wanted: Wanted) -> list[tuple[int, int]]:
        """Height and width of each image that is made."""
        return [made_size(w, (self.height, self.width)) for w in wanted]

    @property
    def text(self) -> TextEncoder:
        """The model's text encoder.

        Raises:
            InputError: it has none.
        """
        if self.model.text is None:
            raise InputError(
                "a --prompt needs a model that was trained with --captions, and this one was not"
            )
        return self.model.text

    def _decoded(self, x: Tensor) -> Images:
        found = self.pixels.levels(self.autoencoder.decode(x) if self.autoencoder else x)
        masks = self.model.masks
        return self._images(self.pixels.stored, found if masks is None else masks.decode(found))

    def shown(self, images: Images) -> NDArray[np.uint8]:
        """Images as bytes, and masks in colours or greys that differ, beside their images."""
        found, masks = self._images(self.pixels.shown, images), self.model.masks
        return found if masks is None else masks.shown(found)

    def _images(self, change: Callable[[Pixels], Array], made: Array) -> Array:
        """What is made, its images changed, and the values of its masks, which are last, kept."""
        images, values = np.split(made, [made.shape[-1] - self.mask_channels], axis=-1)
        changed = change(images)
        return np.concatenate([changed, values.astype(changed.dtype)], axis=-1)

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
        """Images `first` to `first + count` of the seed, (B, H, W, C) in the type of the training
        images, as they get ready.

        Args:
            wanted: the class or text of each image; none given: any.
            plan: what they start from; none given: noise.
            on_step: called after each step of each batch.
            processes: share the batches, of which only this one's are made: see `parts`.
        """
        plan, wanted = plan or self.plans.from_noise(), list(wanted or [None] * count)
        seeds = image_seeds(self.options.seed, count, first)
        sizes = self.sizes(wanted)
        for part in self.parts(sizes, processes):
            chosen = slice(part.start, part.stop)
            height, width = sizes[part.start]
            for step in plan.run(part, seeds[chosen], wanted[chosen]):
                if on_step is not None:
                    on_step(step)
            yield self._decoded(step.x)[:, :height, :width]

    def parts(
        self, sizes: Sequence[tuple[int, int]], processes: Processes | None = None
    ) -> Sequence[range]:
        """The places of the images in each batch that this process makes: of one size, and of no
        more pixels than a batch of the model's images has.

        Args:
            sizes: height and width of each image.
        """
        size = self.options.batch_size
        most, found = size * self.height * self.width, []
        for part in (processes or Processes()).batches(len(sizes), size):
            start = part.start
            for i in part:
                pixels = (i + 1 - start) * sizes[i][0] * sizes[i][1]
                if i > start and (sizes[i] != sizes[start] or pixels > most):
                    found.append(range(start, i))
                    start = i
            found.append(range(start, part.stop))
        return found

    def __call__(self, count: int, wanted: Wanted | None = None) -> Images:
        """All of the first images of the seed, (N, H, W, C)."""
        return np.concatenate(list(self.batches(count, wanted)))

    def appearing(
        self, count: int, wanted: Wanted | None = None, *, first: int = 0
    ) -> Iterator[Images]:
        """The first images, of one size, as they appear: the noise, and what it has become after
        each step.
        """
        seeds, wanted = image_seeds(self.options.seed, count, first), wanted or [None] * count
        height, width = self.sizes(wanted)[0]
        noise = self.plans.noise(NoiseSource(seeds), self.plans.canvas(wanted))
        yield self._decoded(noise)[:, :height, :width]
        for step in self.plans.from_noise().run(range(count), seeds, wanted):
            yield self._decoded(step.x)[:, :height, :width]

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
            run = self.plans.from_noise().run(range(len(wanted)), seeds, wanted)
            for done, step in enumerate(run, start=1):
                record.paused, x = done not in counted, step.x
        return self._decoded(x), record.maps((self.height, self.width))


def _computed(
    model: DiffusionUNet, dtype: torch.dtype | None, x: Tensor, t: Tensor, **given: Any
) -> Tensor:
    """What the model makes of x, in the type of its weights, or under autocast to another one."""
    with computing_in(dtype, x.device):
        found: Tensor = model(x.to(next(model.parameters()).dtype), t, **given)
    return found


def with_defaults(options: SamplingOptions, model: DiffusionUNet) -> SamplingOptions:
    """The options with the usual sampler and steps of a model, where none are given."""
    sampler, steps = options.sampler, options.steps
    usual = STEPS
    if sampler is None:
        usual = _steps_of(model)
        sampler = "dpmpp-2m" if "coupling" in model.info else "dpmpp-2m-sde"
        sampler = "jump" if "few_steps" in model.info else sampler
    if steps is None:
        most = NoiseSchedule.from_dict(_saved(model, "schedule")).steps
        steps = min(FEW_STEPS if sampler == "jump" else usual, most)
    return replace(options, sampler=sampler, steps=steps)


def _steps_of(model: DiffusionUNet) -> int:
    """The steps that were found to be enough for the model with its usual sampler, or STEPS."""
    steps = model.info.get("steps", STEPS)
    if type(steps) is not int or steps < 1:
        raise InputError(f"the model's steps, {steps!r:.200}, are no number: take them out")
    return steps


def sampler_options(options: SamplingOptions) -> dict[str, Any]:
    """Those of the options that their sampler has, as `samplers.sample` takes them."""
    if options.sampler == "ddim":
        return {"eta": options.eta}
    if options.sampler == "ddpm":
        return {"variance": options.variance}
    return {name: getattr(options, name) for name in CHURN} if options.churn else {}


def check_sampler(options: SamplingOptions, model: DiffusionUNet) -> None:
    """Raises an InputError for an unknown sampler, or one that the model was not trained for."""
    if options.sampler == "jump" and not model.config.jumps:
        raise InputError(
            "--sampler jump is for models of train-ddpm --few-steps, which know where a step "
            "leads, and this is none: choose another sampler"
        )
    assert options.sampler is not None
    own = sampler_options(options)
    sampler = get_sampler(options.sampler, own)
    if "coupling" in model.info and sampler.draws_noise(own):
        raise InputError(
            f"--sampler {options.sampler} draws noise during sampling, which is right only where "
            "training drew it independently of the images, and this model was trained with "
            "--coupling ot: choose ddim, euler, heun, flow-heun or dpmpp-2m, without --eta and "
            "--churn"
        )
    if options.variance == "learned" and model.out_channels == model.image_channels:
        raise InputError(
            "--variance learned is for models that were trained with --learn-variance: choose "
            "fixed-small or fixed-large"
        )


def check_guide(options: SamplingOptions, model: DiffusionUNet, guide: DiffusionUNet) -> None:
    """Raises an InputError for a weaker model that cannot guide this model."""
    if "text" in {**model.info, **guide.info}:
        raise InputError(
            f"--guide {options.guide}: each of the two models reads captions with a text encoder "
            "of its own, but guidance gives both the same encoding: leave --guide out"
        )
    if options.sampler == "jump" and not guide.config.jumps:
        raise InputError(
            f"--guide {options.guide} takes no jumps, as models of train-ddpm --few-steps do: "
            "give one that does, or another --sampler"
        )
    ours, theirs = _shared_facts(model), _shared_facts(guide)
    if differing := [name for name in ours if ours[name] != theirs[name]]:
        raise InputError(
            f"--guide {options.guide} and the model differ in the {differing[0]}: choose a smaller "
            "or shorter training on the same data"
        )


def _shared_facts(model: DiffusionUNet) -> dict[str, Any]:
    """What a model and its guide have in common, by its name."""
    return {
        "channels of its images": model.image_channels,
        "type and values of its images": model.pixels,
        "classes": model.classes,
        "condition": model.condition,
        "text encoder": model.info.get("text_encoder"),
        "autoencoder": model.info.get("autoencoder"),
    }


def image_seeds(seed: int, count: int, first: int = 0) -> list[int]:
    """A seed for each image of a run: consecutive ones, from a place that the run's seed gives."""
    start = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return [(start + first + i) % SEEDS for i in range(count)]


@contextmanager
def _part_of(model: DiffusionUNet, key: str, uses: str) -> Iterator[str]:
    """The folder that the model's `info` names under a key; what is wrong there names the key."""
    folder = model.info[key]
    if not isinstance(folder, str):
        raise InputError(f"info.{key} in the model's config.json is {folder!r:.200}, and no folder")
    try:
        yield folder
    except InputError as error:
        raise InputError(
            f"the model {uses} of {folder!r}, which cannot be read ({error}): put it there, or "
            f"write the path to where it is into info.{key} of the model's config.json; or use "
            "txt2img with the pipeline/ of its run"
        ) from error


def _saved(model: DiffusionUNet, key: str) -> Any:
    """The value that training saved under a key of the model's `info`."""
    if key not in model.info:
        raise InputError(
            f"the model's config.json has no {key!r} in its info: it was not made by train-ddpm"
        )
    return model.info[key]
