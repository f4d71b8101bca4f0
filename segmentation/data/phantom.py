"""Phantom: synthetic electron micrographs of packed cells, with exact labels and no files.

The geometry comes first (a warped power diagram, cut along its borders), the picture is drawn
from it. Clutter inside the cells is as dark as the membranes, and membranes vary in contrast and
width, so grey values alone do not tell the two apart; shape and context do.

Lengths are in pixels of about 4 nm, as in the ISBI 2012 stack (Arganda-Carreras et al. 2015).
In the picture, "ink" is darkness: 0 is empty cytoplasm, 1 is nearly black.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from unet.errors import InputError

Field: TypeAlias = NDArray[np.float32]  # (H, W)
Image: TypeAlias = NDArray[np.uint8]  # (H, W) or (N, H, W)

MARGIN = 12  # drawn around the slice and cut off, so that cells go on beyond its edge
ROUNDING = 1.3  # of the cells' corners
SMALLEST_CELL = 16  # a smaller piece of a cell is given to the membrane


def phantom_slice(seed: int, size: tuple[int, int] = (256, 256)) -> tuple[Image, Image]:
    """One synthetic micrograph and its label; the same as slice 0 of `phantom_stack`.

    Args:
        seed: any integer >= 0; the slice depends on it and on the size alone.
        size: height and width, each at least 1.

    Returns:
        image: uint8 (H, W).
        label: uint8 (H, W), 255 = cell, 0 = membrane. Every cell is one 4-connected component.

    Raises:
        InputError: a negative seed, or a size below 1.
    """
    images, labels = phantom_stack(1, size, seed)
    return images[0], labels[0]


def phantom_stack(
    count: int, size: tuple[int, int] = (256, 256), seed: int = 0
) -> tuple[Image, Image]:
    """`count` unrelated slices; slice i depends on (seed, i) and on the size, not on `count`.

    The same arguments give the same bytes (on another machine up to rounding in the last bit).

    Args:
        count: number of slices, at least 1.
        size: height and width, each at least 1.
        seed: any integer >= 0.

    Returns:
        images: uint8 (N, H, W).
        labels: uint8 (N, H, W), 255 = cell, 0 = membrane.

    Raises:
        InputError: a count or size below 1, or a negative seed.
    """
    if count < 1:
        raise InputError(f"phantom: count is {count}, but a stack needs at least 1 slice.")
    if min(size) < 1:
        raise InputError(f"phantom: size is {size}, but height and width must be at least 1.")
    if seed < 0:
        raise InputError(f"phantom: seed is {seed}; give an integer of 0 or more.")
    images = np.empty((count, *size), np.uint8)
    labels = np.empty((count, *size), np.uint8)
    for i in range(count):
        rng = np.random.default_rng((seed, i))
        tissue = grow_tissue(rng, size)
        images[i] = draw_image(rng, tissue)
        labels[i] = np.where(tissue.cells > 0, 255, 0)
    return images, labels


@dataclass(frozen=True, kw_only=True)
class Tissue:
    """The geometry of one slice, all arrays (H, W)."""

    cells: NDArray[np.int32]  # 0 = membrane, 1, 2, ... = cells
    distance: Field  # to the nearest border between two cells, px
    half_width: Field  # of the membrane, px
    grain: Field  # direction along which the cells are drawn out, radians


def grow_tissue(rng: np.random.Generator, size: tuple[int, int]) -> Tissue:
    """Cells as a power diagram of rods, seen through a smooth warp, with membranes cut between.

    A cell is a row of 1 to 6 discs along the local grain; each pixel belongs to the disc of the
    least power distance |x - c|^2 - r^2 (Aurenhammer 1987).
    """
    height, width = size[0] + 2 * MARGIN, size[1] + 2 * MARGIN
    shape = (height, width)
    grain = 1.2 * smooth_noise(rng, shape, 90) + rng.uniform(0, np.pi)

    reach = 60  # discs outside still own pixels inside
    rods = rng.poisson((height + 2 * reach) * (width + 2 * reach) / 1400) + 1
    centre = rng.uniform(-reach, (height + reach, width + reach), (rods, 2))
    row, column = centre.astype(int).clip(0, (height - 1, width - 1)).T
    coarse = np.exp(0.4 * smooth_noise(rng, shape, 55)[row, column])  # bundles of small cells
    radius = np.minimum(13 * coarse * np.exp(0.5 * rng.standard_normal(rods)), 50)
    discs = np.minimum(rng.geometric(0.4, rods), 7)
    owner = np.repeat(np.arange(rods), discs)
    along = np.concatenate([np.arange(n) - (n - 1) / 2 for n in discs]) * radius[owner] * 0.8
    angle = grain[row, column][owner] + 0.015 * along * rng.standard_normal(rods)[owner]
    disc = centre[owner] + along[:, None] * np.stack([np.sin(angle), np.cos(angle)], axis=1)

    # The power distance is a plain distance to discs lifted by sqrt(max r^2 - r^2).
    lift = np.sqrt(radius.max() ** 2 - radius[owner] ** 2)
    warp = [
        axis + 9 * smooth_noise(rng, shape, 45) + 2.2 * smooth_noise(rng, shape, 14)
        for axis in np.indices(shape)
    ]
    points = np.stack([*warp, np.zeros(shape)], axis=-1)
    cells = owner[cKDTree(np.column_stack([disc, lift])).query(points)[1]]
    # Slivers and spikes go to the cells around them: only what has a core grows back.
    cores = number_cells(border_distance(cells) > 3)
    nearest = ndimage.distance_transform_edt(
        cores == 0, return_distances=False, return_indices=True
    )
    distance = border_distance(cores[tuple(nearest)])
    # Blurring rounds the corners; a blurred |x| is sigma * sqrt(2 / pi) at 0.
    rounded = ndimage.gaussian_filter(distance, ROUNDING) - 0.8 * ROUNDING
    distance = np.clip(rounded, 0, distance)
    oblique = np.maximum(smooth_noise(rng, shape, 22) - 1.1, 0)  # cut at a slant: wide
    half_width = np.exp(0.12 * smooth_noise(rng, shape, 9)) + 1.1 * oblique

    inner = (slice(MARGIN, -MARGIN),) * 2
    distance, half_width, grain = distance[inner], half_width[inner], grain[inner]
    # The widths are scaled to give the share of membrane that the annotators drew.
    share = rng.uniform(0.2, 0.25)
    half_width *= np.clip(np.quantile(distance / half_width, share), 0.9, 3.2)
    cells = number_cells(distance > half_width)
    distance[(cells == 0) & (distance > half_width)] = 0  # what was too small is drawn as membrane
    return Tissue(cells=cells, distance=distance, half_width=half_width, grain=grain)


def border_distance(cells: NDArray[np.integer]) -> Field:
    """Distance of every pixel to the nearest border between two cells, px."""
    border = np.zeros(cells.shape, bool)
    border[:-1] |= cells[:-1] != cells[1:]
    border[:, :-1] |= cells[:, :-1] != cells[:, 1:]
    if not border.any():
        return np.full(cells.shape, np.hypot(*cells.shape), np.float32)
    return ndimage.distance_transform_edt(~border).astype(np.float32)


def number_cells(inside: NDArray[np.bool_]) -> NDArray[np.int32]:
    """The 4-connected components of `inside`, numbered from 1, less those below SMALLEST_CELL."""
    components, _ = ndimage.label(inside)
    large = np.bincount(components.ravel()) >= SMALLEST_CELL
    large[0] = False
    return np.where(large, np.cumsum(large), 0)[components].astype(np.int32)


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A micrograph and what people may see in it in more than one way, all arrays (H, W)."""

    image: Image
    organelles: NDArray[np.bool_]  # where mitochondria lie
    stain: Field  # of membranes, where there are some: 0.2 is faint, 1 nearly black


