"""Few evaluations of our samplers compared with many DDIM steps of diffusers: samples.py --model
RUN/model --data FILE ...

One trained network, ours and as diffusers' `UNet2DModel` with the same weights; each makes samples
in its usual way, and both sets are judged by the Fréchet distance to the real images. The image
goes to diffusers' network cut into the same patches, which only sorts its pixels.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from diffusion.data.images import DiffusionData  # noqa: E402
from diffusion.data.pixels import to_bytes  # noqa: E402
from diffusion.judging.evaluation import Judge, timed_samples  # noqa: E402
from diffusion.judging.features import open_extractor  # noqa: E402
from diffusion.model import DiffusionUNet  # noqa: E402
from diffusion.options import SamplingOptions  # noqa: E402
from diffusion.process.schedule import NoiseSchedule  # noqa: E402
from diffusion.sampling import Images, ImageSampler  # noqa: E402
from unet.errors import InputError, RunError  # noqa: E402
from unet.files.writing import write_text  # noqa: E402
from unet.training.cli import run_script  # noqa: E402
from unet.weights.convert import to_layout  # noqa: E402
from unet.weights.diffusers_config import config_to_diffusers  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class Options:
    """Quality and time of samples, ours and diffusers'."""

    model: str
    """Model folder of train_ddpm.py, such as RUN/model; without classes and captions."""

    data: str
    """The real images, as for train_ddpm.py."""

    classifier: str
    """Model folder of train_classifier.py, whose features are compared."""

    out: Path = Path("samples.json")
    """File for the figures."""

    count: int = 2000
    """Samples per side."""

    steps: int = 15
    """Our evaluations of the network."""

    theirs: int = 100
    """DDIM steps of diffusers."""

    batch_size: int = 100
    """Samples at a time, on both sides."""

    threads: int = 2
    """Threads of the computation."""

    seed: int = 0
    """Seed of the first sample."""


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    model = DiffusionUNet.from_pretrained(options.model)
    if model.config.classes or model.text is not None:
        raise InputError(f"--model {options.model} is asked for classes or texts: give one without")
    theirs = _converted(model)
    way = SamplingOptions(steps=options.steps, batch_size=options.batch_size, seed=options.seed)
    sampler = ImageSampler(model, way)
    channels: Any = sampler.channels
    data = DiffusionData(options.data, channels=channels, flips=False)
    extractor = open_extractor(options.classifier, None, "cpu")
    assert extractor is not None
    judge, distance = Judge(data, extractor), extractor.frechet_name
    wanted = [None] * options.count
    name = f"{way.sampler}, {options.steps} evaluations"
    found: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), "sides": {}}

    def add(side: str, images: Images, seconds: float) -> None:
        found["sides"][side] = {**judge(images, wanted), "seconds": seconds}
        print(
            f"{side}: {distance} {found['sides'][side][distance]:.4f}, {seconds:.1f} s", flush=True
        )
        write_text(options.out, json.dumps(found, indent=2) + "\n")

    add(name, *timed_samples(sampler, wanted))
    for spacing in ("leading", "trailing"):
        start = time.perf_counter()
        images = _ddim(theirs, model, data.size, spacing, options)
        side = f"diffusers DDIM, {options.theirs} steps, {spacing}"
        add(side, images, time.perf_counter() - start)
        ours, other = found["sides"][name], found["sides"][side]
        ratios = [f"{key} {ours[key] / other[key]:.2f}" for key in (distance, "seconds")]
        print(f"  ours / theirs: {', '.join(ratios)}", flush=True)


def _converted(model: DiffusionUNet) -> Callable[[Tensor, Tensor], Tensor]:
    """Diffusers' network with the weights of ours, for images that are not cut into patches."""
    from diffusers import UNet2DModel

    patch = model.config.patch
    channels = model.config.in_channels * patch**2
    config = replace(model.config, patch=1, in_channels=channels)
    made: Any = UNet2DModel.from_config(config_to_diffusers(config, model.out_channels * patch**2))
    made.load_state_dict(to_layout(model.state_dict(), config, "diffusers"))
    made.eval()

    def forward(x: Tensor, t: Tensor) -> Tensor:
        if patch == 1:
            return made(x, t).sample
        return F.pixel_shuffle(made(F.pixel_unshuffle(x, patch), t).sample, patch)

    model.eval()
    x, t = torch.randn(2, model.config.in_channels, 8 * patch, 8 * patch), torch.tensor([10, 700])
    with torch.no_grad():
        difference = float((forward(x, t) - model(x, t)).abs().max())
    if difference > 1e-4:
        raise RunError(f"the converted network differs by {difference:g} from ours")
    return forward


@torch.no_grad()
def _ddim(
    network: Callable[[Tensor, Tensor], Tensor],
    model: DiffusionUNet,
    size: tuple[int, int],
    spacing: str,
    options: Options,
) -> Images:
    """The loop of diffusers' DDIMPipeline."""
    import numpy as np
    from diffusers import DDIMScheduler

    kinds = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
    schedule = NoiseSchedule.from_dict(model.info["schedule"])
    scheduler: Any = DDIMScheduler(
        schedule.steps,
        trained_betas=schedule.betas.float().numpy(),
        prediction_type=kinds[model.info["prediction"]],
        timestep_spacing=spacing,
    )
    generator = torch.Generator().manual_seed(options.seed)
    images = []
    for start in range(0, options.count, options.batch_size):
        count = min(options.batch_size, options.count - start)
        x = torch.randn(count, model.config.in_channels, *size, generator=generator)
        scheduler.set_timesteps(options.theirs)
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t), t, x).prev_sample
        images.append(to_bytes(x))
    return np.concatenate(images)


if __name__ == "__main__":
    sys.exit(run_script(main, Options, description=__doc__))
