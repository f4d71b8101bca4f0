"""Training samples: augmented crops of images, masks and weights."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from segmentation.data.augment import Augmentation, augmented_crop
from segmentation.data.classes import IGNORE
from segmentation.data.dataset import SegmentationData
from segmentation.data.weights import border_weights
from unet.training.batches import Key, sample_rng


class CropSamples:
    """Augmented crops of the training images; an epoch sees each image as often as crops fit.

    Args:
        size: height and width of a crop.
        target_size: of the part in its centre that is labelled (valid convolutions).
        border: w0 and sigma of the border weights (arXiv 1505.04597, eq. 2); None: no weights.
    """

    def __init__(
        self,
        data: SegmentationData,
        augmentation: Augmentation,
        size: tuple[int, int],
        target_size: tuple[int, int],
        *,
        border: tuple[float, float] | None = None,
        seed: int = 0,
    ) -> None:
        self.data, self.augmentation, self.seed = data, augmentation, seed
        self.size, self.target_size, self.border = size, target_size, border
        self.images: list[int] = []
        for i in data.train:
            shape = image_shape(data, i)
            fits = (max(1, round(n / t)) for n, t in zip(shape, target_size, strict=True))
            self.images += [i] * math.prod(fits)
        self._weights: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Key) -> dict[str, Tensor]:
        epoch, index = key
        i = self.images[index]
        image, mask = (torch.tensor(a) for a in self.data.load(i))
        maps = [mask] if self.border is None else [mask, self.weights(i)]
        rng = sample_rng(self.seed, epoch, index)
        crop, targets = augmented_crop(
            image, maps, rng, self.augmentation, self.size, self.target_size
        )
        return {"image": crop, **dict(zip(("mask", "weight"), targets, strict=False))}

    def name(self, index: int) -> str:
        return self.data.pairs[self.images[index]].name

    def weights(self, i: int) -> Tensor:
        """Border weights (H, W) of an image, computed once."""
        if i not in self._weights:
            assert self.border is not None
            mask = self.data.load(i)[1]
            cells = np.where(mask == IGNORE, 0, mask == 1).astype(np.uint8)
            w0, sigma = self.border
            self._weights[i] = torch.from_numpy(border_weights(cells, w0=w0, sigma=sigma))
        return self._weights[i]


def image_shape(data: SegmentationData, index: int) -> tuple[int, int]:
    """Height and width of an image."""
    info = data.pairs[index].info
    return info.height, info.width
