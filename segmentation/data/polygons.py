"""Masks that are drawn: the polygons and runs of pixels in COCO's and labelme's JSON files, and the
polygons in YOLO's text files.

A pixel belongs to a polygon if its middle is inside by the even-odd rule; the first pixel has its
middle at x = y = 0.5, as in COCO's own tools. So polygons that share an edge share no pixel.
Objects are drawn in the order of the file, behind the regions that have no label.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segmentation.data.masks import VOID
from unet.errors import InputError
from unet.files.pages import MAX_PIXELS, Array
from unet.files.writing import read_json

FILE_BYTES = 2**29  # of a JSON file; COCO's own largest has 470 MB
YOLO_BYTES = 2**24  # of a text file, for one image
FAR = 2**20  # pixels from the first one to a point, at most
MAX_CROSSINGS = 2**24  # of one polygon's edges with rows of pixels
MAX_DRAWN = 2**29  # pixels of the boxes of all objects of a mask, some seconds
BACKGROUND = "background"  # the name of the class 0
_CIRCLE = 128  # corners of the polygon that stands for a circle


@dataclass(frozen=True, eq=False, kw_only=True)
class Shape:
    """One object, or a region that has no label.

    Attributes:
        label: the name of its class; None: what is inside is ignored.
        polygons: (N, 2) of x and y; what is inside any of them is the object.
        runs: instead of them lengths of runs outside, inside, outside, ..., column by column.
        group: shapes of one label and one group are one object.
    """

    label: str | None
    polygons: tuple[NDArray[np.float64], ...] = ()
    runs: NDArray[np.int64] | None = None
    group: int | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Drawing:
    """The mask of one image, which is drawn when it is read.

    Attributes:
        file: the JSON or text file.
        image: the name of the image's file.
        size: rows and columns, as the file says or the image has; None: nobody said it yet.
        relative: polygons are shares of width and height instead of pixels, until `of_size`.
    """

    file: Path
    image: str
    shapes: tuple[Shape, ...]
    size: tuple[int, int] | None = None
    relative: bool = False

    @property
    def labels(self) -> list[str]:
        """The names of the classes, in the order in which they occur."""
        return list(dict.fromkeys(s.label for s in self.shapes if s.label is not None))

    def of_size(self, height: int, width: int) -> Drawing:
        """The same for an image that has this size.

        Raises:
            InputError: the file says another size.
        """
        if self.size is not None and self.size != (height, width):
            said = " x ".join(map(str, self.size))
            raise self._error(f"it is {height} x {width}, but was {said} when it was labelled")
        shapes = self.shapes
        if self.relative:
            shapes = tuple(
                replace(s, polygons=tuple(points * (width, height) for points in s.polygons))
                for s in shapes
            )
        return replace(self, shapes=shapes, size=(height, width), relative=False)

    def read(self, classes: Mapping[int, str] | None = None) -> tuple[NDArray[np.int32], int, int]:
        """The mask (H, W) of classes or, where none are given, of objects from 1 on.

        0 is background, and VOID, which is no object's number, what has no label.

        Args:
            classes: the name of each mask value.

        Returns:
            The mask, the number of pixels that two classes or two objects claim (the later one has
            them), and the number of objects without a pixel.

        Raises:
            InputError: too large to draw, or a label that no class has.
        """
        height, width = self.size or (0, 0)
        if height * width > MAX_PIXELS:
            raise self._error(
                f"{height} x {width} is over {MAX_PIXELS:,} pixels; cut it into tiles"
            )
        values = {name: value for value, name in (classes or {}).items()}
        numbers: dict[object, int] = {}
        mask = np.zeros((height, width), np.int32)
        overlaps = empty = drawn = 0
        for index, shape in enumerate(sorted(self.shapes, key=lambda s: s.label is not None)):
            if shape.label is None:
                value = VOID
            elif classes is not None:
                if shape.label not in values:
                    raise self._error(
                        f"it has a shape with the label {shape.label!r}, which is none of the "
                        f"classes: {', '.join(values)}"
                    )
                value = values[shape.label]
            elif shape.label == BACKGROUND:
                value = 0
            else:
                key = index if shape.group is None else (shape.label, shape.group)
                count = len(numbers) + 1
                value = numbers.setdefault(key, count + (count >= VOID))
            pixels = 0
            for rows, columns, inside in self._parts(shape, height, width):
                drawn += inside.size
                if drawn > MAX_DRAWN:
                    raise self._error(
                        f"its shapes lie in boxes of more than {MAX_DRAWN:,} pixels together; cut "
                        "it into tiles"
                    )
                part = mask[rows, columns]
                taken = part[inside]
                overlaps += int(((taken != 0) & (taken != VOID) & (taken != value)).sum())
                pixels += len(taken)
                np.copyto(part, value, where=inside)
            empty += not pixels
        return mask, overlaps, empty

    def _parts(self, shape: Shape, height: int, width: int) -> Iterator[tuple[slice, slice, Array]]:
        try:
            if shape.runs is not None:
                yield from _from_runs(shape.runs, height, width)
            for polygon in shape.polygons:
                yield from _filled(polygon, height, width)
        except InputError as error:
            raise self._error(str(error)) from error

    def _error(self, what: str) -> InputError:
        return InputError(f"{str(self.file)!r}: {self.image}: {what}")


def _filled(
    points: NDArray[np.float64], height: int, width: int
) -> Iterator[tuple[slice, slice, Array]]:
    """Rows, columns and what of them is inside a polygon (N, 2): each row is parted by the edges.

    An edge counts in the rows whose middle is between its ends, the upper one included.
    """
    after = np.roll(points, -1, axis=0)
    low = np.where((points[:, 1] <= after[:, 1])[:, None], points, after)  # the end further up
    high = np.where((points[:, 1] <= after[:, 1])[:, None], after, points)
    first, last = (np.clip(np.ceil(e[:, 1] - 0.5), 0, height).astype(np.int64) for e in (low, high))
    spans = last - first
    count = int(spans.sum())
    if count > MAX_CROSSINGS:
        raise InputError(f"a polygon of {len(points):,} points, whose edges are too long to draw")
    if not count:
        return
    edge = np.repeat(np.arange(len(points)), spans)
    row = np.arange(count) - np.repeat(np.cumsum(spans) - spans - first, spans)
    slope = (high[edge, 0] - low[edge, 0]) / (high[edge, 1] - low[edge, 1])
    x = low[edge, 0] + (row + 0.5 - low[edge, 1]) * slope
    column = np.clip(np.ceil(x - 0.5), 0, width).astype(np.int64)
    top, bottom, left, right = row.min(), row.max() + 1, column.min(), column.max()
    if left == right:
        return
    crossed = np.zeros((bottom - top, right - left + 1), np.uint8)
    np.add.at(crossed, (row - top, column - left), 1)  # an even number wraps to an even one
    np.cumsum(crossed, axis=1, dtype=np.uint8, out=crossed)
    yield slice(top, bottom), slice(left, right), (crossed[:, :-1] & 1).view(bool)


def _from_runs(
    runs: NDArray[np.int64], height: int, width: int
) -> Iterator[tuple[slice, slice, Array]]:
    """Rows, columns and what of them is inside, as `_filled`, from the lengths of runs."""
    ends = np.cumsum(runs)
    if not len(runs) or ends[-1] != height * width:
        raise InputError(
            f"runs of {int(ends[-1]) if len(runs) else 0:,} pixels, but the image has "
            f"{height * width:,}"
        )
    bounds = ends[: len(ends) // 2 * 2]  # where runs inside begin and end, by turns
    if not len(bounds) or bounds[0] == bounds[-1]:
        return
    left, right = int(bounds[0]) // height, -(-int(bounds[-1]) // height)
    turned = np.zeros((right - left) * height + 1, np.uint8)
    np.add.at(turned, bounds - left * height, 1)
    inside = np.cumsum(turned[:-1], dtype=np.uint8) & 1
    yield slice(0, height), slice(left, right), inside.reshape(-1, height).T.view(bool)


# -- COCO


def read_coco(file: Path) -> list[Drawing]:
    """The mask of each image that a COCO JSON file lists, whether it has objects or not.

    Crowds, `iscrowd`, are regions without a label.

    Raises:
        InputError: damaged, too large, or boxes alone instead of polygons or runs.
    """
    found = read_json(file, FILE_BYTES)
    shapes: dict[object, list[Shape]] = {}
    images: dict[object, Drawing] = {}
    what = "its images"
    try:
        for number, image in enumerate(found["images"]):
            what = f"image {number}"
            size = int(image["height"]), int(image["width"])
            name = str(image["file_name"])
            images[image["id"]] = Drawing(file=file, image=name, shapes=(), size=size)
            shapes[image["id"]] = []
        what = "its categories"
        names = {entry["id"]: _label(entry["name"]) for entry in found["categories"]}
        what = "its annotations"
        for number, entry in enumerate(found["annotations"]):
            what = f"annotation {number}"
            if entry["image_id"] not in images:
                raise ValueError(f"there is no image with the id {entry['image_id']!r}")
            label = None if entry.get("iscrowd") else names[entry["category_id"]]
            if not (drawn := entry.get("segmentation")):
                raise ValueError("it has no segmentation; a box alone is no mask")
            of = images[entry["image_id"]]
            shapes[entry["image_id"]].append(
                Shape(label=label, runs=_runs(drawn, of.size))
                if isinstance(drawn, dict)
                else Shape(label=label, polygons=tuple(_points(flat) for flat in drawn))
            )
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        lacks = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{str(file)!r} is no COCO file of masks: {what}: {lacks}") from error
    return [replace(images[key], shapes=tuple(shapes[key])) for key in images]


def _points(flat: Sequence[Any]) -> NDArray[np.float64]:
    """x and y of a polygon, (N, 2), of x0, y0, x1, y1, ... or of pairs."""
    points = np.array(flat, np.float64)
    if points.size % 2 or points.ndim not in (1, 2) or (points.ndim == 2 and len(points.T) != 2):
        raise ValueError(f"a polygon of shape {points.shape} is no list of x and y")
    if not (np.abs(points) <= FAR).all():  # NaN is no such number, either
        raise ValueError(f"a polygon has a point that is no number or beyond {FAR:,} pixels")
    return points.reshape(-1, 2)


def _runs(drawn: Mapping[str, Any], size: tuple[int, int] | None) -> NDArray[np.int64]:
    if tuple(drawn["size"]) != size:
        raise ValueError(f"runs for a size of {drawn['size']}, but its image has {size}")
    counts = drawn["counts"]
    runs = np.array(_unpacked(counts) if isinstance(counts, str) else counts, np.int64)
    if runs.ndim != 1 or (runs < 0).any() or (runs > MAX_PIXELS).any():
        raise ValueError("the lengths of its runs are no whole numbers from 0 on")
    return runs


def _unpacked(text: str) -> list[int]:
    """Lengths of runs from COCO's compressed form.

    Each character from "0" on holds five bits, the lowest ones first, and whether more of the
    number follow; the last one's highest bit is the sign. The fourth number and all later ones are
    differences from the one before the last.
    """
    found: list[int] = []
    value = shift = 0
    for code in text.encode("ascii"):
        if not 48 <= code < 112 or shift > 35:
            raise ValueError("its runs are not compressed as COCO's are")
        value |= (code - 48 & 31) << shift
        shift += 5
        if code - 48 & 32:
            continue
        if code - 48 & 16:
            value -= 1 << shift
        found.append(value + (found[-2] if len(found) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("its compressed runs are cut off")
    return found


# -- labelme


def read_labelme(file: Path) -> Drawing:
    """The mask in a labelme JSON file: polygons, rectangles and circles.

    Raises:
        InputError: damaged, too large, or shapes of another kind.
    """
    found = read_json(file, FILE_BYTES)
    what, shapes = "its shapes", []
    try:
        high, wide = found.get("imageHeight"), found.get("imageWidth")
        size = None if high is None or wide is None else (int(high), int(wide))
        for number, entry in enumerate(found["shapes"]):
            what = f"shape {number}"
            group = entry.get("group_id")
            shapes.append(
                Shape(
                    label=_label(entry["label"]),
                    polygons=(_outline(entry.get("shape_type") or "polygon", entry["points"]),),
                    group=None if group is None else int(group),
                )
            )
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        lacks = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{str(file)!r} is no labelme file of masks: {what}: {lacks}") from error
    return Drawing(file=file, image=file.stem, shapes=tuple(shapes), size=size)


def _outline(kind: str, points: Sequence[Any]) -> NDArray[np.float64]:
    corners = _points(points)
    if kind == "rectangle" and len(corners) == 2:
        (x0, y0), (x1, y1) = corners.tolist()
        return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
    if kind == "circle" and len(corners) == 2:
        radius = math.dist(*corners.tolist())
        angles = np.arange(_CIRCLE) * (2 * math.pi / _CIRCLE)
        return corners[0] + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    if kind not in ("polygon", "rectangle"):
        raise ValueError(
            f"a {kind} of {len(corners)} points; draw it as a polygon, rectangle or circle"
        )
    return corners


# -- YOLO


def is_yolo(file: Path) -> bool:
    """Whether a text file begins as YOLO's do: with the number of a class and those of its place.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with file.open("rb") as stream:
            words = stream.readline(2**16).split()
    except OSError as error:
        raise InputError(f"{str(file)!r} cannot be read ({error.strerror})") from error
    try:
        place = [float(word) for word in words[1:5]]
    except ValueError:
        return False
    return len(place) == 4 and words[0].isdigit()


