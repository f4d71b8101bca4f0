"""Muon: orthogonal steps for the weights that are matrices, AdamW's for the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# a, b, c of the quintic x <- a x + b x^3 + c x^5 that takes all of (0, 1] close to 1 in five
# iterations.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
OTHERS = 0.05  # learning rate of what is no matrix, as a share of that of the matrices


class Muon(torch.optim.AdamW):
    """Steps of equal length in all directions of weight space.

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
                self._turn([w for w in group["params"] if w.grad is not None], group)
        return loss

    def _turn(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        """A step of the matrices, those of one shape together: a GPU waits for each launch."""
        rate, momentum = group["lr"], group["betas"][0]
        for weight in weights:
            state = self.state[weight]
            if not state:
                state["momentum"] = torch.zeros_like(weight)
                state["step"] = torch.zeros(())  # AdamW looks for it in a state that is loaded
            state["step"] += 1
        if not weights:
            return
        gradients = [w.grad for w in weights if w.grad is not None]
        averages = [self.state[w]["momentum"] for w in weights]
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        ahead = torch._foreach_lerp(gradients, averages, momentum)
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - rate * group["weight_decay"])
        alike: dict[tuple[int, ...], list[int]] = {}
        for i, weight in enumerate(weights):
            alike.setdefault((len(weight), weight[0].numel()), []).append(i)
        for (rows, columns), places in alike.items():
            steps = orthogonal(torch.stack([ahead[i].flatten(1) for i in places]))
            longer = max(1.0, rows / columns) ** 0.5
            torch._foreach_add_(
                [weights[i] for i in places],
                [s.view_as(weights[i]) for s, i in zip(steps, places, strict=True)],
                alpha=-rate * longer,
            )


def orthogonal(matrices: Tensor, turns: int = 5) -> Tensor:
    """U V^T for U S V^T, about, of each matrix (N, rows, columns): singular values 0.7 to 1.2.

    On a GPU it multiplies in bfloat16, as Muon's author does: what the rounding leaves is less than
    what five iterations leave.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    if x.device.type == "cuda":
        x = x.bfloat16()
    for _ in range(turns):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)
