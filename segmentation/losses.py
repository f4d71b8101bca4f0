"""Losses of a segmentation.

Every loss is called as `loss(logits, target, weight=None)` and returns a scalar:

    logits (B, K, H, W)   K = 1: one logit (sigmoid) of class 1 against class 0; K >= 2: softmax
    target (B, H, W)      class indices; pixels with IGNORE count for nothing
    weight (B, H, W)      how much each pixel counts, or None: all the same

Weights are a measure on the pixels: a pixel of weight 2 is the same pixel twice, one of weight 0
is ignored, and only the proportions matter, for every loss. A class weight multiplies the weight
of each pixel whose true class it is. Sums run over the whole batch. A batch that is all ignored
has loss 0 and gradient 0. Whatever the dtype of the logits, the loss is computed in float32 (or
in float64, if they have it).

The region losses (Dice, Tversky, Lovász) judge the foreground, class 1, if K = 1, and are the mean
over the classes that occur in the target if K >= 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, Protocol, get_args

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from segmentation.data.classes import IGNORE
from segmentation.data.weights import check_class_weights
from unet.errors import InputError

LossName = Literal["ce", "bce", "dice", "dice-ce", "focal", "tversky", "lovasz"]
LOSSES: tuple[LossName, ...] = get_args(LossName)

DEPTH_WEIGHT = 5.0
_SMOOTH = 1e-5  # pixels; keeps the Dice of nothing predicted where nothing is at 1


class Loss(Protocol):
    """Logits (B, K, H, W), target (B, H, W) and pixel weights (B, H, W) to a scalar."""

    def __call__(self, logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor: ...


def _prepare(
    logits: Tensor, target: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The three arguments of a loss, without None, IGNORE and half precision."""
    shape = (logits.shape[0], *logits.shape[2:])
    if logits.ndim != 4 or target.shape != shape or (weight is not None and weight.shape != shape):
        weights = "" if weight is None else f" and weight {tuple(weight.shape)}"
        raise InputError(
            f"logits {tuple(logits.shape)}, target {tuple(target.shape)}{weights} do not fit "
            "together; they must be (B, K, H, W), (B, H, W) and (B, H, W)"
        )
    ignored = target == IGNORE
    dtype = torch.promote_types(logits.dtype, torch.float32)
    # Filled, not only weighted by 0: a NaN at an ignored pixel must not get through either.
    logits = logits.to(dtype).masked_fill(ignored[:, None], 0)
    weight = torch.ones_like(target, dtype=dtype) if weight is None else weight.to(dtype)
    return logits, target.long().masked_fill(ignored, 0), weight.masked_fill(ignored, 0)


def _mean(values: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean, and 0 without any weight."""
    return (values * weight).sum() / weight.sum().clamp_min(torch.finfo(weight.dtype).tiny)


def _pixel_ce(logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of each pixel (B, H, W); a single logit z is the softmax of (0, z)."""
    if logits.shape[1] == 1:
        logits = torch.cat([torch.zeros_like(logits), logits], 1)
    return F.cross_entropy(logits, target, reduction="none", label_smoothing=label_smoothing)


def _one_hot(target: Tensor, like: Tensor) -> Tensor:
    """Target (B, H, W) as 0 and 1 in the shape of the logits: of class 1 alone if K = 1."""
    b, k, h, w = like.shape
    return like.new_zeros(b, max(k, 2), h, w).scatter_(1, target[:, None], 1)[:, -k:]


def _probability(logits: Tensor) -> Tensor:
    return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)


def _class_mean(losses: Tensor, sizes: Tensor) -> Tensor:
    """Mean of the losses (K,) of the classes whose size (K,) in the target is not 0."""
    return losses[0] if len(losses) == 1 else _mean(losses, (sizes > 0).to(losses.dtype))


def cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None = None, *, label_smoothing: float = 0.0
) -> Tensor:
    """Weighted mean of the pixels' cross-entropy, which is the binary one if K = 1.

    The energy of Ronneberger et al. 2015, eq. 1, divided by the sum of the weights. The target of
    a pixel is 1 - label_smoothing at its class, plus label_smoothing shared by all classes.
    """
    logits, target, weight = _prepare(logits, target, weight)
    return _mean(_pixel_ce(logits, target, label_smoothing), weight)


def focal(
    logits: Tensor, target: Tensor, weight: Tensor | None = None, *, gamma: float = 2.0
) -> Tensor:
    """Weighted mean of -(1 - p)^gamma log p, p the probability of the true class.

    Lin et al. 2017 (arXiv 1708.02002), eq. 4; class weights are the alpha of eq. 5.
    """
    logits, target, weight = _prepare(logits, target, weight)
    ce = _pixel_ce(logits, target)
    wrong = -torch.expm1(-ce)  # 1 - p, without cancellation
    # The power of a plain 0 has no gradient if gamma < 1.
    return _mean(wrong.clamp_min(1e-12) ** gamma * ce, weight)


