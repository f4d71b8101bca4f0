"""Sampling compared with regression: restoration.py --data FOLDER --out DIR.

A diffusion model and a plain regression (the same network without its timestep, trained on the
squared error, which adds its output to what takes no model) learn in the same minutes to make
images from poorer ones. Both are judged on images that no training saw, and by which nothing was
chosen, beside bicubic enlargement or the noisy image: PSNR, SSIM, and the Fréchet distance to the
training images on the features of a network of fixed random weights (as arXiv 2002.09797 does for
images far from photographs). What is there already is not trained again.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from diffusion.data.conditions import Asked, Condition  # noqa: E402
from diffusion.data.images import DiffusionData  # noqa: E402
from diffusion.data.pixels import to_bytes  # noqa: E402
from diffusion.data.shapes import example  # noqa: E402
from diffusion.decisions import decide  # noqa: E402
from diffusion.judging.classifier import ClassifierUNet, classifier_config  # noqa: E402
from diffusion.judging.evaluation import Judge, table, timed_samples, to_json  # noqa: E402
from diffusion.judging.features import ClassifierFeatures  # noqa: E402
from diffusion.judging.restoration import Pairs, candidates, restoration  # noqa: E402
from diffusion.model import DiffusionUNet  # noqa: E402
from diffusion.options import DiffusionOptions, SamplingOptions  # noqa: E402
from diffusion.pictures import Images  # noqa: E402
from diffusion.pictures import table as pictured  # noqa: E402
from diffusion.sampling import ImageSampler  # noqa: E402
from diffusion.training import load_data, train  # noqa: E402
from segmentation.data.phantom import phantom_slice  # noqa: E402
from unet.files.images import list_images, write_image  # noqa: E402
from unet.files.pictures import composite  # noqa: E402
from unet.files.writing import write_text  # noqa: E402
from unet.training.cli import run_script  # noqa: E402
from unet.training.fit import fit  # noqa: E402
from unet.training.run import run_folder  # noqa: E402
from unet.training.task import Batch, Processes, Task  # noqa: E402
from unet.weights.crossing import plain  # noqa: E402

FEATURES = 8  # channels of the finest level of the network whose features are compared
SHOWN = 6  # images in the picture


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    out: Path
    """Folder for the data, the runs, restoration.json and restoration.png."""

    data: str = "membranes"
    """Folder of images, of which the last sixth is judged; or membranes or shapes, generated."""

    condition: str = "lowres:4"
    """The condition: lowres:4, noise:0.2, grey or hole."""

    size: int = 64
    """Side of the crops."""

    minutes: float = 6.0
    """Of each training."""

    images: int = 120
    """Generated images."""

    count: int = 100
    """Crops to judge by."""

    each: int = 8
    """Samples of each."""

    threads: int = 1
    """Threads of the computation."""


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    write_data(options)
    settings = DiffusionOptions(
        out=options.out / "diffusion",
        data=str(options.out / "train"),
        condition=options.condition,
        size=options.size,
        crops=True,
        evaluations=4,
        max_minutes=options.minutes,
        device="cpu",
    )
    if not (settings.out / "report.png").exists():
        train(settings)
    seen = load_data(settings)
    assert isinstance(seen, DiffusionData)
    regression = regressed(settings, seen)
    sampler = ImageSampler(
        DiffusionUNet.from_pretrained(settings.out / "model"), SamplingOptions(device="cpu")
    )
    data = DiffusionData(
        options.out / "test", size=options.size, crops=True, condition=seen.condition
    )
    order = np.random.default_rng(0).permutation([*data.train, *data.val]).tolist()
    pairs = Pairs.of(data, order, min(options.count, len(order)), sampler)
    images, seconds = timed_samples(sampler, [*pairs.wanted] * options.each)
    samples = images.reshape(options.each, -1, *images.shape[1:])
    rows = candidates(samples, pairs)
    found = [*rows.items()]
    found.insert(-1 - (options.each > 1), ("regression", applied(regression, pairs)))
    rows = dict(found)
    judge = Judge(seen, features(options, seen.channels), copies=False)
    figures = restoration(rows, pairs, judge.distance)
    facts = {"images": len(pairs.chosen), "seconds of all samples": round(seconds, 1)}
    facts["evaluations"] = sampler.plans.from_noise().evaluations
    facts["steps"] = {run: steps_of(options.out / run) for run in ("diffusion", "regression")}
    write_text(options.out / "restoration.json", to_json({**facts, "restoration": figures}))
    print("\n".join([str(facts), *table(f"{options.data}, {options.condition}", figures)]))
    shown = {**rows, "true image": pairs.truth}
    picture = pictured(
        {
            name.removesuffix(" enlargement"): [composite(image) for image in of[:SHOWN]]
            for name, of in shown.items()
        },
        [""] * min(SHOWN, len(pairs.chosen)),
    )
    picture.save(options.out / "restoration.png")


def write_data(options: Options) -> None:
    """The images to train on, and those to judge by, of which none is the other."""
    if (options.out / "test").exists():
        return
    files = [] if options.data in ("membranes", "shapes") else list_images(Path(options.data))
    count = len(files) or options.images
    for i in range(count):
        part = options.out / ("test" if i >= count - max(1, count // 6) else "train")
        part.mkdir(parents=True, exist_ok=True)
        if files:
            shutil.copy(files[i], part / files[i].name)
        elif options.data == "shapes":
            write_image(part / f"{i}.png", example(0, i, 2 * options.size)[1].picture)
        else:
            write_image(part / f"{i}.png", phantom_slice(i)[0])


class Regression:
    """A network that makes an image of a condition at once, on the data of a diffusion run."""

    def __init__(self, model: DiffusionUNet, condition: Condition, data: DiffusionData) -> None:
        self.model, self.condition, self.data = model, condition, data

    def __call__(self, pictures: Tensor, model: nn.Module | None = None) -> Tensor:
        """Pictures (B, K, H, W) to images (B, C, H, W) in [-1, 1]."""
        floors = [self.condition.as_image(picture, self.data.channels) for picture in pictures]
        made = (model or self.model)(pictures)
        return made + torch.stack([floor for floor in floors if floor is not None])

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.mse_loss(self(batch["picture"], model).float(), batch["image"])

    @torch.no_grad()
    def evaluate(self, model: nn.Module, processes: Processes) -> Mapping[str, float]:
        asked = [Asked.of(one).read() for one in self.data.conditions(self.data.val)]
        made = self(torch.stack([picture for picture in asked if picture is not None]), model)
        return {"loss": float(F.mse_loss(made, self.data.batch(self.data.val)[0]))}


def regressed(settings: DiffusionOptions, data: DiffusionData) -> Regression:
    """The regression of the diffusion model's network, optimizer, batch size and minutes."""
    out = settings.out.with_name("regression")
    plan = decide(replace(settings, out=out), data)
    condition = data.condition
    assert condition is not None
    network = replace(plain(plan.network), in_channels=condition.channels)
    torch.manual_seed(0)
    found = Regression(DiffusionUNet(network, data.channels), condition, data)
    if not (out / "model").exists():
        with run_folder(plan.fit):
            fit(
                Task(
                    model=found.model,
                    samples=data.samples(plan.fit.seed),
                    options=plan.options,
                    loss=found.loss,
                    evaluate=found.evaluate,
                ),
                plan.fit,
            )
    found.model = DiffusionUNet.from_pretrained(out / "model")
    return found


@torch.no_grad()
def applied(regression: Regression, pairs: Pairs) -> Images:
    """The regression's images of the pictures, uint8 (N, H, W, C)."""
    pictures = [picture for w in pairs.wanted if (picture := Asked.of(w).read()) is not None]
    return np.concatenate([to_bytes(regression(picture[None])) for picture in pictures])


def features(options: Options, channels: int) -> ClassifierFeatures:
    """The features of an untrained network."""
    size = (options.size, options.size)
    torch.manual_seed(0)
    info: dict[str, Any] = {"classes": ["a", "b"], "size": list(size)}
    network = ClassifierUNet(classifier_config(size, channels, FEATURES), 2, info)
    network.save_pretrained(options.out / "features")
    return ClassifierFeatures(options.out / "features")


def steps_of(run: Path) -> int:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return max(int(json.loads(line)["step"]) for line in lines)


if __name__ == "__main__":
    sys.exit(run_script(main, Options, description=__doc__))
