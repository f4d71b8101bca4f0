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
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, updates: int) -> None:
        """Takes up the model's weights after `updates` earlier updates."""
        decay = min(self.decay, (1 + updates) / (10 + updates))
        ours, theirs = _tensors(self.model), _tensors(model)
        averaged = [k for k, v in ours.items() if v.is_floating_point()]
        torch._foreach_lerp_([ours[k] for k in averaged], [theirs[k] for k in averaged], 1 - decay)
        for k in ours.keys() - set(averaged):
            ours[k].copy_(theirs[k])


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: local(tensor) for name, tensor in found.items()}
