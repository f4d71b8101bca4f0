"""Small words of messages: one image, two images."""

from __future__ import annotations


def counted(count: float, thing: str) -> str:
    """The count with its noun: "1 image", "1,200 images", "0.5 minutes", "2 classes"."""
    number = f"{count:g}" if count % 1 else f"{int(count):,}"
    plural = "es" if thing.endswith("s") else "s"
    return f"{number} {thing}{plural if count != 1 else ''}"
