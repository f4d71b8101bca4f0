"""Score a model on labelled images: unet-eval-seg --model RUN/model --data DIR --out DIR."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from segmentation.options import LabelOptions, SegmentationOptions
from unet.errors import InputError
from unet.training.cli import run_script, say_next
from unet.training.config_file import load_config
from unet.training.options import Precision, check_paths
from unet.words import counted

if TYPE_CHECKING:
    from segmentation.data.dataset import SegmentationData
    from segmentation.data.pairs import Pair


@dataclass(frozen=True, kw_only=True)
class EvalOptions(LabelOptions):
    """Scores, a list of the images, and pictures, the worst images first."""

    model: tuple[str, ...]
    """Model folder, such as RUN/model; several are averaged."""

    out: Path
    """Folder to make: scores.json, scores.csv (a line for each image), reliability.png, pictures/.
    """

    data: str | None = None
    """Images and masks, as for train-seg; none given: those of the model's run."""

    split: Literal["val", "all"] | None = None
    """val: only images that the runs of all models held out; all: every image. None given: val on
    the data of a model's run, all on other data."""

    val_names: tuple[str, ...] = ()
    """Only these images instead: names, or ranges of their numbers such as 24-29."""

    threshold: float | None = None
    """Probability above which a pixel is of the second of two classes; none given: the model's, as
    for the figures of its training."""

    tta: bool = False
    """Average over the mirrored and rotated versions of the image that the model was trained with,
    eight for micrographs: better, for as many times the time."""

    calibrate: bool = False
    """First fit a temperature for each model on the first half of the images, and save it in its
    folder: from then on its probabilities are calibrated. Only the other half is scored, as the
    temperature was not fitted on it."""

    warping: bool = False
    """Also compute the warping error of ISBI 2012, which takes minutes for some images; only for
    cells that thin membranes separate."""

    surface: float | None = None
    """Also give the distance between true and predicted surfaces, HD95, and the share of them
    within this tolerance, NSD: in the unit of a volume whose scale is known, else in pixels."""

    pictures: int = 50
    """Number of the worst images to draw: image, mask, prediction, error map."""

    json: bool = False
    """Print scores.json instead of a table."""

    precision: Precision = "auto"
    """Arithmetic of the network; auto: bf16 on an NVIDIA GPU that supports it, else fp32."""

    device: str = "auto"
    """auto, or a torch device such as cpu, cuda or mps."""

    overwrite: bool = False
    """Replace what an earlier evaluation wrote to --out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold is not None and not 0 <= self.threshold < 1:
            raise InputError(f"--threshold {self.threshold} must be in [0, 1)")
        if self.surface is not None and self.surface < 0:
            raise InputError(f"--surface {self.surface} must be a tolerance of 0 or more")
        if self.pictures < 0:
            raise InputError(f"--pictures {self.pictures} must be 0 or more")
        if self.split and self.val_names:
            raise InputError("--split and --val-names both choose the images: give one of them")
        if not self.model:
            raise InputError("--model needs a model folder")
        if self.calibrate and self.threshold is not None:
            raise InputError("--calibrate moves the model's threshold: leave out --threshold")
        if self.calibrate:
            from unet.weights.folder import near

            for folder in self.model:
                if not Path(folder).is_dir():
                    raise InputError(
                        f"--calibrate writes into the model: {folder} is no folder"
                        f"{near(Path(folder))}"
                    )


def main(options: EvalOptions) -> None:
    import numpy as np

    from segmentation.data.slices import known_slices
    from segmentation.judging.calibration import calibrate
    from segmentation.judging.evaluation import Evaluation, evaluate
    from segmentation.judging.labelled import known_cells, labelled_data
    from segmentation.judging.report import write_scores
    from segmentation.judging.surface import score_surfaces
    from segmentation.predict import Predictor
    from segmentation.segmenter import load_models
    from unet.files.pages import AS_STORED, Reading

    taken = options.out.is_dir() and any(options.out.iterdir()) and not options.overwrite
    if taken or options.out.is_file():
        raise InputError(f"--out {options.out} holds files: give --overwrite or another folder")
    check_paths(options)
    models, table, threshold = load_models(options.model, options.device)
    if options.reading == AS_STORED:  # as the training images were read
        known = Reading.from_dict(models[0].info.get("reading", {}))
        options = replace(options, axes=known.axes, channels=known.channels, nodata=known.nodata)
    source, pairs = chosen_pairs(options, known_slices(models[0].info))
    data = labelled_data(models, pairs, table, source.ignore_value)
    if data.regions and options.calibrate:
        raise InputError("--calibrate is of classes, and the model knows regions: leave it out")
    if options.threshold is not None and len(table.values) != 2 and not data.regions:
        raise InputError(
            f"--threshold separates two classes, but the model has {len(table.values)} and takes "
            "the most probable one: leave it out"
        )
    cells = known_cells(models, data)
    if options.warping and cells is None:
        raise InputError(
            "--warping counts splits and mergers of cells between thin membranes, and the model "
            "was not trained on such masks: leave it out"
        )

    def score(indices: Sequence[int], threshold: float) -> Evaluation:
        return evaluate(
            Predictor(models, symmetries=options.tta, precision=options.precision),
            data,
            indices,
            threshold=threshold,
            cells=cells,
            warping=options.warping,
        )

    facts: dict[str, object] = {"models": list(options.model), "tta": options.tta}
    judged = list(data.val)
    if options.calibrate:
        fitted, judged = halves(data)
        before = score(judged, threshold).calibration.scores()
        for folder, model in zip(options.model, models, strict=True):
            calibrate(model, data, fitted)
            model.save_info(Path(folder))
        threshold = float(np.mean([model.info["threshold"] for model in models]))
        facts["before_calibration"] = before
        facts["temperatures"] = [model.info["temperature"] for model in models]
    found = score(judged, threshold if options.threshold is None else options.threshold)
    if options.calibrate:
        said = ", ".join(f"{model.info['temperature']:.3f}" for model in models)
        after = found.calibration.scores()
        changes = ", ".join(f"{k} {before[k]:.4f} -> {after[k]:.4f}" for k in after if k in before)
        print(
            f"temperature {said}, fitted on {counted(len(fitted), 'image')} and saved; of the "
            f"other {len(judged)}: {changes}",
            file=sys.stderr,
        )
    surfaces = None if options.surface is None else score_surfaces(found, data, options.surface)
    if surfaces:
        facts["surface"] = surfaces.to_dict()
    write_scores(options.out, found, data, pictures=options.pictures, **facts)
    if options.json:
        print((options.out / "scores.json").read_text(encoding="utf-8"), end="")
    else:
        lines = [*found.lines(), *(["", *surfaces.lines()] if surfaces else [])]
        print("\n".join(lines), f"\n\nscores and pictures: {options.out}")
        unseen = ("--input", "new_images", "--out", "predictions")
        say_next("predict-seg", "--model", *options.model, *unseen)


def halves(data: SegmentationData) -> tuple[list[int], list[int]]:
    """The images to fit a temperature on, and those to judge it by: the first half and the others.

    Parts and masks of one image are on one side, and the slices of one of several volumes.

    Raises:
        InputError: there is a single image.
    """
    from segmentation.data.splits import unit_of

    unit = unit_of(data.pairs)
    sources = list(dict.fromkeys(unit(data.pairs[i]) for i in data.val))
    if len(sources) < 2:
        raise InputError(
            "--calibrate fits on some images and judges by others, and here is a single one: give "
            "two or more"
        )
    first = set(sources[: len(sources) // 2])
    fitted = [i for i in data.val if unit(data.pairs[i]) in first]
    return fitted, [i for i in data.val if unit(data.pairs[i]) not in first]


def chosen_pairs(options: EvalOptions, slices: int) -> tuple[SegmentationOptions, list[Pair]]:
    """The source of the data, and the images to score, each of that many slices."""
    from segmentation.data.slices import with_neighbours
    from segmentation.data.splits import split_pairs
    from segmentation.judging.labelled import held_out
    from segmentation.training import find_data, say_left_out

    files = [Path(folder).parent / "config.yaml" for folder in options.model]
    runs = [SegmentationOptions(**load_config(SegmentationOptions, f)) for f in files if f.exists()]
    if options.data or options.images or options.masks:
        source = SegmentationOptions(
            out=options.out,
            data=options.data or "",
            **{f.name: getattr(options, f.name) for f in fields(LabelOptions)},
        )
    elif runs:
        source = runs[0]
    else:
        raise InputError(f"{options.model[0]} is in no run folder: name labelled images by --data")
    chosen = pairs = with_neighbours(find_data(source), slices)
    say_left_out(source, pairs)
    place = Path(source.images or source.data).resolve()
    own = [run for run in runs if Path(run.images or run.data).resolve() == place]
    if options.val_names:
        chosen = split_pairs(pairs, val_names=options.val_names)[1]
    elif options.split == "val" or (own and options.split is None):
        if len(runs) < len(files):
            raise InputError(
                "--split val needs the config.yaml of the models' runs, beside the model folders: "
                "name the images by --val-names"
            )
        chosen = held_out(pairs, runs)
    if options.calibrate and own:
        unseen = {pair.name for pair in held_out(pairs, own)}
        if trained := [pair.name for pair in chosen if pair.name not in unseen]:
            raise InputError(
                f"--calibrate needs images that no model was trained on, and {trained[0]} is one "
                f"of {counted(len(trained), 'image')} that were: leave out --split and "
                "--val-names, or give other images with --data"
            )
    if own and chosen is pairs and not options.val_names:
        print("note: the model was trained on most of these images", file=sys.stderr)
    print(f"scoring {len(chosen)} of {counted(len(pairs), 'image')}", file=sys.stderr)
    return own[0] if own else source, chosen


def command(argv: Sequence[str] | None = None) -> int:
    return run_script(main, EvalOptions, argv, description=__doc__)
