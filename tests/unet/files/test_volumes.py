"""Volumes: each kind of file gives the slices of the array that was saved, whole and in parts."""

from __future__ import annotations

import builtins
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unet import InputError
from unet.files import rasters
from unet.files.images import Blocks, image_info, list_images, read_image, read_mask
from unet.files.pages import Reading
from unet.files.rasters import open_raster
from unet.files.volumes import is_volume, volume_name

ARRAY = np.random.default_rng(0).integers(0, 255, (2, 3, 5, 20, 30)).astype(np.uint16)  # TCZYX


def save_zarr(path: Path, array: Any, version: int = 3, **more: Any) -> Any:
    zarr = pytest.importorskip("zarr", reason="pip install 'unet-diffusion[zarr]'")
    group = zarr.open_group(str(path), mode="w", zarr_format=version)
    chunks = tuple(min(n, 8) for n in array.shape)
    made = group.create_array("full", shape=array.shape, dtype=array.dtype, chunks=chunks, **more)
    made[...] = array
    return group


def save_ome(path: Path, array: Any, axes: str, version: int, names: tuple[str, ...] = ()) -> None:
    group = save_zarr(path, array, version)
    small = array[..., ::2, ::2]
    half = group.create_array("half", shape=small.shape, dtype=small.dtype)
    half[...] = small
    kinds = {"t": "time", "c": "channel"}
    described: dict[str, Any] = {
        "multiscales": [
            {
                "axes": [{"name": a, "type": kinds.get(a, "space")} for a in axes.lower()],
                "datasets": [
                    {"path": p, "coordinateTransformations": [{"type": "scale", "scale": s}]}
                    for p, s in (("full", [0.5] * len(axes)), ("half", [1.0] * len(axes)))
                ],
            }
        ]
    }
    if names:
        described["omero"] = {"channels": [{"label": name} for name in names]}
    if version == 2:
        described["multiscales"][0]["version"] = "0.4"
        group.attrs.update(described)
    else:
        group.attrs["ome"] = {"version": "0.5", **described}


def check_pages(path: Path, pages: Any, reading: Reading | None = None) -> None:
    """That a file's slices are these (N, H, W, C), read whole and by rectangles."""
    reading = reading or Reading()
    info = image_info(path, reading)
    assert (info.pages, info.height, info.width, info.channels) == pages.shape
    for i, wanted in enumerate(pages):
        page = None if len(pages) == 1 else i
        found = read_image(path, page, reading)
        assert found.dtype == info.dtype
        assert np.array_equal(found, wanted)
        blocks = open_raster(path, page, info, reading)
        assert blocks.shape == wanted.shape
        for rows, columns in ((slice(3, 9), slice(1, 15)), (slice(None, None, 4), slice(None))):
            assert np.array_equal(blocks[rows, columns], wanted[rows, columns])
        assert np.array_equal(blocks[2:5], wanted[2:5])
        assert np.array_equal(np.asarray(blocks), wanted)


