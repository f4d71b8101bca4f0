"""Which files of a folder are images and which are their masks, in common layouts. Only names of
files are read, and a few text files that say more: `classes.txt`, nnU-Net's `dataset.json`, and
files of polygons where there are no masks. Whatever is ambiguous is an error that asks, never a
guess.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path, PureWindowsPath

import yaml

from segmentation.data.masks import VOID
from segmentation.data.polygons import (
    BACKGROUND,
    FILE_BYTES,
    Drawing,
    is_yolo,
    read_coco,
    read_labelme,
    read_yolo,
)
from unet.errors import InputError, not_there
from unet.files.folders import IMAGE_FOLDERS, MASK_FOLDERS, readings
from unet.files.images import (
    files_below,
    images_below,
    is_image_file,
    list_images,
    natural_key,
    predictions,
)
from unet.files.mask_values import some
from unet.files.pages import SUFFIXES
from unet.files.shards import find_shards, key_of, read_shards
from unet.files.volumes import is_volume, is_volume_file, volume_name
from unet.files.writing import read_json
from unet.words import counted

TRAIN_FOLDERS, VAL_FOLDERS = ("train", "training"), ("val", "valid", "validation")
_STACKS = ("train-volume.tif", "train-labels.tif")  # of ISBI 2012
_CELLPOSE = re.compile(r"(_seg\.npy|_cp_output\.\w+|_flows\.\w+|_outlines\.\w+|_superpixels\.\w+)$")
_CITYSCAPES = ("_gtFine_labelTrainIds", "_gtFine_labelIds")  # the masks among its pictures
_CLASSES = ("classes.txt", "class_names.txt", "labels.txt")
_NUMBERED = re.compile(r"[-_ ]?[0-9]+$")  # behind the name of a folder of masks
_WORD = "|".join(sorted((*IMAGE_FOLDERS, *MASK_FOLDERS), key=len, reverse=True))
_WORDS = [  # image1.png and mask1.png; a_raw.png and a_mask.png
    re.compile(rf"({_WORD})(?![a-z]).*"),
    re.compile(rf".*(?<![a-z])({_WORD})"),
]
_NAMES_BYTES, _CHUNK = 2**16, 2**22
_PARTS = (("train", TRAIN_FOLDERS), ("val", VAL_FOLDERS), ("test", ("test", "testing")))


@dataclass(frozen=True, kw_only=True)
class Match:
    """The files of one image and of its mask.

    Attributes:
        image: one file, or one for each of its channels in turn.
        mask: one file, or one for each object, or what is drawn.
        part: "train" or "val" where the folder says it.
    """

    name: str
    image: tuple[Path, ...]
    mask: tuple[Path, ...] | Drawing
    part: str = ""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a folder holds.

    Attributes:
        matches: in natural order of their names.
        instances: the masks number objects, or are one object each.
        classes: the name of each mask value, where a file says them.
        ignore_value: the mask value without a label, where a file says it.
        channels: the names of the channels, where a file says them.
        regions: the mask values of each region, where a file says them.
    """

    matches: Sequence[Match]
    instances: bool = False
    classes: Mapping[int, str] = field(default_factory=dict)
    ignore_value: int | None = None
    channels: tuple[str, ...] = ()
    regions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def stem_of(file: Path) -> str:
    """The name without its ending, also without the .ome of an OME-TIFF; that of a volume.

    Accented letters become one character each (NFC), since some systems write them as two.
    """
    name = volume_name(file) if is_volume(file) else file.stem.removesuffix(".ome")
    return unicodedata.normalize("NFC", name)


def find_layout(
    data: Path | None = None, images: Path | None = None, masks: Path | None = None
) -> Layout:
    """The images and masks of a folder, or of two folders or two files or volumes.

    Raises:
        InputError: no such folder; an image without mask or the reverse; two things that both
            could be the masks; damaged JSON. Names the files.
    """
    if images is not None and masks is not None:
        if masks.suffix.lower() == ".json" and masks.is_file():
            return _drawn(_coco(masks, [images], ""))
        if drawn := _labelme(images, masks) or _yolo(images, masks):
            return _drawn(drawn)
        if _is_file(images) and _is_file(masks):
            return Layout(matches=[_pair(images, masks)])
        return Layout(matches=_across(images, masks))
    if data is None or images is not None or masks is not None:
        raise InputError("give a data folder, or both an image folder and a mask folder")
    layout = _in_folder(data)
    return layout if layout.classes else replace(layout, classes=_class_names(data))


