"""A model of the captioned `shapes`, judged by their reader: does it make what the words say?"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from diffusion.attention_maps import mass_inside
from diffusion.sampling import Images, ImageSampler
from diffusion.shapes import Scene, agrees, caption, find, random_scene


class WordAttention(NamedTuple):
    """Where the colours and shapes of captions are looked at, as a mean over words."""

    inside: float  # share of a word's attention that lies inside its thing
    other: float  # inside the other thing, where there is one
    chance: float  # share of the picture that its thing covers
    words: int


def scenes(count: int, seed: int, *, unseen: bool) -> list[Scene]:
    """Scenes to ask for.

    Args:
        unseen: only scenes with a pair of colour and shape that training never shows; False: only
            others.
    """
    rng = np.random.default_rng((seed, int(unseen)))
    return [random_scene(rng, unseen) for _ in range(count)]


def agreement(images: Images, asked: list[Scene]) -> dict[str, float]:
    """Shares of the images (N, H, W, 3) that show what their scenes ask for.

    Returns:
        "colour", "shape", "position", all three of them ("as captioned"), and "size".
    """
    found = np.array([agrees(image, scene) for image, scene in zip(images, asked, strict=True)])
    shares = dict(zip(("colour", "shape", "size", "position"), found.mean(axis=0), strict=True))
    whole = found[:, [0, 1, 3]].all(axis=1).mean()
    return {"as captioned": float(whole), **{k: float(v) for k, v in shares.items()}}


def word_attention(
    sampler: ImageSampler, asked: list[Scene], steps: tuple[int, int] | None = None
) -> WordAttention:
    """The mean attention of the words for colours and shapes inside the things they stand for.

    Only images that show their scene count, as elsewhere no thing belongs to the word, and only
    words that their caption has once.

    Args:
        steps: see `ImageSampler.attending`.
    """
    rows = []
    images, maps = sampler.attending([caption(scene) for scene in asked], steps)
    for image, heats, scene in zip(images, maps, asked, strict=True):
        masks = _masks(image, scene)
        if not masks:
            continue
        words = sampler.text.words(caption(scene))
        for thing, mask in masks.items():
            other = next((m for k, m in masks.items() if k != thing), np.zeros_like(mask))
            for word in thing:
                if words.count(word) != 1:
                    continue
                heat = heats[words.index(word)]
                inside, beside = (mass_inside(heat, torch.from_numpy(m)) for m in (mask, other))
                rows.append((inside, beside, mask.mean()))
    if not rows:
        return WordAttention(math.nan, math.nan, math.nan, 0)
    inside, other, chance = np.mean(rows, axis=0).tolist()
    return WordAttention(inside, other, chance, len(rows))


def _masks(image: np.ndarray, scene: Scene) -> dict[tuple[str, str], np.ndarray]:
    """The pixels of each thing of a scene, by colour and shape; none where it is not shown."""
    if not all(agrees(image, scene)):
        return {}
    found = {(one.thing.colour, one.thing.shape): one.mask for one in find(image)}
    return {(t.colour, t.shape): found[t.colour, t.shape] for t in scene.things}
