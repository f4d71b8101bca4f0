from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from diffusion.data.shapes import (
    COLOURS,
    HELD_OUT,
    OPPOSITE,
    SHAPES,
    SIZES,
    Picture,
    Scene,
    Thing,
    caption,
    coverage,
    draw,
    example,
    example_caption,
    held_out,
    parse,
    random_scene,
)
from diffusion.judging.shapes_reader import Agreement, agrees, find, read
from unet.errors import InputError

RIGHT, NOTHING = Agreement(True, True, True, True), Agreement(False, False, False, False)

things = st.builds(
    Thing,
    colour=st.sampled_from(list(COLOURS)),
    shape=st.sampled_from(SHAPES),
    size=st.sampled_from([None, *SIZES]),
)
scenes = st.one_of(
    st.builds(lambda thing: Scene(things=(thing,)), things),
    st.builds(
        lambda a, b, relation: Scene(things=(a, b), relation=relation),
        things,
        things,
        st.sampled_from(list(OPPOSITE)),
    ),
)


def picture_of(text: str, size: int = 32, seed: int = 0) -> Picture:
    return draw(parse(text), size, np.random.default_rng(seed)).picture


# -- words


@given(scenes)
def test_a_caption_is_read_back(scene: Scene) -> None:
    assert parse(caption(scene)) == scene
    assert parse(f"  {caption(scene).upper().replace(' ', '  ')}") == scene


def test_the_words_are_those_of_the_example() -> None:
    text = "a small red circle above a large blue square"
    scene = parse(text)
    assert scene.things == (
        Thing(size="small", colour="red", shape="circle"),
        Thing(size="large", colour="blue", shape="square"),
    )
    assert scene.relation == "above"
    assert caption(scene) == text
    assert caption(scene.turned()) == "a large blue square below a small red circle"
    assert scene.turned().canonical() == scene.canonical() == scene


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a circle",
        "a pink circle",
        "a huge red circle",
        "red circle",
        "a red circle above",
        "a red circle on a blue square",
        "a red circle above a blue square above a red square",
    ],
)
def test_other_sentences_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="write it as 'a small red circle"):
        parse(text)


@pytest.mark.parametrize(
    ("colour", "shape", "size"),
    [("pink", "circle", None), ("red", "hexagon", None), ("red", "circle", "huge")],
)
def test_unknown_attributes_are_refused(colour: str, shape: str, size: str | None) -> None:
    with pytest.raises(InputError, match=r"pink|hexagon|huge"):
        Thing(colour=colour, shape=shape, size=size)


@pytest.mark.parametrize(("count", "relation"), [(0, None), (1, "above"), (2, None), (2, "on")])
def test_things_and_relation_must_fit(count: int, relation: str | None) -> None:
    with pytest.raises(InputError):
        Scene(things=(Thing(colour="red", shape="circle"),) * count, relation=relation)


# -- scenes


def test_held_out_combinations_are_left_out_or_asked_for() -> None:
    rng = np.random.default_rng(0)
    seen = [random_scene(rng, unseen=False) for _ in range(1000)]
    unseen = [random_scene(rng, unseen=True) for _ in range(100)]
    assert all(held_out(scene) for scene in unseen)
    assert not any(held_out(scene) for scene in seen)
    pairs = {(thing.colour, thing.shape) for scene in seen for thing in scene.things}
    assert pairs == set(itertools.product(COLOURS, SHAPES)) - HELD_OUT
    # Each word of a pair that is held out is learnt from others.
    assert {colour for colour, _ in pairs} == set(COLOURS)
    assert {shape for _, shape in pairs} == set(SHAPES)
    assert {scene.relation for scene in seen} == {None, *OPPOSITE}
    assert {thing.size for scene in seen for thing in scene.things} == {None, *SIZES}
    assert all(len(set(scene.things)) == len(scene.things) for scene in seen)