@pytest.fixture(params=[2**24, 10], ids=["whole", "blocks"])
def in_parts(request: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(rasters, "IN_MEMORY", request.param)


@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("axes", ["TCZYX", "ZYX", "CYX", "YX"])
def test_ome_zarr_is_read_by_its_axes(tmp_path, version, axes):
    array = ARRAY[tuple(slice(None) if a in axes else 0 for a in "TCZYX")]
    save_ome(tmp_path / "x.zarr", array, axes, version)
    moved = np.moveaxis(ARRAY if "C" in axes else ARRAY[:, :1], 1, -1)  # TZYXC
    if "T" not in axes:
        moved = moved[:1]
    if "Z" not in axes:
        moved = moved[:, :1]
    pages = moved.reshape(-1, *moved.shape[2:])
    check_pages(tmp_path / "x.zarr", pages)
    check_pages(tmp_path / "x.zarr/full", pages)  # a level knows its axes, too
    assert image_info(tmp_path / "x.zarr").axes == axes


def test_channels_are_chosen_by_the_names_of_omero(tmp_path):
    save_ome(tmp_path / "x.zarr", ARRAY, "TCZYX", 3, ("dapi", "gfp", "rfp"))
    assert image_info(tmp_path / "x.zarr").names == ("dapi", "gfp", "rfp")
    pages = np.moveaxis(ARRAY, 1, -1).reshape(-1, 20, 30, 3)[..., [2, 0]]
    check_pages(tmp_path / "x.zarr", pages, Reading(channels=("rfp", "dapi")))


@pytest.mark.parametrize("version", [2, 3])
def test_plain_zarr_says_its_axes_or_is_told(tmp_path, version):
    zarr = pytest.importorskip("zarr", reason="pip install 'unet-diffusion[zarr]'")
    array = ARRAY[0, :, 0]  # three planes of 20 x 30
    made = zarr.create_array(
        str(tmp_path / "x.zarr"), data=np.asfortranarray(array), zarr_format=version
    )
    check_pages(tmp_path / "x.zarr", array[..., None])
    check_pages(tmp_path / "x.zarr", np.moveaxis(array, 0, -1)[None], Reading(axes="CYX"))
    turned = array.transpose(0, 2, 1)[..., None]
    check_pages(tmp_path / "x.zarr", turned, Reading(axes="ZXY"))
    if version == 2:  # as xarray says it
        made.attrs["_ARRAY_DIMENSIONS"] = ["time", "x", "y"]
        check_pages(tmp_path / "x.zarr", turned)
        with pytest.raises(InputError, match="axes ZCYX name 4 axes, but it has 3"):
            image_info(tmp_path / "x.zarr", Reading(axes="ZCYX"))


def test_masks_keep_whole_numbers_and_floats_become_float32(tmp_path):
    labels = ARRAY[0, 0].astype(np.int64) + 2**30
    save_ome(tmp_path / "l.zarr", labels, "ZYX", 3)
    assert np.array_equal(read_mask(tmp_path / "l.zarr", 2), labels[2])
    save_ome(tmp_path / "b.zarr", ARRAY[0, 0] > 99, "ZYX", 2)
    assert np.array_equal(read_mask(tmp_path / "b.zarr", 2), 255 * (ARRAY[0, 0, 2] > 99))
    save_ome(tmp_path / "f.zarr", ARRAY[0, 0] / 7, "ZYX", 2)
    assert read_image(tmp_path / "f.zarr", 0).dtype == np.float32


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("none.zarr", "there is no Zarr store"),
        ("x.zarr/none", "there is no Zarr array or group 'none'"),
        ("several.zarr", r"which array is meant\? It holds several: a, b; name one"),
        ("empty.zarr", "which array is meant.* It holds none"),
        ("five.zarr", "name its axes, such as ZCYX"),
        ("line.zarr", "its shape"),
        ("text.zarr", "not numbers that are pixels"),
        ("pickled.zarr", "not numbers that are pixels"),
        ("codec.zarr", "a codec that is not installed"),
        ("cut.zarr", "not an image, or a damaged one"),
        ("complex.zarr", "not numbers"),
        ("datasets.zarr", "multiscales name no datasets"),
        ("twice.zarr", "name them with --axes"),
        ("s3://bucket/x.zarr", "an address on the Web"),
    ],
)
def test_what_is_no_zarr_image_is_one_sentence(tmp_path, monkeypatch, path, sentence):
    zarr = pytest.importorskip("zarr", reason="pip install 'unet-diffusion[zarr]'")
    numcodecs = pytest.importorskip("numcodecs")
    monkeypatch.chdir(tmp_path)
    save_ome(Path("x.zarr"), ARRAY[0, 0], "ZYX", 3)
    save_ome(Path("twice.zarr"), ARRAY[0, 0], "ZZY", 3)
    zarr.open_group("empty.zarr", mode="w")
    group = zarr.open_group("several.zarr", mode="w")
    for name in "ab":
        group.create_array(name, data=ARRAY[0, 0, 0])
    zarr.create_array("five.zarr", data=ARRAY)
    zarr.create_array("line.zarr", data=ARRAY.ravel())
    zarr.create_array("complex.zarr", data=ARRAY[0, 0].astype(complex))
    zarr.create_array("text.zarr", data=np.array([["a", "b"], ["c", "d"]]))
    save_ome(Path("datasets.zarr"), ARRAY[0, 0], "ZYX", 2)
    attributes = json.loads(Path("datasets.zarr/.zattrs").read_text())
    attributes["multiscales"][0]["datasets"] = []
    Path("datasets.zarr/.zattrs").write_text(json.dumps(attributes))
    zarr.create_array(
        "pickled.zarr",
        shape=(8, 8),
        dtype="u1",
        chunks=(8, 8),
        zarr_format=2,
        filters=[numcodecs.Pickle()],
        compressors=None,
    )
    zarr.create_array("codec.zarr", data=ARRAY[0, 0], zarr_format=2)
    file = Path("codec.zarr/.zarray")
    said = json.loads(file.read_text())
    file.write_text(json.dumps(said | {"compressor": {"id": "unheard-of"}}))
    zarr.create_array("cut.zarr", data=ARRAY[0, 0])
    for chunk in Path("cut.zarr/c").rglob("*"):
        if chunk.is_file():
            chunk.write_bytes(chunk.read_bytes()[:-30])
    with pytest.raises(InputError, match=sentence) as error:
        read_image(Path(path), 0)
    assert str(Path(path)) in str(error.value)


