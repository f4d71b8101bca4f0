"""Images with masks: the pairs of a data folder, and their splits.

Files, slices of stacks and arrays in memory all become a `Pair` and go the same way from there.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
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

    def read_image(self) -> Array:
        """(H, W, C), as `unet.files.images.read_image`."""
        if isinstance(self.image, Path):
            return read_image(self.image, self.page)
        return self.image if self.image.ndim == 3 else self.image[:, :, None]

    def read_mask(self) -> Array:
        """(H, W) or (H, W, 3), as `unet.files.images.read_mask`."""
        return read_mask(self.mask, self.page) if isinstance(self.mask, Path) else self.mask


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


def split_pairs(
    pairs: Sequence[Pair],
    val: float = 0.2,
    fold: str | None = None,
    val_names: Sequence[str] | None = None,
) -> tuple[list[Pair], list[Pair]]:
    """Training and validation pairs, by name, by fold, or else the last `val` of them.

    By default validation is one contiguous block, since neighbouring slices of a stack look alike.

    Args:
        val: share for validation, above 0 and below 1; at least one pair is on each side.
        fold: "k/n": the k-th of n contiguous blocks, from 1.
        val_names: names, 0-based positions, or ranges "24-29" of either; a name goes first.

    Raises:
        InputError: fewer than two pairs, a bad share, fold or name, or nothing left to train on.
    """
    count, names = len(pairs), [pair.name for pair in pairs]
    if count < 2:
        raise InputError(f"{count} image cannot be split; validation needs a second one")
    if val_names is not None and fold is not None:
        raise InputError("give a fold or validation images, not both")
    if val_names is not None:
        chosen = {i for entry in val_names for i in _positions(entry, names)}
    elif fold is not None:
        match = re.fullmatch("([0-9]{1,9})/([0-9]{1,9})", fold)
        k, n = map(int, match.groups()) if match else (0, 0)
        if not 1 <= k <= n or not 2 <= n <= count:
            raise InputError(
                f"fold {fold!r}: give k/n, such as 1/{min(5, count)}, k <= n <= {count}"
            )
        chosen = set(range(count * (k - 1) // n, count * k // n))
    else:
        if not 0 < val < 1:
            raise InputError(f"validation share {val}: give a number between 0 and 1")
        chosen = set(range(count - min(max(round(val * count), 1), count - 1), count))
    if not 0 < len(chosen) < count:
        raise InputError(f"{len(chosen)} of {count} images for validation; leave some on each side")
    train = [pair for i, pair in enumerate(pairs) if i not in chosen]
    return train, [pairs[i] for i in sorted(chosen)]


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
                f"{str(without[0].parent)!r}: {len(without)} {what}s without {other}: {names}; "
                f"a mask is named as its image, or with {', '.join(_MASK_SUFFIXES)} at the end"
            )
    return files


def _positions(entry: str, names: list[str]) -> range:
    ends = re.fullmatch("([0-9]{1,9})-([0-9]{1,9})", entry)
    found = []
    for name in ends.groups() if ends and entry not in names else (entry,):
        if name in names:
            found.append(names.index(name))
        elif re.fullmatch("[0-9]{1,9}", name) and int(name) < len(names):
            found.append(int(name))
        else:
            raise InputError(f"validation image {name!r}: neither a name nor one of {len(names)}")
    return range(found[0], found[-1] + 1)


def _size(info: ImageInfo) -> str:
    return f"{info.height} x {info.width}" + (f", {info.pages} pages" if info.pages > 1 else "")


def kind(info: ImageInfo) -> str:
    return f"{'grey' if info.channels == 1 else 'RGB'} {info.dtype}"
