"""Finds the state dict of a network inside wrappers, prefixes and other saved parts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from unet.errors import InputError
from unet.weights.layouts import COMPVIS_PREFIX, LANDMARKS

_DEEPEST = 4  # dictionaries in each other
_COMPILED = "_orig_mod."  # of torch.compile, before any module


class _Place(NamedTuple):
    """Where a network is: in which dictionary, behind which prefix, and both for people."""

    name: str
    held: Mapping[Any, Any]
    prefix: str


def unwrapped(content: Mapping[Any, Any], layout: str) -> dict[str, Any]:
    """The state dict of the one network of a layout, of `LANDMARKS`, in what a file holds.

    The network is found by a key that each of its layout has once. What stands before that key is
    before all of the network's (`module.` of DataParallel, `model.` of Lightning, `_orig_mod.` of
    torch.compile, CompVis' `model.diffusion_model.`), and is taken off; keys without it belong to
    something else, and are left out. Dictionaries in the dictionary (`state_dict`,
    `model_state_dict`, `ema`, `params_ema` ...) are looked into. Averaged weights, in a dictionary
    or behind a prefix with the word ema, come before others.

    Returns:
        The content as it is where there is no such network.

    Raises:
        InputError: several networks, none of which is to be preferred.
    """
    found = list(_places(content, layout))
    for better in (_is_average, _is_compvis):
        found = list(filter(better, found)) or found
    if not found:
        return dict(content)
    if len(found) > 1:
        names = ", ".join(repr(place.name) for place in found[:4])
        raise InputError(
            f"there are several {layout} networks in it, with {names} before their keys: give the "
            "state dict of one"
        )
    _, held, prefix = found[0]
    plain = {_plain(key): value for key, value in held.items() if isinstance(key, str)}
    return {k.removeprefix(prefix): v for k, v in plain.items() if k.startswith(prefix)}


def has_network(content: Mapping[Any, Any], layout: str) -> bool:
    """Whether there is a network of that layout in what a file holds."""
    return any(True for _ in _places(content, layout))


def all_keys(content: Mapping[Any, Any]) -> Iterator[str]:
    """The keys of what a file holds, and of the dictionaries in it."""
    for _, held in _dictionaries(content):
        yield from (key for key in held if isinstance(key, str))


def _places(content: Mapping[Any, Any], layout: str) -> Iterator[_Place]:
    landmark = LANDMARKS[layout]
    for name, held in _dictionaries(content):
        for key, value in held.items():
            if not isinstance(key, str) or isinstance(value, Mapping):
                continue
            prefix, found, rest = _plain(key).rpartition(landmark)
            if found and not rest and (not prefix or prefix.endswith(".")):
                yield _Place(f"{name}{prefix}", held, prefix)


def _dictionaries(content: Mapping[Any, Any]) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """A dictionary and those in it, each once, with the keys that lead to it."""
    waiting, seen = [("", content, 1)], {id(content)}
    for name, held, depth in waiting:  # which grows
        yield name, held
        for key, value in held.items():
            inside = isinstance(key, str) and isinstance(value, Mapping) and depth < _DEEPEST
            if inside and id(value) not in seen:
                seen.add(id(value))
                waiting.append((f"{name}{key}.", value, depth + 1))


def _plain(key: str) -> str:
    return key.replace(_COMPILED, "")


def _is_average(place: _Place) -> bool:
    return "ema" in re.split(r"[._]", place.name)


def _is_compvis(place: _Place) -> bool:
    return place.prefix.endswith(COMPVIS_PREFIX)
