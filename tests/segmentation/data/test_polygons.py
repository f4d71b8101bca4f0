"""Masks that are drawn from the polygons and runs of COCO's and labelme's files."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from skimage.measure import points_in_poly

from segmentation.data import polygons
from segmentation.data.classes import IGNORE, ClassTable
from segmentation.data.dataset import SegmentationData
from segmentation.data.instances import OBJECT_NAMES
from segmentation.data.pairs import find_pairs
from segmentation.data.polygons import Drawing, Shape, read_coco
from segmentation.data.splits import split_pairs
from unet.errors import InputError
from unet.files.images import write_image

Array = NDArray[Any]
HEIGHT, WIDTH = 24, 20


def drawn(*polygons: Sequence[Sequence[float]], height: int = HEIGHT, width: int = WIDTH) -> Array:
    """Where one object of these polygons is."""
    points = tuple(np.array(polygon, float).reshape(-1, 2) for polygon in polygons)
    shape = Shape(label="a", polygons=points)
    drawing = Drawing(file=Path("x"), image="x", shapes=(shape,), size=(height, width))
    return drawing.read()[0] == 1


def box(left: float, top: float, right: float, bottom: float) -> list[float]:
    return [left, top, right, top, right, bottom, left, bottom]


# -- what is inside

COORDINATE = st.floats(-9, 33, allow_subnormal=False)
POLYGON = st.lists(st.tuples(COORDINATE, COORDINATE), min_size=3, max_size=12)


@given(POLYGON)
def test_a_pixel_is_inside_where_its_middle_is(points: list[tuple[float, float]]) -> None:
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    middles = np.stack([x.reshape(-1), y.reshape(-1)], axis=1)
    wanted = points_in_poly(middles, np.array(points)).reshape(HEIGHT, WIDTH)
    # Middles on an edge, or within rounding of it, may be on either side.
    after = np.roll(points, -1, axis=0)
    steps = after - points
    along = ((middles[:, None] - points) * steps).sum(-1) / np.maximum((steps**2).sum(-1), 1e-300)
    nearest = points + np.clip(along, 0, 1)[..., None] * steps
    far = (np.abs(middles[:, None] - nearest).max(-1).min(-1) > 1e-6).reshape(HEIGHT, WIDTH)
    np.testing.assert_array_equal(drawn(points)[far], wanted[far])


@given(st.lists(st.tuples(COORDINATE, COORDINATE), min_size=3, max_size=3), st.floats(0, 1))
def test_polygons_that_share_an_edge_share_no_pixel(
    corners: list[tuple[float, float]], share: float
) -> None:
    a, b, c = (np.array(corner) for corner in corners)
    middle = a + share * (b - a)
    parts = drawn([a, middle, c]).astype(int) + drawn([middle, b, c])
    assert parts.max() <= 1


def test_a_box_of_whole_numbers_is_these_pixels() -> None:
    wanted = np.zeros((HEIGHT, WIDTH), bool)
    wanted[3:9, 2:7] = True
    np.testing.assert_array_equal(drawn(box(2, 3, 7, 9)), wanted)
    np.testing.assert_array_equal(drawn(box(2, 3, 5, 9), box(4, 3, 7, 9)), wanted)  # a union
    assert drawn(box(-99, -99, 999, 999)).all()
    assert not drawn(box(20, 0, 30, 9)).any()
    assert not drawn([3, 3, 9, 9]).any()  # a line


def counts_of(mask: Array) -> list[int]:
    """COCO's uncompressed runs: column by column, the first one outside."""
    found = [(value, len(list(run))) for value, run in groupby(mask.T.reshape(-1).tolist())]
    return [*([0] if found[0][0] else []), *(length for _, length in found)]


def packed(counts: Sequence[int]) -> str:
    """The compressed form, as COCO's description has it."""
    text = ""
    for i, count in enumerate(counts):
        rest = count - counts[i - 2] if i > 2 else count
        while True:
            five, rest = rest & 31, rest >> 5
            more = rest != (-1 if five & 16 else 0)
            text += chr(48 + five + 32 * more)
            if not more:
                break
    return text


@given(st.integers(0, 99), st.floats(0, 1), st.integers(1, 90), st.integers(1, 90))
def test_runs_are_the_mask_they_were_made_of(
    seed: int, share: float, height: int, width: int
) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < share
    for counts in (counts_of(mask), packed(counts_of(mask))):
        said = coco(masks=[{"size": [height, width], "counts": counts}], size=(height, width))
        shape = read(said)[0].shapes[0]
        drawing = Drawing(file=Path("x"), image="x", shapes=(shape,), size=(height, width))
        np.testing.assert_array_equal(drawing.read()[0] == 1, mask)