def draw_image(rng: np.random.Generator, tissue: Tissue) -> Image:
    """The micrograph of a tissue, uint8 (H, W)."""
    return draw(rng, tissue).image


def draw(rng: np.random.Generator, tissue: Tissue) -> Drawn:
    """The micrograph of a tissue, with what is in it."""
    shape = tissue.cells.shape
    ink = draw_cytoplasm(rng, tissue)
    ink += draw_specks(rng, tissue)
    ink, organelles = draw_mitochondria(rng, tissue, ink)
    stain = membrane_stain(rng, tissue)
    ink = np.maximum(ink, draw_membrane(tissue, stain) + 0.2 * ink)
    ink += draw_densities(rng, tissue)

    white = rng.standard_normal((2, *shape), dtype=np.float32)
    blurred = ndimage.gaussian_filter(ink + 0.22 * white[0], 0.75)
    grey = 172 - 146 * (blurred + 0.04 * white[1])
    grey = grey * (1 + 0.07 * smooth_noise(rng, shape, 110)) + 7 * smooth_noise(rng, shape, 60)
    image = np.clip(np.rint(grey), 0, 255).astype(np.uint8)
    return Drawn(image=image, organelles=organelles, stain=stain)


def draw_cytoplasm(rng: np.random.Generator, tissue: Tissue) -> Field:
    """Every cell has its own tone and its own coarseness of texture."""
    shape = tissue.cells.shape
    number = int(tissue.cells.max()) + 1
    tone = (0.14 * rng.standard_normal(number)).astype(np.float32)
    rough = rng.uniform(0.5, 1.3, number).astype(np.float32)
    white = rng.standard_normal((2, *shape), dtype=np.float32)
    texture = 0.95 * ndimage.gaussian_filter(white[0], 1.4)
    texture += 0.9 * ndimage.gaussian_filter(white[1], 3)
    texture += 0.05 * smooth_noise(rng, shape, 10)
    return tone[tissue.cells] + rough[tissue.cells] * texture


