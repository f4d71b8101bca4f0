"""Pictures that are made from pictures: the condition has the geometry of its image."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from diffusion.data.conditions import RECIPES, Condition, ImageKind, find_condition, partners
from diffusion.data.images import DiffusionData
from diffusion.data.sources import HowToRead
from diffusion.model import DiffusionUNet
from unet import UNetConfig
from unet.errors import InputError
from unet.files.images import write_image
from unet.files.pages import Reading

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (6, 20, 24), np.uint8)
GREY, COLOUR = (ImageKind(size=(16, 16), channels=channels) for channels in (1, 3))


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Images, the same images as pictures, and masks of their bright pixels."""
    for i, image in enumerate(IMAGES):
        write_image(tmp_path / "image" / f"{i}.png", image)
        write_image(tmp_path / "picture" / f"{i}.tif", image)
        write_image(tmp_path / "mask" / f"{i}.png", (image > 99).astype(np.uint8) * 7)
    return tmp_path / "image", tmp_path / "picture", tmp_path / "mask"


@pytest.mark.parametrize("crops", [False, True])
def test_a_picture_is_cut_and_mirrored_as_its_image(
    folders: tuple[Path, Path, Path], crops: bool
) -> None:
    image, picture, mask = folders
    size = 12 if crops else None
    data = DiffusionData(image, condition=str(picture), crops=crops, size=size, flips=True)
    samples = data.samples(seed=3)
    masked = DiffusionData(image, condition=str(mask), crops=crops, size=size, flips=True)
    others = masked.samples(seed=3)
    for key in ((0, 0), (0, 1), (1, 2)):
        sample, other = samples[key], others[key]
        assert torch.equal(sample["image"], sample["picture"])
        bright = other["image"][0] > 2 * 99.5 / 255 - 1
        assert torch.equal(other["picture"], torch.stack([~bright, bright]).float())


@pytest.mark.parametrize(
    ("images", "masks"),
    [
        *(("{}/x", "{}/x"), ("{0}/{0}", "{}"), ("{}", "a/{0}/{0}"), ("{}", "{}")),
        ("ü/{}.ome", "u\u0308/{}"),  # as other programs and systems write them
    ],
)
def test_a_picture_lies_where_its_image_lies_or_has_its_name_alone(
    tmp_path: Path, images: str, masks: str
) -> None:
    for i, image in enumerate(IMAGES):
        write_image(tmp_path / f"image/{images.format(i)}.png", image)
        write_image(tmp_path / f"mask/{masks.format(i)}.tif", (image > 99).astype(np.uint8))
    write_image(tmp_path / "mask/notes/of/none.jpeg.png", IMAGES[0])  # which makes no pictures
    data = DiffusionData(tmp_path / "image", condition=str(tmp_path / "mask"))
    assert data.condition is not None
    assert data.condition.values == (0, 1)
    for i in (*data.train, *data.val):
        image, picture = data.draw(int(i), RNG)[1:]
        assert picture is not None
        assert torch.equal(picture[1] == 1, image[0] > 2 * 99.5 / 255 - 1)


@pytest.mark.parametrize(
    ("images", "others"),
    [
        *(("{}", "{}_edge"), ("x{0}/photo_{0}", "x{0}/sketch-{0}"), ("{}_rgb", "a_{}_ir")),
        ("im_{}_raw", "gt_{}_seg"),
    ],
)
def test_names_may_share_an_ending_or_a_beginning(tmp_path: Path, images: str, others: str) -> None:
    files = [str(tmp_path / f"image/{images.format(i)}.png") for i in range(12)]
    own = [str(tmp_path / f"other/{others.format(i)}.png") for i in range(12)]
    for file in own:
        write_image(Path(file), IMAGES[0])
    assert partners(files, tmp_path / "other", root=tmp_path / "image") == own
    write_image(tmp_path / "other/notes.png", IMAGES[0])
    with pytest.raises(InputError, match="has no condition for 12 images, such as"):
        partners(files, tmp_path / "other", root=tmp_path / "image")


