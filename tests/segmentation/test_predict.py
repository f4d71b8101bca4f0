"""Laws of prediction: any size, tiles equal to the whole, symmetries, ensembles."""

from __future__ import annotations

import copy
import math
import random
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from segmentation.model import SegmentationUNet
from segmentation.predict import Predictor, TensorSource, classes, folded, probabilities
from unet import InputError, UNetConfig
from unet.geometry import receptive_radius
from unet.training.options import Precision

SAME = UNetConfig(channels=4, multipliers=(1, 2))
CONFIGS = {
    "same": SAME,
    "patch": UNetConfig(channels=4, multipliers=(1, 2), patch=2),
    "residual": UNetConfig(channels=4, multipliers=(1, 2), block="res", down="conv", up="nearest"),
    "valid": UNetConfig(channels=4, multipliers=(1, 2), padding="valid", norm="none"),
}


def network(config: UNetConfig, seed: int = 0) -> SegmentationUNet:
    torch.manual_seed(seed)
    return SegmentationUNet(config, 1).eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_size_is_covered(name):
    """Every height and every width; a rule for one axis knows nothing of the other."""
    predict = Predictor([network(CONFIGS[name])])
    for h, w in zip(range(1, 71), random.Random(0).sample(range(1, 71), 70), strict=True):
        assert predict(TensorSource(torch.randn(1, h, w))).shape == (1, h, w)


def test_valid_convolutions_see_the_mirrored_border():
    model = network(CONFIGS["valid"])
    image = torch.randn(1, 20, 20)  # 16 pixels are lost: 36 -> 20
    mirrored = torch.nn.functional.pad(image, (8, 8, 8, 8), mode="reflect")
    with torch.inference_mode():
        expected = model(mirrored[None])[0].sigmoid()
    found = Predictor([model])(TensorSource(image))
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("turns", [[0], [0, 4], [0, 1, 2, 3]])
def test_symmetries_are_those_that_each_model_was_trained_with(turns):
    model, other = network(SAME), network(SAME)
    model.info["symmetries"] = turns
    image = torch.randn(1, 24, 40)
    plain = Predictor([model])
    seen = []
    for turn in turns:
        moved = torch.rot90(image.flip(-1) if turn >= 4 else image, turn % 4, (-2, -1))
        found = torch.rot90(torch.from_numpy(plain(TensorSource(moved))), -turn % 4, (-2, -1))
        seen.append(found.flip(-1) if turn >= 4 else found)
    expected = torch.stack(seen).mean(0)
    predict = Predictor([model], symmetries=True)
    np.testing.assert_allclose(predict(TensorSource(image)), expected, atol=1e-5)
    both = Predictor([model, other], symmetries=True)(TensorSource(image))
    all_eight = torch.from_numpy(Predictor([other], symmetries=True)(TensorSource(image)))
    np.testing.assert_allclose(both, (expected + all_eight) / 2, atol=1e-5)


@pytest.mark.parametrize("damaged", [[], [8], ["0"], 3])
def test_damaged_symmetries_are_told(damaged):
    model = network(SAME)
    model.info["symmetries"] = damaged
    with pytest.raises(InputError, match="symmetries"):
        Predictor([model], symmetries=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_receptive_radius_is_an_upper_bound_and_not_a_wild_one(name):
    model = network(CONFIGS[name])
    x = torch.randn(1, 1, 76, 76, requires_grad=True)
    out = model(x)
    reach = 0
    for row in range(30, 38):  # all phases of the pooling
        (gradient,) = torch.autograd.grad(out[0, 0, row, 34], x, retain_graph=True)
        seen = gradient[0, 0].abs().sum(1).nonzero()[:, 0]
        shift = (76 - out.shape[-2]) // 2
        reach = max(reach, int((seen - row - shift).abs().max()))
    radius = receptive_radius(CONFIGS[name])
    assert reach <= radius <= 2 * reach


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=6)
@given(h=st.integers(1, 120), w=st.integers(90, 200), symmetries=st.booleans())
def test_tiles_are_the_whole_where_the_overlap_covers_the_receptive_field(name, h, w, symmetries):
    model = network(CONFIGS[name])
    overlap = 2 * int(receptive_radius(CONFIGS[name])) + 2
    source = TensorSource(torch.randn(1, h, w))
    whole = Predictor([model], tile=512, symmetries=symmetries)(source)
    predict = Predictor([model], tile=2 * overlap + 4, overlap=overlap, symmetries=symmetries)
    np.testing.assert_allclose(predict(source), whole, atol=1e-4)
    bands = list(predict.bands(source))
    assert [top for top, _ in bands] == list(np.cumsum([0] + [b.shape[1] for _, b in bands[:-1]]))


