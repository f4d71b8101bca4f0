"""Judge a diffusion model by its samples: unet-eval-ddpm --model RUN/model --data DIR."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from diffusion.options import CHURNING, DiffusionOptions, Samplers, SamplingOptions
from unet.errors import InputError
from unet.training.cli import run_script, say_next
from unet.training.config_file import load_config


@dataclass(frozen=True, kw_only=True)
class EvalOptions(SamplingOptions):
    """Distances to real images, classes, memorisation, bits per dimension."""

    model: str
    """Model folder, such as RUN/model."""

    data: str
    """The real images, as for train-ddpm."""

    count: int = 2000
    """Samples to judge."""

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
        if self.bits < 0:
            raise InputError(f"--bits {self.bits} must be 0 or more")
        if self.out:
            folder = self.out.absolute().parent
            if self.out.is_dir() or not (folder.is_dir() and os.access(folder, os.W_OK)):
                raise InputError(f"--out {self.out}: give a file in a folder that can be written")
        if self.classifier and self.inception:
            raise InputError("--classifier and --inception each give the features: give one")

    def ways(self) -> list[SamplingOptions]:
        """The settings to judge: the options' own, or those of --compare.

        An option of one sampler alone goes to that one, which must be among them.
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
    from diffusion.data.images import DiffusionData
    from diffusion.data.pixels import known_ranges
    from diffusion.data.sources import HowToRead
    from diffusion.judging.captions import judge_captions, scenes_to_ask
    from diffusion.judging.evaluation import (
        Judge,
        check_bits,
        comparison,
        held_out_bits,
        lines,
        timed_samples,
        wanted_like,
    )
    from diffusion.judging.features import open_extractor
    from diffusion.sampling import ImageSampler, load_for_sampling
    from unet.files.pages import Reading

    model = load_for_sampling(options.model, options.device)
    if model.condition is not None:
        raise InputError(
            f"{options.model} makes images from pictures, which eval-ddpm does not judge: compare "
            "what sample-ddpm --condition makes with the true images"
        )
    if model.joint:
        raise InputError(
            f"{options.model} makes images with masks, which eval-ddpm does not judge: train a "
            "segmentation on what sample-ddpm makes"
        )
    samplers = [ImageSampler(model, way) for way in options.ways()]
    if options.bits:
        check_bits(samplers[0])
    extractor = open_extractor(options.classifier, options.inception, options.device)
    file = Path(options.model).resolve().parent / "config.yaml"  # of the run: the same are held out
    run = load_config(DiffusionOptions, file) if file.exists() else {}
    first = samplers[0]
    data = DiffusionData(
        options.data,
        size=options.size or (first.height if first.height == first.width else None),
        channels=first.channels,
        how=HowToRead(
            reading=Reading.from_dict(model.info.get("reading", {})),
            background=None if run.get("colour") == "rgba" else DiffusionOptions.background,
            caption_key=run.get("caption_key"),
        ),
        ranges=known_ranges(model.info),
        fine=model.pixels.fine,
        crops=options.crops or run.get("crops", False),
        flips=False,
        val=run.get("val", DiffusionOptions.val),
        skip_bad=run.get("skip_bad", False),
        classes=bool(first.classes),
        captions=model.text is not None,
    )
    if data.size != (first.height, first.width):
        raise InputError(
            f"the images are {data.size[0]} x {data.size[1]}, but the model makes {first.height} x "
            f"{first.width}: bring them to its size"
        )
    judge = Judge(data, extractor, first.classes)
    if (trained_on := run.get("data", options.data)) != options.data:
        judge.notes.append(f"copies are looked for in {options.data}, not in {trained_on}")
    found: dict[str, Any] = {"model": options.model, "data": options.data, "rows": []}
    asked = (
        scenes_to_ask(options.count, options.seed)
        if model.text and options.data == "shapes"
        else None
    )
    for sampler in samplers:
        wanted = asked.captions if asked else wanted_like(data, sampler, options.count)
        images, seconds = timed_samples(sampler, wanted)
        row = {
            "settings": dataclasses.asdict(sampler.options),
            "evaluations": sampler.plans.from_noise().evaluations,
            **judge(images, wanted),
            **(judge_captions(sampler, images, asked) if asked else {}),
            "seconds": seconds,
        }
        found["rows"].append(row)
        print("\n".join(lines(row)), flush=True)
        save(options, found)
    if len(samplers) > 1:
        name = extractor.frechet_name if extractor else None
        print("\n".join(comparison(found["rows"], name)))
    if options.bits:
        found["bits"] = held_out_bits(model, data, options.bits, options.seed, options.batch_size)
        print(", ".join(f"{k} {v}" for k, v in found["bits"].items()))
        save(options, found)
    if options.out:
        print(f"figures: {options.out}")
    say_next("sample-ddpm", "--model", options.model, "--out", "samples")


def save(options: EvalOptions, found: dict[str, Any]) -> None:
    from diffusion.judging.evaluation import to_json
    from unet.files.writing import write_text

    if options.out:
        write_text(options.out, to_json(found))


def command(argv: Sequence[str] | None = None) -> int:
    return run_script(main, EvalOptions, argv, description=__doc__)
