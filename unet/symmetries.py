"""Which symmetries images have: whether up and down, left and right, and quarter turns can be told
apart.

Rotating crops by any angle is right for micrographs and wrong for streets, faces and letters. A
linear classifier finds out which they are: it sees each crop beside its mirror image and learns
which of the two is the crop itself. If the images have the symmetry, it is right half the time. It
is trained on some images and tested on others. Fewer than eight images are too few for that, and so
are the slices of one stack, which show the same tissue at the same place.

Its features are averages of the responses to patches of the images themselves (as in Coates and Ng
2011, "The importance of encoding versus training with sparse coding and vector quantization"), and
the crop as 8 x 8 pixels. Crops are shrunk to 32 x 32 pixels and freed of a slope of grey first, so
that the scan lines of a microscope and its uneven light do not count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from unet.words import counted

Flips: TypeAlias = bool | Literal["mirror"]  # all eight of a square (True), left to right, none

CROPS = 256  # that are looked at
PIXELS = 2**25  # of the images that are read for them, about
SIDE, LAYOUT = 32, 8  # pixels to which crops are shrunk, for patches and as they are
LEAST = 8  # pixels of a crop's side, below which nothing is seen
PATCH, PATCHES = 7, 12  # side and number of the patches, each in eight positions
FOLDS = 8
RIDGE = 0.3  # of the mean squared norm of a difference
STRONG, ODDS = 0.9, 0.005  # share of the crops, and chance that as many images are right by luck
WEAK, WEAK_ODDS = 0.6, 0.02  # of left and right, where up and down are strongly told apart
LEAST_IMAGES = 8  # fewer decide nothing
ALIKE = 0.25  # more correlation of neighbours than of other pairs: slices of a stack

# Each undoes itself. Quarter turns are the third one after a mirror.
MIRRORS: dict[str, Callable[[Tensor], Tensor]] = {
    "up and down": lambda x: x.flip(-2),
    "left and right": lambda x: x.flip(-1),
    "quarter turns": lambda x: x.transpose(-1, -2),
}


class Symmetries(NamedTuple):
    """The symmetries to augment with, and why."""

    flips: Flips
    why: str


class Telling(NamedTuple):
    """How well crops are told from their mirror images."""

    share: float  # of the crops
    odds: float  # that as many of the images are right by luck


def find_symmetries(
    load: Callable[[int], NDArray[Any]],
    indices: Sequence[int],
    crop: tuple[int, int],
    *,
    seed: int = 0,
) -> Symmetries:
    """The symmetries of images, tested on crops of them; the same at each call. The result is all
    eight if nothing can be told apart, or there is too little data to tell; mirroring left to right
    if up and down can be told apart, but not left and right; none otherwise.

    Args:
        load: an image (C, H, W) by its index.
        indices: of the training images.
        crop: height and width of a training crop.
    """
    read = min(len(indices), CROPS)
    if read < LEAST_IMAGES:
        verb = "is" if read == 1 else "are"
        return Symmetries(True, f"{counted(read, 'image')} {verb} too few to tell")
    read = min(read, max(LEAST_IMAGES, PIXELS // math.prod(load(indices[0]).shape[-2:])))
    chosen = [load(indices[(2 * k + 1) * len(indices) // (2 * read)]) for k in range(read)]
    if _alike(chosen):
        return Symmetries(True, "slices of one stack are too alike to tell")
    crops, images = _cut(chosen, crop, np.random.default_rng((seed, read)))
    if crops.shape[-1] < LEAST:
        return Symmetries(True, f"crops of less than {LEAST} pixels are too small to tell")
    found = dict(zip(MIRRORS, _tell(crops, images, seed), strict=True))
    return _chosen(found, f"{counted(len(crops), 'crop')} of {counted(read, 'image')}")


def _chosen(found: dict[str, Telling], seen: str) -> Symmetries:
    def told(name: str) -> str:
        return f"{name} can be told apart: right in {found[name].share:.0%} of {seen}"

    strong = [n for n, (share, odds) in found.items() if share >= STRONG and odds <= ODDS]
    upright, across = found["up and down"], found["left and right"]
    if "up and down" in strong:
        if across.share >= WEAK and across.odds <= WEAK_ODDS:
            also = f"left and right can, too: right in {across.share:.0%}"
            return Symmetries(False, f"{told('up and down')}; {also}")
        return Symmetries(
            "mirror", f"{told('up and down')}; left and right cannot: right in {across.share:.0%}"
        )
    if strong:
        return Symmetries(False, told(strong[0]))
    can = "can hardly" if upright.odds <= ODDS else "cannot"
    said = f"up and down {can} be told apart: right in {upright.share:.0%} of {seen}"
    turns = found["quarter turns"].share
    said += f"; left and right in {across.share:.0%}, quarter turns in {turns:.0%}"
    return Symmetries(True, said)


def _alike(images: Sequence[NDArray[Any]]) -> bool:
    """Whether neighbours among the images resemble each other more than others do."""
    small = [F.adaptive_avg_pool2d(_tensor(i).mean(0, keepdim=True), SIDE) for i in images]
    x = F.normalize(_flat(torch.stack(small)).flatten(1))
    others = (x * x.roll(len(x) // 2, 0)).sum(1).mean()
    return float((x[1:] * x[:-1]).sum(1).mean() - others) > ALIKE


def _cut(
    images: Sequence[NDArray[Any]], crop: tuple[int, int], rng: np.random.Generator
) -> tuple[Tensor, NDArray[np.int64]]:
    """Crops (N, C, S, S) at random places, as many of each image, and the image of each."""
    sides = [min(*crop, *image.shape[-2:]) for image in images]
    each, crops = max(1, CROPS // len(images)), []
    for image, side in zip(images, sides, strict=True):
        whole = _tensor(image)
        for _ in range(each):
            top, left = (int(rng.integers(n - side + 1)) for n in whole.shape[-2:])
            part = whole[:, top : top + side, left : left + side]
            crops.append(F.adaptive_avg_pool2d(part, min(*sides, SIDE)))
    return torch.stack(crops), np.repeat(np.arange(len(images)), each)


def _tensor(image: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.array(image, np.float32))


def _tell(crops: Tensor, images: NDArray[np.int64], seed: int) -> Iterator[Telling]:
    """For each mirror the better of two classifiers, of patches and of the layout."""
    x = _flat(crops)
    patches = _patches(x, np.random.default_rng(seed))
    layout = F.adaptive_avg_pool2d(x, min(LAYOUT, x.shape[-1]))
    for mirror in MIRRORS.values():
        # The patches come in all positions: a mirrored crop has the responses in another order.
        order = [_POSITIONS.index(_cells(mirror(cells))) for cells in _versions(_SQUARE)]
        kinds = ((layout, mirror(layout)), (patches, mirror(patches[:, :, order])))
        yield max(_judged(_difference(*kind), images) for kind in kinds)


def _flat(crops: Tensor) -> Tensor:
    """Without the plane that fits each channel best, and of a common spread."""
    slope = torch.linspace(-1, 1, crops.shape[-1])
    x = crops - crops.mean((-2, -1), keepdim=True)
    square = slope.square().mean()
    for ramp in (slope[:, None], slope[None, :]):
        x = x - (x * ramp).mean((-2, -1), keepdim=True) / square * ramp
    return x / x.std().clamp_min(1e-6)


def _patches(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Mean responses (N, patches, 8, 2, 2) to patches in eight positions, in each quarter."""
    grey = x.mean(1)
    k = min(PATCH, grey.shape[-1])
    count, side = grey.shape[0], grey.shape[-1] - k + 1
    places = rng.integers(0, (count, side, side), (4 * PATCHES, 3)).tolist()
    found = torch.stack([grey[n, r : r + k, c : c + k] for n, r, c in places])
    found = found - found.mean((-2, -1), keepdim=True)
    size = found.flatten(1).norm(dim=1)
    most = size.argsort(descending=True, stable=True)[:PATCHES]
    bank = found[most] / size[most].clamp_min(1e-6)[:, None, None]
    filters = torch.stack(list(_versions(bank)), 1).flatten(0, 1)[:, None]
    threshold = F.conv2d(grey[:64, None], filters).std()
    parts = []
    for part in grey[:, None].split(16):
        response = F.relu(F.conv2d(part, filters) - threshold)
        parts.append(F.adaptive_avg_pool2d(response, min(2, side)))
    return torch.cat(parts).unflatten(1, (-1, 8))


