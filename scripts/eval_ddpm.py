"""Judge a diffusion model by its samples: eval_ddpm.py --model RUN/model --data DIR."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from diffusion.options import DiffusionOptions, SamplingOptions
from unet.errors import InputError
from unet.training.cli import load_config, run_script

if TYPE_CHECKING:
    from diffusion.features import FeatureExtractor


@dataclass(frozen=True, kw_only=True)
class EvalOptions(SamplingOptions):
    """Distances to real images, classes, memorisation, bits per dimension."""

    model: str
    """Model folder, such as RUN/model."""

    data: str
    """The real images, as for train_ddpm.py."""

    count: int = 2000
    """Samples to judge."""

    size: int | None = None
    """As for train_ddpm.py; none given: the model's."""

    crops: bool = False
    """As for train_ddpm.py."""

    classifier: str | None = None
    """Model folder of train_classifier.py: its features are compared, and the classes it finds."""

    inception: Path | None = None
    """File of the standard Inception weights (needs torch-fidelity): gives FID and KID."""

    compare: tuple[str, ...] = ()
    """Judge several ways of sampling, such as ddpm:250 ddim:50 dpmpp-2m:15, in one table."""

    bits: int = 0
    """Held-out images whose bits per dimension are computed, through every noise level; 0: none."""

    out: Path | None = None
    """JSON file for the figures."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count < 4:
            raise InputError(f"--count {self.count} must be at least 4")
        if self.bits < 0:
            raise InputError(f"--bits {self.bits} must be 0 or more")
        if self.classifier and self.inception:
            raise InputError("--classifier and --inception each give the features: give one")

    def ways(self) -> list[SamplingOptions]:
        """The settings to judge: the options' own, or those of --compare."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(SamplingOptions)}
        if not self.compare:
            return [SamplingOptions(**fields)]
        samplers = get_args(get_type_hints(SamplingOptions)["sampler"])
        found = []
        for way in self.compare:
            sampler, colon, steps = way.partition(":")
            if not (colon and steps.isdigit() and sampler in samplers):
                raise InputError(f"--compare {way!r}: write sampler:steps, such as ddim:50")
            given = {**fields, "sampler": sampler, "steps": int(steps)}
            given["eta"] = self.eta if sampler == "ddim" else 0.0
            given["variance"] = self.variance if sampler == "ddpm" else "fixed-small"
            found.append(SamplingOptions(**given))
        return found


def main(options: EvalOptions) -> None:
    from diffusion.data import DiffusionData
    from diffusion.evaluation import Judge, held_out_bits, timed_samples
    from diffusion.model import DiffusionUNet
    from diffusion.sampling import ImageSampler
    from unet.device import pick_device
    from unet.files import write_text

    model = DiffusionUNet.from_pretrained(options.model).to(pick_device(options.device))
    samplers = [ImageSampler(model, way) for way in options.ways()]
    extractor = chosen_extractor(options)
    file = Path(options.model).resolve().parent / "config.yaml"  # of the run: the same are held out
    run = load_config(DiffusionOptions, file) if file.exists() else {}
    first = samplers[0]
    data = DiffusionData(
        options.data,
        size=options.size or (first.height if first.height == first.width else None),
        channels=1 if first.channels == 1 else 3,
        crops=options.crops or run.get("crops", False),
        flips=False,
        val=run.get("val", DiffusionOptions.val),
        skip_bad=run.get("skip_bad", False),
        classes=bool(first.classes),
    )
    if data.size != (first.height, first.width):
        raise InputError(
            f"the images are {data.size[0]} x {data.size[1]}, but the model makes {first.height} x "
            f"{first.width}: bring them to its size"
        )
    judge = Judge(data, extractor)
    rows: list[dict[str, Any]] = []
    for sampler in samplers:
        images, classes, seconds = timed_samples(sampler, options.count)
        way = sampler.options
        row = {
            "sampler": way.sampler,
            "steps": way.steps,
            "evaluations": sampler.from_noise().evaluations,
            "guidance": way.guidance,
            "seed": way.seed,
            **judge(images, classes, sampler.classes),
            "seconds": seconds,
        }
        rows.append(row)
        print("\n".join(lines(row)), flush=True)
    found: dict[str, Any] = {"model": options.model, "data": options.data, "rows": rows}
    if options.bits:
        found["bits"] = {
            "images": min(options.bits, len(data.val)),
            "bits per dimension": held_out_bits(model, data, options.bits, options.seed),
        }
        print(
            "bits per dimension: {bits per dimension:.3f} ({images} held-out images)".format(
                **found["bits"]
            )
        )
    if options.out:
        write_text(options.out, json.dumps(found, indent=2) + "\n")


def chosen_extractor(options: EvalOptions) -> FeatureExtractor | None:
    from diffusion.features import ClassifierFeatures, InceptionFeatures
    from unet.device import pick_device

    if options.classifier:
        return ClassifierFeatures(options.classifier, pick_device(options.device))
    if options.inception:
        return InceptionFeatures(options.inception, pick_device(options.device))
    return None


def lines(row: dict[str, Any]) -> list[str]:
    """A row for people."""
    facts = ("sampler", "steps", "evaluations", "guidance", "seed", "samples", "real", "seconds")
    text = [
        ", ".join(
            f"{k} {row[k]:.4g}" if isinstance(row[k], float) else f"{k} {row[k]}"
            for k in facts
            if k in row
        )
    ]
    text += [f"  {k}: {v:.4f}" for k, v in row.items() if k not in (*facts, "notes")]
    return text + [f"  note: {note}" for note in row["notes"]]


if __name__ == "__main__":
    sys.exit(run_script(main, EvalOptions, description=__doc__))