def _in_folder(data: Path) -> Layout:
    if shards := find_shards(data):
        return _sharded(shards)
    if is_volume(data):
        raise InputError(
            f"{str(data)!r} is one volume: name it and its masks with --images and --masks"
        )
    if data.is_file():
        raise InputError(
            f"{str(data)!r} is a file: give a folder (of an archive what is unpacked), or the "
            "images and the masks with --images and --masks"
        )
    if not data.is_dir():
        raise InputError(f"{str(data)!r}: {not_there(data, 'folder')}")
    stacks = data / _STACKS[0], data / _STACKS[1]
    if all(os.path.isfile(stack) for stack in stacks):
        return Layout(matches=[_pair(*stacks)])
    folders = sorted(
        p
        for p in data.glob("*")
        if p.is_dir() and not p.name.startswith((".", "__")) and not is_volume_file(p)
    )
    if (data / "imagesTr").is_dir() and (data / "labelsTr").is_dir():
        return _nnunet(data)
    images = [folder for folder in folders if folder.name.lower() in IMAGE_FOLDERS]
    masks = [folder for folder in folders if folder.name.lower() in MASK_FOLDERS]
    if not any(_has_images(folder) for folder in masks) and (
        drawn := _coco_files(data, folders, images, masks)
        or _labelme_folder(data, images, masks)
        or (_yolo(images[0], masks[0]) if len(images) == len(masks) == 1 else [])
    ):
        return _drawn(drawn)
    masks = [folder for folder in masks if _has_images(folder)] or masks
    if len(images) == len(masks) == 1:
        return Layout(matches=_across(images[0], masks[0], _listed_parts(data)))
    several = [f for f in folders if _NUMBERED.sub("", f.name.lower()) in MASK_FOLDERS]
    if len(images) == 1 and not masks and len(several) > 1:  # masks-1/ masks-2/
        files = [file for folder in several for file in _tree(folder)]
        return Layout(matches=_annotated(_tree(images[0]), files, several[0]))
    if images and len(masks) > 1:
        raise InputError(
            f"{str(data)!r} has {len(masks)} folders that could hold the masks, "
            f"{some([f.name for f in masks])}: say which with --images {images[0]} --masks FOLDER"
        )
    parts = {
        part: folder
        for folder in folders
        for part, names in _PARTS[:2]
        if folder.name.lower() in names
    }
    if "train" in parts and not images and not masks:
        return _parts(parts)
    if objects := _folders_of_objects(folders):
        return Layout(matches=objects, instances=True)
    files = [p for p in data.glob("*") if p.suffix.lower() in SUFFIXES and p.name[0] != "."]
    if len(masks) == 1 and len(files) == 1 and not images:  # a stack beside a folder
        return Layout(matches=_across(files[0], masks[0]))
    files += [p for p in data.glob("*") if is_volume_file(p)]
    if len(folders) == 1 and not (images or masks or files):  # as archives unpack
        return _in_folder(folders[0])
    by_name = sorted(files, key=lambda file: stem_of(file).lower() in MASK_FOLDERS)
    if len(files) == 2 and [
        stem_of(file).lower() in names
        for file, names in zip(by_name, (IMAGE_FOLDERS, MASK_FOLDERS), strict=True)
    ] == [True, True]:  # images.npy, masks.npy
        return Layout(matches=[_pair(*by_name)])
    if images or masks or (folders and not files):
        raise InputError(
            f"{str(data)!r}: needs one folder of images ({', '.join(IMAGE_FOLDERS[:4])} ...) and "
            f"one of masks ({', '.join(MASK_FOLDERS[:4])} ...), but has "
            f"{some([f.name for f in folders])}; name the two with --images and --masks"
        )
    return _side_by_side(data)


