"""Panels: titles above, a legend below, and nothing on the pictures or cut off; axes that fit."""

from __future__ import annotations

from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import ImageDraw

from unet.files.pictures import LETTERS, composite, fit_axis, font, key, panel

COLOURS = st.tuples(*[st.integers(0, 255)] * 3)
LEGENDS = st.lists(st.tuples(st.text(max_size=90), COLOURS), min_size=1, max_size=40)


def boxes(make):
    """What `make` gives, and the left, right and middle of each text that it draws."""
    found = []
    draw_text = ImageDraw.ImageDraw.text

    def text(draw, at, words, fill, letters, anchor):
        left = at[0] - (letters.getlength(words) / 2 if anchor == "mm" else 0)
        found.append((left, left + letters.getlength(words), at[1]))
        draw_text(draw, at, words, fill, letters, anchor=anchor)

    with mock.patch.object(ImageDraw.ImageDraw, "text", text):
        return make(), found


@given(LEGENDS, st.integers(50, 800))
def test_a_legend_wraps_and_nothing_is_cut_off(legend, width):
    sheet, texts = boxes(lambda: key(legend, width))
    assert len(texts) == len(legend)
    assert all(left >= 0 and right <= sheet.width for left, right, _ in texts)
    assert all(LETTERS / 2 <= y <= sheet.height - LETTERS / 2 for *_, y in texts)
    for (_, right, y), (left, _, below) in pairwise(texts):
        assert below > y or left > right
    longest = max(right - left for left, right, _ in texts)
    assert sheet.width <= max(width, longest + 2 * LETTERS + 4)


@given(LEGENDS)
def test_a_legend_shows_its_colours(legend):
    shown = {colour for _, colour in key(legend, 300).getcolors(2**20)}
    assert {colour for _, colour in legend} <= shown


def test_titles_and_legend_leave_the_pictures_alone():
    rng = np.random.default_rng(0)
    rows = [[rng.integers(0, 255, (20, w, 3), np.uint8) for w in (30, 8)] for _ in range(3)]
    titles, legend = (
        ("image", "a title wider than its picture"),
        [("a", (9, 9, 9)), ("b", (1,) * 3)],
    )
    sheet, texts = boxes(lambda: panel(rows, titles=titles, legend=legend))
    found = np.asarray(sheet)
    for row in rows:
        for picture in row:
            windows = np.lib.stride_tricks.sliding_window_view(found, picture.shape)
            assert (windows == picture).all((-1, -2, -3)).any()
    assert all(left >= 0 and right <= sheet.width for left, right, _ in texts)
    assert texts[0][1] < texts[1][0]
    plain = panel(rows)
    assert (sheet.width, sheet.height) > (plain.width, plain.height)


def test_letters_have_accents():
    drawn = {bytes(font(16).getmask(letter)) for letter in "éäßαЖł\uffff"}
    assert len(drawn) == 7  # the last is the box that stands for a letter that is missing


@pytest.mark.parametrize(
    "values",
    [[0.29, 0.3], [1.0, 0.02, 0.01], [1e-7, 1e3], [-1.0, 50.0], [3.0, 3.0], [np.nan, 1, 2]],
)
def test_an_axis_fits_its_values(values):
    axes = Figure().subplots()
    axes.plot(range(len(values)), values)
    fit_axis(axes, np.array(values))
    limits, known = np.array(axes.get_ylim()), np.array(values)[np.isfinite(values)]
    assert limits[0] <= known.min() <= known.max() <= limits[1]
    if axes.get_yscale() == "log":
        limits, known = np.log(limits), np.log(known)
        assert len(axes.get_yticks()) > 1
    if known.min() < known.max():
        assert np.ptp(known) > 0.85 * np.ptp(limits)


def test_channels_add_up_and_bright_ones_stay_apart():
    dark = np.array([[[100, 0, 0, 0, 0], [0, 50, 0, 0, 0], [0, 0, 30, 0, 20]]], np.uint8)
    assert composite(dark).tolist() == [[[0, 35, 100], [0, 50, 0], [50, 20, 0]]]
    bright = np.full((8, 8, 4), 200, np.uint8)
    bright[:4, :, 3] = 100
    shown = composite(bright)
    assert shown.max() == 255
    assert not np.array_equal(shown[0, 0], shown[7, 7])
