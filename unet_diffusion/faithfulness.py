"""Whether images made from masks show these masks, as a segmentation of real images finds them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from einops import rearrange
from numpy.typing import NDArray

from diffusion.data.images import DiffusionData
from diffusion.sampling import Images, ImageSampler
from segmentation.judging.evaluation import Evaluation
from segmentation.segmenter import load
from unet.errors import InputError
from unet.words import channels_said

PART = 64  # images that are read at a time
_NAMES = {"dice": "Dice", "v_rand": "V_Rand"}


class MaskReader:
    """A trained segmentation, which reads the masks that the images of a sampler are made from.

    Args:
        folder: its model folder.
        sampler: of a model with a condition.

    Raises:
        InputError: no such model, or one of other masks or of images of another kind.
    """

    def __init__(self, folder: str | Path, sampler: ImageSampler, device: str = "auto") -> None:
        condition, self.pixels = sampler.model.condition, sampler.pixels
        assert condition is not None
        if condition.kind != "mask":
            raise InputError(
                f"--segmenter {folder} reads masks, and images are made from {condition.said()}: "
                "leave it out"
            )
        self.segmenter, self.values = load(folder, device=device), np.array(condition.values)
        classes = self.segmenter.classes
        plain = not (self.segmenter.instances or self.segmenter.of_regions)
        known = {*classes, self.segmenter.table.ignore_value}
        if not plain or self.segmenter.slices > 1 or not {*condition.values} <= known:
            knows = ", ".join(map(str, classes))
            kind = "the classes" if plain else "objects or regions of the classes"
            pages = "" if self.segmenter.slices == 1 else ", in several slices together"
            raise InputError(
                f"--segmenter {folder} knows {kind} {knows}{pages}, and images are made from "
                f"{condition.said()}: give a segmentation of such masks"
            )
        made = sampler.channels, self.pixels.dtype
        read = self.segmenter.channels, self.segmenter.dtype
        if made != read and (made, read) != ((1, "uint8"), (3, "uint8")):
            ours, theirs = (f"{channels_said(count)} {dtype}" for count, dtype in (made, read))
            raise InputError(
                f"--segmenter {folder} reads images that are {theirs}, and those that are made are "
                f"{ours}: give a segmentation of such images"
            )

    def asked(self, data: DiffusionData, indices: list[int]) -> NDArray[np.int64]:
        """The masks (N, H, W) that these images of the data are made from."""
        pictures = (asked.read() for i in indices for asked in data.conditions([i]))
        return np.stack([self.values[p.argmax(dim=0)] for p in pictures if p is not None])

    def __call__(self, images: Images, masks: NDArray[np.int64]) -> dict[str, float]:
        """The mean Dice of the classes between the masks (N, H, W) and those that are read in the
        images, uint8 (N, H, W, C); of membranes V_Rand, too.
        """
        segmenter, table = self.segmenter, self.segmenter.table
        images = self.pixels.stored(images)
        if images.shape[-1] < segmenter.channels:  # grey, which a segmentation of RGB reads as such
            images = np.repeat(images, segmenter.channels, axis=-1)
        cells = segmenter.predict.models[0].info.get("cells") if len(table.values) == 2 else None
        found = Evaluation(table, segmenter.threshold, thresholds=(), cells=cells)
        for start in range(0, len(images), PART):
            probability = segmenter.probability(images[start : start + PART])
            form = "n h w -> n 1 h w" if probability.ndim == 3 else "n h w k -> n k h w"
            for i, p in enumerate(rearrange(probability, form), start):
                found.add(i, str(i), p, table.encode(masks[i]))
        scores = found.scores()
        return {name: scores[key] for key, name in _NAMES.items() if key in scores}


def faithfulness(
    read: MaskReader, made: Images, real: Images, masks: NDArray[np.int64]
) -> dict[str, dict[str, float]]:
    """How well masks (N, H, W) are found in the images (N, H, W, C) that were made from them; in
    the real images, which is the upper limit; and the ratio of the two.
    """
    ours, ceiling = read(made, masks), read(real, masks)
    share = {k: ours[k] / ceiling[k] if ceiling[k] else np.nan for k in ours}
    return {"the samples": ours, "the real images": ceiling, "their ratio": share}
