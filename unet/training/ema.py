"""Exponential moving average of a model's weights and buffers."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from unet.training.shard import local


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

    @torch.no_grad()
    def update(self, model: nn.Module, updates: int) -> None:
        """Takes up the model's weights after `updates` earlier updates."""
        decay = min(self.decay, (1 + updates) / (10 + updates))
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


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
