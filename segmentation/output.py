"""Predictions as files: masks with the original values, probabilities, overlays."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from segmentation.classes import ClassTable, Normalisation
from segmentation.model import SegmentationUNet
from segmentation.pictures import grey_or_rgb, overlay
from segmentation.predict import classes, predict_logits, probabilities
from unet.errors import InputError
from unet.images import image_info, list_images, read_image, write_image

Slice = tuple[str, Path, "int | None"]  # name, file, page of a stack


def predict_files(
    model_folder: str,
    source: Path,
    out: Path,
    *,
    threshold: float | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> list[str]:
    """Writes NAME_mask.png, NAME_probability.png and NAME_overlay.png for each image.

    The mask has the values of the training masks. The probability is that of the second of two
    classes, or of the chosen class of more, as 16-bit grey: 65535 is 1.

    Returns:
        What went wrong with the images that failed, a sentence each; the others are written.

    Raises:
        InputError: no usable model or image, or files in the way, before anything is predicted.
    """
    model = SegmentationUNet.from_pretrained(model_folder).to(pick_device(device))
    try:
        table = ClassTable.from_dict(model.info["classes"])
        normalisation = Normalisation.from_dict(model.info["normalisation"])
    except KeyError as error:
        raise InputError(
            f"{model_folder} lacks {error} in its config.json: it was not saved by train_seg.py"
        ) from error
    if threshold is None:
        threshold = float(model.info.get("threshold", 0.5))
    slices = list(find_slices(source))
    if not overwrite:
        for name, _, _ in slices:
            for file in _outputs(out, name):
                if file.exists():
                    raise InputError(f"{file} exists already: give --overwrite or another --out")
    failed = []
    for name, path, page in tqdm(slices, unit="image", disable=None):
        try:
            image = read_image(path, page)
            normalised = torch.from_numpy(normalisation(image))
        except InputError as error:
            failed.append(str(error))
            continue
        probability = probabilities(predict_logits(model, normalised)).cpu().numpy()
        found = classes(probability, threshold)
        mask_file, probability_file, overlay_file = _outputs(out, name)
        write_image(mask_file, table.decode(found))
        chosen = probability.max(axis=0)
        write_image(probability_file, np.round(chosen * 65535).astype(np.uint16))
        write_image(overlay_file, overlay(grey_or_rgb(image), found, len(table.values)))
    for message in failed:
        print(f"error: {message}", file=sys.stderr)
    print(f"{len(slices) - len(failed)} of {len(slices)} images predicted, in {out}")
    return failed


def find_slices(source: Path) -> Iterator[Slice]:
    """The images of a file or folder; a stack gives one for each of its pages."""
    if not source.exists():
        raise InputError(f"--input {source} does not exist: give an image or a folder of images")
    for path in list_images(source) if source.is_dir() else [source]:
        try:
            pages = image_info(path).pages
        except InputError:
            if source.is_file():
                raise
            pages = 1  # its error is reported when its turn comes
        digits = len(str(pages - 1))
        for page in range(pages):
            yield (
                (path.stem, path, None)
                if pages == 1
                else (f"{path.stem}_{page:0{digits}d}", path, page)
            )


def pick_device(name: str) -> torch.device:
    """The device of that name; auto: a GPU where there is one."""
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {name} cannot be used here: {reason}") from error
    return device


def _outputs(out: Path, name: str) -> tuple[Path, Path, Path]:
    kinds = ("mask", "probability", "overlay")
    mask, probability, picture = (out / f"{name}_{kind}.png" for kind in kinds)
    return mask, probability, picture
