"""Laws of an evaluation: the metrics' figures, in parts of any order, the worst image first."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from segmentation.data.classes import IGNORE, ClassTable
from segmentation.data.dataset import SegmentationData
from segmentation.data.depths import depths
from segmentation.data.instances import INSTANCE_NAMES, instance_classes
from segmentation.data.normalisation import Normalisation
from segmentation.data.pairs import Pair, pairs_from_arrays
from segmentation.data.phantom import phantom_stack
from segmentation.judging.evaluation import COARSE, OBJECTS, Evaluation, evaluate
from segmentation.judging.isbi import THRESHOLDS, IsbiMetrics
from segmentation.judging.labelled import held_out, labelled_data
from segmentation.judging.metrics import ConfusionMatrix
from segmentation.model import SegmentationUNet
from segmentation.options import SegmentationOptions
from segmentation.predict import Predictor, Source, TensorSource, classes
from unet import InputError, UNetConfig


def masks_of(classes: int, count: int = 4) -> NDArray[np.uint8]:
    labels = phantom_stack(count, (40, 56), seed=1)[1] // 255
    stripes = np.arange(56) * (classes - 1) // 56 + 1
    masks = np.where(labels > 0, stripes, 0).astype(np.uint8) * 20
    masks[:, 0, :classes] = np.arange(classes) * 20  # every class in every mask
    return masks


def data_of(classes: int, count: int = 4, ignore_value: int | None = None) -> SegmentationData:
    masks = masks_of(classes, count)
    if ignore_value is not None:
        masks[:, 30:, 10:30] = ignore_value
    pairs = pairs_from_arrays(phantom_stack(count, (40, 56), seed=1)[0], masks)
    normalisation = Normalisation.of(pair.read_image() for pair in pairs)
    return SegmentationData((), pairs, ignore_value=ignore_value, normalisation=normalisation)


def model_of(data: SegmentationData, seed: int = 0, **normalisation: object) -> SegmentationUNet:
    torch.manual_seed(seed)
    classes = len(data.table.values)
    info = {"normalisation": {**data.normalisation.to_dict(), **normalisation}}
    config = UNetConfig(channels=4, multipliers=(1, 2))
    return SegmentationUNet(config, 1 if classes == 2 else classes, info).eval()


def test_the_loss_is_the_mean_cross_entropy_of_all_pixels_that_count() -> None:
    data = data_of(2, 3)
    rng = np.random.default_rng(0)
    p = rng.uniform(0.01, 0.99, (3, 1, 40, 56)).astype(np.float32)
    masks = rng.integers(0, 2, (3, 40, 56)).astype(np.uint8)
    masks[0, 0, :4] = IGNORE
    parts, whole = [Evaluation(data.table) for _ in "12"], Evaluation(data.table, cells=1)
    for i in range(3):
        parts[i % 2].add(i, str(i), p[i], masks[i])
        whole.add(i, str(i), p[i], masks[i])
    parts[0].merge(parts[1])
    valid = masks != IGNORE
    found, y = p[:, 0][valid].astype(np.float64), masks[valid]
    expected = -np.mean(np.where(y == 1, np.log(found), np.log(1 - found)))
    for evaluation in (parts[0], whole):
        assert evaluation.scores()["loss"] == pytest.approx(expected, rel=1e-6)
        assert evaluation.scores()["accuracy"] == pytest.approx(np.mean((found > 0.5) == y))
    assert "v_rand" in whole.scores()
    assert "v_rand" not in parts[0].scores()


def noisy(data: SegmentationData, index: int, seed: int = 0) -> NDArray[np.float32]:
    """Probabilities that are right most of the time, and less and less with the index."""
    rng = np.random.default_rng((seed, index))
    mask, count = data.load(index)[1], len(data.table.values)
    p = np.stack([mask == k for k in range(count)]) + rng.random((count, *mask.shape)) * (
        0.9 + 0.2 * index
    )
    p = (p / p.sum(0)).astype(np.float32)
    return p[1:] if count == 2 else p


def scored(data: SegmentationData, indices: list[int] | None = None) -> Evaluation:
    found = Evaluation(data.table, 0.45, cells=1)
    for i in range(len(data.pairs)) if indices is None else indices:
        found.add(i, data.pairs[i].name, noisy(data, i), data.load(i)[1])
    return found


# -- the figures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3])
def test_scores_are_those_that_the_metrics_give(count):
    data = data_of(count)
    model = model_of(data)
    found = evaluate(Predictor([model]), data, data.val, threshold=0.45, cells=1)
    confusion, isbi = ConfusionMatrix(count), IsbiMetrics((0.45,))
    best = IsbiMetrics(sorted([*THRESHOLDS, 0.45]))
    for i in data.val:
        image, mask = data.load(i)
        probability = Predictor([model])(TensorSource(torch.tensor(image)))
        confusion.add(classes(probability, 0.45), mask)
        assert np.array_equal(found.images[i].prediction, classes(probability, 0.45))
        if count == 2:
            isbi.add(probability[0], mask, str(i))
            best.add(probability[0], mask, str(i))
    scores = found.scores()
    assert scores["dice"] == confusion.mean_dice
    assert scores["iou"] == confusion.mean_iou
    assert scores["accuracy"] == confusion.accuracy
    assert [c["dice"] for c in found.per_class()] == confusion.dice.tolist()
    if count == 2:
        expected = isbi.result()
        assert {k: scores[k] for k in expected if k in scores} == {
            k: v for k, v in expected.items() if not k.endswith("_threshold")
        }
        assert found.challenge() == best.result()
        mean = np.nanmean([i.scores["v_rand"] for i in found.images])
        assert mean == pytest.approx(isbi.at(0.45)["v_rand"])
    else:
        assert found.challenge() == {}
        assert not any(key.startswith("v_") for key in scores)


def test_precision_and_recall_of_a_class_by_hand():
    data = data_of(2, 1)
    found = Evaluation(data.table)
    found.add(
        0, "x", np.array([[[0.9, 0.9, 0.1, 0.9]]], np.float32), np.array([[1, 0, 1, 1]], np.uint8)
    )
    background, cell = found.per_class()
    assert (cell["precision"], cell["recall"], cell["share"]) == (2 / 3, 2 / 3, 3 / 4)
    assert (background["precision"], background["recall"], background["share"]) == (0, 0, 1 / 4)
    assert cell["class"] == "20"


def test_each_model_of_an_ensemble_normalises_as_it_was_trained():
    data = data_of(2, 1)
    models = [model_of(data, 1), model_of(data, 2, mean=(10.0,), std=(300.0,))]
    raw = data.pairs[0].read_image().astype(np.float32)[..., 0]
    alone = []
    for model in models:
        mean, std = (model.info["normalisation"][k][0] for k in ("mean", "std"))
        alone.append(Predictor([model])(TensorSource(torch.tensor((raw - mean) / std)[None])))
    found = evaluate(Predictor(models), data, data.val)
    mean = np.mean(alone, axis=0)
    sure = abs(mean[0] - 0.5) > 1e-5
    assert np.array_equal(found.images[0].prediction[sure], classes(mean)[sure])


@pytest.mark.parametrize(("count", "cells"), [(2, 1), (2, 0), (2, None), (3, None)])
def test_ignored_pixels_change_nothing(count, cells):
    data = data_of(count, 1, ignore_value=200)
    mask, probability = data.load(0)[1], noisy(data, 0)
    assert (mask == IGNORE).any()
    other = probability.copy()
    other[:, mask == IGNORE] = np.eye(count, dtype=np.float32)[-1][-len(other) :, None]
    found = [Evaluation(data.table, cells=cells), Evaluation(data.table, cells=cells)]
    for one, p in zip(found, (probability, other), strict=True):
        one.add(0, "x", p, mask)
    assert found[0].to_dict() == found[1].to_dict()
    assert found[0].confusion.counts.sum() == (mask != IGNORE).sum()


def test_probabilities_of_blended_tiles_may_exceed_one_by_rounding():
    data = data_of(2, 1)
    found = Evaluation(data.table, cells=1)
    mask = data.load(0)[1]
    found.add(0, "x", mask[None] * np.float32(1.0000001), mask)
    assert found.scores()["v_rand"] == found.scores()["dice"] == 1


def test_the_warping_error_is_counted_on_request():
    data = data_of(2, 1)
    found = Evaluation(data.table, thresholds=(), cells=1, warping=True)
    found.add(0, "x", noisy(data, 0), data.load(0)[1])
    assert 0 <= found.scores()["warping_error"] < 1
    assert any(line.startswith("warping error") for line in found.lines())
    assert "warping_error" not in scored(data).scores()


@pytest.mark.parametrize("cells", [1, 0])
def test_no_score_is_better_than_its_best(cells):
    """The threshold in use is among those that are tried, whatever it is."""
    data = data_of(2)
    found = Evaluation(data.table, 0.43, cells=cells)
    for i in range(4):
        found.add(i, str(i), noisy(data, i), data.load(i)[1])
    scores, best = found.scores(), found.challenge()
    for key in ("v_rand", "v_info"):
        assert scores[key] <= best[key]
    for key in ("rand_error", "pixel_error"):
        assert scores[key] >= best[key]
    alone = Evaluation(data.table, 0.43, cells=cells, thresholds=())
    for i in range(4):
        alone.add(i, str(i), noisy(data, i), data.load(i)[1])
    assert alone.scores() == scores
    assert alone.challenge() == {}


def test_scores_at_another_threshold_are_those_of_an_evaluation_there():
    data = data_of(2)
    found, there = (Evaluation(data.table, t, thresholds=COARSE, cells=1) for t in (0.5, 0.35))
    for i in range(4):
        for one in (found, there):
            one.add(i, str(i), noisy(data, i), data.load(i)[1])
    assert found.scores(0.35) == there.scores()
    assert found.scores() == there.scores(0.5) != there.scores()


def test_swapping_the_classes_changes_no_score():
    """The mask values swapped and the probabilities inverted: the cells stay the cells."""
    data = data_of(2)
    plain = Evaluation(data.table, 0.45, thresholds=COARSE, cells=1)
    other = Evaluation(data.table, 0.55, thresholds=COARSE, cells=0)
    for i in range(4):
        probability, mask = noisy(data, i), data.load(i)[1]
        plain.add(i, str(i), probability, mask)
        other.add(i, str(i), 1 - probability, 1 - mask)
    for key, score in plain.scores().items():
        assert other.scores()[key] == pytest.approx(score, abs=1e-6), key
    for key, score in plain.challenge().items():
        if not key.endswith("_threshold"):
            assert other.challenge()[key] == pytest.approx(score, abs=1e-6), key
    for by in ("dice", "v_rand"):
        assert other.best_threshold(by) == pytest.approx(1 - plain.best_threshold(by))


def test_the_scores_of_cells_are_there_only_where_there_are_cells():
    data = data_of(2, 1)
    found = Evaluation(data.table)
    found.add(0, "x", noisy(data, 0), data.load(0)[1])
    text = "\n".join(found.lines())
    assert "V_Rand" not in text
    assert "pixel error" not in text
    assert "threshold 0.5" in text
    assert found.challenge() == {}
    with pytest.raises(ValueError, match="evaluate with cells"):
        found.best_threshold("v_rand")
    assert "1 - F-score of the cell pixels" in "\n".join(scored(data_of(2)).lines())


def test_of_more_classes_there_is_no_talk_of_a_threshold():
    found = scored(data_of(3))
    assert not found.has_threshold
    assert "threshold" not in "\n".join(found.lines())
    assert "threshold" not in found.to_dict()


def test_a_class_that_no_mask_has_is_said_and_left_out():
    data = data_of(3, 2)
    without, two = Evaluation(data.table), []
    for i in range(2):
        probability, mask = noisy(data, i), np.minimum(data.load(i)[1], 1)
        without.add(i, str(i), probability, mask)
        assert (without.images[i].prediction == 2).any()
        two.append(without.per_class()[:2])
    assert without.missing() == ["40"]
    assert "no mask has 40: left out of the means" in without.lines()
    assert np.isnan(without.per_class()[2]["dice"])
    assert without.to_dict()["classes"][2]["dice"] is None
    assert without.scores()["dice"] == pytest.approx(np.mean([c["dice"] for c in two[-1]]))
    assert scored(data).missing() == Evaluation(data.table).missing() == []


def test_of_one_class_no_threshold_is_chosen():
    data = data_of(2, 1)
    found = Evaluation(data.table)
    found.add(0, "x", noisy(data, 0), np.zeros((40, 56), np.uint8))
    assert found.best_threshold() == 0.5


# -- order, parts, JSON ---------------------------------------------------------------------------


def test_the_worst_image_comes_first():
    found = scored(data_of(2))
    ranked = found.worst_first()
    assert [i.scores["dice"] for i in ranked] == sorted(i.scores["dice"] for i in found.images)
    assert [i.name for i in ranked] == ["3", "2", "1", "0"]
    assert [image["name"] for image in found.to_dict()["per_image"]] == ["3", "2", "1", "0"]
    assert [line.split()[-1] for line in found.lines(worst=2)[-2:]] == ["3", "2"]


@pytest.mark.parametrize("count", [2, 12])
@pytest.mark.parametrize("parts", [([0, 2], [1, 3]), ([3], [0, 1, 2]), ([2, 1], [], [0, 3])])
def test_parts_in_any_order_are_the_whole(count, parts):
    data = data_of(count)
    merged = Evaluation(data.table, 0.45, cells=1)
    for part in parts:
        merged.merge(scored(data, part))
    whole = scored(data)
    assert merged.to_dict() == whole.to_dict()
    assert merged.lines() == whole.lines()
    assert merged.best_threshold() == whole.best_threshold()


def test_other_thresholds_are_not_merged():
    data = data_of(2, 1)
    with pytest.raises(InputError, match="cannot merge"):
        Evaluation(data.table, 0.4).merge(Evaluation(data.table, 0.5))


@pytest.mark.parametrize("count", [2, 3])
def test_an_evaluation_is_plain_json(count):
    data = data_of(count, 2)
    found = scored(data)
    # of the last class there is nothing here, in neither mask nor prediction
    blank = np.eye(count, dtype=np.float32)[0][:, None, None].repeat(8, 1).repeat(8, 2)
    found.add(2, "blank", blank[1:] if count == 2 else blank, np.zeros((8, 8), np.uint8))
    facts = found.to_dict()
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    blank_scores = next(i for i in facts["per_image"] if i["name"] == "blank")
    assert blank_scores[f"dice {20 * (count - 1)}"] is None
    assert blank_scores["dice"] == 1


def test_an_image_without_a_pixel_that_counts_comes_last():
    data = data_of(2, 1, ignore_value=200)
    found = scored(data)
    found.add(1, "void", np.ones((1, 8, 8), np.float32), np.full((8, 8), IGNORE, np.uint8))
    assert [image.name for image in found.worst_first()] == ["0", "void"]
    assert found.to_dict()["per_image"][1]["dice"] is None
    assert found.lines()


# -- the threshold --------------------------------------------------------------------------------


class Fixed(Predictor):
    """Predicts what it is told to, by the image's first pixel."""

    def __init__(self, predictions: dict[int, NDArray[np.float32]]) -> None:
        self.predictions, self.models = predictions, []

    def found(self, source: Source) -> tuple[NDArray[np.float32], None]:
        return self.predictions[int(source.pixels[0, 0, 0])], None  # type: ignore[attr-defined]


