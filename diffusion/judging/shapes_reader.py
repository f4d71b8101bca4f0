"""A reader of the generated shapes: which `Scene` a picture shows, by rules alone."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from einops import rearrange
from numpy.typing import NDArray
from scipy import ndimage

from diffusion.data.shapes import (
    AREA,
    COLOURS,
    SHAPES,
    SIDE,
    SIZES,
    Map,
    Mask,
    Picture,
    Scene,
    Thing,
    coverage,
)
from unet.errors import InputError

_DARKEST_BACKGROUND = 180  # of ours, in grey levels of each channel
_SPECK = 0.006  # share of the picture below which a blot is passed over; the smallest thing: 0.024
_FOREIGN = 60  # distance (in 8-bit RGB) from every mixture of the background and a colour
# Lengths, as shares of the picture's side.
_SOFT = 3 / SIDE  # reach of a soft edge
_BLURS = (0.0, 0.6 / SIDE, 1.2 / SIDE)  # standard deviations with which a shape is compared
_MISFIT = 0.3  # share of a thing's area by which it may differ from its ideal shape


class Found(NamedTuple):
    """A thing in a picture."""

    thing: Thing
    x: float  # of the centre of gravity, as a share of the picture's side
    y: float
    mask: Mask  # (H, W)


class Agreement(NamedTuple):
    """Whether a picture shows what was asked for; `all(agreement)` for the whole of it."""

    colour: bool
    shape: bool
    size: bool
    position: bool  # the relation of two things; of one, that it is alone


def read(picture: Picture) -> Scene | None:
    """The scene (canonical, sizes told) that a picture (H, W, 3) shows; None: it shows none.

    Raises:
        InputError: not a square uint8 RGB picture.
    """
    found = find(picture)
    if not found:
        return None
    things, relation = tuple(one.thing for one in found), None
    if len(found) == 2:
        x, y = found[1].x - found[0].x, found[1].y - found[0].y
        sideways, upright = "left of" if x > 0 else "right of", "above" if y > 0 else "below"
        relation = sideways if abs(x) > abs(y) else upright
    return Scene(things=things, relation=relation).canonical()


def agrees(picture: Picture, scene: Scene) -> Agreement:
    """What of a scene `read` finds in a picture; a size that the scene leaves open is right.

    Colours, shapes and sizes are those of both things. Where the picture has the two in another
    place than asked for, they are compared as they fit best.
    """
    seen = read(picture)
    if seen is None or len(seen.things) != len(scene.things):
        return Agreement(False, False, False, False)
    return max((_compare(told, scene) for told in (seen, seen.turned())), key=sum)


def _compare(seen: Scene, asked: Scene) -> Agreement:
    pairs = list(zip(seen.things, asked.things, strict=True))
    return Agreement(
        colour=all(a.colour == b.colour for a, b in pairs),
        shape=all(a.shape == b.shape for a, b in pairs),
        size=all(b.size in (None, a.size) for a, b in pairs),
        position=seen.relation == asked.relation,
    )


def find(picture: Picture) -> list[Found]:
    """The one or two things in a picture (H, W, 3); empty where it shows anything else.

    A pixel is a mixture of the background (the picture's median) and the colour whose mixtures come
    nearest. Connected pixels of one colour are a thing; its shape is the one that, drawn with the
    thing's area at its centre of gravity, covers the pixels most like it.

    Raises:
        InputError: not a square uint8 RGB picture.
    """
    side = len(picture)
    if picture.dtype != np.uint8 or picture.shape != (side, side, 3) or not side:
        raise InputError(f"shapes: {picture.dtype} {picture.shape}; give a square uint8 (H, W, 3)")
    pixels, least = picture.astype(np.float32), _SPECK * picture[..., 0].size
    background = np.median(pixels, axis=(0, 1))
    if background.min() < _DARKEST_BACKGROUND:
        return []
    offsets = np.array(list(COLOURS.values()), np.float32) - background  # (colours, 3)
    apart = pixels - background
    shares = np.clip(apart @ (offsets / (offsets**2).sum(1, keepdims=True)).T, 0, 1)
    shares = rearrange(shares, "h w c -> c h w")
    mixtures = shares[..., None] * offsets[:, None, None]
    distance = np.linalg.norm(apart - mixtures, axis=-1)  # (colours, H, W)
    nearest = distance.argmin(0)
    if (distance.min(0) > _FOREIGN).sum() > least:
        return []

    labels, colours = np.zeros(picture.shape[:2], int), []
    for index in range(len(COLOURS)):
        blots, _ = ndimage.label((nearest == index) & (shares[index] > 0.5))
        for blot in np.flatnonzero(np.bincount(blots.ravel())[1:] >= least) + 1:
            colours.append(index)
            labels[blots == blot] = len(colours)
    if not 1 <= len(colours) <= 2:
        return []
    # The pixels at the edge of a thing are those nearest to it, as far as an edge may be soft.
    far, (rows, columns) = ndimage.distance_transform_edt(labels == 0, return_indices=True)
    owner = np.where(far <= _SOFT * len(picture), labels[rows, columns], 0)
    found = [
        _recognise(pixels, labels == i, np.where(owner == i, shares[index], 0), index)
        for i, index in enumerate(colours, start=1)
    ]
    return [one for one in found if one] if all(found) else []


def _recognise(pixels: NDArray[np.float32], mask: Mask, cover: Map, index: int) -> Found | None:
    """The thing of a blot (H, W), whose pixels a colour covers to these shares."""
    core = ndimage.binary_erosion(mask)
    name, colour = list(COLOURS.items())[index]
    if np.linalg.norm(pixels[core if core.any() else mask].mean(0) - colour) > _FOREIGN:
        return None  # a pale one
    size, area = len(mask), cover.sum()
    y, x = ((np.array(ndimage.center_of_mass(cover)) + 0.5) / size).tolist()
    radii = {shape: float(np.sqrt(area / AREA[shape])) / size for shape in SHAPES}
    ideal = {shape: coverage(shape, x, y, radii[shape], size) for shape in SHAPES}
    misfit, shape = min(
        (float(abs(cover - ndimage.gaussian_filter(ideal[shape], blur * size)).sum() / area), shape)
        for shape in SHAPES
        for blur in _BLURS
    )
    between = np.sqrt(SIZES["small"][1] * SIZES["large"][0])
    thing = Thing(colour=name, shape=shape, size="small" if radii[shape] < between else "large")
    return Found(thing, x, y, mask) if misfit <= _MISFIT else None
