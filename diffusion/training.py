"""Training a diffusion model: the task for `fit`."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from diffusion.data.conditions import Asked, find_condition
from diffusion.data.images import DiffusionData
from diffusion.data.pixels import ValueRange, to_bytes
from diffusion.data.samples import TrainingSamples
from diffusion.data.sources import HowToRead, check_source
from diffusion.decisions import DiffusionPlan, check_options, clip_folder, decide
from diffusion.initial import (
    freeze_all_but_attention,
    load_model,
    save_lora,
    start_lora,
    take_over,
)
from diffusion.judging.report import (
    affordable,
    preview_sampler,
    shown_conditions,
    spread,
    write_report,
)
from diffusion.judging.steps import needs_deciding, note_steps
from diffusion.model import DiffusionUNet, noted_path
from diffusion.options import CHANNELS, DiffusionOptions
from diffusion.pictures import grid, table
from diffusion.process.denoiser import Denoiser
from diffusion.process.guidance import Guided
from diffusion.process.levels import TrainingLevels, coupled, jumps
from diffusion.process.loss import Weighting, diffusion_loss, jump_loss
from diffusion.process.noise import NoiseSource
from diffusion.process.prediction import Denoised
from diffusion.stable.autoencoder import Autoencoder
from diffusion.stable.export import obstacle, write_pipeline
from diffusion.stable.latents import Data, LatentData, autoencoder_of, images_of
from diffusion.stable.lora import LORA
from diffusion.text import PADDING
from unet.device import pick_device
from unet.errors import InputError, Interrupted
from unet.files.pictures import composite
from unet.training.batches import Key, sample_rng
from unet.training.config_file import keep_config
from unet.training.fit import fit
from unet.training.resuming import resumed
from unet.training.run import RunFolder, check_first, is_main_process, run_folder, upload
from unet.training.task import Batch, Processes, Task
from unet.weights.card import SAMPLES
from unet.weights.folder import start_folder

_GOLDEN = (math.sqrt(5) - 1) / 2  # its multiples are spread evenly, and far from their neighbours
SHOWN_LEVELS = 8  # of the pictures
# Held-out images, and as many training images: with repetitions, and each once; of large images
# fewer (`affordable`), but FEWEST_JUDGED.
LEAST_JUDGED, MOST_JUDGED, FEWEST_JUDGED = 128, 500, 32


def train(options: DiffusionOptions) -> dict[str, float]:
    """Reads the data, says what was found, trains, and returns the best held-out figures.

    Raises:
        InputError: a mistake in the options or the data, before anything is trained.
    """
    check_first(options)
    options = resumed(options)
    if options.condition and not os.path.isdir(options.condition):
        find_condition(options.condition, 1, cleaning=options.cleaning)
    check_options(options)
    if options.prior:
        check_source(options.prior)
    data = load_data(options)
    prior = load_prior(options, data)
    plan = decide(options, data)
    model = make_model(plan)
    if is_main_process():
        print("\n".join([data.describe(), *plan.lines()]))
        if prior:
            print(f"every second image is from {options.prior}: {prior.describe()}")
        whole = plan.options.trained != "lora"
        if (
            whole
            and isinstance(data, LatentData)
            and (why_not := obstacle(model, data.autoencoder))
        ):
            print(f"diffusers will have no pipeline of this model: {why_not}")
        sys.stdout.flush()
    task = DiffusionTask(plan, data)
    with run_folder(plan.fit):
        for part in (data, prior):
            if isinstance(part, LatentData):
                _encode(part, plan)
        figures = fit(
            Task(
                model=model,
                samples=NoisedSamples(data, plan, model, prior),
                options=plan.options,
                decisions=plan.decisions,
                finish=Timesteps.of(plan),
                loss=task.loss,
                save=save_lora if plan.options.trained == "lora" else DiffusionUNet.save_pretrained,
                evaluate=task.evaluate if data.val else None,
                first_pictures=task.forward_pictures,
                pictures=task.pictures,
            ),
            plan.fit,
        )
        if is_main_process():
            _finish(plan, data, model)
    return figures


def _finish(plan: DiffusionPlan, data: Data, model: DiffusionUNet) -> None:
    """Draws the report of the best weights, and writes a pipeline where they make one."""
    run = plan.fit.out
    best = load_model(run / "model").to(pick_device(plan.fit.device))
    if plan.clip:
        best.text = model.text  # as saved models do not hold it
    whole = plan.options.trained != "lora"
    samples = None
    if whole and needs_deciding(best):
        sampler = preview_sampler(best, plan.fit.seed, plan.fit.together())
        said, samples = note_steps(sampler, shown_conditions(data))
        print(said)
    # What is made from pictures would show these, which may be nobody else's.
    picture = run / "model" / SAMPLES if whole and best.condition is None else None
    report = write_report(run, best, data, plan.fit.seed, plan.fit.together(), picture, samples)
    print(f"report: {report}")
    if whole:
        best.save_info(run / "model")  # whose card shows the samples
    upload(DiffusionUNet, plan.fit)
    folder, autoencoder = clip_folder(plan.options), autoencoder_of(data)
    if not whole:  # which is small, and a pipeline is not
        print(f"for --lora, and for load_lora_weights of diffusers: {run / 'model' / LORA}")
    elif folder and autoencoder and not obstacle(best, autoencoder):
        write_pipeline(run / "pipeline", best, autoencoder, folder)
        print(f"for txt2img --model and for diffusers: {run / 'pipeline'}")


def load_prior(options: DiffusionOptions, data: Data) -> Data | None:
    """The images of --prior, where it is given.

    Raises:
        InputError: images of another size, other channels or another type.
    """
    if options.prior is None:
        return None
    ranges, dtype = _kept(data)
    prior = load_data(replace(options, data=options.prior, val=0), latents="prior", ranges=ranges)
    if (prior.size, prior.channels) != (data.size, data.channels):
        raise InputError(
            f"--prior {options.prior} has images of another size or other channels than --data "
            f"{options.data}: give --size and --colour"
        )
    if (theirs := _kept(prior)[1]) != dtype:
        raise InputError(
            f"--prior {options.prior} has images of {theirs}, and --data {options.data} of "
            f"{dtype}: save all in the same way"
        )
    return prior


def _kept(data: Data) -> tuple[Mapping[str, ValueRange], str]:
    """The values of images, and the type that they are kept in."""
    images = images_of(data)
    return images.ranges, images.dtype


def load_data(
    options: DiffusionOptions,
    latents: str = "latents",
    ranges: Mapping[str, ValueRange] | None = None,
) -> Data:
    """The training and held-out images that the options name, or what they become in latents.

    Args:
        latents: the folder in that of the run where these are kept.
        ranges: see `DiffusionData`.
    """
    autoencoder = None
    if options.latents:
        device = pick_device(options.device) if is_main_process() else "cpu"
        autoencoder = Autoencoder.from_folder(options.latents, device)
    images = DiffusionData(
        options.data,
        size=options.size,
        channels=CHANNELS[options.colour]
        if options.colour
        else (autoencoder.image_channels if autoencoder else None),
        crops=options.crops,
        flips=False if autoencoder else options.flips,
        val=options.val,
        skip_bad=options.skip_bad,
        classes=options.classes,
        captions=options.captions,
        how=how_to_read(options),
        ranges=ranges,
        fine=autoencoder is None,  # which is of 8 bits
        condition=options.condition,
        masks=options.mask_coding if options.target == "mask" or options.joint else None,
        joint=options.joint,
        cleaning=options.cleaning,
    )
    return LatentData(images, autoencoder, options.out / latents) if autoencoder else images


def how_to_read(options: DiffusionOptions) -> HowToRead:
    """How the options say to read image files, beyond what these say themselves."""
    return HowToRead(
        reading=options.reading,
        background=None if options.colour == "rgba" else options.background,
        caption_key=options.caption_key,
    )


def _encode(data: LatentData, plan: DiffusionPlan) -> None:
    """Encodes the images; after an interruption, --resume continues."""
    try:
        data.encode()
    except Interrupted:
        keep_config(plan.options, plan.fit.out, plan.lines())
        raise


def make_model(plan: DiffusionPlan) -> DiffusionUNet:
    """The model of a plan, with random weights or those of its start."""
    torch.manual_seed(plan.fit.seed)
    model = DiffusionUNet(plan.network, plan.outputs, plan.info)
    if plan.clip:
        model.text = plan.clip  # beside it, neither trained nor saved with it
    options = plan.options
    goes_on = options.resume and RunFolder(options.out).state.exists()
    if options.trained == "lora" and plan.start:
        base = noted_path(start_folder(str(options.init)), RunFolder(options.out).model)
        start_lora(model, plan.start, options.rank, base)
    # What is not trained is not in the state, either.
    elif plan.start and not (goes_on and options.trained == "all"):
        found = take_over(model, plan.start)
        if is_main_process() and not goes_on:
            print(f"started with {found}")
    if options.trained == "attention":
        freeze_all_but_attention(model)
    return model


class Alternating:
    """Training samples and as many others, in turn; the others go on from epoch to epoch.

    With a loss that is a mean over both it is DreamBooth's with a prior weight of 1 (arXiv
    2208.12242, eq. 2).
    """

    def __init__(self, samples: TrainingSamples, others: TrainingSamples) -> None:
        self.samples, self.others = samples, others

    def __len__(self) -> int:
        return 2 * len(self.samples)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, index = key
        if index % 2 == 0:
            return self.samples[epoch, index // 2]
        return self.others[divmod(epoch * len(self.samples) + index // 2, len(self.others))]

    def name(self, index: int) -> str:
        if index % 2 == 0:
            return self.samples.name(index // 2)
        return self.others.name(index // 2 % len(self.others))


class NoisedSamples:
    """Training images, each with its noise and the numbers that its timestep and jump follow from.

    `samples[epoch, index]` has those of `TrainingSamples`, with class or caption left out at times;
    "noise" (C, H, W); "place" (), uniform in [0, 1), see `stratified`; with --few-steps "jump" (),
    likewise, see `jumps`; of captions "tokens" (L,) instead. All of it is drawn from the sample's
    own generator, so that a resumed run and one of other numbers of processes see the same.
    """

    def __init__(
        self, data: Data, plan: DiffusionPlan, model: DiffusionUNet, prior: Data | None = None
    ) -> None:
        self.seed = plan.fit.seed
        self.samples: TrainingSamples | Alternating = data.samples(self.seed)
        if prior is not None:
            self.samples = Alternating(self.samples, prior.samples(self.seed))
        self.null, self.dropout = (model.config.classes or 0) - 1, plan.options.label_dropout
        self.jumping = plan.options.few_steps is not None
        self.tokenizer = model.text and model.text.tokenizer

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        sample = dict(self.samples[key])
        rng = sample_rng(self.seed + 1, *key)
        shape = sample["image"].shape
        sample["noise"] = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
        sample["place"] = torch.tensor(rng.random(dtype=np.float32))
        label, caption = sample.pop("label", None), sample.pop("caption", "")
        unlabelled, unpictured = self._left_out(rng.random(), "picture" in sample)
        if self.jumping:
            sample["jump"] = torch.tensor(rng.random(dtype=np.float32))
        if unpictured and "picture" in sample:
            sample["picture"] = torch.zeros_like(sample["picture"])
        if self.null >= 0:
            sample["label"] = torch.tensor(self.null) if unlabelled else label
        if self.tokenizer is not None:
            tokens = self.tokenizer.tokenize(["" if unlabelled else caption])[0]
            missing = self.tokenizer.longest - len(tokens)
            sample["tokens"] = F.pad(tokens, (0, missing), value=PADDING)
        return sample

    def _left_out(self, u: float, pictured: bool) -> tuple[bool, bool]:
        """Whether class or caption, and whether the picture is left out, for u uniform in [0, 1).

        Where there are both, each alone is left out half as often as both together, as in
        InstructPix2Pix (arXiv 2211.09800), so that either can be asked for without the other.
        """
        share = self.dropout
        if not pictured or (self.null < 0 and self.tokenizer is None):
            return u < share, u < share
        return u < 1.5 * share, u < share or 1.5 * share <= u < 2 * share

    def name(self, index: int) -> str:
        return self.samples.name(index)


def stratified(position: Tensor, place: Tensor, batch: int, *, seed: int = 0) -> Tensor:
    """Numbers (B,) in [0, 1): over a whole batch one from each of as many equal parts.

    Each alone is uniform; together they cover all noise levels, which makes the loss of a batch
    less noisy (as the low-discrepancy sampler of arXiv 2107.00630, appendix I.1). They are the same
    however a batch is cut for processes and accumulated parts.

    Args:
        position: (B,) of the samples in the stream of all samples, in which each batch takes the
            next `batch`; all of one batch.
        place: (B,), uniform in [0, 1): where in its part a number lies.
        seed: of the order in which the samples of each batch get the parts.
    """
    stream = (seed, int(position[0]) // batch, 0, 1)  # not that of an epoch's order, or of a sample
    order = np.random.default_rng(stream).permutation(batch)
    return (torch.from_numpy(order).to(position.device)[position % batch] + place) / batch


@dataclass(frozen=True)
class Timesteps:
    """What is drawn for a batch as a whole: its timesteps "t", and the ends of its jumps.

    Tokens are cut to those of its longest text.

    Args:
        batch, seed: those of `stratified`.
        levels: see `TrainingLevels`.
        coupled: noise is paired with the images that go through the network together.
        padded: padding after a text does not count, and can be cut off.
    """

    batch: int
    levels: TrainingLevels
    seed: int
    coupled: bool
    padded: bool

    @classmethod
    def of(cls, plan: DiffusionPlan) -> Timesteps:
        padded = plan.clip is None  # with CLIP, padding counts
        coupled = plan.options.coupling == "ot"
        return cls(plan.fit.batch_size, plan.levels, plan.fit.seed, coupled, padded)

    def __call__(self, batch: Batch) -> Batch:
        t = self.levels(stratified(batch["position"], batch["place"], self.batch, seed=self.seed))
        if self.coupled:
            noise = coupled(batch["noise"], batch["image"], batch.get("label"))
            batch = {**batch, "noise": noise}
        batch = {**batch, "t": t}
        if "jump" in batch:
            batch["near"], batch["to"] = jumps(self.levels.schedule, t, batch["jump"])
        if "tokens" not in batch or not self.padded:
            return batch
        tokens = batch["tokens"]
        longest = int((tokens != PADDING).sum(dim=1).max())
        return {**batch, "tokens": tokens[:, :longest].contiguous()}


class Teacher:
    """The denoiser of the model in --init, with the guidance of --few-steps. It moves to the device
    of its first images, and is not trained.
    """

    def __init__(self, plan: DiffusionPlan) -> None:
        assert plan.options.init
        assert plan.options.few_steps is not None
        self.model = load_model(plan.options.init).requires_grad_(False)
        if plan.clip:
            self.model.text = plan.clip
        self.schedule, self.prediction = plan.schedule, plan.prediction
        self.scale = plan.options.few_steps

    def __call__(
        self, x: Tensor, t: Tensor | float, to: float | None = None, **conditioning: Any
    ) -> Denoised:
        if next(self.model.parameters()).device != x.device:
            self.model.to(x.device)
        if (tokens := conditioning.pop("tokens", None)) is not None:
            assert self.model.text is not None  # the same captions: see `check_teacher`
            conditioning["context"], conditioning["mask"] = self.model.text(tokens)
        denoiser = Denoiser(self.model, self.schedule, self.prediction)
        if self.scale == 1:
            return denoiser(x, t, to, **conditioning)
        null = self.model.conditioning([None])
        return Guided(denoiser, self.scale, null)(x, t, to, **conditioning)


class DiffusionTask:
    """Loss, held-out figures and pictures of a diffusion model."""

    def __init__(self, plan: DiffusionPlan, data: Data) -> None:
        self.plan, self.data = plan, data
        self.schedule, self.prediction = plan.schedule, plan.prediction
        self.autoencoder = autoencoder_of(data)
        self.pictured = data.channels  # before the codes of a mask
        if isinstance(data, DiffusionData) and data.joint:
            self.pictured -= data.codes
        self.teacher = None if plan.options.few_steps is None else Teacher(plan)

    def _loss(
        self,
        model: nn.Module,
        x0: Tensor,
        t: Tensor,
        noise: Tensor,
        jump: tuple[Tensor, Tensor] | None,
        weighting: Weighting = "plain",
        **given: Any,
    ) -> Tensor:
        if self.teacher is not None and jump is not None:
            return jump_loss(model, self.teacher, x0, t, *jump, noise, **given)
        return diffusion_loss(
            model, self.schedule, self.prediction, x0, t, noise, weighting=weighting, **given
        )

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        given: dict[str, Any] = {"weighting": self.plan.options.weighting}
        if "label" in batch:
            given["classes"] = batch["label"]
        if "tokens" in batch:
            given["tokens"] = batch["tokens"]
        if "picture" in batch:
            given["picture"] = batch["picture"]
        jump = (batch["near"], batch["to"]) if self.teacher is not None else None
        losses = self._loss(model, batch["image"], batch["t"], batch["noise"], jump, **given)
        return losses.mean()

    def evaluate(self, model: DiffusionUNet, processes: Processes) -> Mapping[str, float]:
        """The plain loss on held-out images, and on as many training images ("seen").

        Noise levels and noise are the same at each evaluation; a few images are judged at several
        levels each. A held-out loss that rises above that of the seen images indicates
        memorisation.
        """
        figures = {}
        levels = replace(self.plan.levels, shift=1.0)
        least, most = (
            affordable(count, self.data.size, FEWEST_JUDGED)
            for count in (LEAST_JUDGED, MOST_JUDGED)
        )
        val = spread(self.data.val, most)
        for name, images in (("loss", val), ("seen", spread(self.data.train, len(val)))):
            indices = list(images) * -(-least // len(images))
            # Permuted, so that the noise level does not follow the order of the images.
            order = np.random.default_rng(0).permutation(len(indices))
            t = levels(torch.from_numpy((order + 0.5) / len(order)))
            part = processes.share(range(len(indices)))
            size = self.plan.fit.together(processes.count)
            total = self._total(model, part, [indices[i] for i in part], t[list(part)], size)
            figures[name] = sum(processes.gather(total)) / len(indices)
        return figures

    def _total(
        self,
        model: DiffusionUNet,
        seeds: Sequence[int],
        indices: Sequence[int],
        t: Tensor,
        size: int,
    ) -> float:
        """The sum of the losses, `size` images at a time; read at the end alone."""
        device = next(model.parameters()).device
        total = torch.zeros((), device=device)
        for start in range(0, len(indices), size):
            part = slice(start, start + size)
            x0, _ = self.data.batch(indices[part])
            noise = NoiseSource(seeds[part]).draw(x0.shape[1:])
            wanted = self.data.conditions(indices[part])
            given, jump = model.conditioning(wanted), None
            if self.teacher is not None:
                if model.text is not None:  # teacher and model may have each an encoder of its own
                    texts = [str(Asked.of(one).shown or "") for one in wanted]
                    tokens = model.text.tokenize(texts)
                    given = {"tokens": tokens.to(device)}
                u = torch.tensor(seeds[part]) * _GOLDEN % 1
                near, to = jumps(self.schedule, t[part], u)
                jump = near.to(device), to.to(device)
            at = t[part].to(device)
            total += self._loss(model, x0.to(device), at, noise.to(device), jump, **given).sum()
        return float(total)

    def forward_pictures(self) -> Mapping[str, Image.Image]:
        """The forward process: one training image at rising noise levels (DDPM, eq. 4)."""
        x0, _ = self.data.batch(self.data.train[:1])
        noise = NoiseSource([self.plan.fit.seed]).draw(x0.shape[1:])
        levels = np.linspace(0, self.schedule.steps - 1, SHOWN_LEVELS).round().astype(int).tolist()
        rows: dict[str, list[Any]] = {"noisy image": [], "its signal": [], "its noise": []}
        titles = []
        for t in levels:
            level = self.schedule.level(t)
            parts = level.signal * x0, level.noise * noise
            for row, x in zip(rows.values(), (parts[0] + parts[1], *parts), strict=True):
                row.append(self._shown(x))
            titles.append(f"t = {t}\n{level.signal:.2f} / {level.noise:.2f}")
        return {"forward": table(rows, titles)}

    def pictures(self, model: DiffusionUNet) -> Mapping[str, Image.Image]:
        """Samples of fixed seeds, and the noise in an image beside what is predicted: in one that
        was held out, if any was."""
        return {"samples": grid(self._samples(model)), "noise": self._noise_table(model)}

    def _samples(self, model: DiffusionUNet) -> Any:
        size = self.plan.fit.together()
        sampler = preview_sampler(model, self.plan.fit.seed, size, autoencoder=self.autoencoder)
        wanted = shown_conditions(self.data)
        return sampler.shown(sampler(len(wanted), wanted))

    def _shown(self, x: Tensor) -> Any:
        """The first of images, or of the images that latents stand for."""
        x = x[:1]
        found = to_bytes(self.autoencoder.decode(x) if self.autoencoder else x)[0]
        parts = np.split(found, [self.pictured], axis=-1)  # the image, and the codes of its mask
        return np.concatenate([composite(p) for p in parts if p.shape[-1]], axis=1)

    def _noise_table(self, model: DiffusionUNet) -> Image.Image:
        device = next(model.parameters()).device
        example = (self.data.val or self.data.train)[:1]
        x0 = self.data.batch(example)[0].to(device)
        noise = NoiseSource([self.plan.fit.seed]).draw(x0.shape[1:]).to(device)
        denoiser = Denoiser(model, self.schedule, self.prediction)
        given = model.conditioning(self.data.conditions(example))
        last = self.schedule.steps - 1
        levels = np.linspace(0, last, SHOWN_LEVELS + 2).round().astype(int).tolist()[1:-1]
        names = ("noisy image", "noise added", "noise predicted", "image predicted")
        rows: dict[str, list[Any]] = {name: [] for name in names}
        for t in levels:
            x = self.schedule.q_sample(x0, t, noise)
            found = denoiser(x, t, **given)
            # Standard normal noise has little beyond 3, which a third brings into the picture.
            shown = (x, noise / 3, found.eps / 3, found.x0)
            for row, picture in zip(rows.values(), shown, strict=True):
                row.append(self._shown(picture))
        return table(rows, [f"t = {t}" for t in levels])
