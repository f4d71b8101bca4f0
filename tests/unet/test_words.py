"""Counts with their nouns."""

from __future__ import annotations

import pytest

from unet.words import counted


@pytest.mark.parametrize(
    ("count", "thing", "text"),
    [
        (0, "image", "0 images"),
        (1, "image", "1 image"),
        (1.0, "minute", "1 minute"),
        (0.5, "minute", "0.5 minutes"),
        (1, "class", "1 class"),
        (2, "class", "2 classes"),
        (1_234_567, "held-out image", "1,234,567 held-out images"),
    ],
)
def test_one_is_one(count, thing, text):
    assert counted(count, thing) == text