@given(st.integers(1, 300), st.integers(1, 20), st.integers(0, 19), st.integers(0, 12))
def test_the_weights_of_all_tiles_add_up_to_one(n, tile, overlap, radius):
    predict = Predictor([network(SAME)], tile=2 * (tile + 2 * overlap), overlap=2 * overlap)
    predict.radius = radius
    total = np.zeros(n)
    spans = predict._spans(n)
    for i, (start, stop) in enumerate(spans):
        total[start:stop] += predict._weights(spans, i)
    np.testing.assert_allclose(total, 1, atol=1e-6)
    assert spans[0][0] == 0
    assert spans[-1][1] == n
    sizes = [stop - start for start, stop in spans]
    assert max(sizes) <= predict.tile or len(spans) == 1
    assert len(set(sizes[:-1])) <= 1


def test_less_overlap_leaves_no_seam():
    model = network(SAME)
    source = TensorSource(torch.randn(1, 64, 200))
    whole = Predictor([model])(source)
    blended = Predictor([model], tile=64, overlap=8)(source)
    steps = np.abs(np.diff(blended[0] - whole[0], axis=1))
    assert steps.max() < 0.05


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, RuntimeError])
def test_where_memory_runs_out_smaller_tiles_give_the_same(monkeypatch, capsys, error):
    model = network(SAME)
    source = TensorSource(torch.randn(1, 150, 170))
    wanted = Predictor([model], tile=128, overlap=32)(source)
    forward, refused = SegmentationUNet.forward, []

    def short_of_memory(self, x):
        if x.shape[-2] * x.shape[-1] > 64 * 64:
            refused.append(x.shape)
            raise error("can't allocate memory: you tried to allocate 99999 bytes")
        return forward(self, x)

    monkeypatch.setattr(SegmentationUNet, "forward", short_of_memory)
    predictor = Predictor([model], tile=128, overlap=32)
    np.testing.assert_allclose(predictor(source), wanted, atol=1e-6)
    assert len(refused) == 1  # then it is known
    assert capsys.readouterr().err == "memory ran out: tiles of 64 pixels instead of 128\n"


def test_no_tile_is_small_enough(monkeypatch, capsys):
    def forward(self, x):
        raise torch.OutOfMemoryError("no memory at all")

    monkeypatch.setattr(SegmentationUNet, "forward", forward)
    with pytest.raises(torch.OutOfMemoryError):
        Predictor([network(SAME)], tile=128, overlap=32)(TensorSource(torch.randn(1, 50, 50)))


def test_symmetries_make_a_prediction_that_turns_with_the_image():
    predict = Predictor([network(SAME)], symmetries=True)
    image = torch.randn(1, 24, 24)
    plain = predict(TensorSource(image))
    for turn in (lambda p: torch.rot90(p, 1, (-2, -1)), lambda p: p.flip(-1), lambda p: p.mT):
        expected = turn(torch.from_numpy(plain))
        np.testing.assert_allclose(predict(TensorSource(turn(image))), expected, atol=1e-5)


def with_depth() -> SegmentationUNet:
    torch.manual_seed(0)
    return SegmentationUNet(SAME, 2, {"objects": "depth"}).eval()


def test_the_depth_is_that_of_the_network_and_turns_with_the_image():
    image = torch.randn(1, 24, 40)
    plain = Predictor([with_depth()]).found(TensorSource(image))
    with torch.inference_mode():
        logits = with_depth()(image[None])[0]
    np.testing.assert_allclose(plain[0], logits[:1].sigmoid(), atol=1e-5)
    np.testing.assert_allclose(plain[1], logits[1], atol=1e-5)
    predict = Predictor([with_depth()], symmetries=True)
    found = predict.found(TensorSource(image))
    np.testing.assert_array_equal(predict(TensorSource(image)), found[0])
    turned = predict.found(TensorSource(torch.rot90(image, 1, (-2, -1))))
    for one, other in zip(turned, found, strict=True):
        np.testing.assert_allclose(one, np.rot90(other, 1, (-2, -1)), atol=1e-5)