# -- files


def coco(
    masks: Sequence[Any] = (),
    labels: Sequence[int] = (),
    images: Sequence[int] = (),
    names: Sequence[str] = ("cell", "dirt"),
    files: Sequence[str] = ("0.png",),
    size: tuple[int, int] = (HEIGHT, WIDTH),
    crowds: Sequence[int] = (),
) -> dict[str, Any]:
    labels, images = labels or [0] * len(masks), images or [0] * len(masks)
    return {
        "images": [
            {"id": 10 + i, "file_name": name, "height": size[0], "width": size[1]}
            for i, name in enumerate(files)
        ],
        "categories": [{"id": 1 + 7 * i, "name": name} for i, name in enumerate(names)],
        "annotations": [
            {
                "id": i,
                "image_id": 10 + images[i],
                "category_id": 1 + 7 * labels[i],
                "segmentation": mask,
                "iscrowd": int(i in crowds),
            }
            for i, mask in enumerate(masks)
        ],
    }


def read(said: Any) -> list[Drawing]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "x.json").write_text(json.dumps(said))
        return read_coco(Path(folder) / "x.json")


def with_images(folder: Path, names: Sequence[str] = ("0.png", "1.png", "2.png")) -> Path:
    for i, name in enumerate(names):
        image = np.random.default_rng(i).integers(0, 256, (HEIGHT, WIDTH), np.uint8)
        write_image(folder / name, image)
    return folder


THREE = ("0.png", "1.png", "2.png")
BOXES = [[box(2, 2, 8, 8)], [box(6, 6, 12, 12)], [box(1, 14, 19, 20)], [box(3, 3, 9, 9)]]
MANY: dict[str, Any] = {"masks": BOXES, "images": [0, 0, 1, 2], "files": THREE}


def test_categories_are_classes_with_their_names(tmp_path: Path) -> None:
    with_images(tmp_path / "images")
    (tmp_path / "annotations.json").write_text(json.dumps(coco(**MANY, labels=[0, 1, 0, 1])))
    data = SegmentationData(find_pairs(tmp_path))
    assert (data.table.values, data.table.names) == ((0, 1, 2), ("background", "cell", "dirt"))
    mask = data.load(0)[1]
    assert (mask[3, 3], mask[7, 7], mask[10, 10], mask[20, 3]) == (1, 2, 2, 0)
    assert "4 pixels claimed by two classes: the later one" in data.describe()
    assert not data.instances
    numbered = SegmentationData(find_pairs(tmp_path), instances=True)
    assert numbered.table.names == OBJECT_NAMES
    assert "4 pixels claimed by two objects" in numbered.describe()
    explicit = find_pairs(images=tmp_path / "images", masks=tmp_path / "annotations.json")
    np.testing.assert_array_equal(explicit[1].read_mask(), find_pairs(tmp_path)[1].read_mask())


def test_objects_of_one_category_are_numbered(tmp_path: Path) -> None:
    with_images(tmp_path)
    (tmp_path / "_annotations.coco.json").write_text(json.dumps(coco(**MANY)))
    data = SegmentationData(find_pairs(tmp_path))
    assert data.table.names == OBJECT_NAMES
    assert sorted(np.unique(data.pairs[0].read_mask())) == [0, 1, 2]


def test_crowds_are_ignored_and_are_behind_objects(tmp_path: Path) -> None:
    with_images(tmp_path)
    said = coco(**MANY, labels=[0, 1, 0, 1], crowds=[1])
    (tmp_path / "a.json").write_text(json.dumps(said))
    for instances in (False, True):
        data = SegmentationData(find_pairs(tmp_path), instances=instances)
        mask = data.load(0)[1]
        assert (mask[7, 7], mask[10, 10], mask[20, 3]) == (1, IGNORE, 0)
        known = ClassTable(
            values=data.table.values, shares=data.table.shares, names=data.table.names
        )
        scored = SegmentationData(
            (),
            find_pairs(tmp_path),
            table=known,
            normalisation=data.normalisation,
            instances=instances,
        )
        np.testing.assert_array_equal(scored.load(0)[1], mask)


