"""Laws of the losses: oracles, limits, weights as a measure, ignored pixels, extreme logits."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from segmentation.data.classes import IGNORE
from segmentation.judging.metrics import ConfusionMatrix
from segmentation.losses import (
    LOSSES,
    Loss,
    cross_entropy,
    dice,
    dice_ce,
    focal,
    lovasz,
    make_loss,
    tversky,
)
from unet.errors import InputError

REGION = ("dice", "tversky", "lovasz")
CASES = [(name, k) for name in LOSSES for k in (1, 2, 4) if name != "bce" or k == 1]
every_loss = pytest.mark.parametrize(("name", "k"), CASES)


def batch(k: int, seed: int = 0, scale: float = 2.0, b: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Logits in float64, a target that has every class, and weights from 0.5 to 2.5."""
    g = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(b, k, 6, 7, generator=g, dtype=torch.float64)
    target = torch.randint(max(k, 2), (b, 6, 7), generator=g)
    target[0, 0, : max(k, 2)] = torch.arange(max(k, 2))
    return logits, target, 0.5 + 2 * torch.rand(b, 6, 7, generator=g, dtype=torch.float64)


def value_and_gradient(
    loss: Loss, logits: Tensor, target: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    logits = logits.detach().clone().requires_grad_()
    value = loss(logits, target, weight)
    assert value.shape == ()
    (gradient,) = torch.autograd.grad(value, logits)
    return value.detach(), gradient


def sure(target: Tensor, k: int, scale: float = 1e4) -> Tensor:
    """Logits (B, K, H, W) that predict the target with certainty."""
    if k == 1:
        return scale * (2 * target[:, None].double() - 1)
    return scale * F.one_hot(target, k).movedim(-1, 1).double()


def foreground_probability(logits: Tensor) -> Tensor:
    return torch.sigmoid(logits[:, 0])


# ----------------------------------------------------------------------------------------------
# Oracles


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("k", [2, 4])
def test_cross_entropy_is_that_of_torch(k: int, smoothing: float) -> None:
    logits, target, _ = batch(k)
    target[1, 2:4] = IGNORE
    ours = cross_entropy(logits, target, label_smoothing=smoothing)
    assert_close(
        ours, F.cross_entropy(logits, target, ignore_index=IGNORE, label_smoothing=smoothing)
    )


def test_class_weights_of_cross_entropy_are_those_of_torch() -> None:
    logits, target, _ = batch(4)
    target[1, 2:4] = IGNORE
    weights = [0.5, 1.0, 3.0, 0.0]
    theirs = F.cross_entropy(logits, target, logits.new_tensor(weights), ignore_index=IGNORE)
    assert_close(make_loss("ce", 4, class_weights=weights)(logits, target), theirs)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("name", ["ce", "bce"])
def test_cross_entropy_of_one_logit_is_the_binary_one_of_torch(name: Any, smoothing: float) -> None:
    logits, target, _ = batch(1)
    soft = target.double() * (1 - smoothing) + smoothing / 2
    theirs = F.binary_cross_entropy_with_logits(logits[:, 0], soft)
    assert_close(make_loss(name, 1, label_smoothing=smoothing)(logits, target), theirs)


def test_focal_is_the_formula() -> None:
    logits, target, weight = batch(4)
    p = logits.softmax(1).gather(1, target[:, None])[:, 0]
    expected = (weight * -((1 - p) ** 1.5) * p.log()).sum() / weight.sum()
    assert_close(focal(logits, target, weight, gamma=1.5), expected)


def test_dice_and_tversky_of_one_logit_are_the_formulas_of_the_foreground() -> None:
    logits, target, w = batch(1)
    p, g = foreground_probability(logits), target.double()
    expected = 1 - 2 * (w * p * g).sum() / ((w * p).sum() + (w * g).sum())
    assert_close(dice(logits, target, w), expected, rtol=1e-5, atol=0)
    tp, fp, fn = (w * p * g).sum(), (w * p * (1 - g)).sum(), (w * (1 - p) * g).sum()
    expected = 1 - tp / (tp + 0.2 * fp + 0.9 * fn)
    assert_close(tversky(logits, target, w, alpha=0.2, beta=0.9), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("loss", [dice, tversky])
def test_region_loss_of_classes_is_the_mean_of_each_class_against_the_rest(loss: Loss) -> None:
    logits, target, weight = batch(4)
    p = logits.softmax(1)
    one_against_rest = [
        loss(p[:, c : c + 1].logit(), (target == c).long(), weight) for c in range(4)
    ]
    assert_close(loss(logits, target, weight), torch.stack(one_against_rest).mean())


def jaccard_loss(wrong: Tensor, truth: Tensor, weight: Tensor) -> float:
    """1 - IoU of a class if exactly the pixels `wrong` are predicted wrongly."""
    predicted = truth ^ wrong
    union = weight[predicted | truth].sum()
    return float(1 - weight[predicted & truth].sum() / union) if union > 0 else 0.0


def lovasz_extension(errors: Tensor, truth: Tensor, weight: Tensor) -> float:
    """The integral over t of the Jaccard loss of {errors >= t}: the definition, without sorting."""
    levels = [0.0, *sorted(set(errors.flatten().tolist()))]
    return math.fsum(
        (high - low) * jaccard_loss(errors >= high, truth, weight)
        for low, high in itertools.pairwise(levels)
    )


@pytest.mark.parametrize("seed", range(3))
def test_lovasz_is_the_lovasz_extension_of_the_jaccard_loss(seed: int) -> None:
    logits, target, weight = batch(3, seed)
    p = logits.softmax(1)
    expected = [
        lovasz_extension(torch.where(target == c, 1 - p[:, c], p[:, c]), target == c, weight)
        for c in range(3)
    ]
    assert float(lovasz(logits, target, weight)) == pytest.approx(sum(expected) / 3)
    logits, target, weight = batch(1, seed)
    hinge = (1 - logits[:, 0] * (2 * target - 1)).clamp_min(0)
    expected_hinge = lovasz_extension(hinge, target == 1, weight)
    assert float(lovasz(logits, target, weight)) == pytest.approx(expected_hinge)


@pytest.mark.parametrize("k", [2, 4])
def test_dice_and_lovasz_of_hard_predictions_are_dice_and_iou(k: int) -> None:
    _, target, _ = batch(k)
    prediction = target.roll(1, 2)
    matrix = ConfusionMatrix(k)
    matrix.add(prediction.numpy(), target.numpy())
    logits = sure(prediction, k)
    assert float(lovasz(logits, target)) == pytest.approx(1 - matrix.iou.mean())
    assert float(dice(logits, target)) == pytest.approx(1 - matrix.dice.mean(), rel=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_lovasz_hinge_bounds_the_jaccard_loss(seed: int) -> None:
    logits, target, weight = batch(1, seed)
    wrong = (logits[:, 0] > 0) ^ (target == 1)
    error = jaccard_loss(wrong, target == 1, weight)
    assert float(lovasz(logits, target, weight)) >= error
    # at +-1 the hinge errors are 0 and 2
    hard = torch.where(logits > 0, 1.0, -1.0).double()
    assert float(lovasz(hard, target, weight)) == pytest.approx(2 * error)


# ----------------------------------------------------------------------------------------------
# Relations between the losses


@pytest.mark.parametrize("k", [1, 3])
def test_relations_between_losses(k: int) -> None:
    logits, target, weight = batch(k)
    for w in (None, weight):
        both = dice(logits, target, w) + cross_entropy(logits, target, w, label_smoothing=0.1)
        assert_close(dice_ce(logits, target, w, label_smoothing=0.1), both)
        assert_close(tversky(logits, target, w, alpha=0.5, beta=0.5), dice(logits, target, w))
        assert_close(focal(logits, target, w, gamma=0.0), cross_entropy(logits, target, w))


def test_tversky_with_more_beta_asks_for_recall() -> None:
    target = torch.zeros(1, 4, 4, dtype=torch.long)
    target[:, :2] = 1
    too_much, too_little = target.clone(), target.clone()
    too_much[0, 2], too_little[0, 1] = 1, 0
    assert tversky(sure(too_much, 1), target) < tversky(sure(too_little, 1), target)


@pytest.mark.parametrize("name", [n for n in LOSSES if n not in REGION and "dice" not in n])
def test_one_logit_z_is_two_logits_0_and_z(name: Any) -> None:
    z, target, weight = batch(1)
    two_name = "ce" if name == "bce" else name
    two = make_loss(two_name, 2, class_weights=[1, 3])
    one = make_loss(name, 1, class_weights=[1, 3])
    value, gradient = value_and_gradient(one, z, target, weight)
    pair = torch.cat([torch.zeros_like(z), z], 1)
    other, other_gradient = value_and_gradient(two, pair, target, weight)
    assert_close(value, other)
    assert_close(gradient, other_gradient[:, 1:])


def test_dice_of_two_logits_is_the_mean_of_both_foregrounds() -> None:
    z, target, weight = batch(1)
    both = (dice(z, target, weight) + dice(-z, 1 - target, weight)) / 2
    assert_close(dice(torch.cat([torch.zeros_like(z), z], 1), target, weight), both)


@every_loss
def test_perfect_prediction_costs_nothing_but_smoothing(name: Any, k: int) -> None:
    _, target, weight = batch(k)
    assert_close(make_loss(name, k)(sure(target, k), target, weight).item(), 0.0)


@pytest.mark.parametrize("name", REGION)
def test_empty_foreground(name: Any) -> None:
    loss, nothing = make_loss(name, 1), torch.zeros(1, 4, 4, dtype=torch.long)
    assert loss(sure(nothing, 1), nothing).item() == 0
    assert loss(sure(nothing + 1, 1, 1.0), nothing).item() > 0.99


@pytest.mark.parametrize("name", REGION)
def test_classes_that_do_not_occur_are_left_out_of_the_mean(name: Any) -> None:
    logits, target, weight = batch(2)
    absent = torch.full((2, 2, 6, 7), -1e4, dtype=torch.float64)
    more = torch.cat([logits, absent], 1)
    assert_close(
        make_loss(name, 4)(more, target, weight), make_loss(name, 2)(logits, target, weight)
    )


# ----------------------------------------------------------------------------------------------
# Weights are a measure on the pixels


@every_loss
def test_weights_of_one_are_no_weights(name: Any, k: int) -> None:
    logits, target, weight = batch(k)
    ones = [1.0] * max(k, 2)
    plain = value_and_gradient(make_loss(name, k), logits, target)
    assert_close(
        value_and_gradient(make_loss(name, k), logits, target, torch.ones_like(weight)), plain
    )
    assert_close(value_and_gradient(make_loss(name, k, class_weights=ones), logits, target), plain)


@every_loss
def test_only_proportions_of_weights_matter(name: Any, k: int) -> None:
    logits, target, weight = batch(k)
    loss = make_loss(name, k)
    assert_close(loss(logits, target, 50 * weight), loss(logits, target, weight), rtol=1e-6, atol=0)


@every_loss
def test_class_weights_are_pixel_weights_of_the_true_class(name: Any, k: int) -> None:
    logits, target, weight = batch(k)
    target[0, 5] = IGNORE
    class_weights = [1.0, 0.25, 4.0, 2.0][: max(k, 2)]
    table = torch.tensor(class_weights + [math.nan] * (IGNORE + 1 - len(class_weights)))
    expected = make_loss(name, k)(logits, target, weight * table[target])
    assert_close(make_loss(name, k, class_weights=class_weights)(logits, target, weight), expected)


@given(
    case=st.sampled_from(CASES),
    counts=st.lists(st.integers(0, 3), min_size=12, max_size=12).filter(any),
    seed=st.integers(0, 99),
)
@settings(max_examples=80)
def test_a_weight_of_n_is_the_pixel_n_times(
    case: tuple[Any, int], counts: list[int], seed: int
) -> None:
    name, k = case
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(1, k, 1, 12, generator=g, dtype=torch.float64)
    target = torch.randint(max(k, 2), (1, 1, 12), generator=g)
    n = torch.tensor(counts)
    weighted = make_loss(name, k)(logits, target, n[None, None].double())
    repeated = make_loss(name, k)(
        logits.repeat_interleave(n, 3), target.repeat_interleave(n, 2), None
    )
    assert_close(weighted, repeated)


@every_loss
def test_the_place_of_a_pixel_does_not_matter(name: Any, k: int) -> None:
    logits, target, weight = batch(k)
    loss = make_loss(name, k)
    strip = loss(
        logits.movedim(1, 0).reshape(1, k, 7, 12),
        target.reshape(1, 7, 12),
        weight.reshape(1, 7, 12),
    )
    assert_close(strip, loss(logits, target, weight))


# ----------------------------------------------------------------------------------------------
# Ignored pixels


@every_loss
def test_ignored_pixels_count_for_nothing(name: Any, k: int) -> None:
    logits, target, weight = batch(k)
    target[0, 2:4], target[1, :, 3] = IGNORE, IGNORE
    ignored = target == IGNORE
    loss = make_loss(name, k, class_weights=[1.0, 2.0, 3.0, 4.0][: max(k, 2)])
    value, gradient = value_and_gradient(loss, logits, target, weight)
    assert (gradient.movedim(1, 0)[:, ignored] == 0).all()
    assert gradient.abs().sum() > 0
    for intruder in (-7.0, 1e4, math.inf, math.nan):
        changed = logits.masked_fill(ignored[:, None], intruder)
        weight_there = weight.masked_fill(ignored, intruder)
        again = value_and_gradient(loss, changed, target, weight_there)
        assert_close(again, (value, gradient), rtol=0, atol=0)
    of_weight_0 = loss(logits, target.masked_fill(ignored, 0), weight * ~ignored)
    assert_close(of_weight_0, value)


@every_loss
def test_a_batch_without_valid_pixels_costs_nothing(name: Any, k: int) -> None:
    logits, target, weight = batch(k)
    loss = make_loss(name, k, class_weights=[1.0] * max(k, 2))
    nowhere = torch.full_like(target, IGNORE)
    for t, w in ((nowhere, None), (nowhere, weight), (target, torch.zeros_like(weight))):
        value, gradient = value_and_gradient(loss, logits, t, w)
        assert value == 0
        assert (gradient == 0).all()


# ----------------------------------------------------------------------------------------------
# Numbers


@every_loss
def test_gradient_is_the_derivative(name: Any, k: int) -> None:
    logits, target, weight = batch(k, b=1)
    target[0, 1] = IGNORE
    loss = make_loss(name, k)
    assert torch.autograd.gradcheck(
        lambda z: loss(z, target, weight), logits.requires_grad_(), fast_mode=True
    )


@every_loss
def test_a_step_down_the_gradient_lowers_the_loss(name: Any, k: int) -> None:
    logits, target, weight = batch(k)
    loss = make_loss(name, k)
    value, gradient = value_and_gradient(loss, logits, target, weight)
    assert loss(logits - 1e-3 * gradient / gradient.norm(), target, weight) < value


EXTREMES = [*CASES, ("focal-0.5", 1), ("focal-0.5", 4)]


@pytest.mark.parametrize(("name", "k"), EXTREMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_are_safe(name: Any, k: int, dtype: torch.dtype) -> None:
    loss = make_loss("focal", k, gamma=0.5) if name == "focal-0.5" else make_loss(name, k)
    _, target, weight = batch(k)
    right = sure(target, k).to(dtype)
    flat = torch.zeros_like(right)
    for logits in (right, -right, right.roll(1, 3), flat + 1e4, flat - 1e4, flat):
        value, gradient = value_and_gradient(loss, logits, target, weight.float())
        assert value.dtype == torch.float32
        assert value.isfinite()
        assert value >= 0
        assert gradient.isfinite().all()


@every_loss
def test_autocast_computes_in_float32(name: Any, k: int) -> None:
    logits, target, weight = batch(k)
    half, loss = logits.bfloat16(), make_loss(name, k)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = value_and_gradient(loss, half, target, weight.bfloat16())
    plain = value_and_gradient(loss, half.float(), target, weight.bfloat16().float())
    assert_close(under_autocast[0], plain[0], rtol=0, atol=0)
    assert_close(under_autocast[1], plain[1].bfloat16(), rtol=0, atol=0)


@every_loss
def test_arguments_are_not_changed_and_bytes_will_do_for_targets(name: Any, k: int) -> None:
    logits, target, weight = batch(k)
    target[0, 1] = IGNORE
    before = [x.clone() for x in (logits, target, weight)]
    loss = make_loss(name, k, class_weights=[1.0] * max(k, 2))
    value = loss(logits, target, weight)
    assert_close([logits, target, weight], before, rtol=0, atol=0)
    assert loss(logits, target.byte(), weight) == value


# ----------------------------------------------------------------------------------------------
# Mistakes


def test_options_reach_the_loss_and_have_the_papers_defaults() -> None:
    logits, target, _ = batch(1)
    for name, function, default, other in (
        ("ce", cross_entropy, {"label_smoothing": 0.0}, {"label_smoothing": 0.3}),
        ("dice-ce", dice_ce, {"label_smoothing": 0.0}, {"label_smoothing": 0.3}),
        ("focal", focal, {"gamma": 2.0}, {"gamma": 0.7}),
        ("tversky", tversky, {"alpha": 0.3, "beta": 0.7}, {"alpha": 0.8, "beta": 0.1}),
    ):
        plain = make_loss(name, 1)(logits, target)
        changed = make_loss(name, 1, **other)(logits, target)
        assert plain == function(logits, target, **default)
        assert changed == function(logits, target, **other)
        assert plain != changed


@pytest.mark.parametrize(
    ("name", "channels", "options", "says"),
    [
        ("hinge", 1, {}, "'hinge' is unknown.*dice-ce"),
        ("bce", 3, {}, "has 3; use 'ce'"),
        ("bce", 2, {}, "has 2; use 'ce'"),
        ("ce", 0, {}, "not 0"),
        ("dice", 1, {"label_smoothing": 0.1}, "'dice' has no option label_smoothing"),
        ("ce", 2, {"gamma": 2.0}, "no option gamma.*it has label_smoothing"),
        ("focal", 2, {"alpha": 0.5}, "no option alpha"),
        ("lovasz", 2, {"beta": 0.5}, "no option beta"),
        ("ce", 2, {"label_smoothing": 1.0}, "below 1, not 1.0"),
        ("ce", 2, {"label_smoothing": math.nan}, "not nan"),
        ("focal", 2, {"gamma": -1.0}, "gamma.*not -1.0"),
        ("tversky", 2, {"alpha": math.inf}, "alpha.*not inf"),
        ("tversky", 2, {"alpha": 0.0, "beta": 0.0}, "not both be 0"),
        ("ce", 3, {"class_weights": [1, 2]}, "must be 3 numbers"),
        ("ce", 1, {"class_weights": [1.0]}, "must be 2 numbers"),
        ("ce", 2, {"class_weights": [1.0, -1.0]}, "0 or more"),
        ("ce", 2, {"class_weights": [0.0, 0.0]}, "not all 0"),
        ("ce", 2, {"class_weights": [1.0, math.nan]}, "nan"),
    ],
)
def test_wrong_options_are_refused(name: Any, channels: int, options: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        make_loss(name, channels, **options)


def test_a_class_of_a_single_pixel_counts_as_much_as_any() -> None:
    target = torch.zeros(1, 8, 8, dtype=torch.long)
    target[0, 3, 4] = 1
    logits = torch.tensor([30.0, -30.0]).view(1, 2, 1, 1).expand(1, 2, 8, 8)
    assert dice(logits, target).item() == pytest.approx(0.5, abs=0.01)


def test_a_smoothing_of_0_is_no_smoothing() -> None:
    logits, target, _ = batch(2)
    assert make_loss("dice", 2, label_smoothing=0.0)(logits, target) == dice(logits, target)


@every_loss
def test_shapes_that_do_not_fit_are_refused(name: Any, k: int) -> None:
    logits, target, weight = batch(k)
    loss = make_loss(name, k)
    for arguments in (
        (logits[..., 1:], target, weight),
        (logits, target[:1], None),
        (logits, target[:, None], None),
        (logits, target, weight[:, :2]),
        (logits[0], target[0], None),
    ):
        with pytest.raises(InputError, match="do not fit together"):
            loss(*arguments)
