"""Distances between the surfaces of what was found and what is true: HD95 and the surface Dice.

The surface of a class is its pixels with one outside of it among their neighbours by a side, or at
the border of the image. HD95 is the larger of the two 95th percentiles of the distances from each
surface to the other (after Huttenlocher et al. 1993); the normalised surface distance (NSD) is the
share of both surfaces that lies within a tolerance of the other (Nikolov et al. 2021,
doi:10.2196/26151). Volumes with a known scale are judged in three dimensions and in its unit,
everything else slice by slice in pixels.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from segmentation.data.classes import IGNORE
from segmentation.data.dataset import SegmentationData
from segmentation.data.layouts import stem_of
from segmentation.judging.evaluation import Evaluation, ImageScores
from segmentation.judging.metrics import mean_known
from unet.errors import InputError
from unet.files.pages import CHANNELS, naming
from unet.files.volumes import is_volume, open_volume
from unet.words import counted

Mask = NDArray[np.bool_]  # (H, W) or (D, H, W)


def surface_distances(
    found: Mask, true: Mask, spacing: Sequence[float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """From each pixel of one surface to the nearest of the other: of what was found, what is true.

    Args:
        found, true: of equal shape, neither empty; what is not 0 is inside.
        spacing: of the pixels along each axis.

    Raises:
        InputError: other shapes.
    """
    found, true = np.asarray(found, bool), np.asarray(true, bool)
    if found.shape != true.shape:
        raise InputError(
            f"what was found {found.shape} and what is true {true.shape} differ in shape: score "
            "every image against its own mask"
        )
    box = ndimage.find_objects((found | true).astype(np.uint8))[0]
    surfaces = []
    for mask in (found[box], true[box]):
        inside = ndimage.binary_erosion(mask)
        surfaces.append(mask & ~inside)
    a, b = surfaces
    to_b, to_a = (ndimage.distance_transform_edt(~s, sampling=spacing) for s in (b, a))
    return to_b[a], to_a[b]


def surface_scores(
    found: Mask, true: Mask, tolerance: float, spacing: Sequence[float]
) -> tuple[float, float]:
    """HD95, in the unit of the spacing, and NSD.

    Both are NaN where nothing is true. Where nothing was found, HD95 is the diagonal of the image,
    as no distance can be longer, and NSD is 0.
    """
    if not true.any():
        return math.nan, math.nan
    if not found.any():
        return math.hypot(*(n * s for n, s in zip(true.shape, spacing, strict=True))), 0.0
    there, back = surface_distances(found, true, spacing)
    far = max(float(np.percentile(there, 95)), float(np.percentile(back, 95)))
    near = (there <= tolerance).sum() + (back <= tolerance).sum()
    return far, float(near / (len(there) + len(back)))


@dataclass(frozen=True)
class SurfaceScores:
    """HD95 and NSD of each class in each case.

    Attributes:
        cases: the name of each image or volume, and (K, 2) its scores.
        kinds: the names of the classes, or regions.
        unit: of HD95 and of the tolerance.
    """

    cases: Sequence[tuple[str, NDArray[np.float64]]]
    kinds: Sequence[str]
    tolerance: float
    unit: str

    def means(self) -> list[tuple[str, float, float]]:
        """Of each class its name, and means over the cases that have it; last those of the classes
        that any case has.
        """
        scores = np.stack([scores for _, scores in self.cases])
        figures = [[mean_known(column) for column in of.T] for of in scores.transpose(1, 0, 2)]
        rows = [(kind, far, near) for kind, (far, near) in zip(self.kinds, figures, strict=True)]
        far, near = (mean_known([row[i] for row in figures]) for i in (0, 1))
        return [*rows, ("mean", far, near)]

    def lines(self) -> list[str]:
        """A printable table."""
        width = max(6, *(len(kind) for kind in self.kinds))
        of = counted(len(self.cases), "volume" if self.unit != "pixels" else "image")
        lines = [
            f"{'class':>{width}}{f'HD95 ({self.unit})':>20}{f'NSD at {self.tolerance:g}':>14}"
            f"  mean of {of}"
        ]
        for kind, far, near in self.means():
            shown = ("-" if math.isnan(v) else f"{v:.4f}" for v in (far, near))
            lines.append(f"{kind:>{width}}{next(shown):>20}{next(shown):>14}")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """JSON values; undefined scores are None."""

        def known(value: float) -> float | None:
            return None if math.isnan(value) else float(value)

        return {
            "tolerance": self.tolerance,
            "unit": self.unit,
            "means": {k: {"hd95": known(a), "nsd": known(b)} for k, a, b in self.means()},
            "cases": [
                {"name": name}
                | {f"hd95 {k}": known(s[0]) for k, s in zip(self.kinds, scores, strict=True)}
                | {f"nsd {k}": known(s[1]) for k, s in zip(self.kinds, scores, strict=True)}
                for name, scores in self.cases
            ],
        }


def score_surfaces(
    evaluation: Evaluation, data: SegmentationData, tolerance: float
) -> SurfaceScores:
    """Surface scores of what an evaluation found on images of the data.

    Args:
        tolerance: of NSD, in pixels, or in the unit of the volumes where all have one.
    """
    cases, unit = _cases(evaluation.images, data)
    scored = []
    for name, spacing, images in cases:
        found = np.stack([_found(image, data) for image in images], axis=1)
        true = np.stack([_true(image, data) for image in images], axis=1)
        known = true != IGNORE
        if len(spacing) == 2:
            found, true, known = found[:, 0], true[:, 0], known[:, 0]
        each = zip(found & known, (true == 1) & known, strict=True)
        scores = [surface_scores(f, t, tolerance, spacing) for f, t in each]
        scored.append((name, np.array(scores)))
    return SurfaceScores(scored, evaluation.kinds, tolerance, unit)


def _found(image: ImageScores, data: SegmentationData) -> NDArray[np.bool_]:
    """Where each class or region was found, (K, H, W)."""
    if image.regions is not None:
        return image.regions
    return np.stack([image.prediction == k for k in range(len(data.table.values))])


def _true(image: ImageScores, data: SegmentationData) -> NDArray[np.uint8]:
    """For each class or region (K, H, W) 1 where it is, 0 elsewhere; IGNORE stays."""
    mask = data.load(image.index)[1]
    if data.regions:
        return data.regions.true(mask)
    inside = np.stack([mask == k for k in range(len(data.table.values))]).astype(np.uint8)
    return np.where(mask == IGNORE, np.uint8(IGNORE), inside)


Case = tuple[str, tuple[float, ...], list[ImageScores]]


def _cases(images: Sequence[ImageScores], data: SegmentationData) -> tuple[list[Case], str]:
    """What is judged together, with the spacing of its pixels, and the unit of that."""
    stacks: dict[str, list[ImageScores]] = defaultdict(list)
    for image in images:
        stacks[data.pairs[image.index].stack].append(image)
    scales = [_scale(stack) if stack else None for stack in stacks]
    whole = all(_follow(members, data) for members in stacks.values())
    if whole and len({scale and scale[1] for scale in scales}) == 1 and scales[0] is not None:
        unit = scales[0][1]
        pairs = zip(stacks.items(), scales, strict=True)
        return [
            (stem_of(Path(stack)), scale[0], members)
            for (stack, members), scale in pairs
            if scale is not None
        ], unit
    return [(image.name, (1.0, 1.0), [image]) for image in images], "pixels"


def _follow(images: Sequence[ImageScores], data: SegmentationData) -> bool:
    """Whether they are slices of one volume, one behind the other, each once."""
    pages = [data.pairs[image.index].page for image in images]
    alone = data.pairs[images[0].index].info.series == 0
    return alone and None not in pages and pages == list(range(pages[0] or 0, (pages[-1] or 0) + 1))


def _scale(stack: str) -> tuple[tuple[float, ...], str] | None:
    """Distances of a volume's slices, rows and columns, and their unit; None: not known."""
    path = Path(stack)
    if not is_volume(path):
        return None
    with naming(path), open_volume(path) as volume:
        if volume.scale is None or volume.units is None or not volume.axes:
            return None
        places = [
            i
            for i, (axis, n) in enumerate(zip(volume.axes, volume.array.shape, strict=True))
            if axis in "YX" or (axis not in CHANNELS and n > 1)
        ]
        found = {volume.units[i] for i in places}
        if len(places) != 3 or len(found) != 1:
            return None
        order = sorted(places, key=lambda i: "YX".find(volume.axes[i]))
        return tuple(volume.scale[i] for i in order), found.pop() or "as its scale"
