"""Regions: unions of classes that may overlap, such as a whole tumour and its core.

Each is learnt by a sigmoid of its own, as nnU-Net does it (Isensee et al. 2021,
doi:10.1038/s41592-020-01008-z). In a label map, later regions overwrite earlier ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segmentation.data.classes import IGNORE, ClassTable
from unet.errors import InputError
from unet.files.mask_values import listed, some

# What predict-seg calls its other files.
_TAKEN = ("mask", "probability", "overlay", "labels", "entropy", "disagreement", "progress")


def parse_regions(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The mask values of each region: {"core": (2, 3)} of ["core=2,3"].

    Raises:
        InputError: no such text, a name twice, or a single region.
    """
    found: dict[str, tuple[int, ...]] = {}
    for text in texts:
        said = re.fullmatch(r"([^=]+)=([0-9]{1,9}(?:,[0-9]{1,9})*)", text)
        if not said or said[1] in found:
            raise InputError(
                f"--regions {text}: give each region once, by name and mask values, such as "
                "whole=1,2,3 core=2,3"
            )
        found[said[1]] = tuple(map(int, said[2].split(",")))
    return found


class Regions:
    """The regions of masks with known classes.

    Args:
        values: the mask values of each region, by its name; the first one stands for the region in
            a label map.
        classes: of the masks.

    Attributes:
        members: (R, K) which classes are in which region.
        table: of the label map: what is in no region, and each region.

    Raises:
        InputError: values that no mask has; no class without a region; a name or first value twice.
    """

    def __init__(self, values: Mapping[str, Sequence[int]], classes: ClassTable) -> None:
        self.values, self.names = {n: tuple(v) for n, v in values.items()}, tuple(values)
        if isinstance(classes.values[0], tuple):
            raise InputError("regions are of mask values that are numbers, and these are colours")
        for name, of in self.values.items():
            if strange := [v for v in of if v not in classes.values]:
                raise InputError(
                    f"region {name} has the mask values {some(strange)}, which no class has: the "
                    f"classes are {listed(classes.values)}"
                )
        self.members = np.array([[v in of for v in classes.values] for of in self.values.values()])
        written = [of[0] for of in self.values.values()]
        in_one = np.any(self.members, axis=0).tolist()
        outside = [
            v
            for v, inside in zip(classes.values, in_one, strict=True)
            if not inside and isinstance(v, int)
        ]
        if len(set(written)) < len(written) or len(written) < 2:
            raise InputError(
                f"regions {', '.join(self.names)} begin with the mask values "
                f"{', '.join(map(str, written))}: give two regions or more, each with a different "
                "first value, which stands for it in a label map"
            )
        if not outside:
            raise InputError(
                f"each mask value of {listed(classes.values)} is in a region: one has to be the "
                "background, which is in none"
            )
        if len({file_name(n) for n in [*self.names, *_TAKEN]}) < len(self.names) + len(_TAKEN):
            raise InputError(
                f"regions {', '.join(self.names)}: their files need names of their own, other than "
                f"{', '.join(_TAKEN)}"
            )
        ordered = sorted([outside[0], *written])
        names = {outside[0]: "background", **dict(zip(written, self.names, strict=True))}
        self.order = [ordered.index(value) for value in written]
        self.background = ordered.index(outside[0])
        truth = self._map(self.members)
        shares = np.bincount(truth, classes.shares, len(ordered))
        self.table = ClassTable(
            values=tuple(ordered),
            shares=tuple(shares.tolist()),
            ignore_value=classes.ignore_value,
            ignored_share=classes.ignored_share,
            names=tuple(names[value] for value in ordered),
        )

    def found(self, probability: NDArray[np.floating], threshold: float) -> NDArray[np.bool_]:
        """Where (R, H, W) each region is found, by its probability."""
        return np.asarray(probability > threshold)

    def label_map(self, probability: NDArray[np.floating], threshold: float) -> NDArray[np.uint8]:
        """Indices (H, W) in `table` of probabilities (R, H, W)."""
        return self._map(self.found(probability, threshold))

    def true(self, mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """For each region (R, H, W) 1 where it is, 0 elsewhere, of class indices (H, W); IGNORE
        stays.
        """
        inside = self.members.astype(np.uint8)[:, np.where(mask == IGNORE, 0, mask)]
        return np.where(mask == IGNORE, np.uint8(IGNORE), inside)

    def true_map(self, mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Indices (H, W) in `table` of class indices (H, W); IGNORE stays."""
        known = self._map(self.members)[np.where(mask == IGNORE, 0, mask)]
        return np.where(mask == IGNORE, np.uint8(IGNORE), known)

    def _map(self, inside: NDArray[np.bool_]) -> NDArray[np.uint8]:
        found = np.full(inside.shape[1:], self.background, np.uint8)
        for region, index in zip(inside, self.order, strict=True):
            found[region] = index
        return found

    def lines(self) -> str:
        """The regions in words."""
        return "; ".join(f"{n} = {', '.join(map(str, v))}" for n, v in self.values.items())


def known_regions(info: Mapping[str, Any], classes: ClassTable) -> Regions | None:
    """The regions of a model, by its config.json; None: it has classes.

    Raises:
        InputError: a damaged model.
    """
    if "regions" not in info:
        return None
    try:
        values = {str(name): [int(v) for v in of] for name, of in info["regions"]}
    except (TypeError, ValueError) as error:
        raise InputError(f"the model's regions {info['regions']!r} are damaged") from error
    return Regions(values, classes)


def file_name(region: str) -> str:
    """A region's name as a part of a file's name."""
    return re.sub(r"[^\w.-]+", "_", region)
