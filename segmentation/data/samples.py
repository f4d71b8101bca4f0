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

RARE_CROPS = 1 / 3  # share of the crops of real images that are cut for rare classes


class CropSamples:
    """Augmented crops of the training images; an epoch sees each image as often as crops fit.

    Each crop of a partly labelled image contains a labelled pixel, at a random place, and an epoch
    has as many crops as its labelled pixels would fill. If there are synthetic images, an epoch
    also has crops of them, as many as their share requires; the images are taken in turn from epoch
    to epoch. If classes are rare (`SegmentationData.rare`), so are crops that each contain a pixel
    of one, which take turns as well: a third of the crops of real images, the share that nnU-Net
    cuts for its foreground (doi 10.1038/s41592-020-01008-z).

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
        labelled: dict[int, float] = {}
        for i in (*data.train, *data.synthetic):
            labelled[i] = float((data.load(i)[1] != IGNORE).mean())
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
        self.rare = list(data.rare.items())
        more = RARE_CROPS / (1 - RARE_CROPS) if self.rare else 0
        self.rare_crops = math.ceil(len(self.images) * more)
        self._weights: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.images) + self.others + self.rare_crops

    def _cut(self, epoch: int, index: int) -> tuple[int, int | None]:
        """The image that a crop is cut out of, and the rare class that it has to contain."""
        if index < len(self.images):
            return self.images[index], None
        index -= len(self.images)
        if index < self.others:
            turn = epoch * self.others + index
            return self.data.synthetic[turn % len(self.data.synthetic)], None
        turn, which = divmod(epoch * self.rare_crops + index - self.others, len(self.rare))
        k, images = self.rare[which]
        return images[turn % len(images)], k

    def __getitem__(self, key: Key) -> dict[str, Tensor]:
        epoch, index = key
        i, rare = self._cut(epoch, index)
        image, mask = (torch.tensor(a) for a in self.data.load(i))
        maps = {"mask": mask}
        if self.border is not None:
            maps["weight"] = self.weights(i)
        if self.data.instances:
            maps["depth"] = torch.tensor(self.data.objects(i))
        rng = sample_rng(self.seed, epoch, index)
        corner = None
        if rare is not None or i in self.partly:
            wanted = mask.numpy() == rare if rare is not None else mask.numpy() != IGNORE
            corner = random_corner(mask.shape, rng, self.target_size, np.flatnonzero(wanted))
        crop, targets = augmented_crop(
            image, list(maps.values()), rng, self.augmentation, self.size, self.target_size, corner
        )
        sample = {"image": crop, **dict(zip(maps, targets, strict=True))}
        if self.data.instances:  # of objects as they lie in the crop
            sample["depth"] = torch.from_numpy(depths(sample["depth"].numpy()))
        return sample

    def name(self, index: int) -> str:
        return self.data.pairs[self._cut(0, index)[0]].name

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