def test_numbers_leave_out_that_of_no_label() -> None:
    shapes = [
        Shape(label="a", polygons=(np.array(box(i, 0, i + 1, 1)).reshape(4, 2),))
        for i in range(300)
    ]
    drawing = Drawing(file=Path("x"), image="x", shapes=tuple(shapes), size=(1, 300))
    found = drawing.read()[0][0].tolist()
    assert found == [*range(1, 255), *range(256, 302)]


def test_a_model_knows_classes_by_their_names(tmp_path: Path) -> None:
    for part, names in (("a", ("cell", "dirt")), ("b", ("dirt", "cell"))):
        with_images(tmp_path / part)
        said = coco(**MANY, labels=[0, 1, 0, 1], names=names)
        (tmp_path / part / "x.json").write_text(json.dumps(said))
    data = SegmentationData(find_pairs(tmp_path / "a"))
    known: Any = {"table": data.table, "normalisation": data.normalisation}
    other = SegmentationData((), find_pairs(tmp_path / "b"), **known)
    assert (other.load(0)[1][3, 3], other.load(0)[1][10, 10]) == (2, 1)
    strange = coco(**MANY, labels=[0, 1, 0, 1], names=("cell", "dust"))
    (tmp_path / "b" / "x.json").write_text(json.dumps(strange))
    with pytest.raises(InputError, match="'dust', which is none of the classes: background, cell"):
        SegmentationData((), find_pairs(tmp_path / "b"), **known)


def test_cocos_own_folders_and_those_of_roboflow(tmp_path: Path) -> None:
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    for part, named in (("train", "train2017"), ("val", "val2017"), ("test", "test2017")):
        with_images(tmp_path / "coco" / named)
        for kind in ("instances", "captions"):
            said = coco(**MANY, labels=[0, 1, 0, 1])
            (tmp_path / "coco" / "annotations" / f"{kind}_{named}.json").write_text(
                json.dumps(said)
            )
        with_images(tmp_path / "robo" / part)
        said = coco(**MANY, labels=[0, 1, 0, 1] if part == "train" else [1, 1, 1, 1])
        (tmp_path / "robo" / part / "_annotations.coco.json").write_text(json.dumps(said))
    for name in ("coco", "robo"):
        pairs = find_pairs(tmp_path / name)
        train, val = split_pairs(pairs)
        assert [p.name for p in train] == [f"train_{i}" for i in range(3)]
        assert [p.name for p in val] == [f"val_{i}" for i in range(3)]
        assert all(p.part in str(p.image) for p in pairs)
        assert SegmentationData(train, val).table.names == ("background", "cell", "dirt")


def labelme(*shapes: tuple[str, str, Any], **more: Any) -> str:
    found = [
        {"label": label, "shape_type": kind, "points": points} for label, kind, points in shapes
    ]
    return json.dumps({"version": "5.5.0", "flags": {}, "shapes": found, "imageData": None, **more})


def test_labelmes_shapes_lie_beside_their_images(tmp_path: Path) -> None:
    with_images(tmp_path)
    size = {"imageHeight": HEIGHT, "imageWidth": WIDTH}
    triangle = ("dirt", "polygon", [[1, 1], [9, 1], [1, 9]])
    disc = ("cell", "circle", [[10, 14], [10, 18]])
    rest = ("__ignore__", "rectangle", [[19, 23], [15, 20]])
    (tmp_path / "0.json").write_text(labelme(triangle, disc, rest, **size))
    (tmp_path / "1.json").write_text(labelme())
    (tmp_path / "2.json").write_text(labelme(("_background_", "rectangle", [[0, 0], [5, 5]])))
    data = SegmentationData(find_pairs(tmp_path))
    assert (data.table.names, data.table.ignore_value) == (("background", "cell", "dirt"), 255)
    mask = data.load(0)[1]
    assert (mask[2, 2], mask[14, 10], mask[21, 16], mask[0, 19]) == (2, 1, IGNORE, 0)
    assert (mask == 1).sum() == pytest.approx(np.pi * 16, abs=3)
    assert not data.load(1)[1].any()
    (tmp_path / "1.json").unlink()
    with pytest.raises(InputError, match=r"1 image without mask: 1\.png; NAME\.json belongs"):
        find_pairs(tmp_path)


