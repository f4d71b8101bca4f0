"""A trained segmentation as a package of the BioImage Model Zoo, https://bioimage.io.

Fiji (deepImageJ), ilastik, napari and others run it, and `bioimageio.core` tests it.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image

from segmentation.data.classes import ClassTable
from segmentation.data.normalisation import known_normalisation
from segmentation.data.regions import known_regions
from segmentation.data.slices import known_slices, middle
from segmentation.export.graph import channels_of, exportable, metadata
from segmentation.model import SegmentationUNet
from segmentation.pictures import class_colours, grey_or_rgb
from segmentation.predict import classes
from unet.errors import InputError
from unet.files.pages import Array
from unet.files.writing import replacing
from unet.geometry import receptive_radius
from unet.weights.formats import OPSET

FORMAT = "0.5.4"  # which later programs read as well; nothing newer is used
NAME = 128  # characters of a name, at most; 5 at least
TEST = 256  # pixels a side of the test image, at most
HALO = 64  # pixels that a tile's border may be wrong by, at most
COVER = 256


def write_package(
    model: SegmentationUNet,
    out: Path,
    image: Array,
    *,
    name: str,
    authors: Sequence[str] = (),
    licence: str | None = None,
) -> None:
    """Writes the zip: description, documentation, cover, test tensors, ONNX and TorchScript.

    Args:
        model: as `load_models` gives it.
        image: (H, W, C) like the training images, for the test tensors and the cover.
        name: of the model, for people.
        authors: their names.
        licence: an SPDX identifier, such as CC-BY-4.0; None: none, which the zoo itself refuses.

    Raises:
        InputError: a package that is not installed; another ending; an image that is too small.
    """
    if out.suffix != ".zip":
        raise InputError(f"a package ends in .zip: give {out.with_suffix('.zip')} instead of {out}")
    if not 5 <= len(name) <= NAME:
        raise InputError(f"the name {name!r} of a package must have from 5 to {NAME} characters")
    radius = receptive_radius(model.config)
    halo = int(min(HALO, radius))
    least = 2 * halo + model.config.stride
    pixels = _crop(image, least)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as held:
        folder = Path(held)
        export = exportable(model)
        export.write("onnx", folder / "model.onnx")
        export.write("torchscript", folder / "model.pt")
        tensor = np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])
        with torch.no_grad():
            found = export.module(torch.from_numpy(tensor.astype(np.float32))).numpy()
        np.save(folder / "input.npy", tensor)
        np.save(folder / "probabilities.npy", found)
        table = ClassTable.from_dict(model.info["classes"])
        shown = middle(pixels, known_slices(model.info))
        regions = known_regions(model.info, table)
        count = len(regions.table.values if regions else table.values)
        _cover(shown, classes(found[0], regions=regions), count).save(folder / "cover.png")
        (folder / "documentation.md").write_text(_documentation(model, name), encoding="utf-8")
        description = _described(folder, model, halo, least, name, authors, licence)
        text = yaml.safe_dump(description, sort_keys=False, allow_unicode=True)
        with replacing(out) as temporary, ZipFile(temporary, "w", ZIP_DEFLATED) as package:
            package.writestr("rdf.yaml", text)
            for file in sorted(folder.iterdir()):
                package.write(file, file.name)


def _described(
    folder: Path,
    model: SegmentationUNet,
    halo: int,
    least: int,
    name: str,
    authors: Sequence[str],
    licence: str | None,
) -> dict[str, Any]:
    """What `rdf.yaml` says of the files in a folder.

    https://bioimage-io.github.io/spec-bioimage-io lists the fields.
    """

    def file(name: str) -> dict[str, str]:
        return {
            "source": name,
            "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(),
        }

    saved = known_normalisation(model.info)
    table = ClassTable.from_dict(model.info["classes"])
    regions = known_regions(model.info, table)
    kind = "region" if regions else "class"
    what = f"one of {len(table.values)} classes" if regions is None else "its regions"
    names = (
        regions.names
        if regions
        else table.names or [f"class_{value}" for value in map(_flat, table.values)]
    )
    channels = channels_of(model) or [f"channel{i}" for i in range(len(saved.mean))]
    axes = ("y", "x")
    length = {"min": least, "step": 1}
    same = [{"tensor_id": "image", "axis_id": axis} for axis in axes]
    return {
        "format_version": FORMAT,
        "type": "model",
        "name": name,
        "description": f"A U-Net that gives every pixel {what}",
        "authors": [{"name": author} for author in authors],
        **({} if licence is None else {"license": licence}),
        "documentation": "documentation.md",
        "covers": ["cover.png"],
        "tags": ["unet", "2d", "segmentation", "semantic-segmentation", "pytorch"],
        "inputs": [
            {
                "id": "image",
                "description": "pixels as files hold them: the model normalises them itself",
                "axes": [
                    {"type": "batch"},
                    {"type": "channel", "channel_names": _identifiers(channels)},
                    *({"type": "space", "id": axis, "size": length} for axis in axes),
                ],
                "test_tensor": file("input.npy"),
                "data": {"type": saved.dtype},
                "preprocessing": [{"id": "ensure_dtype", "kwargs": {"dtype": "float32"}}],
            }
        ],
        "outputs": [
            {
                "id": "probabilities",
                "description": f"one channel per {kind}: {metadata(model)['decision']}",
                "axes": [
                    {"type": "batch"},
                    {"type": "channel", "channel_names": _identifiers(names)},
                    *(
                        {"type": "space", "id": size["axis_id"], "halo": halo, "size": size}
                        for size in same
                    ),
                ],
                "test_tensor": file("probabilities.npy"),
                "data": {"type": "float32", "range": [0.0, 1.0]},
            }
        ],
        "weights": {
            "onnx": {**file("model.onnx"), "opset_version": OPSET, "parent": "torchscript"},
            "torchscript": {
                **file("model.pt"),
                "pytorch_version": torch.__version__.partition("+")[0],
            },
        },
    }


def _crop(image: Array, least: int) -> Array:
    """The middle of an image, of TEST pixels a side or as many as the package needs."""
    side = max(TEST, least)
    if min(image.shape[:2]) < least:
        raise InputError(
            f"the image for the package has {image.shape[0]} x {image.shape[1]} pixels, but its "
            f"test needs {least} a side: give a larger one"
        )
    top, left = (max(0, n - side) // 2 for n in image.shape[:2])
    return image[top : top + side, left : left + side]


def _cover(pixels: Array, found: NDArray[np.uint8], count: int) -> Image.Image:
    """The image beside its classes, twice as wide as high, as the zoo shows it."""
    sheet = Image.new("RGB", (2 * COVER, COVER))
    for i, picture in enumerate((grey_or_rgb(pixels), class_colours(found, count))):
        side = min(picture.shape[:2])
        way = Image.Resampling.NEAREST if i else Image.Resampling.LANCZOS
        square = Image.fromarray(picture[:side, :side]).resize((COVER, COVER), way)
        sheet.paste(square, (i * COVER, 0))
    return sheet


def _documentation(model: SegmentationUNet, name: str) -> str:
    said_of = {key: text for key, text in metadata(model).items() if text not in ("", "[]")}
    rows = "\n".join(f"| {key} | {text.replace('|', ' ')} |" for key, text in said_of.items())
    return (
        f"# {name}\n\nA U-Net of the package unet-diffusion. Normalisation, padding and softmax or "
        f"sigmoid are inside.\n\n| | |\n|---|---|\n{rows}\n\n## Validation\n\nThe test tensors "
        "hold an image and PyTorch's probabilities of it.\n"
    )


def _identifiers(names: Sequence[str]) -> list[str]:
    """Names as the format has them: letters, digits and _, each once."""
    found: list[str] = []
    for i, name in enumerate(names):
        plain = "".join(c if c.isascii() and c.isalnum() else "_" for c in name)
        plain = plain if plain.isidentifier() else f"_{plain}"
        found.append(plain if plain not in found else f"{plain}_{i}")
    return found


def _flat(value: int | tuple[int, ...]) -> str:
    return "_".join(map(str, value)) if isinstance(value, tuple) else str(value)
