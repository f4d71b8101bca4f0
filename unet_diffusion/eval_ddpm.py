"""Judge a diffusion model by its samples: unet-eval-ddpm --model RUN/model --data DIR."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from diffusion.options import CHURNING, DiffusionOptions, Samplers, SamplingOptions
from unet.errors import InputError
from unet.training.cli import run_script, say_next
from unet.training.config_file import load_config
from unet.training.options import check_paths
from unet.words import counted

if TYPE_CHECKING:
    from diffusion.data.images import DiffusionData
    from diffusion.judging.evaluation import Judge
    from diffusion.judging.features import FeatureExtractor
    from diffusion.judging.restoration import Pairs
    from diffusion.model import DiffusionUNet
    from diffusion.sampling import ImageSampler
    from unet_diffusion.faithfulness import MaskReader


@dataclass(frozen=True, kw_only=True)
class EvalOptions(SamplingOptions):
    """Distances to real images, classes, memorisation, bits per dimension; of a model that makes
    images from pictures also how near these come to the true ones."""

    model: str
    """Model folder, such as RUN/model."""

    data: str
    """The real images, as for train-ddpm. A model that makes images from pictures is judged by
    those that it was not trained on: by all of them, if they are not those of its run."""

    condition: Path | None = None
    """Folder of the masks or pictures that belong to --data, for a model that was trained with such
    a folder; none given: that of the run, if --data is that of the run. Small, grey and noisy
    images and holes are made from the images themselves."""

    each: int = 1
    """Samples of each picture: the mean over them is judged as well."""

    segmenter: str | None = None
    """For a model that makes images from masks: model folder of a segmentation of real images. It
    predicts the masks of the samples and of the real images, and both are scored."""

    count: int = 2000
    """Samples to judge; of a model that works from pictures, --each times as many."""

    size: int | None = None
    """As for train-ddpm; none given: the model's."""

    crops: bool = False
    """As for train-ddpm."""

    classifier: str | None = None
    """Model folder of train-classifier: its features are compared, and the classes it finds."""

    inception: Path | None = None
    """File of the standard Inception weights (needs torch-fidelity): gives FID and KID."""

    compare: tuple[str, ...] = ()
    """Judge several ways of sampling, such as ddpm:250 ddim:50 dpmpp-2m:15, in one table."""

    bits: int = 0
    """Held-out images whose bits per dimension are computed, through every noise level; 0: none."""

    out: Path | None = None
    """JSON file for the figures."""

    def __post_init__(self) -> None:
        self.ways()  # has the checks of the ways themselves
        if self.count < 4:
            raise InputError(f"--count {self.count} must be at least 4")
        if self.each < 1:
            raise InputError(f"--each {self.each} must be at least 1")
        if self.bits < 0:
            raise InputError(f"--bits {self.bits} must be 0 or more")
        if self.out:
            folder = self.out.absolute().parent
            if self.out.is_dir():
                raise InputError(f"--out {self.out} is a folder: give a file, such as scores.json")
            if not (folder.is_dir() and os.access(folder, os.W_OK)):
                raise InputError(f"--out {self.out}: give a file in a folder that can be written")
        if self.classifier and self.inception:
            raise InputError("--classifier and --inception each give the features: give one")

    def ways(self) -> list[SamplingOptions]:
        """The settings to judge: those of the options, or those of --compare. An option of a single
        sampler applies to that one, which must be among them.
        """
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(SamplingOptions)}
        if not self.compare:
            return [SamplingOptions(**fields)]
        samplers = get_args(Samplers)
        named = {way.partition(":")[0] for way in self.compare}
        found = []
        for way in self.compare:
            sampler, colon, steps = way.partition(":")
            if not (colon and re.fullmatch("[0-9]{1,6}", steps) and sampler in samplers):
                raise InputError(f"--compare {way!r}: write sampler:steps, such as ddim:50")
            given = {**fields, "sampler": sampler, "steps": int(steps)}
            owned = {key: {*CHURNING} for key in ("churn", "churn_interval", "churn_noise")}
            for option, owners in {"eta": {"ddim"}, "variance": {"ddpm"}, **owned}.items():
                if sampler not in owners and named & owners:
                    given[option] = getattr(SamplingOptions, option)
            found.append(SamplingOptions(**given))
        return found