def _sharded(shards: Sequence[Path]) -> Layout:
    """Samples with an image and a mask, named by their keys, and their shards where keys recur."""
    found = read_shards(shards, masks=True)
    places = [key_of(image) for image in found.images]
    times = Counter(key for _, key in places)
    matches = [
        Match(
            name=(key if times[key] == 1 else f"{shard.rpartition('.')[0]}_{key}").replace(
                "/", "_"
            ),
            image=(Path(image),),
            mask=(Path(mask),),
            part=part,
        )
        for (shard, key), image, mask, part in zip(
            places, found.images, found.masks, found.parts, strict=True
        )
    ]
    return Layout(matches=sorted(matches, key=lambda match: natural_key(match.name)))


def _parts(parts: Mapping[str, Path]) -> Layout:
    """train/ and val/, each with a layout of its own."""
    found = {part: _in_folder(folder) for part, folder in parts.items()}
    matches = [replace(m, part=part) for part in found for m in found[part].matches]
    if any(isinstance(match.mask, Drawing) for match in matches):
        return _drawn(matches)
    first = found["train"]
    classes = first.classes or _class_names(parts["train"])
    return replace(first, matches=_with_names_of_parts(matches), classes=classes)


def _with_names_of_parts(matches: Sequence[Match]) -> list[Match]:
    names = Counter(match.name for match in matches)
    return [replace(m, name=f"{m.part}_{m.name}") if names[m.name] > 1 else m for m in matches]


def _listed_parts(data: Path) -> dict[str, str]:
    """The part of each name in Pascal VOC's lists, where they are there."""
    folder = data / "ImageSets" / "Segmentation"
    listed = {}
    for part in ("val", "train"):
        try:
            names = (folder / f"{part}.txt").read_text(encoding="utf-8-sig").split()
        except (OSError, UnicodeDecodeError):
            continue
        listed.update(dict.fromkeys(names, part))
    return listed


def _nnunet(data: Path) -> Layout:
    """imagesTr/case_0000.png, one file per channel, labelsTr/case.png, and dataset.json; images of
    any kind, such as .nii.gz.
    """
    labels = {stem_of(mask): mask for mask in list_images(data / "labelsTr")}
    cases: dict[str, dict[int, Path]] = defaultdict(dict)
    for image in list_images(data / "imagesTr"):
        ending = re.fullmatch(r"(.+)_(\d{4})", stem_of(image))
        name, channel = (ending[1], int(ending[2])) if ending else (stem_of(image), 0)
        cases[name][channel] = image
    _check_alone(
        [next(iter(c.values())) for name, c in cases.items() if name not in labels],
        [mask for name, mask in labels.items() if name not in cases],
        "labelsTr/NAME belongs to imagesTr/NAME_0000, NAME_0001, ..., one file per channel",
    )
    most = max(max(channels) for channels in cases.values()) + 1
    for name, channels in cases.items():
        if len(channels) < most:
            gone = next(i for i in range(most) if i not in channels)
            raise InputError(
                f"{str(data / 'imagesTr')!r}: {name} has no channel {gone:04d}, but others have "
                f"{most} channels"
            )
    matches = [
        Match(name=name, image=tuple(c[i] for i in range(most)), mask=(labels[name],))
        for name, c in sorted(cases.items(), key=lambda case: natural_key(case[0]))
    ]
    file = data / "dataset.json"
    if not file.is_file():
        return Layout(matches=matches)
    said = read_json(file)
    named, classes = said.get("channel_names", said.get("modality")), said.get("labels")
    regions: dict[str, tuple[int, ...]] = {}
    try:
        if isinstance(classes, dict) and any(isinstance(v, list) for v in classes.values()):
            regions, classes = _nnunet_regions(classes, said["regions_class_order"]), None
        names = tuple(str(named[str(i)]) for i in range(len(named))) if named else ()
        if classes and all(str(key).isdecimal() for key in classes):  # the first version's order
            classes = {name: int(value) for value, name in classes.items()}
        values = {int(value): str(name) for name, value in (classes or {}).items()}
        if not all(0 <= value < 2**16 for value in values):
            raise ValueError("a label that no mask has")
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise InputError(
            f"{str(file)!r} must give channel_names such as {{'0': 'T1'}} and labels such as "
            "{'background': 0, 'nucleus': 1}, and a regions_class_order where labels are lists"
        ) from error
    if names and len(names) != most:
        raise InputError(f"{str(file)!r} names {len(names)} channels, but the images have {most}")
    ignored = next((value for value, name in values.items() if name.lower() == "ignore"), None)
    values = {value: name for value, name in values.items() if value != ignored}
    return Layout(
        matches=matches, classes=values, ignore_value=ignored, channels=names, regions=regions
    )