def test_a_package_that_is_missing_is_named_with_what_brings_it(tmp_path, monkeypatch):
    known = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] in ("zarr", "h5py", "nibabel", "pydicom"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return known(name, *args, **kwargs)

    for module in ("zarrs", "hdf5", "nifti", "dicom"):
        monkeypatch.delitem(sys.modules, f"unet.files.{module}", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    (tmp_path / "dicom").mkdir()
    (tmp_path / "dicom/1.dcm").write_bytes(bytes(128) + b"DICM")
    extras = {"x.zarr": "zarr", "x.h5": "hdf5", "x.nii.gz": "medical", "dicom": "medical"}
    for name, extra in extras.items():
        with pytest.raises(InputError, match=rf'pip install "unet-diffusion\[{extra}\]"'):
            image_info(tmp_path / name)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("a/x.zarr", "x"),
        ("a/x.ome.zarr/0", "x_0"),
        ("x.h5", "x"),
        ("x.HDF5:/volumes/raw", "x_volumes_raw"),
        ("a.b.nii.gz", "a.b"),
        ("a/x.png", None),
        ("zarr", None),
        ("zarr/x.tif", None),
    ],
)
def test_volumes_are_told_by_their_names(path, name):
    assert is_volume(Path(path)) == (name is not None)
    if name is not None:
        assert volume_name(Path(path)) == name


def test_blocks_are_what_large_slices_give(tmp_path, monkeypatch):
    monkeypatch.setattr(rasters, "IN_MEMORY", 10)
    save_ome(tmp_path / "x.zarr", ARRAY[0, 0], "ZYX", 3)
    assert isinstance(open_raster(tmp_path / "x.zarr", 1), Blocks)


# -- HDF5


def save_hdf5(path: Path, labels: str = "", **arrays: Any) -> None:
    h5py = pytest.importorskip("h5py", reason="pip install 'unet-diffusion[hdf5]'")
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            made = file.create_dataset(f"in/{name}", data=array, chunks=array.ndim > 2 or None)
            for dimension, label in zip(made.dims, labels, strict=False):
                dimension.label = label