def test_an_example_depends_on_seed_and_index_alone() -> None:
    scene, drawing = example(3, 5)
    again = example(3, 5)
    assert scene == again[0]
    np.testing.assert_array_equal(drawing.picture, again[1].picture)
    assert example(3, 5, 64)[0] == scene
    assert example_caption(3, 5) == caption(scene)
    others = [example(3, 6), example(4, 5)]
    assert all((other.picture != drawing.picture).any() for _, other in others)


def test_the_layout_does_not_depend_on_the_size() -> None:
    for i in range(20):
        small, large = example(0, i, 32)[1].picture, example(0, i, 128)[1].picture
        shrunk = large.reshape(32, 4, 32, 4, 3).mean((1, 3))
        assert abs(shrunk - small).mean() < 2


# -- pictures


def test_coverage_is_antialiased_and_has_the_area_of_the_shape() -> None:
    for shape, area in (("circle", np.pi), ("square", 3.24), ("triangle", 2.2)):
        cover = coverage(shape, 0.5, 0.45, 0.2, 128)
        assert cover.mean() == pytest.approx(area * 0.2**2, rel=0.01)
        assert ((cover > 0) & (cover < 1)).any()
        y, x = (np.array(ndimage.center_of_mass(cover)) + 0.5) / 128
        assert (x, y) == pytest.approx((0.5, 0.45), abs=0.003)


def test_things_lie_inside_apart_and_as_their_caption_says() -> None:
    for i in range(300):
        scene, (picture, masks) = example(1, i, 64)
        assert picture.shape == (64, 64, 3)
        assert masks.shape == (len(scene.things), 64, 64)
        border = np.ones((64, 64), bool)
        border[1:-1, 1:-1] = False
        assert not (masks & border).any()
        for thing, mask in zip(scene.things, masks, strict=True):
            inside = ndimage.binary_erosion(mask)
            assert (abs(picture[inside] - np.array(COLOURS[thing.colour])) <= 1).all()
        if scene.relation:
            assert not (ndimage.binary_dilation(masks[0], iterations=3) & masks[1]).any()
            (y0, x0), (y1, x1) = (ndimage.center_of_mass(mask) for mask in masks)
            gap = {"above": y1 - y0, "below": y0 - y1, "left of": x1 - x0, "right of": x0 - x1}
            assert max(gap, key=lambda name: gap[name]) == scene.relation


def test_small_and_large_differ_clearly() -> None:
    areas: dict[tuple[str, str | None], list[int]] = {}
    for i in range(300):
        scene, drawing = example(2, i, 64)
        for thing, mask in zip(scene.things, drawing.masks, strict=True):
            areas.setdefault((thing.shape, thing.size), []).append(int(mask.sum()))
    for shape in SHAPES:
        assert 1.5 * max(areas[shape, "small"]) < min(areas[shape, "large"])


# -- the reader


@pytest.mark.parametrize(
    ("size", "sigma", "blur", "least"),
    [
        (32, 0, 0, 0.995),
        (64, 0, 0, 0.995),
        (24, 0, 0, 0.98),
        (32, 8, 0.6, 0.99),
        (64, 8, 0.6, 0.99),
    ],
)
def test_the_reader_is_right(size: int, sigma: float, blur: float, least: float) -> None:
    """`blur` is the standard deviation in pixels of a picture of 32 x 32."""
    rng = np.random.default_rng(0)
    count, right = 200, 0
    for i in range(count):
        scene, drawing = example(4, i, size)
        reach = blur * size / 32
        blurred = ndimage.gaussian_filter(drawing.picture.astype(float), (reach, reach, 0))
        noisy = blurred + rng.normal(0, sigma, blurred.shape)
        right += agrees(np.rint(noisy.clip(0, 255)).astype(np.uint8), scene) == RIGHT
    assert right >= least * count


def test_the_reader_names_every_attribute_and_place() -> None:
    for i in range(100):
        scene, (picture, masks) = example(5, i)
        seen = read(picture)
        assert seen is not None
        if all(thing.size for thing in scene.things):
            assert seen == scene.canonical()
        found = find(picture)
        for mask in masks:
            best = max(found, key=lambda one: (one.mask & mask).sum())
            assert (best.mask & mask).sum() / (best.mask | mask).sum() > 0.9
            y, x = (np.array(ndimage.center_of_mass(mask)) + 0.5) / 32
            assert (best.x, best.y) == pytest.approx((x, y), abs=0.02)