def _difference(crops: Tensor, mirrored: Tensor) -> Tensor:
    """(N, features) of crops less those of their mirror images, each of a common spread."""
    if crops.dim() == 5:  # of patches: also the means over the whole crop
        crops, mirrored = (
            torch.cat([x.flatten(1), x.mean((-2, -1)).flatten(1)], 1) for x in (crops, mirrored)
        )
    crops, mirrored = crops.flatten(1), mirrored.flatten(1)
    spread = torch.cat([crops, mirrored]).std(0)
    return (crops - mirrored) / (spread + 0.05 * crops.std() + 1e-6)


def _judged(difference: Tensor, images: NDArray[np.int64]) -> Telling:
    """How often w . difference > 0, with w by ridge regression to 1 on other images."""
    x = difference.double()
    kernel = x @ x.T
    kernel = kernel / kernel.diagonal().mean().clamp_min(1e-12)
    count = int(images.max()) + 1
    folds = images * FOLDS // count
    margin = torch.zeros(len(x), dtype=torch.float64)
    for fold in range(FOLDS):
        test, known = (torch.from_numpy(np.flatnonzero(w)) for w in (folds == fold, folds != fold))
        ridge = kernel[known][:, known] + RIDGE * torch.eye(len(known), dtype=torch.float64)
        weights = torch.linalg.solve(ridge, torch.ones(len(known), dtype=torch.float64))
        margin[test] = kernel[test][:, known] @ weights
    right = ((margin > 1e-9).double() + 0.5 * (margin.abs() <= 1e-9)).numpy()
    by_image = np.bincount(images, margin.numpy()) > 1e-9
    return Telling(float(right.mean()), _luck(int(by_image.sum()), count))


def _luck(right: int, count: int) -> float:
    """The chance of so many heads or more of a fair coin."""
    return sum(math.comb(count, k) for k in range(right, count + 1)) / 2**count


def _versions(square: Tensor) -> Iterator[Tensor]:
    """The eight positions of squares (..., S, S)."""
    for x in (square, square.transpose(-1, -2)):
        for y in (x, x.flip(-2)):
            yield from (y, y.flip(-1))


def _cells(square: Tensor) -> tuple[int, ...]:
    return tuple(square.flatten().tolist())


_SQUARE = torch.arange(4).view(2, 2)
_POSITIONS = [_cells(cells) for cells in _versions(_SQUARE)]