def test_a_picture_that_could_be_one_of_several_is_refused(tmp_path: Path) -> None:
    for place in ("image/a/0.png", "image/a/1.png", "mask/b/0.png", "mask/c/0.png", "mask/a/1.png"):
        write_image(tmp_path / place, IMAGES[0])
    with pytest.raises(
        InputError, match=r"mask/b/0.png' and .*mask/c/0.png' could both be the con"
    ):
        DiffusionData(tmp_path / "image", condition=str(tmp_path / "mask"))
    write_image(tmp_path / "mask/a/0.png", IMAGES[0])
    DiffusionData(tmp_path / "image", condition=str(tmp_path / "mask"))
    write_image(tmp_path / "mask/a/0.tif", IMAGES[0])
    with pytest.raises(
        InputError, match=r"mask/a/0.png' and .*mask/a/0.tif' could both be the con"
    ):
        DiffusionData(tmp_path / "image", condition=str(tmp_path / "mask"))


def test_the_condition_of_an_index_is_the_same_at_each_call(
    folders: tuple[Path, Path, Path],
) -> None:
    for said in ("hole", "noise:0.3", str(folders[2])):
        data = DiffusionData(folders[0], condition=said)
        one, two = (data.conditions([0, 3]) for _ in range(2))
        assert all(torch.equal(a.picture, b.picture) for a, b in zip(one, two, strict=True))


UNIT = hnp.arrays(np.float32, (3, 16, 16), elements=st.floats(-1, 1, width=32))


@given(UNIT, st.integers(0, 99))
def test_recipes_make_what_they_say(array: np.ndarray, seed: int) -> None:
    image = torch.from_numpy(array)
    made = {}
    for said in ("lowres:4", "grey", "noise:0.2", "hole"):
        condition = find_condition(said, 3)
        made[condition.kind] = condition.make(image, np.random.default_rng(seed))
        assert made[condition.kind].shape == (condition.channels, 16, 16)
        assert Condition.from_dict(condition.to_dict()) == condition
    assert set(made) == set(RECIPES)
    inside = made["hole"][3] == 1
    assert 0 < inside.sum() < inside.numel()
    assert torch.equal(made["hole"][:3, ~inside], image[:, ~inside])
    assert not made["hole"][:3, inside].any()
    assert made["grey"].min() >= image.min() - 1e-5
    assert made["grey"].max() <= image.max() + 1e-5
    flat = torch.full((3, 16, 16), 0.25)
    small = find_condition("lowres:4", 3).make(flat, np.random.default_rng(0))
    torch.testing.assert_close(small, flat)


def test_a_small_picture_is_given_as_it_was_learnt(tmp_path: Path) -> None:
    condition = find_condition("lowres:4", 1)
    whole = torch.from_numpy(np.kron(IMAGES[0, :4, :4], np.ones((4, 4), np.uint8)))
    write_image(tmp_path / "small.png", IMAGES[0, :4, :4])
    write_image(tmp_path / "whole.png", whole.numpy())
    small, large = (condition.given(tmp_path / f"{name}.png", GREY) for name in ("small", "whole"))
    torch.testing.assert_close(small, large)


def test_a_transparent_hole_is_the_hole(tmp_path: Path) -> None:
    rgba = np.full((16, 16, 4), 200, np.uint8)
    rgba[..., 3], rgba[4:8, 4:8] = 255, 0
    write_image(tmp_path / "x.png", rgba)
    found = find_condition("hole", 3).given(tmp_path / "x.png", COLOUR)
    assert found[3].sum() == 16
    assert not found[:3, 4:8, 4:8].any()
    small = find_condition("hole", 3).given(tmp_path / "x.png", replace(COLOUR, size=(6, 6)))
    around = small[:3, small[3] == 0]  # the black below the hole is in none of these
    torch.testing.assert_close(around, torch.full_like(around, 200 / 127.5 - 1))
    write_image(tmp_path / "y.png", rgba[..., :3])
    with pytest.raises(InputError, match="no pixel of it is transparent"):
        find_condition("hole", 3).given(tmp_path / "y.png", COLOUR)