def read_yolo(file: Path, names: Mapping[int, str]) -> Drawing:
    """The mask in a text file of YOLO: in each line the number of a class, and the corners of a
    polygon as shares of the width and the height of the image.

    Args:
        names: of the classes.

    Raises:
        InputError: damaged, too large, or boxes instead of polygons.
    """
    number, shapes = 0, []
    try:
        with file.open("rb") as stream:
            data = stream.read(YOLO_BYTES + 1)
        if len(data) > YOLO_BYTES:
            raise ValueError(f"it has more than {YOLO_BYTES:,} bytes")
        for line in data.decode("utf-8-sig").splitlines():
            number += 1
            if not (words := line.split()):
                continue
            if len(words) < 7:
                what = "a box alone is no mask" if len(words) == 5 else "a polygon has 3 corners"
                raise ValueError(f"it has {len(words)} numbers; {what}")
            kind, points = int(words[0]), _points([float(word) for word in words[1:]])
            if np.abs(points).max() > 2:
                raise ValueError("its corners are no shares of the width and height of the image")
            label = _label(names.get(kind, f"class {kind}"))
            shapes.append(Shape(label=label, polygons=(points,)))
    except (OSError, ValueError) as error:
        where = f"line {number}: " if number else ""
        raise InputError(f"{str(file)!r} is no YOLO file of masks: {where}{error}") from error
    return Drawing(file=file, image=file.stem, shapes=tuple(shapes), relative=True)


def _label(name: object) -> str | None:
    """The class that a label names; None: it says that there is no label."""
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"the label {name!r} is no name")
    plain = name.strip("_ ").lower()
    return {"ignore": None, BACKGROUND: BACKGROUND}.get(plain, name)
