"""Training samples: augmented crops of images, masks and weights."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from segmentation.augment import Augmentation, augmented_crop
from segmentation.classes import IGNORE
from segmentation.data import SegmentationData
from segmentation.pictures import class_colours, grey_or_rgb
from segmentation.weights import border_weights
from unet.pictures import panel
from unet.training.batches import Key, sample_rng

PICTURED = 16  # samples in the picture at the start of a run


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

    def picture(self) -> Image.Image:
        """Samples of the first epoch with their masks below them, and weights below those."""
        rows = []
        count = len(self.data.table.values)
        for start in range(0, PICTURED, 8):
            samples = [self[0, i % len(self)] for i in range(start, start + 8)]
            rows.append([_shown(s["image"]) for s in samples])
            rows.append([class_colours(s["mask"].numpy(), count) for s in samples])
            if self.border is not None:
                rows.append([_shown(s["weight"][None]) for s in samples])
        return panel(rows, largest=192)


def image_shape(data: SegmentationData, index: int) -> tuple[int, int]:
    """Height and width of an image."""
    info = data.pairs[index].info
    return info.height, info.width


def _shown(image: Tensor) -> np.ndarray:
    return grey_or_rgb(image.permute(1, 2, 0).numpy())
