"""A model of the captioned `shapes`, judged by their reader: do its images show what the captions
say?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from diffusion.attention_maps import mass_inside
from diffusion.data.shapes import Scene, caption, random_scene
from diffusion.judging.shapes_reader import agrees, find
from diffusion.sampling import Images, ImageSampler

ATTENDED = 100  # images whose attention is judged


class WordAttention(NamedTuple):
    """Where the colours and shapes of captions are looked at, as a mean over words."""

    inside: float  # share of a word's attention that lies inside its thing
    other: float  # inside the other thing, where there is one
    chance: float  # share of the picture that its thing covers
    words: int


class Asked(NamedTuple):
    """Scenes to ask for, as in training, and with a pair that training never shows."""

    seen: list[Scene]
    unseen: list[Scene]

    @property
    def captions(self) -> list[str]:
        return [caption(scene) for scene in (*self.seen, *self.unseen)]


def scenes_to_ask(count: int, seed: int) -> Asked:
    """`count` random scenes; half of them are `shapes.held_out`."""
    rng = np.random.default_rng((seed, count))
    half = count // 2
    return Asked(
        *(
            [random_scene(rng, u) for _ in range(n)]
            for u, n in ((False, count - half), (True, half))
        )
    )


def judge_captions(sampler: ImageSampler, images: Images, asked: Asked) -> dict[str, float]:
    """How many of the images, made of `asked.captions`, show what they were asked for; and where
    the words are looked at in some."""
    found: dict[str, float] = {}
    parts = {"seen": (asked.seen, images[: len(asked.seen)])}
    parts["unseen"] = (asked.unseen, images[len(asked.seen) :])
    for name, (scenes, made) in parts.items():
        found |= {f"{name} pairs, {k}": v for k, v in agreement(made, scenes).items()}
    attention = word_attention(sampler, asked.seen[:ATTENDED])
    return found | {f"attention of words, {k}": v for k, v in attention._asdict().items()}


def agreement(images: Images, asked: Sequence[Scene]) -> dict[str, float]:
    """Shares of the images (N, H, W, 3) that show what their scenes ask for.

    Returns:
        "colour", "shape", "position", all three of them ("as captioned"), and "size".
    """
    found = np.array([agrees(image, scene) for image, scene in zip(images, asked, strict=True)])
    shares = dict(zip(("colour", "shape", "size", "position"), found.mean(axis=0), strict=True))
    whole = found[:, [0, 1, 3]].all(axis=1).mean()
    return {"as captioned": float(whole), **{k: float(v) for k, v in shares.items()}}


def word_attention(
    sampler: ImageSampler, asked: Sequence[Scene], steps: tuple[int, int] | None = None
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
