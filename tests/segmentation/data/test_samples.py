"""Training samples: what an epoch holds, weights that move with the masks, the picture."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from segmentation.data.augment import Augmentation
from segmentation.data.classes import IGNORE
from segmentation.data.dataset import SegmentationData
from segmentation.data.pairs import pairs_from_arrays
from segmentation.data.phantom import phantom_stack
from segmentation.data.samples import CropSamples
from segmentation.data.weights import border_weights
from segmentation.losses import cross_entropy
from segmentation.model import SegmentationUNet
from segmentation.options import SegmentationOptions
from segmentation.pictures import SAMPLES, augmented, class_legend
from tests.forks import as_spawned
from unet import PRESETS, InputError
from unet.files.pictures import key

FLIPS = Augmentation()


@pytest.fixture(scope="module")
def data() -> SegmentationData:
    pairs = pairs_from_arrays(*phantom_stack(3, (64, 96), seed=2))
    return SegmentationData(pairs[:2], pairs[2:])


def test_an_epoch_sees_each_image_as_often_as_crops_fit(data):
    samples = CropSamples(data, FLIPS, (32, 32), (32, 32))
    assert len(samples) == 2 * (2 * 3)
    assert [samples.name(i) for i in (0, 5, 6, 11)] == ["0", "0", "1", "1"]
    assert len(CropSamples(data, FLIPS, (500, 500), (500, 500))) == 2


def test_a_third_of_the_crops_show_rare_classes() -> None:
    """In turn, each from the images that have it; without one an epoch is what it was."""
    images = np.random.default_rng(0).integers(0, 256, (5, 96, 96), np.uint8)
    masks = np.zeros((5, 96, 96), np.uint8)
    masks[:, :40] = 1
    masks[1, 50:54, 60:64] = 2
    masks[3, 10:16, 10:16] = 2
    masks[3, 80:85, 5:10] = 3
    pairs = pairs_from_arrays(images, masks)
    data = SegmentationData(pairs[:4], pairs[4:])
    assert data.rare == {2: [1, 3], 3: [3]}
    samples = CropSamples(data, FLIPS, (32, 32), (32, 32))
    assert len(samples) == 4 * 9 + 18
    assert [samples.name(i) for i in range(36)] == [str(i // 9) for i in range(36)]
    assert [samples._cut(0, 36 + i) for i in range(4)] == [(1, 2), (3, 3), (3, 2), (3, 3)]
    assert samples._cut(1, 36) == samples._cut(0, 36 + 2)
    for epoch in range(2):
        for i in range(36, 54):
            assert (samples[epoch, i]["mask"] == samples._cut(epoch, i)[1]).any()
    for held_out in (pairs[4:], pairs[3:4]):  # what is held out is not cut
        whole = SegmentationData(pairs[:1], held_out)
        assert whole.rare == {}
        assert len(CropSamples(whole, FLIPS, (32, 32), (32, 32))) == 9


def test_synthetic_images_have_their_share_and_are_in_nothing_else(data):
    """An epoch sees the real images as before; the others take turns, from epoch to epoch."""
    real = [data.pairs[i] for i in (*data.train, *data.val)]
    made = pairs_from_arrays(*phantom_stack(3, (40, 48), seed=9))
    made = [replace(p, name=f"made {p.name}", image=p.image // 2) for p in made]
    both = SegmentationData(real[:2], real[2:], synthetic=made)
    assert both.normalisation == data.normalisation
    assert both.table == data.table
    assert (both.train, both.val, both.synthetic) == (data.train, data.val, range(3, 6))
    for share, others in ((0.5, 12), (0.25, 4), (0.9, 108)):
        samples = CropSamples(both, FLIPS, (32, 32), (32, 32), share=share)
        assert [samples.name(i) for i in range(12)] == ["0"] * 6 + ["1"] * 6
        assert len(samples) == 12 + others
        turns = [(epoch, 12 + i) for epoch in (0, 1) for i in range(min(others, 4))]
        for n, turn in enumerate(turns):
            i = samples._cut(*turn)[0]
            assert n >= 4 or both.pairs[i].name == f"made {n % 3}"
            assert samples[turn]["image"].shape == (1, 32, 32)
    wrong = [replace(made[0], mask=np.where(made[0].mask > 0, 3, 0).astype(np.uint8))]
    with pytest.raises(InputError, match="made 0: unexpected values 3 in"):
        SegmentationData(real[:2], real[2:], synthetic=wrong)
    partly = [
        replace(pair, mask=np.pad(pair.mask[1:], ((1, 0), (0, 0)), constant_values=9))
        for pair in real[:2]
    ]
    blank = [replace(made[0], mask=np.full_like(made[0].mask, 9))]
    with pytest.raises(InputError, match="no pixel of this synthetic mask has a label"):
        SegmentationData(partly, real[2:], synthetic=blank, ignore_value=9)


def test_a_sample_depends_on_seed_epoch_and_index_alone(data):
    make = lambda seed: CropSamples(data, FLIPS, (32, 32), (32, 32), seed=seed)  # noqa: E731
    first, again = make(1)[3, 4], make(1)[3, 4]
    assert all(torch.equal(first[k], again[k]) for k in first)
    others = [make(2)[3, 4], make(1)[4, 4], make(1)[3, 5]]
    assert not any(torch.equal(first["image"], other["image"]) for other in others)


def test_samples_can_be_handed_to_a_process_that_is_spawned(data):
    samples = CropSamples(data, FLIPS, (32, 32), (32, 32), border=(10.0, 5.0))
    torch.testing.assert_close(as_spawned(samples)[3, 4], samples[3, 4], rtol=0, atol=0)


def test_weights_move_with_the_mask(data):
    turned = Augmentation(rotation=180, scale=0.2, elastic=5)
    samples = CropSamples(data, turned, (48, 48), (48, 48), border=(10.0, 5.0))
    whole = samples.weights(0)
    mask = data.load(0)[1]
    np.testing.assert_allclose(whole, border_weights((mask == 1).astype(np.uint8)), rtol=1e-6)
    # Every pair of mask and weight in a sample stands somewhere in the image.
    known = set(zip(mask.ravel().tolist(), whole.numpy().ravel().tolist(), strict=True))
    sample = samples[0, 0]
    found = zip(sample["mask"].flatten().tolist(), sample["weight"].flatten().tolist(), strict=True)
    assert set(found) <= known
    assert sample["weight"].max() > 1


def test_weights_are_between_the_cells_whichever_class_they_are(data):
    swapped = [255 - pair.read_mask() for pair in data.pairs]
    images = np.stack([pair.read_image()[..., 0] for pair in data.pairs])
    other = SegmentationData(pairs_from_arrays(images, np.stack(swapped)))
    plain = CropSamples(data, FLIPS, (48, 48), (48, 48), border=(10.0, 5.0))
    found = CropSamples(other, FLIPS, (48, 48), (48, 48), border=(10.0, 5.0), cells=0)
    for i in range(2):
        assert torch.equal(plain.weights(i), found.weights(i))


def test_training_arrays_are_never_changed(data):
    before = [a.copy() for a in data.load(0)]
    noisy = Augmentation(brightness=1, contrast=1, gamma=1, blur=1, noise=1)
    samples = CropSamples(data, noisy, (32, 32), (32, 32))
    for i in range(len(samples)):
        samples[0, i]["image"].zero_()
    assert all(np.array_equal(a, b) for a, b in zip(before, data.load(0), strict=True))


@pytest.mark.parametrize("border", [None, (10.0, 5.0)])
def test_the_picture_shows_samples_with_masks(data, border):
    samples = CropSamples(data, FLIPS, (32, 32), (32, 32), border=border)
    picture = augmented(samples)
    rows = SAMPLES // 8 * (2 if border is None else 3)
    legend = key(class_legend(data.table), 8 * 36 + 4)
    assert picture.size == (legend.width, rows * 36 + 4 + legend.height)


@pytest.mark.slow
def test_preparing_a_batch_takes_at_most_a_quarter_of_a_step():
    """With the default options, and with every kind of augmentation; the best of three."""
    pairs = pairs_from_arrays(*phantom_stack(2, (512, 512), seed=2))
    data = SegmentationData(pairs[:1], pairs[1:])
    names = Augmentation.__dataclass_fields__
    default = Augmentation(**{n: getattr(SegmentationOptions, n) for n in names})
    model = SegmentationUNet(PRESETS["segmentation"].config, 1)
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters())

    def prepare(samples: CropSamples) -> tuple[torch.Tensor, torch.Tensor]:
        batch = [samples[0, i % len(samples)] for i in range(SegmentationOptions.batch_size)]
        return tuple(torch.stack([s[k] for s in batch]) for k in ("image", "mask"))

    def step(image: torch.Tensor, mask: torch.Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(image)
        cross_entropy(logits, mask).backward()
        optimizer.step()
        optimizer.zero_grad()

    def seconds(work: Callable[..., object], *given: object) -> float:
        times = []
        for _ in range(4):
            start = time.perf_counter()
            work(*given)
            times.append(time.perf_counter() - start)
        return min(times[1:])

    more = {
        "scale": 0.2,
        "brightness": 0.2,
        "contrast": 0.2,
        "gamma": 0.2,
        "blur": 1.0,
        "noise": 0.1,
    }
    for augmentation in (default, replace(default, **more)):
        samples = CropSamples(data, augmentation, (256, 256), (256, 256))
        share = seconds(prepare, samples) / seconds(step, *prepare(samples))
        print(f"share of a step: {share:.3f}")
        assert share <= 0.25


def test_crops_of_a_partly_labelled_image_show_labels_at_all_places() -> None:
    """Each crop has a label, and over many crops each place of it has one as often, nearly."""
    mask = np.full((200, 240), 7, np.uint8)
    mask[100:116, 120:136] = np.arange(256).reshape(16, 16) % 2
    images = np.zeros((1, 200, 240), np.uint8)
    data = SegmentationData(pairs_from_arrays(images, mask[None]), ignore_value=7)
    samples = CropSamples(data, Augmentation(flips=False), (64, 64), (48, 48))
    assert len(samples) == 1
    seen = torch.stack([samples[epoch, 0]["mask"] != IGNORE for epoch in range(400)])
    assert seen.flatten(1).any(dim=1).all()
    share = seen.float().mean(dim=0)
    assert share.min() > 0.3 * share.mean()
    assert share.max() < 2 * share.mean()
