"""Names of files and folders: which are of masks, and which files belong together."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path

IMAGE_FOLDERS = (
    *("image", "images", "img", "imgs", "imagestr", "jpegimages", "leftimg8bit", "raw", "img_dir"),
    *("input", "inputs"),
)
MASK_FOLDERS = (
    *("label", "labels", "mask", "masks", "labelstr", "annotation", "annotations", "gt", "gtfine"),
    *("groundtruth", "ground_truth", "segmentation", "segmentations", "segmentationclass"),
    *("target", "targets", "manual", "1st_manual", "ann_dir"),
)


def mask_folders(folders: Iterable[Path], root: Path) -> list[Path]:
    """Folders of masks, by their names: beside those of their images or below them.

    Args:
        folders: those in or below `root` that images lie in.
    """
    inside: defaultdict[Path, set[str]] = defaultdict(set)  # folders in each; "" is a file
    for folder in set(folders):
        parts = ("", *folder.relative_to(root).parts, "")
        for depth, name in enumerate(parts[1:], 1):
            inside[root.joinpath(*parts[1:depth])].add(name)
    return [
        place / name
        for place, names in inside.items()
        for name in sorted(names)
        if name.lower() in MASK_FOLDERS and any(n.lower() in ("", *IMAGE_FOLDERS) for n in names)
    ]


def mask_files(files: Iterable[Path]) -> list[Path]:
    """Files of masks in the folders of their images, by their names: a_mask.png beside a.png or
    a_raw.png, mask1.png beside image1.png.
    """
    stems: defaultdict[Path, set[str]] = defaultdict(set)
    named = []
    for file in files:
        stem = file.stem.lower()
        stems[file.parent].add(stem)
        if stem.endswith(MASK_FOLDERS) or stem.startswith(MASK_FOLDERS):
            named.append(file)
    return [f for f in named if not stems[f.parent].isdisjoint(_of_images(f.stem.lower()))]


def _of_images(stem: str) -> Iterator[str]:
    """The names that the image of a mask of this name could have."""
    for word in MASK_FOLDERS:
        before, after = stem.removesuffix(word), stem.removeprefix(word)
        if before != stem and before.endswith(("_", "-", ".", " ")):
            yield from (before[:-1], *(before + kind for kind in IMAGE_FOLDERS))
        if after != stem and after and not after[0].isalpha():
            yield from (kind + after for kind in IMAGE_FOLDERS)


def readings(names: Sequence[str]) -> list[list[str]]:
    """What the names of files can mean beside the names of others: as they are, and without the
    beginning, the ending, or both, that all of them share. Only readings that tell all files apart.

    Args:
        names: without suffixes; the folders of paths are kept.
    """
    bare = [os.path.basename(name) for name in names]
    places = [name.removesuffix(own) for name, own in zip(names, bare, strict=True)]
    begins, ends = [0], [0]
    if len(names) > 1:
        ending = _common([name[::-1] for name in bare])[::-1]
        ends += [len(ending) - m.start() for m in re.finditer(r"[_\-. ]", ending)]
        beginning = _common(bare)
        cuts = {m.end() for m in re.finditer(r"[_\-. ]", beginning)}
        cuts |= {len(beginning.rstrip("0123456789"))} - {0}  # image1, mask1
        begins += sorted(cuts, reverse=True)
    found = [[name.removesuffix("_0000") for name in bare]]
    found += [[name[b : len(name) - e] for name in bare] for b, e in product(begins, ends)]
    whole = ([*map("".join, zip(places, of, strict=True))] for of in found if all(of))
    return [of for of in whole if len(set(of)) == len(of)]


def _common(texts: Sequence[str]) -> str:
    """The longest beginning of all of them."""
    first, last = min(texts), max(texts)
    same = (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    return first[: next(same, min(len(first), len(last)))]