def test_labelmes_files_may_have_a_folder_of_their_own(tmp_path: Path) -> None:
    with_images(tmp_path / "images")
    (tmp_path / "labels").mkdir()
    for i in range(3):
        shape = ("cell", "rectangle", [[i, i], [9, 9]])
        (tmp_path / "labels" / f"{i}.json").write_text(labelme(shape))
    found = find_pairs(tmp_path), find_pairs(images=tmp_path / "images", masks=tmp_path / "labels")
    for pairs in found:
        assert [int(p.read_mask().sum()) for p in pairs] == [81, 64, 49]


def test_shapes_of_one_group_are_one_object(tmp_path: Path) -> None:
    with_images(tmp_path, ["0.png"])
    said = json.loads(labelme(*(("cell", "rectangle", [[x, 1], [x + 3, 9]]) for x in (1, 6, 11))))
    said["shapes"][0]["group_id"] = said["shapes"][2]["group_id"] = 4
    (tmp_path / "0.json").write_text(json.dumps(said))
    mask = find_pairs(tmp_path)[0].read_mask()
    assert mask[4, [2, 7, 12]].tolist() == [1, 2, 1]


def test_masks_in_files_go_before_polygons(tmp_path: Path) -> None:
    with_images(tmp_path / "images")
    with_images(tmp_path / "masks")
    (tmp_path / "a.json").write_text(json.dumps(coco(**MANY)))
    assert all(isinstance(pair.mask, Path) for pair in find_pairs(tmp_path))


@pytest.mark.parametrize("layout", ["{1}/{0}", "{0}/{1}"])
def test_polygons_of_yolo_are_shares_of_their_images(tmp_path: Path, layout: str) -> None:
    left, top = "1 0 0 0.5 0 0.5 1 0 1\n", "0 0 0 1 0 1 0.5 0 0.5\n"
    for part, lines in (("train", ["", left, left]), ("val", [top, "", ""])):
        with_images(tmp_path / layout.format(part, "images"))
        labels = tmp_path / layout.format(part, "labels")
        labels.mkdir(parents=True)
        for i, line in enumerate(lines):
            (labels / f"{i}.txt").write_text(line)
    for said in ("names: [dirt, cell]", "names: {0: dirt, 1: cell}"):
        (tmp_path / "data.yaml").write_text(said)
        train, val = split_pairs(find_pairs(tmp_path))
        assert [p.name for p in train] == [f"train_{i}" for i in range(3)]
        assert [p.name for p in val] == [f"val_{i}" for i in range(3)]
        data = SegmentationData(train, val)
        assert data.table.names == ("background", "cell", "dirt")
        assert not data.load(0)[1].any()
        assert (data.load(1)[1] == (np.arange(WIDTH) < WIDTH / 2)).all()
        assert (data.load(3)[1] == 2 * (np.arange(HEIGHT) < HEIGHT / 2)[:, None]).all()


# -- what is refused


def broken(**changed: Any) -> dict[str, Any]:
    """An annotation with other values."""
    said = coco(**MANY)
    said["annotations"][0] |= changed
    return said


