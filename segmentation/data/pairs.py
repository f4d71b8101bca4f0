"""Images with masks: the pairs of a data folder.

Files, slices of stacks and arrays in memory all become a `Pair` and go the same way from there.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from segmentation.data.classes import DTYPES, some
from unet.errors import InputError
from unet.files.images import (
    SUFFIXES,
    Array,
    ImageInfo,
    image_info,
    list_images,
    read_image,
    read_mask,
)
from unet.words import counted

_IMAGE_FOLDERS = ("image", "images", "img", "imgs", "imagestr")
_MASK_FOLDERS = ("label", "labels", "mask", "masks", "labelstr")
_MASK_SUFFIXES = ("_mask", "_label", "_seg")
_ISBI_STACKS = ("train-volume.tif", "train-labels.tif")


@dataclass(frozen=True, eq=False, kw_only=True)
class Pair:
    """One image and its mask: two files, a slice of two stacks, or two arrays."""

    name: str
    image: Path | Array
    mask: Path | Array
    info: ImageInfo  # of the image
    page: int | None = None  # 0-based slice of the stacks
    window: tuple[slice, slice] | None = None  # rows and columns of a part of the image

    def read_image(self) -> Array:
        """(H, W, C), as `unet.files.images.read_image`."""
        if isinstance(self.image, Path):
            image = read_image(self.image, self.page)
        else:
            image = self.image if self.image.ndim == 3 else self.image[:, :, None]
        return image if self.window is None else image[self.window]

    def read_mask(self) -> Array:
        """(H, W) or (H, W, 3), as `unet.files.images.read_mask`."""
        mask = read_mask(self.mask, self.page) if isinstance(self.mask, Path) else self.mask
        return mask if self.window is None else mask[self.window]

    @property
    def source(self) -> tuple[str | int, int | None]:
        """The image that it is, or is a part of."""
        return (str(self.image) if isinstance(self.image, Path) else id(self.image)), self.page

    def meets(self, other: Pair) -> bool:
        """Whether this part of an image has a pixel in common with another one of it."""
        if self.window is None or other.window is None:
            return True
        pairs = zip(self.window, other.window, strict=True)
        return all(max(a.start, b.start) < min(a.stop, b.stop) for a, b in pairs)


def find_pairs(
    data: Path | None = None, images: Path | None = None, masks: Path | None = None
) -> list[Pair]:
    """Images and masks that belong together, in natural order; a stack gives a pair per slice.

    `data` holds a folder of images and one of masks (`image/ label/`, `images/ masks/`,
    `imgs/ masks/`, `imagesTr/ labelsTr/`), or both side by side, or ISBI 2012's original stacks;
    or `images` and `masks` are two folders or two files. A mask has the stem of its image, also
    with _mask, _label or _seg; nnU-Net's _0000 at the end of an image's stem does not count.

    Raises:
        InputError: no such folder; an image without mask or the reverse; sizes that differ;
            channels or bit depths that differ over the set. Names the files.
    """
    if images is not None and masks is not None:
        if os.path.isfile(images) and os.path.isfile(masks):
            files = [(images, masks)]
        else:
            files = _match(list_images(images), list_images(masks))
    elif data is None or images is not None or masks is not None:
        raise InputError("give a data folder, or both an image folder and a mask folder")
    else:
        files = _in_folder(data)

    pairs: list[Pair] = []
    for image, mask in files:
        info, of_mask = image_info(image), image_info(mask)
        if (info.height, info.width, info.pages) != (of_mask.height, of_mask.width, of_mask.pages):
            raise InputError(
                f"{_size(info)} in {str(image)!r}, but {_size(of_mask)} in {str(mask)!r}"
            )
        if pairs and (info.channels, info.dtype) != (pairs[0].info.channels, pairs[0].info.dtype):
            raise InputError(
                f"{kind(info)} in {str(image)!r}, but {kind(pairs[0].info)} in "
                f"{str(pairs[0].image)!r}; save all images alike"
            )
        digits = len(str(info.pages - 1))
        for page in range(info.pages):
            slice_name = f"{image.stem}_{page:0{digits}d}" if info.pages > 1 else image.stem
            number = page if info.pages > 1 else None
            pairs.append(Pair(name=slice_name, image=image, mask=mask, info=info, page=number))
    name, times = Counter(pair.name for pair in pairs).most_common(1)[0]
    if times > 1:
        raise InputError(f"{times} images are named {name!r}; rename all but one")
    return pairs


def pairs_from_arrays(images: Array, masks: Array) -> list[Pair]:
    """Pairs named "0", "1", ... of uint8, uint16 or float32 (N, H, W[, C]) and masks (N, H, W)."""
    channels = images.shape[3] if images.ndim == 4 else 1
    known = channels in (1, 3) and images.dtype.name in DTYPES
    if images.ndim not in (3, 4) or images.shape[:3] != masks.shape or not known:
        raise InputError(
            f"{images.dtype} images {images.shape} and masks {masks.shape} do not fit: give "
            f"{', '.join(DTYPES)} (N, H, W) or (N, H, W, C), C = 1 or 3, and (N, H, W)"
        )
    height, width = masks.shape[1:]
    info = ImageInfo(height=height, width=width, channels=channels, dtype=images.dtype.name)
    return [
        Pair(name=str(i), image=image, mask=mask, info=info)
        for i, (image, mask) in enumerate(zip(images, masks, strict=True))
    ]


def _in_folder(data: Path) -> list[tuple[Path, Path]]:
    stacks = data / _ISBI_STACKS[0], data / _ISBI_STACKS[1]
    if all(os.path.isfile(stack) for stack in stacks):
        return [stacks]
    folders = sorted(path for path in data.glob("*") if path.is_dir())
    images = [folder for folder in folders if folder.name.lower() in _IMAGE_FOLDERS]
    masks = [folder for folder in folders if folder.name.lower() in _MASK_FOLDERS]
    if len(images) == len(masks) == 1:
        return _match(list_images(images[0]), list_images(masks[0]))
    side_by_side = any(path.suffix.lower() in SUFFIXES for path in data.glob("*"))
    if images or masks or (folders and not side_by_side):
        raise InputError(
            f"{str(data)!r}: needs one folder of images ({', '.join(_IMAGE_FOLDERS)}) and one of "
            f"masks ({', '.join(_MASK_FOLDERS)}), but has {some([f.name for f in folders])}; "
            "name the two folders"
        )
    files = list_images(data)
    masks = [file for file in files if file.stem.endswith(_MASK_SUFFIXES)]
    return _match([file for file in files if file not in masks], masks)


def _match(images: list[Path], masks: list[Path]) -> list[tuple[Path, Path]]:
    free = {mask.stem: mask for mask in masks}
    files, alone = [], []
    for image in images:
        stems = dict.fromkeys((image.stem, image.stem.removesuffix("_0000")))
        found = [s + end for s in stems for end in ("", *_MASK_SUFFIXES) if s + end in free]
        if found:
            files.append((image, free.pop(found[0])))
        else:
            alone.append(image)
    used = {mask for _, mask in files}
    unused = [mask for mask in masks if mask not in used]
    for what, other, without in (("image", "mask", alone), ("mask", "image", unused)):
        if without:
            names = some([path.name for path in without])
            raise InputError(
                f"{str(without[0].parent)!r}: {counted(len(without), what)} without {other}: "
                f"{names}; a mask is named as its image, or with {', '.join(_MASK_SUFFIXES)} at "
                "the end"
            )
    return files


def _size(info: ImageInfo) -> str:
    return f"{info.height} x {info.width}" + (f", {info.pages} pages" if info.pages > 1 else "")


def kind(info: ImageInfo) -> str:
    return f"{'grey' if info.channels == 1 else 'RGB'} {info.dtype}"