def drawing(path: Path, colour: int, where: slice = slice(4, 9)) -> None:
    """Rows of a colour, the first of them half transparent, on nothing."""
    rgba = np.zeros((20, 24, 4), np.uint8)
    rgba[where] = (colour, colour, colour, 255)
    rgba[where.start, :, 3] = 128
    write_image(path, rgba)


@pytest.mark.parametrize(
    ("painted", "background", "over"),
    [
        (255, (255, 255, 255), (0, 0, 0)),
        (0, (255, 255, 255), (255, 255, 255)),
        (0, (0, 0, 0), (255, 255, 255)),
        (255, (0, 0, 0), (0, 0, 0)),
        (7, (7, 7, 7), (255, 255, 255)),
    ],
)
def test_what_is_painted_on_nothing_is_seen_and_the_colour_below_is_told(
    tmp_path: Path,
    painted: int,
    background: tuple[int, int, int],
    over: tuple[int, int, int],
) -> None:
    for i, image in enumerate(IMAGES):
        write_image(tmp_path / f"image/{i}.png", image)
        drawing(tmp_path / f"drawn/{i}.png", painted)
    write_image(tmp_path / "drawn/5.png", np.zeros((20, 24, 4), np.uint8))  # nothing is painted
    how = HowToRead(background=background)
    data = DiffusionData(tmp_path / "image", condition=str(tmp_path / "drawn"), how=how)
    assert f"transparent pixels over the colour {over[0]} {over[1]} {over[2]}" in data.describe()
    condition = data.condition
    assert condition is not None
    assert Condition.from_dict(condition.to_dict()) == condition
    seen = condition.given(tmp_path / "drawn/0.png", ImageKind(size=None, channels=1))
    blank, full = over[0] / 127.5 - 1, painted / 127.5 - 1
    want = torch.full((20,), blank)
    want[5:9], want[4] = full, (blank + full) / 2
    assert torch.allclose(seen, want[:, None].expand(3, 20, 24), atol=0.01)
    drawing(tmp_path / "later.png", over[0])
    said = f"later.png': all that is painted in it has the colour {over[0]} {over[0]} {over[0]}, "
    with pytest.raises(InputError, match=said):
        condition.given(tmp_path / "later.png", ImageKind(size=None, channels=1))


def test_drawings_that_no_colour_below_shows_are_refused(tmp_path: Path) -> None:
    for i, image in enumerate(IMAGES):
        write_image(tmp_path / f"image/{i}.png", image)
        drawing(tmp_path / f"drawn/{i}.png", 255 * (i % 2))
    with pytest.raises(InputError, match="or train with another --background"):
        DiffusionData(tmp_path / "image", condition=str(tmp_path / "drawn"))
    how = HowToRead(background=(128, 128, 128))
    DiffusionData(tmp_path / "image", condition=str(tmp_path / "drawn"), how=how)


def test_a_file_for_a_recipe_is_laid_over_what_the_images_were(tmp_path: Path) -> None:
    drawing(tmp_path / "x.png", 255)
    for over in (0, 255, 90):
        kind = ImageKind(size=None, channels=3, background=(over, over, over))
        for recipe in ("noise:0.1", "grey"):
            seen = find_condition(recipe, 3).given(tmp_path / "x.png", kind)
            assert torch.allclose(seen[:, :4], torch.tensor(over / 127.5 - 1))
    kind = ImageKind(size=None, channels=4, background=None)
    seen = find_condition("noise:0.1", 4).given(tmp_path / "x.png", kind)
    assert (seen[3, :4] == -1).all()  # alpha is a channel
    assert (seen[3, 5:9] == 1).all()