def _nnunet_regions(
    labels: Mapping[str, object], order: Sequence[int]
) -> dict[str, tuple[int, ...]]:
    """nnU-Net's regions, each with the value first that it has in a label map."""
    values = {
        name: tuple(map(int, value if isinstance(value, list) else [value]))
        for name, value in labels.items()
        if name != "background"
    }
    pairs = zip(values.items(), map(int, order), strict=True)
    return {name: (first, *(v for v in of if v != first)) for (name, of), first in pairs}


def _folders_of_objects(folders: Sequence[Path]) -> list[Match]:
    """NAME/images/NAME.png and NAME/masks/, one file per object: the 2018 Data Science Bowl."""
    found, several = [], False
    for folder in sorted(folders, key=lambda path: natural_key(path.name)):
        if not ((folder / "images").is_dir() and (folder / "masks").is_dir()):
            return []
        image = list_images(folder / "images")
        if len(image) != 1:
            return []
        masks = tuple(list_images(folder / "masks"))
        several |= len(masks) > 1
        found.append(Match(name=folder.name, image=(image[0],), mask=masks))
    return found if several else []


def _drawn(matches: Sequence[Match]) -> Layout:
    """Masks that are drawn from polygons; several objects of a single class are numbered."""
    drawings = [match.mask for match in matches if isinstance(match.mask, Drawing)]
    shapes = [drawing.shapes for drawing in drawings]
    classes = class_values(drawings)
    return Layout(
        matches=_with_names_of_parts(matches),
        instances=len(classes) == 2 and any(len(of) > 1 for of in shapes),
        classes=classes,
        ignore_value=VOID if any(s.label is None for of in shapes for s in of) else None,
    )


def class_values(drawings: Sequence[Drawing]) -> dict[int, str]:
    """0 for the background, and 1, 2, ... for the labels in natural order."""
    labels = {label for drawing in drawings for label in drawing.labels} - {BACKGROUND}
    return dict(enumerate([BACKGROUND, *sorted(labels, key=natural_key)]))


def _coco_files(
    data: Path, folders: Sequence[Path], images: Sequence[Path], masks: Sequence[Path]
) -> list[Match]:
    """The images of COCO files in a folder or in one for masks, perhaps one for each part."""
    files = [
        file
        for place in (data, *masks)
        for file in sorted(place.glob("*.json"))
        if _mentions(file, b'"images"', b'"annotations"')
    ]
    if any(file.name.startswith("instances_") for file in files):  # COCO's other files are no masks
        files = [file for file in files if file.name.startswith("instances_")]
    parts = {file: _part_in(file.stem) for file in files}
    if any(part != "test" for part in parts.values()):
        files = [file for file in files if parts[file] != "test"]
    if len(files) > 1 and sorted(parts[file] for file in files) != ["train", "val"]:
        raise InputError(
            f"{str(data)!r} has {len(files)} files of polygons, {some(f.name for f in files)}: say "
            f"which with --images FOLDER --masks {files[0]}"
        )
    below = [place for f in images for place in sorted(f.glob("*")) if place.is_dir()]
    places = [data, *(f for f in folders if f not in masks), *below]
    several = len(files) > 1
    return [m for f in files for m in _coco(f, [f.parent, *places], parts[f] if several else "")]


def _coco(file: Path, places: Sequence[Path], part: str) -> list[Match]:
    """The images that a COCO file names, in the one folder that has them."""
    drawings = read_coco(file)
    if not drawings:
        raise InputError(f"{str(file)!r} lists no image")
    holding = [p for p in dict.fromkeys(places) if _placed(p, drawings[0].image)]
    if len(holding) > 1:
        named = [p for p in holding if p.name.lower() in file.stem.lower()]
        holding = named or [p for p in holding if _part_in(p.name) == _part_in(file.stem)]
    if len(holding) > 1:
        raise InputError(
            f"{str(file)!r}: {drawings[0].image} is in {some(holding)}: say which with --images "
            f"FOLDER --masks {file}"
        )
    found, lost = [], []
    for drawing in drawings:
        image = _placed(holding[0], drawing.image) if holding else None
        if image is None:
            lost.append(drawing.image)
            continue
        name = ".".join(image.relative_to(holding[0]).with_suffix("").parts)
        found.append(Match(name=name, image=(image,), mask=drawing, part=part))
    if lost:
        where = str(holding[0]) if holding else ", ".join(dict.fromkeys(map(str, places)))
        raise InputError(
            f"{str(file)!r} lists {counted(len(lost), 'image')} that {where!r} has not: "
            f"{some(lost)}; if they are elsewhere, give --images FOLDER --masks {file}"
        )
    return sorted(found, key=lambda match: natural_key(match.name))