def numbered(data: SegmentationData) -> SegmentationData:
    images = np.zeros((len(data.pairs), 40, 56), np.uint8)
    images[:, 0, 0] = range(len(images))
    masks = np.stack([pair.read_mask() for pair in data.pairs])
    return SegmentationData(pairs_from_arrays(images, masks), ignore_value=data.table.ignore_value)


def test_the_best_threshold_beats_all_others():
    data = numbered(data_of(2, 3, ignore_value=200))
    predict = Fixed({i: noisy(data, i) ** 3 for i in range(3)})
    chosen = evaluate(predict, data, range(3), thresholds=()).best_threshold()
    dice = {}
    for k in range(1, 100):
        confusion = ConfusionMatrix(2)
        for i in range(3):
            p = predict.predictions[i]
            confusion.add(classes(p, k / 100), data.load(i)[1], ignore=IGNORE)
        dice[k / 100] = confusion.mean_dice
    assert chosen != 0.5
    assert dice[chosen] == max(dice.values())
    assert evaluate(predict, data, range(3), threshold=chosen).scores()["dice"] == dice[chosen]


def test_v_rand_chooses_another_threshold():
    """Membranes with faint gaps are closed from 0.7 on."""
    data = numbered(data_of(2, 1))
    mask = data.load(0)[1]
    edge = (mask == 0) & (np.arange(56) % 8 == 0)
    p = np.where(edge, 0.7, mask * 0.93 + 0.02)[None].astype(np.float32)
    predict = Fixed({0: p})
    chosen = evaluate(predict, data, range(1), thresholds=COARSE, cells=1).best_threshold("v_rand")
    found = {
        t: evaluate(predict, data, range(1), threshold=t, thresholds=(), cells=1).scores()["v_rand"]
        for t in (0.05, 0.5, chosen, 0.9)
    }
    assert 0.7 <= chosen < 0.95
    assert found[chosen] == max(found.values()) > found[0.5]