def main(options: EvalOptions) -> None:
    from diffusion.data.sources import check_source
    from diffusion.judging.evaluation import check_bits, comparison, held_out_bits, lines
    from diffusion.judging.features import open_extractor
    from diffusion.sampling import ImageSampler, load_for_sampling
    from unet_diffusion.faithfulness import MaskReader

    check_paths(options)
    check_source(options.data)
    model = load_for_sampling(options.model, options.device)
    check_model(options, model)
    usual, *others = options.ways()
    samplers = [ImageSampler(model, usual)]
    samplers += [samplers[0].with_options(way) for way in others]
    if options.bits:
        check_bits(samplers[0])
    reader = None
    if options.segmenter and model.condition:
        reader = MaskReader(options.segmenter, samplers[0], options.device)
    extractor = open_extractor(options.classifier, options.inception, options.device)
    judge, pairs = judge_and_pairs(options, samplers[0], extractor)
    found: dict[str, Any] = {"model": options.model, "data": options.data, "rows": []}
    for sampler in samplers:
        if pairs is None:
            figures, seconds = judged_from_noise(options, sampler, judge)
        else:
            figures, seconds = judged_pairs(options, sampler, judge, pairs, reader)
        row = {
            "settings": dataclasses.asdict(sampler.options),
            "evaluations": sampler.plans.from_noise().evaluations,
            **figures,
            "seconds": seconds,
        }
        found["rows"].append(row)
        print("\n".join(lines(row)), flush=True)
        save(options, found)
    if len(samplers) > 1:
        name = extractor.frechet_name if extractor else None
        print("\n".join(comparison(found["rows"], name)))
    if options.bits:
        found["bits"] = held_out_bits(
            model, judge.data, options.bits, options.seed, options.batch_size
        )
        print(", ".join(f"{k} {v}" for k, v in found["bits"].items()))
        save(options, found)
    if options.out:
        print(f"figures: {options.out}")
    given = () if pairs is None else ("--condition", "pictures")
    say_next("sample-ddpm", "--model", options.model, *given, "--out", "samples")


def judge_and_pairs(
    options: EvalOptions, sampler: ImageSampler, extractor: FeatureExtractor | None
) -> tuple[Judge, Pairs | None]:
    """The judge of a model's samples, and the pictures that they are made from; None: from noise.

    The images of the model's own run are split as there: the same ones are held out.
    """
    from diffusion.judging.evaluation import Judge
    from diffusion.judging.restoration import Pairs

    file = Path(options.model).resolve().parent / "config.yaml"
    run = load_config(DiffusionOptions, file) if file.exists() else {}
    trained_on = run.get("data", options.data)
    own = bool(run) and Path(trained_on).resolve() == Path(options.data).resolve()
    data = read_images(options, run, sampler, options.data, own)
    if not data.val and (options.bits or sampler.model.condition is not None):
        raise InputError(
            f"{options.model} was trained on all of {options.data} (--val 0), and this is judged "
            "on images that it has not seen: give others as --data"
        )
    pairs, trained = None, None
    if sampler.model.condition is not None:
        unseen = data.val if own else [*data.val, *data.train]
        pairs = Pairs.of(data, unseen, options.count, sampler)
        trained = data if own else images_of_run(options, run, sampler)
    copies = bool(data.val) and (pairs is None or trained is not None)
    seen = None if own else trained
    judge = Judge(data, extractor, sampler.classes, trained=seen, copies=copies)
    if pairs is None and trained_on != options.data:
        judge.notes.append(f"copies are looked for in {options.data}, not in {trained_on}")
    if not data.val:
        judge.notes.append("copies are not looked for: no image was held out to compare with")
    elif not copies:
        judge.notes.append("copies are not looked for: what the model was trained on is not here")
    if pairs is not None and len({*pairs.chosen}) < options.count:
        pictures = counted(len({*pairs.chosen}), "picture")
        judge.notes.append(f"the samples are made from {pictures}, in turn")
    if pairs is not None and pairs.hole is not None:
        judge.notes.append("PSNR and SSIM are of the hole alone, as what is around it is given")
    return judge, pairs


def check_model(options: EvalOptions, model: DiffusionUNet) -> None:
    """Raises an InputError for a model that cannot be judged here, or not with these options."""
    condition = model.condition
    if model.joint:
        raise InputError(
            f"{options.model} makes images with masks, which eval-ddpm does not judge: train a "
            "segmentation on what sample-ddpm makes"
        )
    if model.masks:
        cure = "what predict-seg --samples makes of labelled images"
        raise InputError(
            f"{options.model} makes masks, which eval-ddpm does not judge: look at "
            f"{cure if condition else 'those that sample-ddpm makes'}"
        )
    if condition is None and (options.condition or options.each > 1 or options.segmenter):
        raise InputError(
            f"--condition, --each and --segmenter are for models that make images from pictures, "
            f"and {options.model} makes them from noise alone: leave them out"
        )
    if condition is not None and condition.from_image and options.condition:
        raise InputError(
            f"--condition {options.condition}: {options.model} makes images from "
            f"{condition.said()}, which is made from those of --data: leave it out"
        )


