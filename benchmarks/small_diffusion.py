"""How well small networks learn to denoise in equal time: held-out v-MSE after a few minutes.

    python benchmarks/small_diffusion.py --data mnist_train.npz --network diffusion --out runs/d

The images are those of an .npz (`images` uint8 (N, H, W)), the last 1,000 held out; cosine schedule
(arXiv 2102.09672, eq. 17), v-prediction (arXiv 2202.00512), the noise of a held-out image fixed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unet.presets import PRESETS
from unet.training.cli import run_script
from unet.training.options import FitOptions

HELD_OUT = 1000


@dataclass(frozen=True, kw_only=True)
class Options(FitOptions):
    """Options of the comparison."""

    data: Path
    """An .npz with `images`."""

    network: str = "diffusion"
    """Preset of the network."""

    patch: int | None = None
    """Patch of the stem, instead of the preset's."""

    width: int | None = None
    """Channels of the finest level, instead of the preset's."""

    attention: bool = True
    """Keep the attention of the preset."""

    batch_size: int = 128
    """Images an optimizer step."""


def main(options: Options) -> None:
    import numpy as np
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn

    from diffusion.model import DiffusionUNet
    from unet.training.batches import Key, sample_rng
    from unet.training.fit import fit
    from unet.training.run import run_folder
    from unet.training.task import Batch, Processes, Task

    images = np.load(options.data, allow_pickle=False)["images"]

    def noised(index: int, rng: np.random.Generator) -> dict[str, Any]:
        x = torch.from_numpy(images[index]).float()[None] / 127.5 - 1
        noise = torch.from_numpy(rng.standard_normal(x.shape, dtype=np.float32))
        angle = math.pi / 2 * rng.uniform(0.01, 0.99)
        signal, sigma = math.cos(angle), math.sin(angle)
        return {
            "x": signal * x + sigma * noise,
            "v": signal * noise - sigma * x,
            "t": torch.tensor(1000 * angle / (math.pi / 2)),
        }

    class Samples:
        def __len__(self) -> int:
            return len(images) - HELD_OUT

        def __getitem__(self, key: Key) -> dict[str, Any]:
            return noised(key[1], sample_rng(options.seed, *key))

        def name(self, index: int) -> str:
            return str(index)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.mse_loss(model(batch["x"], batch["t"]).float(), batch["v"])

    def evaluate(model: nn.Module, processes: Processes) -> Mapping[str, float]:
        first = len(images) - HELD_OUT
        held_out = [noised(i, sample_rng(1, 0, i)) for i in range(first, len(images))]
        batch = {k: torch.stack([s[k] for s in held_out]) for k in held_out[0]}
        parts = zip(*(batch[k].split(250) for k in ("x", "t", "v")), strict=True)
        total = sum(float(F.mse_loss(model(x, t).float(), v)) for x, t, v in parts)
        return {"loss": 250 * total / HELD_OUT}

    config = replace(PRESETS[options.network].config, in_channels=1)
    changes: dict[str, Any] = {"patch": options.patch, "channels": options.width}
    if not options.attention:
        changes |= {"attention_levels": (), "middle_attention": False, "head_channels": None}
    config = replace(config, **{k: v for k, v in changes.items() if v is not None})
    torch.manual_seed(options.seed)
    model = DiffusionUNet(config, 1)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    with run_folder(options):
        fit(Task(model=model, samples=Samples(), loss=loss, evaluate=evaluate), options)


if __name__ == "__main__":
    sys.exit(run_script(main, Options, description=__doc__))
