"""Training samples: augmented crops of images, masks and weights."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from segmentation.data.augment import Augmentation, augmented_crop, random_corner
from segmentation.data.classes import IGNORE
from segmentation.data.dataset import SegmentationData
from segmentation.data.depths import depths
from segmentation.data.weights import border_weights
from unet.training.batches import Key, sample_rng


class CropSamples:
    """Augmented crops of the training images; an epoch sees each image as often as crops fit.

    Each crop of a partly labelled image contains a labelled pixel, at a random place, and an epoch
    has as many crops as its labelled pixels would fill. If there are synthetic images, an epoch
    also has crops of them, as many as their share requires; the images are taken in turn from epoch
    to epoch.

    Args:
        size: height and width of a crop.
        target_size: of the part in its centre that is labelled (valid convolutions).
        border: w0 and sigma of the border weights (arXiv 1505.04597, eq. 2); None: no weights.
            Where masks number objects, these are the cells.
        cells: the class of the cells between which these are.
        share: the share of crops from synthetic images.
    """

    def __init__(
        self,
        data: SegmentationData,
        augmentation: Augmentation,
        size: tuple[int, int],
        target_size: tuple[int, int],
        *,
        border: tuple[float, float] | None = None,
        cells: int = 1,
        share: float = 0.5,
        seed: int = 0,
    ) -> None:
        self.data, self.augmentation, self.seed = data, augmentation, seed
        self.size, self.target_size, self.border = size, target_size, border
        self.cells = cells
        used = [*data.train, *data.synthetic]
        labelled = {i: float((data.load(i)[1] != IGNORE).mean()) for i in used}
        # The images with pixels that are ignored.
        self.partly = {i for i, part in labelled.items() if part < 1}
        self.images: list[int] = []
        for i in data.train:
            sides = zip(image_shape(data, i), target_size, strict=True)
            fits = math.prod(max(1, round(n / t)) for n, t in sides)
            self.images += [i] * max(1, round(labelled[i] * fits))
        self.others = 0
        if data.synthetic:
            self.others = max(1, round(len(self.images) * share / (1 - share)))
        self._weights: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.images) + self.others

    def _image(self, epoch: int, index: int) -> int:
        """The image that a crop is cut out of."""
        if index < len(self.images):
            return self.images[index]
        turn = epoch * self.others + index - len(self.images)
        return self.data.synthetic[turn % len(self.data.synthetic)]

    def __getitem__(self, key: Key) -> dict[str, Tensor]:
        epoch, index = key
        i = self._image(epoch, index)
        image, mask = (torch.tensor(a) for a in self.data.load(i))
        maps = {"mask": mask}
        if self.border is not None:
            maps["weight"] = self.weights(i)
        if self.data.instances:
            maps["depth"] = torch.tensor(self.data.objects(i))
        rng = sample_rng(self.seed, epoch, index)
        corner = None
        if i in self.partly:
            labelled = np.flatnonzero(mask.numpy() != IGNORE)
            corner = random_corner(mask.shape, rng, self.target_size, labelled)
        crop, targets = augmented_crop(
            image, list(maps.values()), rng, self.augmentation, self.size, self.target_size, corner
        )
        sample = {"image": crop, **dict(zip(maps, targets, strict=True))}
        if self.data.instances:  # of objects as they lie in the crop
            sample["depth"] = torch.from_numpy(depths(sample["depth"].numpy()))
        return sample

    def name(self, index: int) -> str:
        return self.data.pairs[self._image(0, index)].name

    def weights(self, i: int) -> Tensor:
        """Border weights (H, W) of an image, computed once."""
        if i not in self._weights:
            assert self.border is not None
            if self.data.instances:
                cells = np.maximum(self.data.objects(i), 0)
            else:
                cells = self.data.load(i)[1] == self.cells
            w0, sigma = self.border
            found = border_weights(cells, w0=w0, sigma=sigma)
            self._weights[i] = torch.from_numpy(found)
        return self._weights[i]


def image_shape(data: SegmentationData, index: int) -> tuple[int, int]:
    """Height and width of an image."""
    info = data.pairs[index].info
    return info.height, info.width