@pytest.mark.usefixtures("in_parts")
def test_a_dataset_of_hdf5_is_read_by_its_axes(tmp_path):
    pages = np.moveaxis(ARRAY, 1, -1).reshape(-1, 20, 30, 3)
    save_hdf5(tmp_path / "x.h5", "tczyx", raw=ARRAY)
    check_pages(tmp_path / "x.h5", pages)
    save_hdf5(tmp_path / "y.hdf5", raw=ARRAY, labels="")
    check_pages(tmp_path / "y.hdf5", pages, Reading(axes="TCZYX"))
    save_hdf5(tmp_path / "z.h5", raw=ARRAY[0, 0], mask=ARRAY[1, 0])
    check_pages(tmp_path / "z.h5:/in/mask", ARRAY[1, 0, ..., None])
    with pytest.raises(InputError, match=r"which dataset is meant.*several: /in/mask, /in/raw"):
        image_info(tmp_path / "z.h5")
    with pytest.raises(InputError, match="no dataset 'in/none'"):
        image_info(tmp_path / "z.h5:/in/none")
    with pytest.raises(InputError, match="no file"):
        image_info(tmp_path / "none.h5")
    with pytest.raises(InputError, match="name its axes"):
        image_info(tmp_path / "y.hdf5")
    (tmp_path / "damaged.h5").write_bytes((tmp_path / "x.h5").read_bytes()[:3000])
    with pytest.raises(InputError, match="damaged one"):
        image_info(tmp_path / "damaged.h5")
    save_hdf5(tmp_path / "text.h5", raw=np.array([[b"a", b"b"]], object))
    with pytest.raises(InputError, match="objects or text"):
        image_info(tmp_path / "text.h5:in/raw")


# -- NIfTI


@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("axes", [2, 3, 4])
def test_nifti_is_turned_to_rows_and_columns(tmp_path, ending, axes):
    nibabel = pytest.importorskip("nibabel", reason="pip install 'unet-diffusion[medical]'")
    array = ARRAY[(0,) * (4 - axes)][:, 0] if axes == 4 else ARRAY[0, 0][(0,) * (3 - axes)]
    path = tmp_path / f"x{ending}"
    nibabel.save(nibabel.Nifti1Image(array.T, np.diag([2.0, 2.0, 5.0, 1.0])), path)  # TZYX
    pages = array.reshape(-1, 20, 30, 1)
    check_pages(path, pages)
    check_pages(path, pages)
    assert image_info(path).dtype == "uint16"
    assert np.array_equal(
        read_mask(path, None if axes == 2 else 1), pages[min(1, len(pages) - 1), ..., 0]
    )


def test_nifti_values_are_scaled_as_its_header_says(tmp_path):
    nibabel = pytest.importorskip("nibabel", reason="pip install 'unet-diffusion[medical]'")
    image = nibabel.Nifti1Image(ARRAY[0, 0].T.astype(np.int16), np.eye(4))
    image.header.set_slope_inter(0.5, -10)
    image.header.set_data_dtype(np.int16)
    nibabel.save(image, tmp_path / "x.nii.gz")
    stored = nibabel.load(tmp_path / "x.nii.gz")
    assert stored.dataobj.slope == 0.5
    check_pages(tmp_path / "x.nii.gz", np.float32(stored.get_fdata()).T[..., None])
    nibabel.save(nibabel.Nifti1Image(ARRAY[1, 0].T, np.eye(4)), tmp_path / "x.nii.gz")
    check_pages(tmp_path / "x.nii.gz", ARRAY[1, 0, ..., None])  # another file of the same name