def membrane_stain(rng: np.random.Generator, tissue: Tissue) -> Field:
    """How dark membranes are, from 0.2 to 1: fading here and there."""
    shape = tissue.cells.shape
    stain = 0.73 + 0.26 * smooth_noise(rng, shape, 16)
    stain *= 1 - 0.75 * np.clip(smooth_noise(rng, shape, 20) - 1.0, 0, 1)
    found: Field = np.clip(stain, 0.2, 1.0)
    return found


def draw_membrane(tissue: Tissue, stain: Field) -> Field:
    """Dark lines along the borders, pale and blurred where oblique."""
    slant = np.clip(tissue.half_width / 3.2 - 1, 0, 1)
    core = tissue.half_width * 0.7
    profile = np.exp(-((tissue.distance / core) ** 2))
    return stain * (1 - 0.4 * slant) * profile


def draw_specks(rng: np.random.Generator, tissue: Tissue) -> Field:
    """Vesicles (rings), ribosomes and granules (dots) and filaments (rows of dots) in the cells."""
    shape = tissue.cells.shape
    busy = rng.gamma(0.7, 0.6, int(tissue.cells.max()) + 1).clip(0.05, 1)

    at = rng.uniform(0, shape, (rng.poisson(tissue.cells.size / 70), 2))
    at = at[rng.uniform(size=len(at)) < busy[tissue.cells[tuple(at.astype(int).T)]]]
    ring = rng.uniform(size=len(at)) < 0.5
    radius = np.where(ring, rng.uniform(1.8, 3.6, len(at)), 0)
    thick = np.where(ring, rng.uniform(0.8, 1.2, len(at)), rng.uniform(0.9, 2.0, len(at)))
    depth = rng.uniform(0.2, 0.85, len(at))

    path, stain = walk_filaments(rng, tissue)
    at = np.concatenate([at, path])
    radius = np.concatenate([radius, np.zeros(len(path))])
    thick = np.concatenate([thick, np.full(len(path), 1.1)])
    depth = np.concatenate([depth, stain])
    inside = ((at >= 0) & (at < shape)).all(axis=1)
    at, radius, thick, depth = at[inside], radius[inside], thick[inside], depth[inside]
    row, column = at.astype(int).T
    free = (tissue.cells[row, column] > 0) & (tissue.distance[row, column] > radius + 4)
    return stamp_rings(shape, at[free], radius[free], thick[free], depth[free])