def flat(grey: int) -> Picture:
    return np.full((32, 32, 3), grey, np.uint8)


def wrong_pictures() -> dict[str, Picture]:
    rng = np.random.default_rng(0)
    circle = picture_of("a large red circle")
    parts = (picture_of("a small blue circle", 32, seed)[:16, :16] for seed in range(200))
    seen = (part for part in parts if read(np.pad(part, ((0, 16), (0, 16), (0, 0)), "edge")))
    whole = list(itertools.islice(seen, 4))
    four = np.concatenate([np.concatenate(whole[:2], 1), np.concatenate(whole[2:], 1)])
    pale = (0.4 * circle + 0.6 * 240).astype(np.uint8)
    orange = circle.copy()
    orange[(circle[..., 1] < 60) & (circle[..., 0] > 150)] = (250, 130, 140)
    ring = circle.copy()
    y, x = ndimage.center_of_mass(circle[..., 1] < 100)
    rows, columns = np.indices((32, 32))
    ring[np.hypot(rows - y, columns - x) < 3.5] = 240
    bar = flat(240)
    bar[14:17, 3:29] = COLOURS["blue"]
    return {
        "light": flat(240),
        "black": flat(0),
        "noise": rng.integers(0, 256, (32, 32, 3), np.uint8),
        "light noise": rng.normal(235, 25, (32, 32, 3)).clip(0, 255).astype(np.uint8),
        "smooth noise": (
            128 + 900 * ndimage.gaussian_filter(rng.normal(size=(32, 32, 3)), (4, 4, 0))
        )
        .clip(0, 255)
        .astype(np.uint8),
        "negative": 255 - circle,
        "four things": four,
        "a pale colour": pale,
        "a foreign colour": orange,
        "a ring": ring,
        "a bar": bar,
    }


@pytest.mark.parametrize("name", wrong_pictures())
def test_pictures_of_anything_else_are_not_read(name: str) -> None:
    picture = wrong_pictures()[name]
    assert read(picture) is None
    assert agrees(picture, parse("a large red circle")) == NOTHING


@pytest.mark.parametrize(
    ("shown", "wrong"),
    [
        ("a small red square above a large blue triangle", {}),
        ("a large blue triangle below a small red square", {}),
        ("a small green square above a large blue triangle", {"colour"}),
        ("a small blue square above a large red triangle", {"colour"}),
        ("a small red circle above a large blue triangle", {"shape"}),
        ("a large red square above a large blue triangle", {"size"}),
        ("a small red square below a large blue triangle", {"position"}),
        ("a small red square left of a large blue triangle", {"position"}),
        ("a small red square", set(Agreement._fields)),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_agreement_tells_which_attribute_is_wrong(shown: str, wrong: set[str], seed: int) -> None:
    asked = parse("a small red square above a large blue triangle")
    found = agrees(picture_of(shown, seed=seed), asked)
    assert {name for name, right in found._asdict().items() if not right} == set(wrong)
    open_size = parse("a red square above a blue triangle")
    assert agrees(picture_of(shown, seed=seed), open_size).size == (wrong != set(Agreement._fields))


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((32, 32), np.uint8),
        np.zeros((32, 32, 1), np.uint8),
        np.zeros((32, 16, 3), np.uint8),
        np.zeros((32, 32, 3), np.float32),
        np.zeros((0, 0, 3), np.uint8),
    ],
)
def test_what_is_no_square_rgb_picture_is_refused(picture: Picture) -> None:
    with pytest.raises(InputError, match="give a square uint8"):
        read(picture)


def test_a_picture_has_at_least_a_pixel() -> None:
    scene = parse("a red circle")
    assert draw(scene, 1, np.random.default_rng(0)).picture.shape == (1, 1, 3)
    with pytest.raises(InputError, match="at least 1 pixel"):
        draw(scene, 0, np.random.default_rng(0))
