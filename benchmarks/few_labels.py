"""The benefit of unlabelled images where labels are few.

    python benchmarks/few_labels.py --isbi FOLDER --out DIR
    python benchmarks/few_labels.py --nuclei FOLDER --labels 1s 4s 16s --out DIR
    python benchmarks/few_labels.py --labels 1s 2s 4s 8s --crop 96 --out DIR

of the membranes of ISBI 2012, of nuclei in the layout of the 2018 Data Science Bowl, and of
generated cells with nuclei (background, cytoplasm and nucleus in two channels of 12 bits).

For each amount of labels and each seed, which chooses the images and the corner, segmentations of
the same network on the same labels: from random weights for the whole budget; with --unlabelled,
the diffusion model of the unlabelled images and all, within the same budget; and with the whole
budget behind that model, as where it is there already. The first and the last of these also beside
generated images and masks (--synthetic), of a joint diffusion model that starts from that of the
unlabelled images and learns from the labels; its steps, as many again, are in no budget. The last
images are scored (slices 24 to 29; 16 nuclei or cells) by the last weights, so nothing is chosen on
them. Each figure is written when it is there, and a run that is started again goes on.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from diffusion.options import DiffusionOptions  # noqa: E402
from diffusion.training import train as train_diffusion  # noqa: E402
from segmentation.data.classes import ClassTable  # noqa: E402
from segmentation.data.pairs import Pair, find_pairs, pairs_from_arrays  # noqa: E402
from segmentation.data.stains import stained_stack  # noqa: E402
from segmentation.decisions import PARTS  # noqa: E402
from segmentation.judging.evaluation import evaluate  # noqa: E402
from segmentation.judging.labelled import labelled_data  # noqa: E402
from segmentation.model import SegmentationUNet  # noqa: E402
from segmentation.options import SegmentationOptions  # noqa: E402
from segmentation.predict import Predictor  # noqa: E402
from segmentation.segmenter import load_models  # noqa: E402
from segmentation.training import train as train_segmentation  # noqa: E402
from unet.errors import InputError  # noqa: E402
from unet.files.images import list_images, read_image, write_image  # noqa: E402
from unet.training.cli import run_script  # noqa: E402
from unet.words import counted  # noqa: E402
from unet_diffusion.pretraining import train_with_unlabelled  # noqa: E402
from unet_diffusion.sample_ddpm import SampleOptions  # noqa: E402
from unet_diffusion.sample_ddpm import main as sample  # noqa: E402

UNLABELLED = 7  # a mask value that no class has
WAYS = {
    "random": ("#d55e00", "from random weights"),
    "unlabelled": ("#0072b2", "with unlabelled images, all within the same budget"),
    "given": ("#009e73", "the same budget, the diffusion model done before"),
    "synthetic": ("#cc79a7", "from random weights, beside generated pairs"),
    "both": ("#e69f00", "the diffusion model done before, and generated pairs"),
}
FIGURES = {  # of all kinds of images; each has some of them, of which the first is drawn
    "v_rand": "V_Rand",
    "v_rand_turned": "V_Rand, eight symmetries",
    "v_info": "V_Info",
    "pixel_error": "pixel error",
    "ap50": "AP 0.5",
    "ap50_turned": "AP 0.5, eight symmetries",
    "pq": "panoptic quality",
    "dice": "Dice",
    "dice_turned": "Dice, eight symmetries",
}
CELLS, CELL_SIZE = 48 + 16, (160, 160)  # generated images of cells with nuclei


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    isbi: Path | None = None
    """Folder with image/, label/ and, where it is there, test/ of ISBI 2012."""

    nuclei: Path | None = None
    """Folder with ID/images and ID/masks; neither given: generated cells with nuclei."""

    out: Path
    """Folder for the runs, few-labels.jsonl, few-labels.md and few-labels.png."""

    labels: tuple[str, ...] = ("128", "256", "1s", "2s", "4s", "24s")
    """Amounts of labels: the side of one corner, or so many whole images."""

    seeds: int = 3
    """Choices of images and corners."""

    steps: int | None = None
    """Budget in steps, which other work on the machine does not change; none given: --minutes."""

    minutes: float = 15.0
    """Budget in minutes."""

    network: str = "shared"
    """Preset of the network, on both sides."""

    crop: int = 192
    """Side of the training crops, on both sides."""

    ways: tuple[str, ...] = tuple(WAYS)
    """Which of random, unlabelled, given, synthetic and both to run."""

    count: int = 100
    """Generated pairs, of the size of a crop."""

    threads: int = 2
    """Threads of the computation."""

    def budget(self, share: float) -> dict[str, Any]:
        """A part of the budget, as the trainers take it."""
        if self.steps is not None:
            return {"steps": max(1, round(share * self.steps))}
        return {"max_minutes": share * self.minutes}

    def __post_init__(self) -> None:
        for amount in self.labels:
            if not amount.removesuffix("s").isdecimal() or int(amount.removesuffix("s")) < 1:
                raise InputError(f"--labels {amount!r}: give the side of a corner, or 2s for two")


@dataclass(frozen=True)
class Images:
    """The labelled images, and those for scoring."""

    pairs: list[Pair]
    """Of which some are labelled."""

    scored: list[Pair]

    more: list[Path]
    """Images without labels, beside those of the pairs."""

    instances: bool = False
    """Whether masks number objects."""

    cells: int | None = None
    """The class between the membranes."""

    @classmethod
    def of(cls, options: Options) -> Images:
        if options.isbi is not None:
            pairs, test = find_pairs(options.isbi), options.isbi / "test"
            more = list_images(test) if test.is_dir() else []
            return cls(pairs[:24], pairs[24:], more, cells=1)
        if options.nuclei is not None:
            pairs = find_pairs(options.nuclei)
            return cls(pairs[:-16], pairs[-16:], [], instances=True)
        pairs = pairs_from_arrays(*stained_stack(CELLS, CELL_SIZE))
        return cls(pairs[:-16], pairs[-16:], [])

    def figures(self, models: Sequence[SegmentationUNet], classes: ClassTable) -> dict[str, float]:
        """The figures of the models on the scored images, plain and averaged over the
        symmetries."""
        data = labelled_data(models, self.scored, classes)
        found: dict[str, float] = {}
        for suffix, symmetries in (("_turned", True), ("", False)):
            predictor = Predictor(models, symmetries=symmetries)
            judged = evaluate(predictor, data, data.val, cells=self.cells)
            scores = judged.scores() | judged.challenge()
            found |= {f"{name}{suffix}": value for name, value in scores.items()}
        return {name: round(float(found[name]), 4) for name in FIGURES if name in found}


def main(options: Options) -> None:
    import torch

    torch.set_num_threads(options.threads)
    file = options.out / "few-labels.jsonl"
    images = Images.of(options)
    drawn = pretrained(options, images)
    rows = read_rows(file)
    for amount in options.labels:
        for seed in range(options.seeds):
            folder = options.out / f"labels-{amount}-{seed}"
            write_labels(folder, images.pairs, amount, seed)
            for way in options.ways:
                key = {"labels": amount, "seed": seed, "way": way}
                if any(key.items() <= row.items() for row in rows):
                    continue
                row = key | segmented(options, images, folder, way, drawn, seed)
                rows.append(row)
                with file.open("a", encoding="utf-8") as lines:
                    print(json.dumps(row), file=lines, flush=True)
                print(row, flush=True)
    text = table(rows)
    (options.out / "few-labels.md").write_text(text, encoding="utf-8")
    draw(rows, options.out / "few-labels.png")
    print(text)


def pretrained(options: Options, images: Images) -> Path:
    """The diffusion model of all images that are not scored, without their labels."""
    run, folder = options.out / "pretraining", options.out / "unlabelled"
    if not (run / "report.png").exists():
        for i, pair in enumerate(images.pairs):
            write_image(folder / f"{i}.tif", pair.read_image())
        for i, path in enumerate(images.more, len(images.pairs)):
            write_image(folder / f"{i}.tif", read_image(path))
        train_diffusion(
            DiffusionOptions(
                out=run,
                data=str(folder),
                crops=True,
                size=options.crop,
                network=options.network,
                noise="cosine",  # as --unlabelled does
                batch_size=4,
                resume=(run / "config.yaml").exists(),
                **options.budget(PARTS["pretraining"]),
            )
        )
    return run / "model"


def generated(options: Options, folder: Path, drawn: Path, seed: int) -> Path:
    """Images and masks that a joint diffusion model makes, which has learnt from these labels."""
    run, made = folder / "joint", folder / "made"
    if not (made / "grid.png").exists():
        pairs = folder / "turned"
        for pair in find_pairs(folder):
            image, mask = pair.read_image(), pair.read_mask()
            rows, columns = (np.flatnonzero((mask != UNLABELLED).any(axis)) for axis in (1, 0))
            labelled = np.ix_(rows, columns)  # a corner, or all
            for turn in range(8):
                for kind, pixels in (("image", image), ("label", mask)):
                    turned = np.rot90(pixels[labelled], turn)[:, :: 1 if turn < 4 else -1]
                    write_image(pairs / kind / f"{pair.name}-{turn}.tif", turned)
        if not (run / "report.png").exists():
            train_diffusion(
                DiffusionOptions(
                    out=run,
                    data=str(pairs / "image"),
                    joint=pairs / "label",
                    init=str(drawn),
                    val=0,
                    crops=True,
                    size=options.crop,
                    batch_size=4,
                    seed=seed,
                    resume=(run / "config.yaml").exists(),
                    **options.budget(1),
                )
            )
        sample(
            SampleOptions(
                model=str(run / "model"), out=made, count=options.count, seed=seed, overwrite=True
            )
        )
    return made


def write_labels(folder: Path, pairs: list[Pair], amount: str, seed: int) -> None:
    """Images and masks of which a corner of one is labelled, or some as a whole."""
    rng = np.random.default_rng(seed)
    if amount.endswith("s"):
        for i in rng.choice(len(pairs), int(amount[:-1]), replace=False):
            write_image(folder / "image" / f"{i}.tif", pairs[i].read_image())
            write_image(folder / "label" / f"{i}.tif", pairs[i].read_mask())
        return
    pair, side = pairs[rng.integers(len(pairs))], int(amount)
    mask = pair.read_mask()
    top, left = rng.integers(0, 2, 2) * (np.array(mask.shape) - side)
    sparse = np.full_like(mask, UNLABELLED)
    window = slice(top, top + side), slice(left, left + side)
    sparse[window] = mask[window]
    write_image(folder / "image" / f"{pair.name}.tif", pair.read_image())
    write_image(folder / "label" / f"{pair.name}.tif", sparse)


def segmented(
    options: Options, images: Images, folder: Path, way: str, drawn: Path, seed: int
) -> dict[str, float]:
    """The figures of a segmentation on the images that are scored."""
    run = folder / way
    sparse = not folder.name.split("-")[1].endswith("s")
    settings = SegmentationOptions(
        out=run,
        data=str(folder),
        ignore_value=UNLABELLED if sparse else None,
        instances=images.instances,
        val=0,
        crop=options.crop,
        evaluations=0,
        seed=seed,
        resume=(run / "config.yaml").exists(),
    )
    if way in ("synthetic", "both"):
        settings = replace(settings, synthetic=generated(options, folder, drawn, seed))
    if way in ("random", "synthetic"):
        train_segmentation(replace(settings, network=options.network, **options.budget(1)))
    else:
        share = 1 - PARTS["pretraining"] if way == "unlabelled" else 1
        more: dict[str, Any] = {"init": str(drawn), "unlabelled": options.out / "unlabelled"}
        train_with_unlabelled(replace(settings, **more, **options.budget(share)))
    models, classes, _ = load_models([str(run / "model")])
    return images.figures(models, classes)


def read_rows(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def compared(rows: list[dict[str, Any]]) -> Iterator[tuple[str, str, dict[str, list[float]]]]:
    """Labels, way, and each figure of the seeds that all ways with these labels have."""
    for amount in sorted({row["labels"] for row in rows}, key=pixels):
        ways = {
            way: {row["seed"]: row for row in rows if (row["labels"], row["way"]) == (amount, way)}
            for way in WAYS
        }
        ways = {way: own for way, own in ways.items() if own}
        seeds = sorted(set.intersection(*map(set, ways.values())))
        if seeds:
            for way, own in ways.items():
                names = [name for name in FIGURES if all(name in row for row in own.values())]
                yield amount, way, {k: [own[seed][k] for seed in seeds] for k in names}


def table(rows: list[dict[str, Any]]) -> str:
    """Medians and, in brackets, the range over the seeds, in Markdown."""
    found = list(compared(rows))
    names = [name for name in FIGURES if all(name in figures for *_, figures in found)]
    lines = [
        f"| labels | way | seeds | {' | '.join(FIGURES[name] for name in names)} |",
        "|---|---|---|" + "---|" * len(names),
    ]
    for amount, way, figures in found:
        cells = [str(len(figures[names[0]]))]
        cells += [
            f"{statistics.median(v):.3f} ({min(v):.3f}–{max(v):.3f})"
            for v in (figures[name] for name in names)
        ]
        lines.append(f"| {amount} | {way} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def pixels(amount: str) -> float:
    """Labelled pixels, for the axis, as if an image had 512 x 512."""
    return 512.0**2 * int(amount[:-1]) if amount.endswith("s") else float(amount) ** 2


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Labels against the first of the figures: each seed a dot, the medians a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    found = list(compared(rows))
    name = next(iter(found[0][2]))
    for way, (colour, label) in WAYS.items():
        own = [(pixels(amount), f[name]) for amount, w, f in found if w == way]
        if not own:
            continue
        places = [place for place, _ in own]
        for place, values in own:
            axes.plot([place] * len(values), values, "o", color=colour, alpha=0.35, mew=0)
        axes.plot(places, [statistics.median(v) for _, v in own], "o-", color=colour, label=label)
    axes.set_xscale("log")
    amounts = sorted({amount for amount, _, _ in found}, key=pixels)
    axes.set_xticks([pixels(a) for a in amounts], [named(a) for a in amounts])
    axes.minorticks_off()
    axes.set_xlabel("labelled")
    axes.set_ylabel(f"{FIGURES[name]} on the images that are scored")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path)


def named(amount: str) -> str:
    if not amount.endswith("s"):
        return f"{amount} x {amount}"
    return counted(int(amount[:-1]), "image")


if __name__ == "__main__":
    sys.exit(run_script(main, Options, description=__doc__))