def _placed(folder: Path, name: str) -> Path | None:
    """The file that a JSON file means, in a folder or below; a path from above is cut."""
    path = PureWindowsPath(name)  # which knows both kinds of slashes
    parts = [part for part in path.parts if part != path.anchor and part != ".."]
    for cut in range(len(parts)):
        file = folder.joinpath(*parts[cut:])
        if os.path.isfile(file):
            return file
    return None


def _part_in(name: str) -> str:
    """The part that a name such as instances_train2017 is of."""
    words = re.findall(r"[a-z]+", name.lower())
    return next((part for part, names in _PARTS if set(words) & set(names)), "")


def _labelme_folder(data: Path, images: Sequence[Path], masks: Sequence[Path]) -> list[Match]:
    """labelme's files beside the images, or in a folder of their own."""
    for place in images if len(images) == 1 else [data] if not images else []:
        for other in (place, data, *masks):
            if found := _labelme(place, other):
                return found
    return []


def _labelme(images: Path, jsons: Path) -> list[Match]:
    """NAME.json for each image; nothing, if there is none such file."""
    if not (images.is_dir() and jsons.is_dir()) or (images != jsons and _has_images(jsons)):
        return []
    files = {file.stem: file for file in sorted(jsons.glob("*.json"))}
    pictures = [f for f in _tree(images) if f.parent == images] if files else []
    if not any(p.stem in files and _mentions(files[p.stem], b'"shapes"') for p in pictures):
        return []
    names = {picture.stem for picture in pictures}
    _check_alone(
        [picture for picture in pictures if picture.stem not in files],
        [file for stem, file in files.items() if stem not in names],
        "NAME.json belongs to NAME.png; of an image without any object it has no shapes",
    )
    return [
        Match(name=picture.stem, image=(picture,), mask=read_labelme(files[picture.stem]))
        for picture in pictures
    ]


def _yolo(images: Path, labels: Path) -> list[Match]:
    """NAME.txt for each image, also below train/ and val/ in both; nothing, if there is none such
    file."""
    if not (images.is_dir() and labels.is_dir()) or images == labels or _has_images(labels):
        return []
    files = {
        file.relative_to(labels).with_suffix(""): file
        for file in files_below(labels)
        if file.suffix.lower() == ".txt" and file.name not in _CLASSES
    }
    pictures = {f.relative_to(images).with_suffix(""): f for f in _tree(images)} if files else {}
    if not any(is_yolo(files[name]) for name in pictures if name in files):
        return []
    parts = {name: _part_in(str(name.parent)) for name in [*pictures, *files]}
    if "train" in parts.values():
        pictures = {name: f for name, f in pictures.items() if parts[name] != "test"}
        files = {name: f for name, f in files.items() if parts[name] != "test"}
    _check_alone(
        [picture for name, picture in pictures.items() if name not in files],
        [file for name, file in files.items() if name not in pictures],
        "NAME.txt belongs to NAME.jpg; of an image without any object it is empty",
    )
    classes = _yolo_names(labels)
    return [
        Match(
            name=".".join(name.parts[bool(parts[name]) :]),
            image=(picture,),
            mask=read_yolo(files[name], classes),
            part=parts[name],
        )
        for name, picture in pictures.items()
    ]


