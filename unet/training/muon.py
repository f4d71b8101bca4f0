"""Muon: orthogonal steps for the weights that are matrices, AdamW's for the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# a, b, c of the quintic x <- a x + b x^3 + c x^5 that takes all of (0, 1] near to 1 in five turns.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
OTHERS = 0.05  # learning rate of what is no matrix, as a share of that of the matrices


class Muon(torch.optim.AdamW):
    """Steps of one length in all directions that a weight can take.

    The momentum of a weight of two or more dimensions is laid out as a matrix, outputs x (inputs x
    kernel), and the step is the nearest semi-orthogonal matrix to it: its singular values become
    1, so that rare directions are learned as soon as common ones. Scales, shifts and embeddings
    take AdamW's steps at a twentieth of the learning rate. After K. Jordan et al., "Muon", 2024,
    https://kellerjordan.github.io/posts/muon/; `torch.optim.Muon`, which is for matrices alone,
    takes the same steps but for the bfloat16 in which it makes them orthogonal.

    Args:
        lr: of the matrices; a step has it as its spectral norm, times the root of outputs / inputs
            where that is above 1.
        momentum: of the gradients (Nesterov's), and beta1 of AdamW.
        beta2, weight_decay: as AdamW's; the decay is decoupled.
    """

    def __init__(
        self, model: nn.Module, *, lr: float, momentum: float, beta2: float, weight_decay: float
    ) -> None:
        tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        parts: tuple[list[Tensor], list[Tensor]] = ([], [])
        for p in model.parameters():
            parts[p.ndim >= 2 and id(p) not in tables].append(p)
        groups: list[dict[str, Any]] = [
            {"params": parts[1], "orthogonal": True, "lr_scale": 1.0},
            {"params": parts[0], "orthogonal": False, "lr_scale": OTHERS, "lr": OTHERS * lr},
        ]
        super().__init__(
            [g for g in groups if g["params"]],
            lr=lr,
            betas=(momentum, beta2),
            weight_decay=weight_decay,
            fused=True,
        )
        self._step_supports_amp_scaling = False  # a scaler leaves out whole steps, not AdamW's

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        groups = self.param_groups
        try:
            self.param_groups = [g for g in groups if not g["orthogonal"]]
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group["orthogonal"]:
                for weight in group["params"]:
                    if weight.grad is not None:
                        self._turn(weight, weight.grad, group)
        return loss

    def _turn(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, momentum = self.state[weight], group["betas"][0]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
            state["step"] = torch.zeros(())  # AdamW looks for it in a state that is loaded
        state["step"] += 1
        state["momentum"].lerp_(gradient, 1 - momentum)
        ahead = gradient.lerp(state["momentum"], momentum)
        step = orthogonal(ahead.flatten(1))
        longer = max(1.0, step.shape[0] / step.shape[1]) ** 0.5
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(step.view_as(weight), alpha=-group["lr"] * longer)


def orthogonal(matrix: Tensor, turns: int = 5) -> Tensor:
    """U V^T for U S V^T, about: singular values between 0.7 and 1.2, in the matrix's precision."""
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(turns):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