def test_what_was_not_measured_in_a_picture_is_the_mean_of_the_rest(tmp_path: Path) -> None:
    """Of pictures beside images, and of those that a recipe's model is asked with."""
    how = HowToRead(reading=Reading(nodata=math.nan))
    for i, image in enumerate(IMAGES):
        floats = (image / 255).astype(np.float32)
        floats[:5] = np.nan
        write_image(tmp_path / "picture" / f"{i}.tif", floats)
        write_image(tmp_path / "image" / f"{i}.png", image)
    pictures = tmp_path / "picture"
    with pytest.raises(InputError, match="say so with --nodata nan"):
        DiffusionData(tmp_path / "image", condition=str(pictures))
    data = DiffusionData(tmp_path / "image", condition=str(pictures), how=how)
    found = data.conditions([data.val[0]])[0].picture
    assert torch.allclose(found[:, :5], found[:, 5:].mean(), atol=1e-5)
    of_itself = DiffusionData(pictures, condition="noise:0.1", how=how)
    recipe, file = of_itself.condition, Path(of_itself.source.files[2])
    kind = ImageKind(size=None, channels=1, ranges=of_itself.ranges, fine=True, nodata=math.nan)
    asked = recipe.unread(file, kind).read()
    assert torch.equal(asked, of_itself.batch([2])[0][0])


def model(condition: Condition, channels: int = 1) -> DiffusionUNet:
    torch.manual_seed(0)
    config = UNetConfig(
        in_channels=channels + condition.channels,
        channels=8,
        multipliers=(1, 2),
        block="res",
        norm="group",
        groups=4,
        time=True,
    )
    return DiffusionUNet(config, channels, {"condition": condition.to_dict(), "size": [16, 16]})


def test_a_network_sees_the_picture_and_none_is_no_picture() -> None:
    net = model(find_condition("grey", 1))
    assert net.image_channels == 1
    x, t, picture = torch.randn(2, 1, 16, 16), torch.tensor([3, 9]), torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        seen = net(x, t, picture=picture)
        nothing = net(x, t, **net.conditioning([None, None]))
        zeros = net(x, t, picture=torch.zeros_like(picture))
    assert seen.shape == x.shape
    assert (seen - nothing).abs().max() > 1e-4
    assert torch.equal(nothing, zeros)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("lowres", "give lowres:4"),
        ("lowres:1", "give lowres:4"),
        ("noise:-1", "give lowres:4"),
        ("grey:2", "takes no number"),
        ("blur:2", "neither a folder nor one of"),
    ],
)
def test_a_recipe_that_is_none_is_refused(said: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        find_condition(said, 1)


@pytest.mark.parametrize("flag", ["condition", "joint"])
def test_an_image_gets_no_picture_of_another_image(tmp_path: Path, flag: str) -> None:
    for place in ("image/a/0.png", "image/b/0.png", "mask/b/0.png"):
        write_image(tmp_path / place, IMAGES[0] // 200)
    with pytest.raises(InputError, match=r"no \w+ for 1 image, such as '.*image/a/0\.png': give"):
        DiffusionData(tmp_path / "image", **{flag: str(tmp_path / "mask")})
    for images in ("", "image"):
        with pytest.raises(InputError, match=r"/image/\w/0.png' would be its own \w+: give"):
            DiffusionData(tmp_path / images, **{flag: str(tmp_path / "image")})


def test_a_folder_that_does_not_fit_is_one_sentence(folders: tuple[Path, Path, Path]) -> None:
    image, _, mask = folders
    (mask / "2.png").unlink()
    with pytest.raises(InputError, match=r"no condition for 1 image, such as '.*/2\.png'"):
        DiffusionData(image, condition=str(mask))
    write_image(mask / "2.png", np.zeros((5, 5), np.uint8))
    with pytest.raises(InputError, match="is 5 x 5, but its image 20 x 24"):
        DiffusionData(image, condition=str(mask))
    condition = find_condition(str(mask), 1)
    write_image(mask / "2.png", np.full((20, 24), 3, np.uint8))
    with pytest.raises(InputError, match=r"holds the values \[3\], but the conditions have"):
        condition.read(mask / "2.png")