def test_the_depth_of_tiles_is_that_of_the_whole():
    overlap = 2 * int(receptive_radius(SAME)) + 2
    source = TensorSource(torch.randn(1, 70, 200))
    whole = Predictor([with_depth()], tile=512).found(source)
    tiled = Predictor([with_depth()], tile=2 * overlap + 4, overlap=overlap).found(source)
    for one, other in zip(tiled, whole, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", [(32, 32), (24, 40), (64, 64), (60, 200)])
def test_symmetries_go_through_together_where_they_fit_into_a_tile(monkeypatch, name, size):
    model, forward, seen = network(CONFIGS[name]), SegmentationUNet.forward, []

    def recorded(self, x):
        seen.append(x.shape)
        return forward(self, x)

    monkeypatch.setattr(SegmentationUNet, "forward", recorded)
    source = TensorSource(torch.randn(1, *size))
    together = Predictor([model], tile=64, overlap=8, symmetries=True)(source)
    shapes, seen = seen, []
    monkeypatch.setattr("segmentation.predict._alike", lambda turns, *_: [[t] for t in range(8)])
    alone = Predictor([model], tile=64, overlap=8, symmetries=True)(source)
    np.testing.assert_allclose(together, alone, atol=1e-6)
    assert sum(s[0] for s in shapes) == len(seen)
    assert all(s[0] == 1 or s[0] * s[2] * s[3] <= 64**2 for s in shapes)
    if name != "valid" and max(size) <= 40:
        assert len(shapes) < 8


def test_tiles_are_read_ahead_and_come_in_their_order():
    """The next is read before what the one before has become is waited for."""
    order = []

    class Recorded(TensorSource):
        def read(self, rows, columns, model):
            order.append(("read", columns.start))
            return super().read(rows, columns, model)

    predict = Predictor([network(SAME)], tile=64, overlap=8)
    places = [(slice(0, 64), slice(left, left + 64)) for left in (0, 64, 128)]
    tiles = predict._tiles(Recorded(torch.randn(1, 64, 192)), places)
    for place, _ in zip(places, tiles, strict=True):
        order.append(("blended", place[1].start))
    first, *rest = [name for name, _ in order]
    assert (first, rest) == ("read", ["read", "blended", "read", "blended", "blended"])
    assert [start for name, start in order if name == "blended"] == [0, 64, 128]


def test_half_precision_is_asked_for_and_gives_nearly_the_same():
    model, source = network(SAME), TensorSource(torch.randn(1, 40, 40))
    exact = Predictor([model])(source)
    assert np.array_equal(Predictor([model], precision="auto")(source), exact)  # on a CPU
    rounded = Predictor([model], precision="bf16")(source)
    assert rounded.dtype == np.float32
    assert 0 < abs(rounded - exact).max() < 0.02
    with torch.autocast("cpu", torch.bfloat16):  # as an evaluation in training has it
        assert np.array_equal(Predictor([model])(source), rounded)
    for dtype in (torch.float64, torch.bfloat16):  # of the weights
        found = Predictor([copy.deepcopy(model).to(dtype)])(source)
        assert found.dtype == np.float32
        assert abs(found - exact).max() < 0.02


def test_a_model_in_training_predicts_as_in_evaluation_and_goes_on_training():
    model, source = network(replace(SAME, dropout=0.5)), TensorSource(torch.randn(1, 40, 40))
    wanted = Predictor([model])(source)
    assert np.array_equal(Predictor([model.train()])(source), wanted)
    assert all(module.training for module in model.modules())


def test_no_model_and_an_unknown_precision_are_refused():
    with pytest.raises(InputError, match="takes one model or more, and none is given"):
        Predictor([])
    with pytest.raises(InputError, match="precision 'fp8' is unknown: choose from") as told:
        Predictor([network(SAME)], precision="fp8")
    assert str(told.value).endswith(": choose from " + ", ".join(get_args(Precision)))


def test_an_ensemble_is_the_mean_of_its_models():
    models = [network(SAME, 1), network(CONFIGS["patch"], 2)]
    source = TensorSource(torch.randn(1, 30, 31))
    alone = [Predictor([model])(source) for model in models]
    np.testing.assert_allclose(Predictor(models)(source), np.mean(alone, axis=0), atol=1e-6)


@pytest.mark.parametrize("activation", ["relu", "leaky-relu", "silu", "gelu"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_folded_copy_computes_the_same_and_leaves_the_model_alone(name, activation):
    config = replace(CONFIGS[name], activation=activation)
    model = network(config)
    for norm in model.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            norm.weight.data.normal_()
            norm.bias.data.normal_()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    quick = folded(model)
    x = torch.randn(2, 1, 76, 76)
    with torch.inference_mode():
        expected = model(x)
        given = x.clone()
        torch.testing.assert_close(quick(given), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(given, x)
    norms = [m for m in quick.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert config.block == "res" or norms == []
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_models_that_do_not_go_together_are_refused():
    other = SegmentationUNet(UNetConfig(in_channels=3, channels=4, multipliers=(1,)), 1)
    with pytest.raises(InputError, match="cannot be averaged"):
        Predictor([network(SAME), other])
    with pytest.raises(InputError, match="2 outputs of classes cannot be averaged"):
        Predictor([with_depth(), SegmentationUNet(SAME, 2).eval()])


def test_an_overlap_of_more_than_half_is_refused():
    with pytest.raises(InputError, match="tiles of 64 pixels cannot overlap by 40"):
        Predictor([network(SAME)], tile=64, overlap=40)


def test_attention_sees_everything():
    config = UNetConfig(channels=8, multipliers=(1, 2), attention_levels=(1,))
    assert receptive_radius(config) == math.inf


def test_one_logit_is_two_classes():
    logits = torch.randn(1, 5, 5)
    two = torch.cat([torch.zeros_like(logits), logits])
    one, both = probabilities(logits).numpy(), probabilities(two).numpy()
    np.testing.assert_allclose(one[0], both[1], atol=1e-6)
    assert np.array_equal(classes(one), classes(both))
    assert np.array_equal(classes(one, 0.9), (one[0] > 0.9).astype(np.uint8))
