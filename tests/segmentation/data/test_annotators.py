"""Masks of several annotators: generated ones that disagree in known ways, and folders of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from segmentation.data.annotators import COUNT, annotated_stack
from segmentation.data.layouts import _annotated, find_layout
from segmentation.data.pairs import find_pairs
from segmentation.data.phantom import phantom_stack
from segmentation.data.splits import split_pairs
from segmentation.training import annotated_pairs
from tests.costs import blurs
from unet import InputError
from unet.files.images import write_image


def test_annotators_disagree_as_they_are_said_to():
    images, masks = annotated_stack(3, (128, 96), seed=1)
    plain, labels = phantom_stack(3, (128, 96), seed=1)
    assert np.array_equal(images, plain)
    assert np.array_equal(masks[:, 2], labels)
    assert masks.shape == (3, COUNT, 128, 96)
    cell = masks == 255
    assert (cell[:, 3:] <= cell[:, :3]).all()  # a thick pen only takes away
    assert (cell[:, 0] <= cell[:, 2]).all()  # so does who counts organelles out
    assert (cell[:, 1] >= cell[:, 2]).all()  # who overlooks membranes sees more cell
    for a, b in ((0, 2), (1, 2), (5, 2)):
        assert 0.005 < (cell[:, a] != cell[:, b]).mean() < 0.3
    with pytest.raises(InputError, match="annotators: 0 images"):
        annotated_stack(0)


def write(folder: Path, layout: str) -> Path:
    images, masks = annotated_stack(3, (32, 40))
    for i in range(3):
        write_image(folder / f"images/{i}.png", images[i])
        for a in range(2):
            write_image(folder / layout.format(a=a + 1, i=i), masks[i, a])
    return folder


@pytest.mark.parametrize("layout", ["masks/{a}/{i}.png", "masks-{a}/{i}.png"])
def test_a_folder_of_each_annotator_gives_a_pair_for_each_mask(tmp_path, layout):
    pairs = find_pairs(write(tmp_path, layout))
    images, masks = annotated_stack(3, (32, 40))
    assert len(pairs) == len({pair.name for pair in pairs}) == 6
    for n, pair in enumerate(pairs):
        assert np.array_equal(pair.read_image()[..., 0], images[n // 2])
        assert np.array_equal(pair.read_mask(), masks[n // 2, n % 2])
    for split in (split_pairs(pairs), split_pairs(pairs, fold="3/3")):
        assert [p.name for p in split[1]] == [p.name for p in pairs[4:]]
    train, val = split_pairs(pairs, val_names=[pairs[1].name])
    assert val == pairs[:2]
    assert train == pairs[2:]
    assert split_pairs(annotated_pairs(2, 0, (16, 16)))[1][0].name == "1_1"
    with pytest.raises(InputError, match="single image, with 2 masks"):
        split_pairs(pairs[:2])


def test_files_that_could_be_annotators_or_objects_are_a_question(tmp_path):
    with pytest.raises(InputError, match=r"masks/1/0\.png, masks/2/0\.png; of several objects"):
        find_layout(write(tmp_path, "masks/{i}_{a}.png"))


def test_an_annotator_may_have_left_an_image_out_but_none_is_without_a_mask(tmp_path):
    folder = write(tmp_path, "masks/{a}/{i}.png")
    (folder / "masks/2/1.png").unlink()
    assert len(find_pairs(folder)) == 5
    (folder / "masks/1/1.png").unlink()
    with pytest.raises(InputError, match=r"1 image without mask: 1\.png"):
        find_pairs(folder)


def test_whether_many_masks_are_of_annotators_is_told_at_once():
    """In time linear in their number: 50,000 took 25 minutes when each was compared with each."""
    images = [Path(f"image/{i}.png") for i in range(4000)]
    masks = [Path(f"label/{i}_mask.png") for i in range(4000)]
    assert blurs(_annotated, images, masks, Path("label"), calls=1) < 60
