"""`TrainingSamples`: the images of a training, drawn anew in each epoch."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion.data.captions import Captions
from unet.training.batches import Key, sample_rng


class Drawable(Protocol):
    """What `TrainingSamples` needs of its data; see `DiffusionData`."""

    train: list[int]
    labels: NDArray[np.int64] | None
    captioned: bool

    def draw(self, index: int, rng: np.random.Generator) -> tuple[int, Tensor, Tensor | None]: ...

    def captions(self, index: int) -> Captions: ...

    def name(self, index: int) -> str: ...


class TrainingSamples:
    """`samples[epoch, index]`: "image" (C, H, W), of pixels in [-1, 1] or of latents; "picture"
    (K, H, W), the condition, where there is one; "label" () where there are classes; "caption"
    (str) where captions were asked for, of several another one in each epoch. See
    `unet.training.batches.Samples`.
    """

    def __init__(self, data: Drawable, seed: int) -> None:
        self.data, self.seed = data, seed

    def __len__(self) -> int:
        return len(self.data.train)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        used, image, picture = self.data.draw(self.data.train[key[1]], sample_rng(self.seed, *key))
        sample: dict[str, Any] = {"image": image}
        if picture is not None:
            sample["picture"] = picture
        if self.data.labels is not None:
            sample["label"] = torch.tensor(int(self.data.labels[used]))
        if self.data.captioned:
            texts = self.data.captions(used)
            sample["caption"] = texts[sum(key) % len(texts)]
        return sample

    def name(self, index: int) -> str:
        return self.data.name(self.data.train[index])
