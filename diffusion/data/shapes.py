"""Shapes: generated pictures of coloured shapes with exact captions, and a reader that checks them.

    a small red circle above a large blue square

A `Scene` says what a picture shows. `draw` makes a picture of it, `caption` and `parse` turn it
into words and back, and `read` finds it again in a picture, by rules alone: nothing is learned.

Positions and radii are shares of the picture's side, x to the right, y down.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from unet.errors import InputError

Picture: TypeAlias = NDArray[np.uint8]  # (H, W, 3)
Map: TypeAlias = NDArray[np.floating[Any]]  # (H, W)
Mask: TypeAlias = NDArray[np.bool_]  # (H, W)

SIZES = {"small": (0.105, 0.125), "large": (0.17, 0.195)}  # range of the radius
COLOURS = {
    "red": (220, 30, 30),
    "yellow": (245, 200, 0),
    "green": (30, 160, 50),
    "cyan": (0, 185, 205),
    "blue": (30, 70, 220),
    "purple": (150, 40, 190),
    "black": (30, 30, 30),
}
SHAPES = ("circle", "square", "triangle")
OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
HELD_OUT = frozenset({("green", "circle"), ("purple", "square"), ("red", "triangle")})

SIDE = 32  # pixels, unless another size is asked for

# In units of the radius, about the centre of gravity.
_BOX = {  # left, top, right, bottom
    "circle": (1.0, 1.0, 1.0, 1.0),
    "square": (0.9, 0.9, 0.9, 0.9),
    "triangle": (1.1, 4 / 3, 1.1, 2 / 3),
}
AREA = {"circle": np.pi, "square": 1.8**2, "triangle": 2.2}
_MARGIN, _GAP = 0.02, 0.08  # around the things, and at least between them
_TILT = 0.5  # of the line between two things: how far it leaves the axis of their relation
_FINER = 5  # samples along each side of a pixel; odd, as half a pixel would be a tie


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One coloured shape; its size may be left open."""

    colour: str
    shape: str
    size: str | None = None

    def __post_init__(self) -> None:
        known = (*COLOURS, *SHAPES, *SIZES)
        if self.colour not in COLOURS or self.shape not in SHAPES:
            raise InputError(
                f"shapes: {self.colour} {self.shape}; the words are {', '.join(known)}"
            )
        if self.size not in (None, *SIZES):
            raise InputError(f"shapes: size {self.size!r}; give {', '.join(SIZES)} or none")


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One thing, or two and where the first lies from the second."""

    things: tuple[Thing, ...]
    relation: str | None = None

    def __post_init__(self) -> None:
        if len(self.things) not in (1, 2) or (len(self.things) == 2) != bool(self.relation):
            raise InputError("shapes: give one thing without a relation, or two with one")
        if self.relation and self.relation not in OPPOSITE:
            raise InputError(f"shapes: {self.relation!r} is none of {', '.join(OPPOSITE)}")

    def turned(self) -> Scene:
        """The same, told from the second thing: "a below b" for "b above a"."""
        return Scene(things=self.things[::-1], relation=OPPOSITE.get(self.relation or ""))

    def canonical(self) -> Scene:
        """Of the two ways to tell it the one with "above" or "left of"."""
        return self.turned() if self.relation in ("below", "right of") else self


class Drawing(NamedTuple):
    """A picture and which pixels belong to each of its things."""

    picture: Picture
    masks: NDArray[np.bool_]  # (things, H, W): more than half of the pixel


# -- scenes and words


def random_scene(rng: np.random.Generator, unseen: bool | None = None) -> Scene:
    """One thing (in a quarter of the scenes) or two that differ; a quarter tell no sizes.

    Args:
        unseen: True: only scenes that are `held_out`; False: only others; None: any.
    """
    while True:
        count, sized = 1 + (rng.random() < 0.75), rng.random() < 0.75
        things = tuple(
            Thing(
                colour=_pick(rng, COLOURS),
                shape=_pick(rng, SHAPES),
                size=_pick(rng, SIZES) if sized else None,
            )
            for _ in range(count)
        )
        relation = _pick(rng, OPPOSITE) if count == 2 else None
        scene = Scene(things=things, relation=relation)
        if len(set(things)) == count and unseen in (None, held_out(scene)):
            return scene


def _pick(rng: np.random.Generator, words: Collection[str]) -> str:
    return tuple(words)[rng.integers(len(words))]


def held_out(scene: Scene) -> bool:
    """Whether one of its things has a pair of colour and shape that training never shows."""
    return not HELD_OUT.isdisjoint((thing.colour, thing.shape) for thing in scene.things)


def caption(scene: Scene) -> str:
    """The sentence of a scene, such as "a red circle", which `parse` reads back."""
    parts = [("a", thing.size, thing.colour, thing.shape) for thing in scene.things]
    return f" {scene.relation} ".join(" ".join(filter(None, words)) for words in parts)


def parse(text: str) -> Scene:
    """The scene of a sentence as `caption` writes it; case and spaces do not matter.

    Raises:
        InputError: any other sentence.
    """
    thing = rf"a (?:({'|'.join(SIZES)}) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
    match = re.fullmatch(
        rf"{thing}(?: ({'|'.join(OPPOSITE)}) {thing})?", " ".join(text.lower().split())
    )
    if match is None:
        raise InputError(
            f"shapes: cannot read {text!r}; write it as 'a small red circle above a large blue "
            f"square', of the words {', '.join((*SIZES, *COLOURS, *SHAPES, *OPPOSITE))}"
        )
    size, colour, shape, relation, *other = match.groups()
    things = [Thing(size=size, colour=colour, shape=shape)]
    if relation:
        things.append(Thing(size=other[0], colour=other[1], shape=other[2]))
    return Scene(things=tuple(things), relation=relation)


# -- drawing


def example(seed: int, index: int, size: int = SIDE) -> tuple[Scene, Drawing]:
    """Training picture `index` of a seed, which depends on these alone; never held out.

    Args:
        seed, index: integers >= 0.
        size: height and width in pixels; the scene and its layout do not depend on it.
    """
    rng = np.random.default_rng((seed, index))
    scene = random_scene(rng, unseen=False)
    return scene, draw(scene, size, rng)


def example_caption(seed: int, index: int) -> str:
    """The caption of `example`, without drawing it."""
    return caption(random_scene(np.random.default_rng((seed, index)), unseen=False))


def draw(scene: Scene, size: int, rng: np.random.Generator) -> Drawing:
    """A picture of a scene on a light background, antialiased; what it leaves open is random.

    Raises:
        InputError: a size below 1.
    """
    if size < 1:
        raise InputError(f"shapes: size is {size}, but a picture needs at least 1 pixel")
    places = _layout(scene, rng)
    tint, slope = rng.uniform(230, 248) + rng.uniform(-5, 5, 3), rng.uniform(-4, 4, 2)
    ramp = np.linspace(-1, 1, size)
    picture = tint + (slope[0] * ramp[:, None] + slope[1] * ramp)[..., None]  # (H, W, 3)
    masks = []
    for thing, (x, y, radius) in zip(scene.things, places, strict=True):
        cover = coverage(thing.shape, x, y, radius, size)
        picture += cover[..., None] * (np.array(COLOURS[thing.colour]) - picture)
        masks.append(cover > 0.5)
    return Drawing(np.rint(picture).clip(0, 255).astype(np.uint8), np.stack(masks))


def coverage(shape: str, x: float, y: float, radius: float, size: int) -> Map:
    """The share of each pixel (H, W) that a shape covers, from 5 x 5 samples a pixel."""
    samples = (np.arange(size * _FINER) + 0.5) / (size * _FINER)
    u, v = (samples - x) / radius, ((samples - y) / radius)[:, None]
    if shape == "circle":
        inside = u**2 + v**2 <= 1
    elif shape == "square":
        inside = (abs(u) <= 0.9) & (abs(v) <= 0.9)
    else:  # apex at v = -4/3, base from (-1.1, 2/3) to (1.1, 2/3)
        inside = (abs(u) <= 0.55 * (v + 4 / 3)) & (v <= 2 / 3)
    # Rows first: a sum over the few samples of a pixel alone is slow.
    rows = inside.reshape(size, _FINER, -1).sum(1, dtype=np.uint8)
    return rows.reshape(size, size, _FINER).sum(2, dtype=np.uint8) / np.float32(_FINER**2)


def _layout(scene: Scene, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Centre and radius (x, y, radius) of each thing: inside the picture, apart, as related."""
    radii = [rng.uniform(*SIZES[thing.size or _pick(rng, SIZES)]) for thing in scene.things]
    boxes = [
        radius * np.array(_BOX[thing.shape]).reshape(2, 2)  # (before or after, x or y)
        for thing, radius in zip(scene.things, radii, strict=True)
    ]
    if scene.relation is None:
        x, y = rng.uniform(_MARGIN + boxes[0][0], 1 - _MARGIN - boxes[0][1])
        return [(x, y, radii[0])]

    along, across = (0, 1) if scene.relation in ("left of", "right of") else (1, 0)
    first, second = (0, 1) if scene.relation in ("left of", "above") else (1, 0)
    centres = np.empty((2, 2))  # (thing, x or y)
    used = sum(box[:, along].sum() for box in boxes) + 2 * _MARGIN + _GAP
    before, between = np.diff(np.sort(rng.uniform(0, 1 - used, 2)), prepend=0)
    centres[first, along] = _MARGIN + before + boxes[first][0, along]
    end = centres[first, along] + boxes[first][1, along]
    centres[second, along] = end + _GAP + between + boxes[second][0, along]

    low = np.array([_MARGIN + box[0, across] for box in boxes])
    high = np.array([1 - _MARGIN - box[1, across] for box in boxes])
    tilt = rng.uniform(-_TILT, _TILT) * abs(centres[0, along] - centres[1, along])
    middle = rng.uniform(low.max(), high.min())
    # Clipping brings the two nearer to each other, as the middle is within reach of both.
    centres[:, across] = np.clip(middle + np.array([-0.5, 0.5]) * tilt, low, high)
    return [(x, y, radius) for (x, y), radius in zip(centres, radii, strict=True)]


# -- reading
