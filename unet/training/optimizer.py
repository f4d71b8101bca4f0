"""The optimizers that a plan may name."""

from __future__ import annotations

import torch
from torch import nn

from unet.training.muon import Muon
from unet.training.plan import FitPlan


def make_optimizer(model: nn.Module, plan: FitPlan) -> torch.optim.Optimizer:
    """The optimizer that a plan names."""
    parameters, lr, decay = model.parameters(), plan.lr, plan.weight_decay
    momentum = plan.momentum
    if plan.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=decay)
    if plan.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=lr, momentum=momentum, weight_decay=decay)
    if plan.optimizer == "muon":
        beta2 = plan.beta2
        return Muon(model, lr=lr, momentum=momentum, beta2=beta2, weight_decay=decay)
    betas = (momentum, plan.beta2)
    return torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=decay, fused=True)
