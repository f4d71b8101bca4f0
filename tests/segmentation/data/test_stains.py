from __future__ import annotations

import numpy as np
import pytest

from segmentation.data.stains import WHITE, stained_slice, stained_stack
from segmentation.training import stained_pairs
from unet.errors import InputError
from unet.files.pages import Reading


def test_a_seed_gives_one_image_and_another_seed_another() -> None:
    one, same, other = (stained_slice(seed, (64, 80)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.image, same.image)
    assert (one.image != other.image).mean() > 0.5
    assert one.image.shape == (64, 80, 2)
    assert one.image.dtype == np.uint16


def test_labels_agree_and_each_stain_shines_in_its_class() -> None:
    found = stained_slice(0)
    assert ((found.cells > 0) == (found.classes > 0)).all()
    assert found.image.max() <= WHITE
    means = [[found.image[..., c][found.classes == k].mean() for k in range(3)] for c in (0, 1)]
    assert means[0][2] > 3 * max(means[0][:2])
    assert means[1][1] > 3 * means[1][0]


def test_channels_are_chosen_by_name() -> None:
    both, one = stained_pairs(1, 0), stained_pairs(1, 0, Reading(channels=("cytoplasm",)))
    np.testing.assert_array_equal(one[0].read_image()[..., 0], both[0].read_image()[..., 1])
    assert one[0].info.names == ("cytoplasm",)


def test_a_stack_is_its_slices_and_small_ones_are_refused() -> None:
    images, classes = stained_stack(2, (32, 40), seed=3)
    second = stained_slice(3 * 100_003 + 1, (32, 40))
    np.testing.assert_array_equal(images[1], second.image)
    np.testing.assert_array_equal(classes[1], second.classes)
    with pytest.raises(InputError, match="at least 32 x 32"):
        stained_slice(0, (31, 40))