def _yolo_names(labels: Path) -> dict[int, str]:
    """The names of the classes in the nearest YAML file that has some, or classes.txt."""
    for folder in (labels, *labels.absolute().parents[:2]):
        for file in sorted(folder.glob("*.y*ml")):
            try:
                with file.open("rb") as stream:
                    said = yaml.safe_load(stream.read(_NAMES_BYTES))
                names = said.get("names") if isinstance(said, dict) else None
                if isinstance(names, list):
                    names = dict(enumerate(names))
                if isinstance(names, dict):
                    return {int(number): str(name) for number, name in names.items()}
            except (OSError, RecursionError, TypeError, ValueError, yaml.YAMLError) as error:
                line = " ".join(str(error).split())
                raise InputError(f"{str(file)!r} names no classes of YOLO: {line}") from error
        if names := _class_names(folder):
            return names
    return {}


def _has_images(folder: Path) -> bool:
    return any(is_image_file(file) or is_volume_file(file) for file in files_below(folder))


def _mentions(file: Path, *words: bytes) -> bool:
    """Whether a file has all these words, in as many bytes as are read of it."""
    try:
        if not file.is_file():
            return False
        missing, last = set(words), b""
        with file.open("rb") as stream:
            for _ in range(FILE_BYTES // _CHUNK):
                part = stream.read(_CHUNK)
                missing -= {word for word in missing if word in last + part}
                last = part[-64:]
                if not part or not missing:
                    break
    except OSError as error:
        raise InputError(f"{str(file)!r} cannot be read ({error.strerror})") from error
    return not missing


def _across(images: Path, masks: Path, listed: Mapping[str, str] | None = None) -> list[Match]:
    """Files of a folder and of another, with their subfolders; or a stack and a folder of masks.

    Args:
        listed: the part of each name, where a list says which are meant.
    """
    if _is_file(images) != _is_file(masks):
        stack, folder = (images, masks) if _is_file(images) else (masks, images)
        files = tuple(list_images(folder))
        pair = ((stack,), files) if stack is images else (files, (stack,))
        return [Match(name=stem_of(stack), image=pair[0], mask=pair[1], part="stack")]
    found = [_tree(folder) for folder in (images, masks)]
    if listed:
        found = [[f for f in files if stem_of(f) in listed] for files in found]
        if not (found[0] and found[1]):
            raise InputError(
                f"{str(images)!r} and {str(masks)!r} have nothing of what ImageSets/Segmentation "
                f"lists, such as {min(listed)}"
            )
        return [
            replace(match, part=listed[match.name])
            for match in _matched(found[0], found[1], images, masks)
        ]
    deep = [_below(folder) for folder in (images, masks)]
    if all(len(inside) > len(files) for inside, files in zip(deep, found, strict=True)):
        found = deep  # both have images beside subfolders of images
    made = predictions(found[0])
    found[0] = [file for file in found[0] if file not in made] or found[0]
    for ending in _CITYSCAPES:
        if meant := [file for file in found[1] if stem_of(file).endswith(ending)]:
            found[1] = meant
            break
    parts = [{part for part, _ in map(_part_of, files)} & {"train", "val"} for files in found]
    if parts[0] and parts[0] == parts[1]:
        matches = []
        for part in sorted(parts[0]):
            of = [[f for f in files if _part_of(f)[0] == part] for files in found]
            matches += [replace(m, part=part) for m in _matched(of[0], of[1], images, masks)]
        return matches
    return _annotated(found[0], found[1], masks) or _matched(found[0], found[1], images, masks)


def _annotated(images: Sequence[Path], masks: Sequence[Path], masked: Path) -> list[Match]:
    """Several masks of an image, MASKS/ANNOTATOR/NAME.png: a match for each; nothing, if there are
    none such.
    """
    of = {stem_of(image): image for image in images}
    by_image: dict[str, list[Path]] = defaultdict(list)
    for mask in masks:
        by_image[stem_of(mask)].append(mask)
    if len(of) < len(images) or len(masks) == len(by_image):
        begun = Counter(s[: m.start()] for s in by_image for m in re.finditer("_", s))
        several = [name for name in of if begun[name] > 1]
        if len(of) == len(images) and several and len(masks) > len(images):
            raise InputError(
                f"{str(masked)!r} has several masks for {several[0]}: put those of each annotator "
                f"into a folder of its own, {masked.name}/1/{several[0]}.png, "
                f"{masked.name}/2/{several[0]}.png; of several objects give one numbered mask"
            )
        return []
    _check_alone(
        [image for name, image in of.items() if name not in by_image],
        [files[0] for name, files in by_image.items() if name not in of],
        "the masks of each annotator are in a folder of their own, named as their images",
    )
    matches = [
        replace(_pair(of[name], mask), name=f"{name}_{mask.parent.name}")
        for name in of
        for mask in by_image[name]
    ]
    return matches


def _tree(folder: Path) -> list[Path]:
    """Images of a folder, or if it has none itself, of the folders below it; or volumes."""
    inside = [path for path in folder.glob("*") if is_image_file(path)]
    volumes = (is_volume_file(path) for path in folder.glob("*"))
    if inside or not folder.is_dir() or any(volumes):
        return list_images(folder)
    return images_below(folder)


def _below(folder: Path) -> list[Path]:
    """Image files of a folder and of those below it, without hidden ones."""
    return [path for path in files_below(folder) if is_image_file(path)]


def _part_of(file: Path) -> tuple[str, Path]:
    for parent in list(file.parents)[:4]:
        for part, names in _PARTS[:2]:
            if parent.name.lower() in names:
                return part, parent
    return "", file.parent


def _matched(
    images: Sequence[Path], masks: Sequence[Path], where: Path, masked: Path
) -> list[Match]:
    """Images and masks with the same stem, except for an ending or a beginning that all share."""
    name, times = Counter(stem_of(image) for image in images).most_common(1)[0]
    if times > 1:
        by_folder: list[dict[Path, list[Path]]] = [defaultdict(list), defaultdict(list)]
        for files, root, groups in zip((images, masks), (where, masked), by_folder, strict=True):
            for file in files:
                groups[file.parent.relative_to(root)].append(file)
        if len(by_folder[0]) > 1 and by_folder[0].keys() == by_folder[1].keys():  # of patients
            return [
                replace(match, name="_".join([*place.parts, match.name]))
                for place, of in by_folder[0].items()
                for match in _matched(of, by_folder[1][place], where / place, masked / place)
            ]
        said = f"{times} images of {str(where)!r} are named {name!r}; rename all but one"
        places, others = map(dict.keys, by_folder)
        if len(places) == 1:
            raise InputError(said)
        bare = (sorted(places - others) or sorted(others - places))[0]
        what, root = ("mask", masked) if bare in places else ("image", where)
        raise InputError(
            f"{said}, or put each mask into a folder like that of its image: there is no {what} in "
            f"{str(root / bare)!r}"
        )
    by_name = (
        [dict(zip(names, files, strict=True)) for names in readings([*map(stem_of, files)])]
        for files in (images, masks)
    )
    read = list(product(*by_name))
    for of_image, of_mask in read:
        if of_image.keys() == of_mask.keys():
            return [_pair(image, of_mask[name]) for name, image in of_image.items()]
    if len(images) == len(masks) == 1 and stem_of(masks[0]).startswith(stem_of(images[0])):
        return [_pair(images[0], masks[0])]
    # Each mask by itself: with an ending of its own.
    free = {stem_of(mask): mask for mask in masks}
    begun: defaultdict[str, list[str]] = defaultdict(list)  # by what stands before a _ or -
    for stem in free:
        for at in re.finditer("[_-]", stem):
            begun[stem[: at.start()]].append(stem)
    alone = []
    for image in images:
        stems = (stem_of(image), stem_of(image).removesuffix("_0000"))
        hit = next((s for s in stems if s in free), None)
        ends = [s for s in begun.get(stem_of(image), ()) if s in free]
        if hit is None and len(ends) == 1:
            hit = ends[0]
        if hit is None:
            alone.append(image)
        else:
            del free[hit]
    rest = list(free.values())
    for of_image, of_mask in read:  # by names of which more are equal
        without = [image for name, image in of_image.items() if name not in of_mask]
        if len(without) < len(alone):
            alone, rest = without, [m for name, m in of_mask.items() if name not in of_image]
    _check_alone(
        alone,
        rest,
        "a mask is named as its image, but for an ending that all masks share, such as _mask",
    )
    stem, times = Counter(map(stem_of, masks)).most_common(1)[0]
    if times > 1:
        one, other = [str(mask) for mask in masks if stem_of(mask) == stem][:2]
        raise InputError(f"{one!r} and {other!r} could both be the mask of {stem!r}: keep one")
    raise InputError(
        f"the masks of {str(masked)!r} cannot be told to belong to the images of {str(where)!r}: "
        "give each mask the name of its image"
    )


def _side_by_side(data: Path) -> Layout:
    """Images and masks in one folder: an ending that all masks share tells them apart."""
    files = [file for file in list_images(data) if not _CELLPOSE.search(file.name.lower())]
    stems = {stem_of(file) for file in files}
    for pattern in _WORDS:
        said = [pattern.fullmatch(stem_of(file).lower()) for file in files]
        words = [word[1] for word in said if word is not None]
        if len(words) == len(files):
            images, masks = (
                [file for file, word in zip(files, words, strict=True) if word in names]
                for names in (IMAGE_FOLDERS, MASK_FOLDERS)
            )
            if images and masks:
                return Layout(matches=_matched(images, masks, data, data))
    endings: Counter[str] = Counter()
    for file in files:
        for m in re.finditer(r"[_\-. ]", stem_of(file)):
            if stem_of(file)[: m.start()] in stems:
                endings[stem_of(file)[m.start() :]] += 1
    images = [f for f in files if not any(stem_of(f).endswith(end) for end in endings)]
    whole = [
        end
        for end in endings
        if all(f"{stem_of(image)}{end}" in stems for image in images) and images
    ]
    if len(whole) > 1:
        raise InputError(
            f"{str(data)!r} has {len(whole)} files beside each image that could be its mask, "
            f"ending in {some(whole)}: move the masks to a folder, and give --images and --masks"
        )
    by_stem = defaultdict(list)
    for file in files:
        by_stem[stem_of(file)].append(file)
    lossy = (".jpg", ".jpeg", ".webp")
    if not endings and all(
        sorted(f.suffix.lower() in lossy for f in twins) == [False, True]
        for twins in by_stem.values()
    ):
        matches = []
        for twins in by_stem.values():
            image, mask = sorted(twins, key=lambda f: f.suffix.lower() not in lossy)
            matches.append(_pair(image, mask))
        return Layout(matches=matches)
    end = whole[0] if whole else (endings.most_common(1) or [("_mask", 0)])[0][0]
    masks = [f for f in files if stem_of(f).endswith(end)]
    images = [f for f in files if f not in masks]
    have = {stem_of(mask).removesuffix(end) for mask in masks}
    _check_alone(
        [f for f in images if stem_of(f) not in have],
        [f for f in masks if stem_of(f).removesuffix(end) not in {stem_of(i) for i in images}],
        f"a mask is named as its image, with {end} at the end",
    )
    of = {stem_of(mask).removesuffix(end): mask for mask in masks}
    # Cellpose names numbered masks NAME_masks.
    return Layout(matches=[_pair(i, of[stem_of(i)]) for i in images])


def _check_alone(images: Sequence[Path], masks: Sequence[Path], rule: str) -> None:
    for what, other, without in (("image", "mask", images), ("mask", "image", masks)):
        if without:
            names = some([path.name for path in without])
            raise InputError(
                f"{str(without[0].parent)!r}: {counted(len(without), what)} without {other}: "
                f"{names}; {rule}"
            )


def _pair(image: Path, mask: Path) -> Match:
    return Match(name=stem_of(image), image=(image,), mask=(mask,))


def _is_file(path: Path) -> bool:
    return os.path.isfile(path) or is_volume(path)


def _class_names(folder: Path) -> dict[int, str]:
    """The names in a classes.txt, one per line, of the values 0, 1, ...; `3: car` names the value
    3."""
    for name in _CLASSES:
        file = folder / name
        if not file.is_file():
            continue
        try:
            with file.open("rb") as stream:
                data = stream.read(_NAMES_BYTES + 1)
            if len(data) > _NAMES_BYTES:
                raise InputError(f"{str(file)!r} has over {_NAMES_BYTES:,} bytes: no list of names")
            lines = data.decode("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{str(file)!r} cannot be read as UTF-8 text") from error
        found = {}
        for number, line in enumerate(line.strip() for line in lines if line.strip()):
            said = re.fullmatch(r"([0-9]{1,9})\s*[:=,\t ]\s*(.+)", line)
            found[int(said[1]) if said else number] = said[2].strip() if said else line
        return found
    return {}