def test_of_equal_thresholds_the_middle_is_taken():
    data = numbered(data_of(2, 1))
    mask = data.load(0)[1].astype(np.float32)
    for scale, chosen in ((1, 0.5), (0.3, 0.29)):
        found = evaluate(Fixed({0: mask[None] * scale}), data, range(1), thresholds=())
        assert found.best_threshold() == chosen


def test_of_more_classes_no_threshold_is_chosen():
    data = data_of(3, 1)
    found = evaluate(Predictor([model_of(data)]), data, range(1))
    assert found.best_threshold() == found.best_threshold("v_rand") == 0.5


# -- which images ---------------------------------------------------------------------------------


def grey_16(pairs: list[Pair]) -> list[Pair]:
    return pairs_from_arrays(
        np.stack([p.read_image() for p in pairs]).astype(np.uint16), masks_of(2)
    )


def colour(pairs: list[Pair]) -> list[Pair]:
    return pairs_from_arrays(np.stack([p.read_image() for p in pairs]).repeat(3, 3), masks_of(2))


def other_values(pairs: list[Pair]) -> list[Pair]:
    return pairs_from_arrays(np.stack([p.read_image() for p in pairs]), masks_of(2) * 2)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (grey_16, "1 channel of uint16.*trained on 1 of uint8"),
        (colour, "3 channels of uint8.*trained on 1 of uint8"),
        (other_values, "unexpected values 40.*classes are 0, 20"),
    ],
)
def test_data_unlike_the_models_are_refused(change: Callable[[list[Pair]], list[Pair]], told: str):
    data = data_of(2)
    with pytest.raises(InputError, match=told):
        labelled_data([model_of(data)], change(data.pairs), data.table)


