"""Label every pixel of images: unet-predict-seg --model RUN/model --input FILE_OR_DIR --out DIR."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unet.errors import InputError
from unet.training.cli import run_script, say_next
from unet.training.options import Precision, ReadingOptions, check_paths

if TYPE_CHECKING:
    from segmentation.data.inputs import Inputs


@dataclass(frozen=True, kw_only=True)
class PredictOptions(ReadingOptions):
    """Masks, probabilities and overlays of images."""

    model: tuple[str, ...]
    """Model folder, such as RUN/model; several are averaged."""

    input: Path
    """An image, or a folder of images, in it and below it; folders of masks beside those of images,
    and what this command wrote, are left out. Stacks are predicted slice by slice. Or a volume:
    x.zarr, x.zarr/path/in/it, x.h5:/path, x.nii.gz or a folder of a DICOM series; or a folder of
    volumes."""

    out: Path
    """Folder for NAME_mask.png, NAME_probability.png, NAME_overlay.png, and legend.png; for a
    volume NAME_mask.zarr and NAME_probability.zarr. Folders below --input become folders here."""

    threshold: float | None = None
    """Probability above which a pixel is of the second of two classes; none given: the model's."""

    tta: bool = False
    """Average over the mirrored and rotated versions of the image that the model was trained with,
    eight for micrographs: better, for as many times the time."""

    min_size: int | None = None
    """Connected parts of fewer pixels take the class around them; for a model of numbered masks,
    objects of fewer pixels are left out. None given: 0, or for objects the size below which 1 in
    100 objects of the training masks are."""

    labels: bool = False
    """Also number the connected parts of the second of two classes, or the objects of a model of
    numbered masks, in NAME_labels.tif and the overlay."""

    uncertainty: bool = False
    """Also write NAME_entropy.png, how unsure each pixel is, and, where several models or
    symmetries (--tta) are averaged, NAME_disagreement.png, the part of it that is their
    disagreement. They have 16 bits: 65535 is the largest entropy, 1 bit for two classes."""

    samples: int = 0
    """With a diffusion model of masks (train-ddpm --target mask): masks to sample for each image;
    the mask of their mean, the probability and the entropy are written."""

    keep_samples: bool = False
    """With --samples: also write each of them, NAME_sample_0.png and so on."""

    seed: int = 0
    """With --samples: seed of their noise."""

    tile: int = 1024
    """Larger images are predicted in tiles of at most that many pixels a side."""

    overlap: int = 128
    """Pixels that neighbouring tiles share."""

    precision: Precision = "auto"
    """Arithmetic of the network; auto: bf16 on an NVIDIA GPU that supports it, else fp32."""

    device: str = "auto"
    """auto, or a torch device such as cpu, cuda or mps."""

    overwrite: bool = False
    """Replace files that are there already. The same command continues the interrupted prediction
    of a volume, with or without this option."""

    def __post_init__(self) -> None:
        if self.threshold is not None and not 0 <= self.threshold < 1:
            raise InputError(f"--threshold {self.threshold} must be in [0, 1)")
        for name, least in (("tile", 1), ("overlap", 0), ("min_size", 0), ("samples", 0)):
            if (getattr(self, name) or 0) < least:
                flag = name.replace("_", "-")
                raise InputError(f"--{flag} {getattr(self, name)} must be at least {least}")
        if not self.model:
            raise InputError("--model needs a model folder")
        if not self.samples and (self.keep_samples or self.seed):
            raise InputError(
                "--keep-samples and --seed go with --samples: give how many, such as 16"
            )
        if self.samples and (len(self.model) > 1 or self.tta or self.labels or self.min_size):
            raise InputError(
                "--samples are of one model, as they are: leave out other models, --tta, --labels "
                "and --min-size"
            )


def main(options: PredictOptions) -> int:
    from segmentation.data.inputs import find_inputs
    from segmentation.output import FilePredictor, predict_files
    from segmentation.predict import Predictor
    from segmentation.segmenter import load_models
    from segmentation.volumes import predict_volumes
    from unet.memory import PREDICTED, keep_freed_memory
    from unet.training.task import Processes
    from unet.weights.folder import read_config

    check_paths(options)
    if options.samples:
        return sampled_main(options)
    if Path(options.model[0]).is_dir() and _draws_masks(read_config(Path(options.model[0]))):
        raise InputError(
            f"{options.model[0]} is a diffusion model: say how many masks it shall sample of each "
            "image, such as --samples 16"
        )
    keep_freed_memory(PREDICTED)
    processes = Processes.started(options.device)
    models, table, threshold = load_models(options.model, options.device)
    predict = Predictor(
        models,
        tile=options.tile,
        overlap=options.overlap,
        symmetries=options.tta,
        precision=options.precision,
    )
    del models  # copies of them predict
    predictor = FilePredictor(
        predict,
        table,
        threshold if options.threshold is None else options.threshold,
        min_size=options.min_size,
        labels=options.labels,
        uncertainty=options.uncertainty,
        reading=options.reading,
    )
    inputs = find_inputs(options.input, options.out)
    if processes.main and inputs.remark:
        print(inputs.remark, file=sys.stderr)
    volumes = bool(inputs.volumes)  # which looks at each file
    predicted = predict_volumes if volumes else predict_files
    if predicted(predictor, inputs, options.out, overwrite=options.overwrite, processes=processes):
        return 1
    if processes.main and not volumes:
        masks = where(inputs, options.out, "*_mask.*")
        print(f"masks: {masks}, probabilities and overlays beside them")
    labelled = ("--data", "labelled_images", "--out", "scores")
    say_next("eval-seg", "--model", *options.model, *labelled)
    return 0


def where(inputs: Inputs, out: Path, names: str) -> Path:
    """The place of the results as a pattern: a tree like that of the images, if these are in
    folders."""
    deep = any(inputs.place(file) != Path() for file in inputs.files)
    return out / "**" / names if deep else out / names


def sampled_main(options: PredictOptions) -> int:
    """Predicts by samples of a diffusion model."""
    from diffusion.options import SamplingOptions
    from segmentation.data.inputs import find_inputs
    from unet_diffusion.sampled import MaskSampler, predict_samples

    settings = SamplingOptions(
        seed=options.seed, device=options.device, precision=options.precision
    )
    sampler = MaskSampler(options.model[0], options.samples, settings)
    inputs = find_inputs(options.input, options.out)
    if inputs.remark:
        print(inputs.remark, file=sys.stderr)
    failed = predict_samples(
        sampler,
        inputs,
        options.out,
        threshold=0.5 if options.threshold is None else options.threshold,
        keep=options.keep_samples,
        overwrite=options.overwrite,
    )
    if failed:
        return 1
    masks = where(inputs, options.out, "*_mask.*")
    print(f"masks: {masks}, probabilities and entropies beside them")
    return 0


def _draws_masks(config: Mapping[str, Any]) -> bool:
    """Whether a model's config.json is that of a diffusion model that makes masks from images."""
    return config["task"] == "diffusion" and {"target", "condition"} <= config["info"].keys()


def command(argv: Sequence[str] | None = None) -> int:
    return run_script(main, PredictOptions, argv, description=__doc__)