RUNS = {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}
REFUSED = {
    "a box alone": (broken(segmentation=[]), "annotation 0: it has no segmentation; a box alone"),
    "an unknown category": (broken(category_id=99), "annotation 0: it has no 99"),
    "an unknown image": (broken(image_id=99), "no image with the id 99"),
    "odd numbers": (broken(segmentation=[[1, 2, 3, 4, 5]]), "no list of x and y"),
    "no number": (broken(segmentation=[[1, 2, 3, "x"]]), "annotation 0: could not convert"),
    "NaN": (broken(segmentation=[[1, 2, 3, float("nan")]]), "no number or beyond"),
    "far away": (broken(segmentation=[[1, 2, 3, 1e300]]), "no number or beyond 1,048,576"),
    "runs of another size": (broken(segmentation=RUNS | {"size": [3, 4]}), r"runs for a size of"),
    "too few runs": (
        broken(segmentation=RUNS | {"counts": [3, 4]}),
        "runs of 7 pixels, but the image",
    ),
    "negative runs": (broken(segmentation=RUNS | {"counts": [-3]}), "whole numbers from 0 on"),
    "huge runs": (broken(segmentation=RUNS | {"counts": [2**62] * 4}), "whole numbers from 0 on"),
    "half a number": (broken(segmentation=RUNS | {"counts": "PP"}), "are cut off"),
    "no letters": (broken(segmentation=RUNS | {"counts": "ä"}), "ascii"),
    "endless numbers": (broken(segmentation=RUNS | {"counts": "o" * 99}), "not compressed as"),
    "another size": (coco(**MANY, size=(9, 9)), "it is 24 x 20, but was 9 x 9 when"),
    "no image": ({"images": [], "annotations": [], "categories": []}, "lists no image"),
    "images that are gone": (
        coco(**MANY | {"files": ("0.png", "1.png", "9.png")}),
        r"1 image .*9\.png",
    ),
    "names that lead out": (coco(**MANY | {"files": ("/etc/hostname", "..\\x", "2")}), "3 images"),
    "no categories": ({**coco(**MANY), "categories": 7}, "its categories"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_bad_file_is_one_sentence(tmp_path: Path, kind: str) -> None:
    said, reason = REFUSED[kind]
    with_images(tmp_path)
    (tmp_path / "a.json").write_text(json.dumps(said))
    with pytest.raises(InputError, match=rf"a\.json.*{reason}"):
        SegmentationData(find_pairs(tmp_path))


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        (("cell", "linestrip", [[1, 1], [9, 1]]), "shape 0: a linestrip of 2 points; draw it as"),
        (("cell", "point", [[1, 1]]), "a point of 1 points; draw it as a polygon"),
        (("cell", "circle", [[1, 1]]), "a circle of 1 points"),
        ((" ", "polygon", [[1, 1], [9, 1], [9, 9]]), "the label ' ' is no name"),
        (("cell", "polygon", [[1, 1, 1]] * 3), "is no list of x and y"),
    ],
)
def test_what_labelme_draws_otherwise_is_named(
    tmp_path: Path, shape: tuple[str, str, Any], reason: str
) -> None:
    with_images(tmp_path, ["0.png"])
    (tmp_path / "0.json").write_text(labelme(shape))
    with pytest.raises(InputError, match=rf"0\.json.*{reason}"):
        find_pairs(tmp_path)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("0 0.5 0.5 0.2 0.2", "line 2: it has 5 numbers; a box alone is no mask"),
        ("0 0.5 0.5 0.2", "line 2: it has 4 numbers; a polygon has 3 corners"),
        ("0 0 0 1 0 1 1 0", "line 2: a polygon of shape"),
        ("0 0 0 90 0 90 90", "line 2: its corners are no shares of the width and height"),
        ("cell 0 0 1 0 1 1", "line 2: invalid literal"),
        ("0 nan 0 1 0 1 1", "line 2: a polygon has a point that is no number"),
    ],
)
def test_what_yolo_says_otherwise_is_named(tmp_path: Path, line: str, reason: str) -> None:
    with_images(tmp_path / "images", ["0.png"])
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "0.txt").write_text(f"0 0 0 1 0 1 1\n{line}\n")
    with pytest.raises(InputError, match=rf"0\.txt' is no YOLO file of masks: {reason}"):
        find_pairs(tmp_path)
    (tmp_path / "labels" / "0.txt").rename(tmp_path / "labels" / "1.txt")
    with pytest.raises(InputError, match="no image in this folder"):
        find_pairs(tmp_path)


def test_two_files_of_polygons_are_a_question(tmp_path: Path) -> None:
    with_images(tmp_path)
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(json.dumps(coco(**MANY)))
    with pytest.raises(InputError, match=r"2 files of polygons, a\.json, b\.json: say which"):
        find_pairs(tmp_path)


def test_drawing_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polygons, "MAX_DRAWN", 2**20)
    everywhere = np.array(box(-1, -1, 5000, 5000)).reshape(4, 2)
    many = Shape(label="a", polygons=(everywhere,) * 20)
    x = np.arange(10**6)
    zigzag = np.stack([x % 5000, x % 2 * 5000], axis=1).astype(float)
    for shape, size, reason in (
        (many, (500, 500), "in boxes of more than"),
        (Shape(label="a", polygons=(zigzag,)), (5000, 5000), "a polygon of 1,000,000 points"),
        (many, (10**6, 10**6), "1000000 x 1000000 is over"),
    ):
        with pytest.raises(InputError, match=reason):
            Drawing(file=Path("x"), image="x", shapes=(shape,), size=size).read()


def test_reading_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.json"
    for text, reason in (
        (" " * 9000 + json.dumps(coco(**MANY)), "it has more than 8,192 bytes"),
        ('{"images": [], "annotations": [' + "[]," * 1000 + "[]]}", "more than 1,024 values"),
    ):
        file.write_text(text)
        monkeypatch.setattr(polygons, "FILE_BYTES", 8192)
        with pytest.raises(InputError, match=reason):
            read_coco(file)
