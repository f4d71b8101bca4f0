"""Masks of volumes whose axes run the other way in the body than those of their images."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from segmentation.data.dataset import SegmentationData
from segmentation.data.pairs import Pair, find_pairs
from tests.unet.files.test_volumes import save_dicom
from unet.errors import InputError

nibabel = pytest.importorskip("nibabel", reason="pip install 'unet-diffusion[medical]'")
pytest.importorskip("pydicom", reason="pip install 'unet-diffusion[medical]'")

RNG = np.random.default_rng(0)
SLICES, ROWS, COLUMNS = 3, 4, 5
IMAGE = RNG.integers(1, 1000, (SLICES, ROWS, COLUMNS), dtype=np.uint16)
MASK = np.arange(SLICES * ROWS * COLUMNS, dtype=np.uint8).reshape(IMAGE.shape) % 7
# A head that is tilted a little: directions of x, y and z, then where the first voxel is.
TILT = np.array([[0.98, 0.17, 0], [-0.17, 0.97, 0.17], [0.03, -0.17, 0.98]])


def saved(file: Path, array: Any, affine: Any, *, known: bool = True) -> Path:
    """A NIfTI file of an array (slices, rows, columns)."""
    image = nibabel.Nifti1Image(array.T, affine)
    image.header.set_xyzt_units("mm")
    if not known:
        image.set_sform(None)
        image.set_qform(None)
    nibabel.save(image, file)
    return file


def placed(*steps: float, origin: tuple[float, ...] = (0, 0, 0)) -> Any:
    """The affine of columns, rows and slices along x, y and z."""
    found = np.diag([*steps, 1.0])
    found[:3, 3] = origin
    return found


def masks(pairs: list[Pair]) -> Any:
    return np.stack([pair.read_mask() for pair in pairs])


def test_a_turned_mask_is_read_as_its_image_lies(tmp_path: Path) -> None:
    """nibabel turns the mask, and says so in its affine: what is read is the same each time."""
    affine = placed(-0.5, 0.7, 2.5, origin=(7, -9, 3))
    affine[:3, :3] = TILT @ affine[:3, :3]
    image = saved(tmp_path / "image.nii.gz", IMAGE, affine)
    plain = nibabel.load(saved(tmp_path / "plain.nii.gz", MASK, affine))
    for signs in itertools.product((1, -1), repeat=3):
        file = tmp_path / "mask.nii.gz"
        nibabel.save(
            plain.as_reoriented(np.array([[0, signs[0]], [1, signs[1]], [2, signs[2]]])), file
        )
        pairs = find_pairs(images=image, masks=file)
        assert np.array_equal(masks(pairs), MASK)
        assert pairs[0].flipped == tuple(sign < 0 for sign in signs[::-1])
        told = SegmentationData(pairs, ()).describe()
        assert ("1 mask reoriented to match the image" in told) == (min(signs) < 0)
    assert pairs[0].where.endswith("mask.nii.gz' page 2")


def test_a_series_goes_with_the_masks_of_each_program(tmp_path: Path) -> None:
    """The affines follow DICOM PS3.3 C.7.6.2.1.1: rows of an axial series run to the back."""
    for k in range(SLICES):
        where = {"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}
        where |= {"ImagePositionPatient": [-3, -5, 2.5 * k - 4], "PixelSpacing": [0.7, 0.5]}
        save_dicom(tmp_path / f"series/{9 - k}.dcm", IMAGE[k], 0, **where)
    as_it_lies = placed(-0.5, -0.7, 2.5, origin=(3, 5, -4))
    rows_reversed = placed(-0.5, 0.7, 2.5, origin=(3, 5 - 0.7 * (ROWS - 1), -4))
    upside_down = placed(-0.5, -0.7, -2.5, origin=(3, 5, 2.5 * (SLICES - 1) - 4))
    for array, affine in (
        (MASK, as_it_lies),
        (MASK[:, ::-1], rows_reversed),
        (MASK[::-1], upside_down),
    ):
        file = saved(tmp_path / "mask.nii.gz", array, affine)
        pairs = find_pairs(images=tmp_path / "series", masks=file)
        assert np.array_equal(masks(pairs), MASK)
        assert np.array_equal([pair.read_image()[..., 0] for pair in pairs], IMAGE)


def test_other_grids_are_refused_and_what_is_not_known_lies_as_it_lies(tmp_path: Path) -> None:
    image = saved(tmp_path / "image.nii.gz", IMAGE, placed(-0.5, -0.7, 2.5, origin=(3, 5, -4)))
    careless = saved(tmp_path / "careless.nii.gz", MASK, np.eye(4))
    with pytest.raises(
        InputError, match=r"run to S, P, L in '.*image\.nii\.gz', but to S, A, R in"
    ):
        find_pairs(images=image, masks=careless)
    # In the body its slices are what the image's rows are.
    side = np.eye(4)[:, [0, 2, 1, 3]]
    with pytest.raises(InputError, match=r"but to A, S, R in .*: resample the mask onto the image"):
        find_pairs(images=image, masks=saved(tmp_path / "side.nii.gz", MASK, side))
    for affine, known in ((np.eye(4), False), (placed(-1, -1, 1), True)):
        file = saved(tmp_path / "mask.nii.gz", MASK, affine, known=known)
        assert np.array_equal(masks(find_pairs(images=image, masks=file)), MASK)