def walk_filaments(
    rng: np.random.Generator, tissue: Tissue
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Curves of 8 to 44 px, roughly along the grain: positions (P, 2), 1 px apart, and ink (P,)."""
    shape = tissue.cells.shape
    filaments, steps = rng.poisson(tissue.cells.size / 2000), 44
    start = rng.uniform(0, shape, (filaments, 2))
    row, column = start.astype(int).T
    turn = rng.normal(0, 0.1, (filaments, steps)).cumsum(axis=1)
    angle = tissue.grain[row, column][:, None] + rng.normal(0, 0.5, (filaments, 1)) + turn
    path = start[:, None] + np.stack([np.sin(angle), np.cos(angle)], axis=2).cumsum(axis=1)
    drawn = np.arange(steps) < rng.integers(8, steps + 1, (filaments, 1))
    ink = np.broadcast_to(rng.uniform(0.15, 0.55, (filaments, 1)), drawn.shape)
    return path[drawn], ink[drawn]


def stamp_rings(
    shape: tuple[int, ...],
    at: NDArray[np.float64],
    radius: NDArray[np.float64],
    thick: NDArray[np.float64],
    depth: NDArray[np.float64],
) -> Field:
    """Sum of depth * exp(-((|x - at| - radius) / thick)^2) over N rings, each in a 15 x 15 patch.

    `at` is (N, 2) inside the shape; the others are (N,). A radius of 0 gives a dot.
    """
    offset = np.arange(-7, 8)
    row = at[:, 0, None].astype(int) + offset  # (N, 15)
    column = at[:, 1, None].astype(int) + offset
    far = np.hypot((row - at[:, :1])[:, :, None], (column - at[:, 1:])[:, None, :])
    value = depth[:, None, None] * np.exp(
        -(((far - radius[:, None, None]) / thick[:, None, None]) ** 2)
    )
    padded = (shape[0] + 14, shape[1] + 14)
    index = (row + 7)[:, :, None] * padded[1] + (column + 7)[:, None, :]
    total = np.bincount(index.ravel(), value.ravel(), padded[0] * padded[1]).reshape(padded)
    return total[7:-7, 7:-7].astype(np.float32)


def draw_mitochondria(
    rng: np.random.Generator, tissue: Tissue, ink: Field
) -> tuple[Field, NDArray[np.bool_]]:
    """`ink` with mitochondria over it, ovals with a dark rim, a grey matrix and striations, and
    where they lie.

    They stand where a cell is wide enough, and flatten where they come near its membrane.
    """
    ink = ink.copy()
    shape = tissue.cells.shape
    wobble = smooth_noise(rng, shape, 9)
    patchy = np.clip(0.7 + 0.5 * smooth_noise(rng, shape, 6), 0, 1.3)
    taken, organelles = np.zeros((2, *shape), bool)
    for at in rng.integers(0, shape, (rng.poisson(tissue.cells.size / 1800), 2)):
        room = tissue.distance[tuple(at)] - 3.5
        short = room * rng.uniform(0.6, 1.0)
        long = short * rng.uniform(1.0, 2.4)
        period, depth = rng.uniform(4, 6.5), rng.uniform(0.25, 0.6)
        if not 6 < short < 26 or tissue.cells[tuple(at)] == 0:
            continue
        reach = int(long) + 4
        (top, left), (bottom, right) = np.clip((at - reach, at + reach + 1), 0, shape)
        box = (slice(top, bottom), slice(left, right))
        if taken[box].any():
            continue
        taken[box] = True
        y, x = np.ogrid[box]
        sin, cos = np.sin(tissue.grain[tuple(at)]), np.cos(tissue.grain[tuple(at)])
        u = (x - at[1]) * cos + (y - at[0]) * sin
        v = (y - at[0]) * cos - (x - at[1]) * sin
        outside = (np.hypot(u / long, v / short) - 1) * short + 0.8 * wobble[box]
        outside = np.maximum(outside, tissue.half_width[box] + 2.0 - tissue.distance[box])
        outside[tissue.cells[box] != tissue.cells[tuple(at)]] = reach
        body = 1 / (1 + np.exp(outside / 0.6))
        rim = np.exp(-(((outside + 0.5) / 1.3) ** 2))
        cristae = np.sin(2 * np.pi * (u + 2.2 * wobble[box]) / period + np.sin(v / 4))
        matrix = depth + 0.25 * cristae * np.clip(-outside / 3, 0, 1) * patchy[box] + 0.6 * ink[box]
        ink[box] += body * (matrix - ink[box]) + rim * (0.9 - 0.7 * depth)
        organelles[box] |= outside < 0
    return ink, organelles


def draw_densities(rng: np.random.Generator, tissue: Tissue) -> Field:
    """Synapse-like dark clouds that lean on a membrane and blur where it runs."""
    shape = tissue.cells.shape
    cloud = np.clip(smooth_noise(rng, shape, 14) - 1.35, 0, 1)
    near = np.exp(-((tissue.distance / 9) ** 2))
    grit = 1 + 0.25 * smooth_noise(rng, shape, 3)
    return 0.45 * cloud * near * grit


def smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], scale: float) -> Field:
    """A Gaussian random field (H, W) of unit variance that varies over about `scale` pixels."""
    weights = []
    for length in shape:
        knots = np.arange(-2, length / scale + 3) * scale
        weight = np.exp(-(((np.arange(length)[:, None] - knots) / scale) ** 2))
        weights.append(weight / np.linalg.norm(weight, axis=1, keepdims=True))
    coarse = rng.standard_normal((weights[0].shape[1], weights[1].shape[1]))
    # einsum adds in a fixed order; a threaded matrix product is also slower at this size.
    rows = np.einsum("ik,kl->il", weights[0], coarse)
    return np.einsum("il,jl->ij", rows, weights[1]).astype(np.float32)