def tversky(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    alpha: float = 0.3,
    beta: float = 0.7,
) -> Tensor:
    """1 - TP / (TP + alpha FP + beta FN) of the soft counts: beta > alpha favours recall.

    Salehi et al. 2017 (arXiv 1706.05721); the default alpha and beta are the best found there.
    """
    logits, target, weight = _prepare(logits, target, weight)
    truth, p, w = _one_hot(target, logits), _probability(logits), weight[:, None]

    def total(values: Tensor) -> Tensor:
        return (w * values).sum((0, 2, 3))  # (K,)

    tp, fp, fn = total(p * truth), total(p * (1 - truth)), total((1 - p) * truth)
    index = (tp + _SMOOTH) / (tp + alpha * fp + beta * fn + _SMOOTH)
    return _class_mean(1 - index, total(truth))


def dice(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """1 - 2 sum(p g) / (sum(p) + sum(g)), p the probability and g the truth, 0 or 1.

    The soft Dice with plain sums in the denominator, not the squares of Milletari et al. 2016.
    """
    return tversky(logits, target, weight, alpha=0.5, beta=0.5)


def dice_ce(
    logits: Tensor, target: Tensor, weight: Tensor | None = None, *, label_smoothing: float = 0.0
) -> Tensor:
    """Dice plus cross-entropy, one to one; the smoothing is the cross-entropy's alone."""
    # Prepared here already, so that the two gradients are not added in half precision.
    pixels = _prepare(logits, target, weight)
    return dice(*pixels) + cross_entropy(*pixels, label_smoothing=label_smoothing)


def lovasz(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Lovász extension of 1 - IoU (Berman et al. 2018, arXiv 1705.08790).

    K = 1: of the hinge errors, never below 1 - IoU of the foreground; K >= 2: Lovász-softmax.
    """
    logits, target, weight = _prepare(logits, target, weight)
    truth = _one_hot(target, logits)
    if logits.shape[1] == 1:
        errors = F.relu(1 - logits * (2 * truth - 1))
    else:
        errors = (truth - _probability(logits)).abs()
    truth, errors = (rearrange(x, "b k h w -> k (b h w)") for x in (truth, errors))
    errors, order = errors.sort(dim=1, descending=True)
    truth, w = truth.gather(1, order), weight.flatten()[order]  # (K, B * H * W)
    sizes = (w * truth).sum(1)
    # 1 - IoU if the pixels up to here are wrong and the others right: wrong over union (Alg. 1)
    union = sizes[:, None] + (w * (1 - truth)).cumsum(1)
    loss = w.cumsum(1) / union.clamp_min(torch.finfo(w.dtype).tiny)
    gradient = loss.diff(dim=1, prepend=torch.zeros_like(loss[:, :1]))
    return _class_mean((errors * gradient).sum(1), sizes)


class DepthLoss:
    """A loss of objects, and DEPTH_WEIGHT times the mean squared error of the depth in them.

    Args:
        loss: of the logit of objects.
    """

    def __init__(self, loss: Loss) -> None:
        self.loss = loss

    def __call__(
        self, found: Tensor, target: Tensor, weight: Tensor | None, depth: Tensor
    ) -> Tensor:
        """Of outputs (B, 2, H, W), target and weight as of any loss, and depth (B, H, W)."""
        ignored = target == IGNORE
        dtype = torch.promote_types(found.dtype, torch.float32)
        error = (found[:, 1].to(dtype).masked_fill(ignored, 0) - depth.masked_fill(ignored, 0)) ** 2
        return self.loss(found[:, :1], target, weight) + DEPTH_WEIGHT * _mean(
            error, (~ignored).to(dtype)
        )


class RegionLoss:
    """The mean over regions of a loss of single logits (`segmentation.data.regions`).

    Args:
        loss: of one logit a pixel.
        members: (R, K) which classes are in which region.
    """

    def __init__(self, loss: Loss, members: NDArray[np.bool_]) -> None:
        self.loss, self.members = loss, torch.from_numpy(members)

    def __call__(self, logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        """Of logits (B, R, H, W), target and weight as of any loss."""
        ignored, members = target == IGNORE, self.members.to(target.device)
        known = target.long().masked_fill(ignored, 0)
        losses = [
            self.loss(
                one[:, None], inside[known].to(target.dtype).masked_fill(ignored, IGNORE), weight
            )
            for one, inside in zip(logits.unbind(1), members, strict=True)
        ]
        return torch.stack(losses).mean()


def deeply_supervised(
    loss: Callable[..., Tensor], logits: Sequence[Tensor], *targets: Tensor | None
) -> Tensor:
    """Mean loss over the levels of a decoder, each counted half of the next finer one.

    Deep supervision (Lee et al. 2015, arXiv 1409.5185) with the weights of nnU-Net (Isensee et al.
    2021, doi:10.1038/s41592-020-01008-z).

    Args:
        logits: (B, K, h, w) of each level, the finest last; coarser ones are judged by every so
            many pixels of the targets.
        targets: what the loss takes beside them, (B, ..., H, W) each.
    """
    total, shares = logits[-1].new_zeros(()), 0.0
    for i, level in enumerate(reversed(logits)):
        size = level.shape[-2:]
        total = total + 0.5**i * loss(
            level, *(t if t is None else _nearest(t, size) for t in targets)
        )
        shares += 0.5**i
    return total / shares


def _nearest(x: Tensor, size: Sequence[int]) -> Tensor:
    """x (B, ..., H, W) at the centres of a grid of h x w cells: (B, ..., h, w)."""
    rows, columns = (
        ((torch.arange(n, device=x.device) + 0.5) * (whole / n)).long()
        for n, whole in zip(size, x.shape[-2:], strict=True)
    )
    return x[..., rows[:, None], columns]


# The function of each name, and the options that it takes.
_FUNCTIONS: dict[LossName, tuple[Callable[..., Tensor], tuple[str, ...]]] = {
    "ce": (cross_entropy, ("label_smoothing",)),
    "bce": (cross_entropy, ("label_smoothing",)),
    "dice": (dice, ()),
    "dice-ce": (dice_ce, ("label_smoothing",)),
    "focal": (focal, ("gamma",)),
    "tversky": (tversky, ("alpha", "beta")),
    "lovasz": (lovasz, ()),
}


def make_loss(
    name: LossName,
    channels: int,
    *,
    class_weights: Sequence[float] | None = None,
    label_smoothing: float | None = None,
    gamma: float | None = None,
    alpha: float | None = None,
    beta: float | None = None,
) -> Loss:
    """The loss of a name, for models with `channels` logits a pixel.

    Args:
        name: one of LOSSES. "ce" is the binary cross-entropy if channels = 1; "bce" insists on it.
        class_weights: one for each class, so two if channels = 1.
        label_smoothing: of ce, bce and dice-ce; 0 if None.
        gamma: of focal; 2 if None.
        alpha, beta: of tversky, the weights of false positives and negatives; 0.3, 0.7 if None.

    Raises:
        InputError: an unknown name, a loss that does not fit the channels, an option out of range
            or one (other than None, or a smoothing of 0) that the loss does not have.
    """
    if name not in LOSSES:
        raise InputError(f"loss {name!r} is unknown; choose one of {', '.join(LOSSES)}")
    if channels < 1:
        raise InputError(f"a loss needs a model with 1 or more logits per pixel, not {channels}")
    if name == "bce" and channels > 1:
        raise InputError(
            f"loss 'bce' is for one logit per pixel, and this model has {channels}; use 'ce'"
        )
    given = {"label_smoothing": label_smoothing or None, "gamma": gamma}
    given |= {"alpha": alpha, "beta": beta}
    options = {option: value for option, value in given.items() if value is not None}
    function, known = _FUNCTIONS[name]
    for option, value in options.items():
        if option not in known:
            has = f"it has {' and '.join(known)}" if known else "it has none"
            raise InputError(f"loss {name!r} has no option {option} (given {value}); {has}")
        if option == "label_smoothing" and not 0 <= value < 1:
            raise InputError(f"label_smoothing must be at least 0 and below 1, not {value}")
        if not 0 <= value < math.inf:
            raise InputError(
                f"{option} of loss {name!r} must be a number of 0 or more, not {value}"
            )
    if alpha == beta == 0:
        raise InputError("alpha and beta of loss 'tversky' must not both be 0")
    loss: Loss = partial(function, **options)
    return loss if class_weights is None else _class_weighted(loss, class_weights, max(channels, 2))


def _class_weighted(loss: Loss, class_weights: Sequence[float], classes: int) -> Loss:
    check_class_weights(class_weights, classes)

    def weighted(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        factors = torch.tensor(class_weights, dtype=torch.float32, device=target.device)
        factor = factors[target.long().masked_fill(target == IGNORE, 0)]
        return loss(logits, target, factor if weight is None else weight * factor)

    return weighted