def test_the_order_of_an_ensemble_makes_no_difference():
    """Of which one model alone knows the value of pixels where nothing was measured."""
    data = data_of(2)
    value = float(data.pairs[0].read_image()[0, 0, 0])
    models = [model_of(data, 0, nodata=value), model_of(data, 1, mean=[99.0])]
    found, masks = [], []
    for order in (models, models[::-1]):
        labelled = labelled_data(order, data.pairs, data.table)
        found.append(evaluate(Predictor(order), labelled, labelled.val).scores())
        masks.append(labelled.load(0)[1])
    assert found[0] == pytest.approx(found[1])
    assert np.array_equal(*masks)
    assert ((masks[0] == IGNORE) == (data.pairs[0].read_image()[..., 0] == value)).all()
    with pytest.raises(InputError, match=f"different values for no data, {value:g} and -1:"):
        labelled_data([models[0], model_of(data, nodata=-1)], data.pairs, data.table)


def test_held_out_are_images_that_no_run_saw(tmp_path):
    pairs = data_of(2, 6).pairs
    folds = [SegmentationOptions(out=tmp_path, fold=f"{k}/3") for k in (1, 2)]
    tail = SegmentationOptions(out=tmp_path, val=0.7)
    assert [p.name for p in held_out(pairs, folds[:1])] == ["0", "1"]
    assert [p.name for p in held_out(pairs, [folds[1], tail])] == ["2", "3"]
    with pytest.raises(InputError, match="trained on each image"):
        held_out(pairs, folds)


