"""Moving averages of a model's weights and buffers, and averages whose width is chosen after
training."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from unet.errors import InputError
from unet.training.shard import local

KEPT = (0.05, 0.10)  # relative widths of the averages that a run keeps, as in the paper
WIDEST = 0.28  # of a power function; at 0.289 the average is over the whole run, evenly


class EMA:
    """A copy of a model with averaged weights: theta' <- d theta' + (1 - d) theta.

    The decay warms up, d = min(decay, (1 + n) / (10 + n)) after n updates, so that a short run
    averages over about its last tenth and the initial weights are soon forgotten. Buffers (running
    statistics of batch norm) are averaged as well, counters are copied.

    Args:
        model: the model to follow.
        decay: the decay after the warm-up; 0 makes the average follow at once.
        shares: weights that are not trained are shared with the model instead of copied.
    """

    def __init__(self, model: nn.Module, decay: float, *, shares: bool = True) -> None:
        frozen = [p for p in model.parameters() if not p.requires_grad] if shares else []
        self.model = copy.deepcopy(model, {id(p): p for p in frozen}).eval().requires_grad_(False)
        self.decay = decay
        self.followed: nn.Module | None = None
        self.averaged: list[tuple[Tensor, Tensor]] = []  # ours and its own, found once:
        self.copied: list[tuple[Tensor, Tensor]] = []  # a large network has hundreds

    def decay_after(self, updates: int) -> float:
        """The decay of the next update."""
        return min(self.decay, (1 + updates) / (10 + updates))

    @torch.no_grad()
    def update(self, model: nn.Module, updates: int) -> None:
        """Takes up the model's weights after `updates` earlier updates."""
        decay = self.decay_after(updates)
        if self.followed is not model:
            self.followed = model
            pairs = list(zip(_tensors(self.model), _tensors(model), strict=True))
            pairs = [pair for pair in pairs if pair[0] is not pair[1]]
            self.averaged = [pair for pair in pairs if pair[0].is_floating_point()]
            self.copied = [pair for pair in pairs if not pair[0].is_floating_point()]
        ours, theirs = zip(*((local(a), local(b)) for a, b in self.averaged), strict=True)
        torch._foreach_lerp_(ours, theirs, 1 - decay)
        if self.copied:
            counters, counted = zip(*self.copied, strict=True)
            torch._foreach_copy_(counters, counted)


class PowerEMA(EMA):
    """An average whose profile is a power of the time, however long the run becomes.

    After step T the weights of step t count as t^gamma (Karras et al., EDM2, arXiv 2312.02696, eq.
    2), so an early step is forgotten at the same rate as the run is getting longer. From two of
    these, kept at some moments of a run, an average of any other width can be computed later.

    Args:
        model: the model to follow.
        std: standard deviation of the profile, as a share of the time so far; see `exponent`.
        shares: as of `EMA`.
    """

    def __init__(self, model: nn.Module, std: float, *, shares: bool = True) -> None:
        super().__init__(model, decay=0.0, shares=shares)
        self.std, self.exponent = std, exponent(std)

    def decay_after(self, updates: int) -> float:
        return (1 - 1 / (updates + 1)) ** (self.exponent + 1)


class Profile(NamedTuple):
    """How much the weights of each step count in an average, at a moment of the run."""

    std: float  # relative to the steps so far
    step: int  # at which it was taken


def exponent(std: float) -> float:
    """The gamma of the profile t^gamma with this relative standard deviation (EDM2, eq. 4).

    Raises:
        InputError: a width that is not above 0 and at most `WIDEST`.
    """
    if not 0 < std <= WIDEST:
        raise InputError(f"the width {std} of an average must be above 0 and at most {WIDEST}")
    inverse = std**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def put_together(kept: Sequence[Profile], wanted: Profile) -> tuple[NDArray[np.float64], float]:
    """The factors by which kept averages are combined into one that was not kept.

    They are those of the least squares between the profiles (EDM2, eq. 5 and appendix C.4).

    Returns:
        A factor for each of `kept`, and the remaining error: the norm of the difference between the
        profiles over the norm of the wanted one.
    """
    among = np.array([[_product(a, b) for b in kept] for a in kept])
    with_wanted = np.array([_product(a, wanted) for a in kept])
    factors = np.linalg.lstsq(among, with_wanted, rcond=None)[0]
    square = _product(wanted, wanted)
    left = square - 2 * factors @ with_wanted + factors @ among @ factors
    return factors, math.sqrt(max(left, 0.0) / square)


def _product(a: Profile, b: Profile) -> float:
    """The integral of the product of two profiles, (gamma + 1) t^gamma / T^(gamma + 1) up to T."""
    first, last = sorted((a, b), key=lambda profile: profile.step)
    ga, gb = exponent(first.std), exponent(last.std)
    together = (ga + 1) * (gb + 1) / (ga + gb + 1)
    return together * (first.step / last.step) ** gb / last.step


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