def test_what_is_no_nifti_image_is_one_sentence(tmp_path):
    nibabel = pytest.importorskip("nibabel", reason="pip install 'unet-diffusion[medical]'")
    with pytest.raises(InputError, match="no such file"):
        image_info(tmp_path / "none.nii")
    (tmp_path / "x.nii").write_bytes(b"nothing")
    with pytest.raises(InputError, match="damaged one"):
        image_info(tmp_path / "x.nii")
    nibabel.save(nibabel.Nifti1Image(ARRAY.T, np.eye(4)), tmp_path / "five.nii")
    with pytest.raises(InputError, match="it has 5 axes"):
        image_info(tmp_path / "five.nii")
    colours = np.zeros((4, 5, 6), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nibabel.save(nibabel.Nifti1Image(colours, np.eye(4)), tmp_path / "rgb.nii")
    with pytest.raises(InputError, match="its pixels are"):
        image_info(tmp_path / "rgb.nii")
    nibabel.save(nibabel.Nifti1Image(ARRAY[0, 0].T, np.eye(4)), tmp_path / "cut.nii.gz")
    whole = (tmp_path / "cut.nii.gz").read_bytes()
    (tmp_path / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="damaged one"):
        read_image(tmp_path / "cut.nii.gz", 4)


# -- DICOM


def save_dicom(file: Path, array: Any, place: float, **more: Any) -> None:
    pydicom = pytest.importorskip("pydicom", reason="pip install 'unet-diffusion[medical]'")
    meta = pydicom.dataset.FileMetaDataset()
    meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    head = pydicom.Dataset()
    head.file_meta = meta
    head.SOPClassUID, head.SOPInstanceUID = meta.MediaStorageSOPClassUID, "1.2.3"
    head.Rows, head.Columns = array.shape[:2]
    head.SamplesPerPixel, head.PhotometricInterpretation = 1, "MONOCHROME2"
    if array.ndim == 3:
        head.SamplesPerPixel, head.PhotometricInterpretation = 3, "RGB"
        head.PlanarConfiguration = 0
    head.BitsAllocated = head.BitsStored = 8 * array.dtype.itemsize
    head.HighBit, head.PixelRepresentation = head.BitsStored - 1, int(array.dtype.kind == "i")
    head.SeriesInstanceUID, head.PixelSpacing = "1.2", [0.5, 0.25]
    head.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]  # coronal: the normal is y
    head.ImagePositionPatient = [7, place, 9]
    head.PixelData = array.tobytes()
    for name, value in more.items():
        setattr(head, name, value)
    file.parent.mkdir(exist_ok=True)
    head.save_as(file, enforce_file_format=True)


@pytest.mark.usefixtures("in_parts")
def test_a_dicom_series_is_in_the_order_of_its_places(tmp_path):
    pytest.importorskip("pydicom", reason="pip install 'unet-diffusion[medical]'")
    for name, at in zip("cadbe", range(5), strict=True):
        save_dicom(tmp_path / f"s/{name}", ARRAY[0, 0, at], 3.0 * at - 4)
    check_pages(tmp_path / "s", ARRAY[0, 0, ..., None])
    assert image_info(tmp_path / "s").dtype == "uint16"
    for name, at in zip("cadbe", range(5), strict=True):
        stored = ARRAY[0, 0, at].astype(np.int16) - 100
        scaled = {"RescaleSlope": 2 + at % 2, "RescaleIntercept": -1024}
        save_dicom(tmp_path / f"ct/{name}.dcm", stored, 3.0 * at - 4, **scaled)
    units = 2 + np.arange(5)[:, None, None] % 2
    hounsfield = (ARRAY[0, 0].astype(np.float32) - 100) * units - 1024
    check_pages(tmp_path / "ct", hounsfield[..., None].astype(np.float32))


def test_a_folder_of_dicom_series_says_how_to_convert_them(tmp_path):
    for patient in "ab":
        save_dicom(tmp_path / f"{patient}/1.dcm", ARRAY[0, 0, 0], 1)
    with pytest.raises(InputError, match=r"a in it is a DICOM series: .*dcm2niix"):
        list_images(tmp_path)


def test_colours_of_dicom_are_channels(tmp_path):
    pytest.importorskip("pydicom", reason="pip install 'unet-diffusion[medical]'")
    colours = np.moveaxis(ARRAY[:, :, 0], 1, -1).astype(np.uint8)
    for at in range(2):
        save_dicom(tmp_path / f"s/{at}.dcm", np.ascontiguousarray(colours[at]), at)
    check_pages(tmp_path / "s", colours)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"SeriesInstanceUID": "1.9"}, "which series is meant.*2 series"),
        ({"NumberOfFrames": 2}, "holds several images"),
        ({"PhotometricInterpretation": "MONOCHROME1"}, "white as zero"),
        ({"Rows": 10}, "but the first one is"),
        ({"PixelData": b"12"}, "cannot be decoded"),
    ],
)
def test_what_is_no_dicom_series_is_one_sentence(tmp_path, more, sentence):
    pytest.importorskip("pydicom", reason="pip install 'unet-diffusion[medical]'")
    save_dicom(tmp_path / "s/1.dcm", ARRAY[0, 0, 0], 1)
    save_dicom(tmp_path / "s/2.dcm", ARRAY[0, 0, 1], 2, **more)
    with pytest.raises(InputError, match=sentence):
        read_image(tmp_path / "s", 1)