def read_images(
    options: EvalOptions, run: dict[str, Any], sampler: ImageSampler, where: str, own: bool
) -> DiffusionData:
    """Images as the run read them, with the pictures that they are made from.

    Args:
        own: whether they are the run's, so that its pictures go with them.
    """
    from diffusion.data.images import DiffusionData
    from diffusion.data.pixels import known_ranges
    from diffusion.data.sources import HowToRead
    from unet.files.pages import Reading

    model = sampler.model
    pictures = options.condition or (run.get("condition") if own else None)
    if model.condition is not None and not model.condition.from_image and pictures is None:
        raise InputError(
            f"{options.model} makes images from {model.condition.said()}: give the folder of those "
            f"that go with {where} as --condition"
        )
    height, width = sampler.height, sampler.width
    val = run.get("val", DiffusionOptions.val)
    if not (own or 0 < val < 1):  # as many may be more than there are
        val = DiffusionOptions.val
    data = DiffusionData(
        where,
        size=options.size or (height if height == width else None),
        channels=sampler.channels,
        how=HowToRead(
            reading=Reading.from_dict(model.info.get("reading", {})),
            background=sampler.background,
            caption_key=run.get("caption_key"),
        ),
        ranges=known_ranges(model.info),
        fine=model.pixels.fine,
        condition=model.condition,
        pictures=pictures,
        crops=options.crops or run.get("crops", False),
        flips=False,
        val=val,
        skip_bad=run.get("skip_bad", False),
        classes=bool(sampler.classes),
        captions=model.text is not None,
    )
    if data.size != (height, width):
        raise InputError(
            f"the images are {data.size[0]} x {data.size[1]}, but the model makes {height} x "
            f"{width}: resize them"
        )
    return data


def images_of_run(
    options: EvalOptions, run: dict[str, Any], sampler: ImageSampler
) -> DiffusionData | None:
    """The images that a model was trained on; None: they are not there any more."""
    if "data" not in run:
        return None
    try:
        return read_images(
            dataclasses.replace(options, condition=None), run, sampler, run["data"], own=True
        )
    except InputError:
        return None


def judged_from_noise(
    options: EvalOptions, sampler: ImageSampler, judge: Judge
) -> tuple[dict[str, Any], float]:
    """Figures of images made from noise alone, and the seconds that they took to make.

    A model of the captioned shapes is asked for random scenes, half of them with unseen pairs.
    """
    from diffusion.judging.captions import judge_captions, scenes_to_ask
    from diffusion.judging.evaluation import timed_samples, wanted_like

    if sampler.model.text and options.data == "shapes":
        asked = scenes_to_ask(options.count, options.seed)
        images, seconds = timed_samples(sampler, asked.captions)
        figures = judge(images, asked.captions) | judge_captions(sampler, images, asked)
        return figures, seconds
    wanted = wanted_like(judge.data, sampler, options.count)
    images, seconds = timed_samples(sampler, wanted)
    return judge(images, wanted), seconds


def judged_pairs(
    options: EvalOptions,
    sampler: ImageSampler,
    judge: Judge,
    pairs: Pairs,
    reader: MaskReader | None,
) -> tuple[dict[str, Any], float]:
    """Figures of images made from pictures, and the seconds that they took to make.

    All pictures are gone through once for each of their samples: the first ones are those of a run
    without --each, and the samples that realism and faithfulness are judged by.
    """
    from diffusion.data.conditions import Asked
    from diffusion.judging.evaluation import timed_samples
    from diffusion.judging.restoration import candidates, restoration
    from unet_diffusion.faithfulness import faithfulness

    images, seconds = timed_samples(sampler, [*pairs.wanted] * options.each)
    samples = images.reshape(options.each, -1, *images.shape[1:])
    figures = judge(samples[0], [Asked.of(wanted).shown for wanted in pairs.wanted])
    distance = judge.distance if judge.extractor else None
    figures["restoration"] = restoration(candidates(samples, pairs), pairs, distance)
    if reader is not None:
        masks = reader.asked(judge.data, pairs.chosen)
        figures["faithfulness"] = faithfulness(reader, samples[0], pairs.truth, masks)
    return figures, seconds


def save(options: EvalOptions, found: dict[str, Any]) -> None:
    from diffusion.judging.evaluation import to_json
    from unet.files.writing import write_text

    if options.out:
        write_text(options.out, to_json(found))


def command(argv: Sequence[str] | None = None) -> int:
    return run_script(main, EvalOptions, argv, description=__doc__)