def test_no_image_is_no_score():
    data = data_of(2, 1)
    with pytest.raises(InputError, match="no image"):
        evaluate(Predictor([model_of(data)]), data, [])


def objects_of(count: int = 3) -> SegmentationData:
    """Rectangles of 10 x 12 pixels, every second one touching the next."""
    numbers = np.zeros((count, 40, 56), np.uint16)
    for n in range(12):
        row, column = divmod(n, 4)
        numbers[:, 13 * row + 1 : 13 * row + 11, 12 * column + 2 : 12 * column + 14] = n + 1
    pairs = pairs_from_arrays(phantom_stack(count, (40, 56), seed=1)[0], numbers)
    return SegmentationData(pairs[:1], pairs[1:], instances=True)


def add(
    evaluation: Evaluation, data: SegmentationData, i: int, numbers: NDArray[np.int32] | None = None
) -> None:
    """Scores the true objects of an image, or others, as if they were predicted."""
    found = data.objects(i) if numbers is None else numbers
    probability = 0.65 * (found > 0)[None].astype(np.float32)
    evaluation.add(i, str(i), probability, data.load(i)[1], data.objects(i), depths(found))


def test_objects_are_scored_beside_their_classes() -> None:
    data = objects_of()
    whole, *parts = (Evaluation(data.table, thresholds=OBJECTS) for _ in "123")
    melted = (data.objects(1) + 3) // 4  # rows of four
    for i, numbers in ((1, melted), (2, None)):
        for evaluation in (whole, parts[i - 1]):
            add(evaluation, data, i, numbers)
    parts[1].merge(parts[0])
    assert parts[1].to_dict() == whole.to_dict()
    found = whole.scores()
    assert (found["objects"], found["found"]) == (24, 3 + 12)
    assert found["ap50"] == pytest.approx(12 / (24 + 15 - 12))
    assert whole.images[0].scores["ap"] == 0
    assert whole.images[1].scores["ap"] == 1
    assert [image.name for image in whole.worst_first()] == ["1", "2"]
    said = "\n".join(whole.lines())
    assert "24 objects, 15 found; the two counts differ by 4.5 per image on average" in said
    assert "AP 0.5      0.4444" in said
    assert not whole.never_predicted()
    saved = json.loads(json.dumps(whole.to_dict(), allow_nan=False))
    assert saved["precision"]["0.95"] == pytest.approx(12 / 27)
    assert "ap50" not in Evaluation(data.table).scores()
    assert whole.best_threshold("ap") == 0.5
    assert whole.scores(0.7)["found"] == 0
    np.testing.assert_array_equal(whole.images[1].objects > 0, data.objects(2) > 0)


def test_objects_below_the_smallest_do_not_count() -> None:
    data = objects_of()
    found = Evaluation(data.table, smallest=121)
    add(found, data, 0)
    assert found.scores()["found"] == 0


def test_a_class_that_is_never_predicted_is_named() -> None:
    data = objects_of()
    found = Evaluation(data.table)
    assert not found.never_predicted()
    add(found, data, 1, np.zeros_like(data.objects(1)))
    assert found.never_predicted() == ["cell"]
    assert "no pixel was predicted as cell" in "\n".join(found.lines())


def test_objects_of_earlier_models_are_parted_by_their_border_class() -> None:
    data = objects_of()
    table = ClassTable(values=(0, 1, 2), shares=(0.5, 0.3, 0.2), names=INSTANCE_NAMES)
    found = Evaluation(table, thresholds=OBJECTS)
    classes = instance_classes(data.pairs[1].read_mask())
    probability = np.stack([classes == k for k in range(3)]).astype(np.float32)
    found.add(1, "1", probability, classes, data.objects(1))
    assert found.scores()["ap"] == 1
    assert found.best_threshold("ap") == 0.5
