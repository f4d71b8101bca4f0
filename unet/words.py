"""Phrases for messages, such as "1 image" and "2 images"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def counted(count: float, thing: str) -> str:
    """The count with its noun: "1 image", "1,200 images", "0.5 minutes", "2 classes"."""
    number = f"{count:g}" if count % 1 else f"{int(count):,}"
    plural = "es" if thing.endswith("s") else "s"
    return f"{number} {thing}{plural if count != 1 else ''}"


def listed(counts: Mapping[str, int]) -> str:
    """Names with a count each, the first ten of many and the last: "a (6), b (1,200)"."""
    said = [f"{name} ({count:,})" for name, count in counts.items()]
    return ", ".join(said if len(said) <= 12 else [*said[:10], "...", said[-1]])


def channels_said(count: int, names: Sequence[str] = ()) -> str:
    """What images of so many channels are: "grey (1 channel)", "2 channels (DAPI, GFP)"."""
    known = counted(count, "channel")
    if names:
        return f"{known} ({', '.join(names)})"
    return {1: f"grey ({known})", 3: f"RGB ({known})"}.get(count, known)


def left_out(
    found: Mapping[str, Sequence[object]], cure: str = "name one by itself if it is meant"
) -> str:
    """A sentence on what is left out of a folder, with the first path of each kind; "" for nothing.

    Args:
        found: files or folders by what they are, such as "folder of masks".
        cure: what to do to use them nevertheless.
    """
    said = []
    for what, paths in found.items():
        thing, _, more = what.partition(" ")
        if paths:
            first = min(map(str, paths))
            said.append(f"{counted(len(paths), thing)} {more}, such as {first}")
    return f"left out: {', and '.join(said)}; {cure}" if said else ""
