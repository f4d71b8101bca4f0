"""Where each word of a prompt is looked at: cross-attention over the image, as heat maps.

Averaged over heads, layers and steps, as in DAAM (Tang et al., arXiv 2210.04885, sec. 3).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from diffusion.pictures import LINE, cell, lettered
from unet.attention import Attention, SpatialTransformer, TransformerBlock
from unet.errors import InputError
from unet.files.pictures import RGB, composite, panel
from unet.model import UNet

COLUMNS = 8  # of a figure, at most
_HEAT = 0.7  # share of the heat's colour in a picture; the rest is the image in grey


class AttentionRecord:
    """The cross-attention of some forward passes of a U-Net; made by `recorded_attention`.

    Attributes:
        paused: set it to skip forward passes.
    """

    def __init__(self, images: int | None) -> None:
        self.paused = False
        self._images = images
        # Of each forward, by the height and width of a map: (B, L, h, w), summed over layers.
        self._forwards: list[dict[tuple[int, int], Tensor]] = []
        self._size = (1, 1)  # of the map whose pixels attend next

    def __len__(self) -> int:
        """How many forward passes are recorded."""
        return len(self._forwards)

    def maps(self, size: tuple[int, int], forwards: slice = slice(None)) -> Tensor:
        """How much each pixel attends to each token: float32 (B, L, *size), on the CPU.

        The mean over heads, layers and forwards, each enlarged to `size` first. At each pixel the
        tokens sum to 1; masked ones have 0.

        Args:
            size: height and width of the image.
            forwards: which of the recorded ones, such as slice(10) or slice(-5, None).

        Raises:
            InputError: there are none.
        """
        chosen = self._forwards[forwards]
        if not chosen:
            raise InputError(
                f"there is no attention to draw: {len(self)} forward passes are recorded, and "
                f"{forwards} has none of them"
            )
        # Guidance pads a prompt to the length of the other one, but not at every noise level.
        length = max(y.shape[1] for sizes in chosen for y in sizes.values())
        total = torch.zeros(())
        for y in (y for sizes in chosen for y in sizes.values()):
            whole = F.pad(y, (0, 0, 0, 0, 0, length - y.shape[1]))
            total = total + F.interpolate(whole, size=size, mode="bilinear", align_corners=False)
        return total / total.sum(dim=1, keepdim=True)  # which is the number of layers

    def _begin(self, *_: Any) -> None:
        if not self.paused:
            self._forwards.append({})

    def _note_size(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self._size = args[0].shape[-2:]

    @torch.no_grad()
    def _add(self, attention: Attention, args: tuple[Any, ...], _: Tensor) -> None:
        if self.paused:
            return
        found = reduce(attention.probabilities(*args)[: self._images], "b h n l -> b l n", "mean")
        found = rearrange(found, "b l (h w) -> b l h w", h=self._size[0]).float().cpu()
        sums = self._forwards[-1]
        sums[self._size] = sums.get(self._size, 0) + found


@contextlib.contextmanager
def recorded_attention(model: nn.Module, images: int | None = None) -> Iterator[AttentionRecord]:
    """Records the cross-attention of a network's forward passes; its outputs stay the same.

    While it is active, each cross-attention also computes its probabilities, beside the fused
    kernel. Afterwards the network is as it was before.

    Args:
        model: a `UNet`, or what has one inside, such as `DiffusionUNet`; not compiled.
        images: how many rows of each batch to keep, from the first on, as guidance puts those of
            the null prompt behind them; None: all.

    Raises:
        InputError: the network has no cross-attention.
    """
    modules = list(model.modules())
    nets = [m for m in modules if isinstance(m, UNet)]
    if all(net.config.context_channels is None for net in nets):
        raise InputError(
            "attention pictures need a model that reads text: this one has no cross-attention"
        )
    record = AttentionRecord(images)
    handles = [net.register_forward_pre_hook(record._begin) for net in nets]
    for module in modules:
        if isinstance(module, SpatialTransformer):
            handles.append(module.register_forward_pre_hook(record._note_size))
        if isinstance(module, TransformerBlock) and module.cross_attention is not None:
            handles.append(module.cross_attention.register_forward_hook(record._add))
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def attention_figure(image: RGB, words: Sequence[str], maps: Tensor) -> Image.Image:
    """An image, and for each word its heat map over the image in grey, brightest at its maximum.

    Args:
        image: uint8 (H, W, C), C = 1 or 3.
        words: of L tokens.
        maps: (L, H, W) or more, of which the first L are shown, as `AttentionRecord.maps` has them.

    Raises:
        InputError: more words than maps, or maps of another size than the image.
    """
    if len(words) > len(maps) or maps.shape[1:] != image.shape[:2]:
        raise InputError(
            f"{len(words)} words and an image of {image.shape[0]} x {image.shape[1]} do not go "
            f"with maps {tuple(maps.shape)}: give one map per word, of the image's size"
        )
    heats = maps[: len(words)].numpy()
    cells = [cell(composite(image)), *(cell(_overlaid(image, heat)) for heat in heats)]
    titles = [lettered(word, cells[0].shape[1], LINE) for word in ("image", *words)]
    tiles = [np.concatenate(pair) for pair in zip(titles, cells, strict=True)]
    return panel([tiles[i : i + COLUMNS] for i in range(0, len(tiles), COLUMNS)])


def _overlaid(image: RGB, heat: NDArray[np.float32]) -> RGB:
    from matplotlib import colormaps

    grey = reduce(image.astype(np.float32), "h w c -> h w 1", "mean")
    colour = 255 * colormaps["inferno"](heat / max(heat.max(), 1e-12))[..., :3]
    return np.rint(_HEAT * colour + (1 - _HEAT) * grey).astype(np.uint8)


def mass_inside(heat: Tensor, mask: Tensor) -> float:
    """The share of a word's attention that lies inside an object.

    By chance it would be `mask.float().mean()`, the share of the image that the object covers.

    Args:
        heat: (H, W), 0 or more, such as one of `AttentionRecord.maps`.
        mask: (H, W) bool, True on the object.

    Raises:
        InputError: other shapes; a map of zeros, such as that of padding.
    """
    if heat.shape != mask.shape or mask.dtype != torch.bool:
        raise InputError(
            f"a map {tuple(heat.shape)} and a mask {tuple(mask.shape)} of {mask.dtype}: give both "
            "of one size, the mask as torch.bool"
        )
    total = heat.double().sum()
    if not total > 0:
        raise InputError("nothing attends to this token, such as padding: choose a word's map")
    return float(heat.double()[mask].sum() / total)
