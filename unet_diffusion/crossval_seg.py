"""Cross-validate a recipe: unet-crossval-seg --data DIR --out DIR; --resume continues it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from segmentation.options import RECIPES, SegmentationOptions
from unet.errors import InputError
from unet.files.writing import write_text
from unet.training.cli import run_script, say_next
from unet.training.config_file import equal, load_config, save_config

MAY_CHANGE = ("out", "resume", "device", "workers")  # when a cross-validation goes on
COLUMNS = (
    "dice",
    "iou",
    "accuracy",
    "v_rand",
    "v_info",
    "rand_error",
    "pixel_error",
    "ap50",
    "ap",
    "pq",
    "aji",
)


@dataclass(frozen=True, kw_only=True)
class CrossvalOptions(SegmentationOptions):
    """Train and score a model for each fold of the images."""

    out: Path
    """Folder to make: crossval.json, and the run folders fold-1/, fold-2/, ..."""

    folds: int = 5
    """Contiguous parts of the images, each held out once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.folds < 2:
            raise InputError(f"--folds {self.folds} must be at least 2")
        if self.unlabelled is not None:
            raise InputError(
                "--unlabelled does not go with a cross-validation: train a diffusion model of the "
                "images once, and start every fold from it with --init"
            )
        if self.push_to_hub is not None:
            raise InputError(
                "--push-to-hub does not go with a cross-validation, where every fold has a model: "
                "train one on all of it with train-seg"
            )
        for name in ("fold", "val_names", "val"):
            if getattr(self, name) != getattr(SegmentationOptions, name):
                flag = name.replace("_", "-")
                raise InputError(
                    f"--{flag} does not go with a cross-validation: --folds says what is held out"
                )

    def fold_options(self, k: int) -> SegmentationOptions:
        """The options of the k-th fold's run, from 1, which is resumed if it was begun."""
        values = {f.name: getattr(self, f.name) for f in fields(SegmentationOptions)}
        out = self.out / f"fold-{k}"
        begun = any(not path.name.startswith(".") for path in out.glob("*"))
        values |= {"out": out, "fold": f"{k}/{self.folds}", "resume": begun}
        return SegmentationOptions(**values)


def main(options: CrossvalOptions) -> None:
    from segmentation.training import train
    from unet.training.run import is_main_process
    from unet_diffusion.starting import segmentation_start

    start = segmentation_start(options.init)
    if is_main_process():
        begin(options)
    runs = [options.fold_options(k) for k in range(1, options.folds + 1)]
    for run in [run for run in runs if not (run.out / "scores.json").exists()]:
        try:
            if is_main_process():
                print(f"\nfold {run.fold}, in {run.out}", flush=True)
            train(run, start)
        except InputError:
            if is_main_process() and not any(r.out.exists() for r in runs):  # nothing was begun
                (options.out / "config.yaml").unlink()
                options.out.rmdir()
            raise
        if is_main_process():
            score(run)
    if is_main_process():
        found = summary([json.loads((r.out / "scores.json").read_text("utf-8")) for r in runs])
        write_text(options.out / "crossval.json", json.dumps(found, indent=2) + "\n")
        print("\n".join(["", *table(found), "", f"all results: {options.out / 'crossval.json'}"]))
        models = [run.out / "model" for run in runs]  # together they are better than one of them
        unseen = ("--input", "new_images", "--out", "predictions")
        say_next("predict-seg", "--model", *models, *unseen)


def begin(options: CrossvalOptions) -> None:
    """Makes the folder, or checks that it belongs to these options."""
    file = options.out / "config.yaml"
    if not options.resume:
        if options.out.is_file() or (options.out.exists() and any(options.out.iterdir())):
            raise InputError(f"--out {options.out} is in use: give another, or --resume to go on")
        save_config(options, file)
        return
    saved = load_config(CrossvalOptions, file) if file.exists() else {}
    if "folds" not in saved:
        raise InputError(f"--out {options.out} holds no cross-validation: start without --resume")
    for name, value in saved.items():
        if name not in MAY_CHANGE and not equal(getattr(options, name), value):
            was = "not given" if value is None else value
            raise InputError(
                f"--{name.replace('_', '-')} was {was} for the folds that are done: leave it out"
            )


def score(run: SegmentationOptions) -> None:
    """Scores a fold's model on the images that it did not see."""
    from segmentation.judging.evaluation import evaluate
    from segmentation.judging.labelled import known_cells
    from segmentation.judging.report import write_scores
    from segmentation.predict import Predictor
    from segmentation.segmenter import load_models
    from segmentation.training import load_data

    models, _, threshold = load_models([str(run.out / "model")], run.device)
    data = load_data(run)
    cells = known_cells(models, data)
    found = evaluate(Predictor(models), data, data.val, threshold=threshold, cells=cells)
    write_scores(run.out, found, data, pictures=0, fold=run.fold)


def summary(folds: list[dict[str, Any]]) -> dict[str, Any]:
    """The folds' scores, their mean and standard deviation, and all images, the worst first."""
    images = [{"fold": f["fold"], **image} for f in folds for image in f["per_image"]]
    images.sort(key=lambda image: (image["dice"] is None, image["dice"] or 0))
    return {
        "scores": spread(fold["scores"] for fold in folds),
        "challenge": spread(fold["challenge"] for fold in folds),
        "folds": [{k: v for k, v in fold.items() if k != "per_image"} for fold in folds],
        "per_image": images,
    }


def spread(scores: Iterable[dict[str, float | None]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation (of a sample) of each score over the folds that have it."""
    found, rows = {}, list(scores)
    for key in dict.fromkeys(key for row in rows for key in row):
        values = [value for row in rows if (value := row.get(key)) is not None]
        if values:
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            found[key] = {"mean": statistics.fmean(values), "std": deviation}
    return found


def table(found: dict[str, Any]) -> list[str]:
    lines = []
    titles = {"scores": "at each model's threshold", "challenge": "each at its best threshold"}
    if "threshold" not in found["folds"][0]:  # of more than two classes
        titles = {"scores": ""}
    for kind, title in titles.items():
        if keys := [key for key in COLUMNS if key in found[kind]]:
            rows = {fold["fold"]: fold[kind] for fold in found["folds"]}
            rows |= {w: {k: found[kind][k][w] for k in keys} for w in ("mean", "std")}
            lines.append(f"fold  {''.join(f'{key:>12}' for key in keys)}  {title}".rstrip())
            for name, row in rows.items():
                figures = ("-" if row.get(k) is None else f"{row[k]:.4f}" for k in keys)
                lines.append(f"{name:6}" + "".join(f"{f:>12}" for f in figures))
    return lines


def command(argv: Sequence[str] | None = None) -> int:
    return run_script(main, CrossvalOptions, argv, description=__doc__, recipes=RECIPES)
