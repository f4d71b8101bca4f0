"""`Start`: a trained model of either task that another training starts from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from unet.config import UNetConfig
from unet.model import UNet
from unet.weights.checkpoints import read_checkpoint
from unet.weights.crossing import Trunk, check_channels, with_channels, with_inputs
from unet.weights.folder import FolderModel, load_strictly, read_config, read_weights, start_folder

_TRUNK = "trunk."
_LAST = "head.conv"


@dataclass(frozen=True, kw_only=True)
class Start:
    """Weights of a model, which are read when they are needed, and facts about it.

    Attributes:
        where: what they are, in words: the model, and what was done to it.
        config: the trunk's shape.
        info: as `FolderModel` keeps it.
        read: gives the state dict of the model, trunk and head.
        crossed: whether they were trained for the other task than the one that they start.
    """

    where: str
    config: UNetConfig
    info: Mapping[str, Any]
    read: Callable[[], Mapping[str, Tensor]]
    crossed: bool = False

    def changed(
        self,
        config: UNetConfig,
        change: Callable[[UNetConfig, Mapping[str, Tensor]], Trunk],
        done: str,
    ) -> Start:
        """The same head on another trunk.

        Args:
            config: of the other trunk.
            change: config and state of the trunk to those of the other one.
            done: what was done to the trunk, in words.
        """

        def read() -> Mapping[str, Tensor]:
            state = self.read()
            trunk = {k.removeprefix(_TRUNK): v for k, v in state.items() if k.startswith(_TRUNK)}
            head = {k: v for k, v in state.items() if not k.startswith(_TRUNK)}
            found = change(self.config, trunk).state
            return head | {f"{_TRUNK}{k}": v for k, v in found.items()}

        return replace(self, where=f"{self.where}, {done}", config=config, read=read)

    def for_channels(self, channels: int) -> Start:
        """The same start for images of another number of channels.

        Raises:
            InputError: neither grey nor colour on one of the sides.
        """
        if channels == self.config.in_channels:
            return self
        check_channels(self.config.in_channels, channels)
        return self.changed(
            replace(self.config, in_channels=channels),
            lambda config, trunk: with_channels(config, trunk, channels),
            f"its first weights {'summed to grey' if channels == 1 else 'spread over the colours'}",
        )

    def for_inputs(self, kept: int, more: int, done: str) -> Start:
        """The same start with other channels behind the first of its input: see `with_inputs`.

        Args:
            kept: channels that are kept.
            more: channels after them, whose weights are zero.
            done: what was done, in words.
        """
        return self.changed(
            replace(self.config, in_channels=kept + more),
            lambda config, trunk: with_inputs(config, trunk, kept, more),
            done,
        )

    def for_outputs(self, kept: int, more: int) -> Start:
        """The same start with other outputs of its head behind the first ones, which give zeros.

        Args:
            kept: rows of the last convolution that are kept; 0: it starts anew.
            more: rows after them.
        """

        def read() -> Mapping[str, Tensor]:
            state = dict(self.read())
            for key in (f"{_LAST}.weight", f"{_LAST}.bias"):
                if key in state and (rows := state.pop(key)[:kept]).numel():
                    state[key] = torch.cat([rows, rows.new_zeros(more, *rows.shape[1:])])
            return state

        return replace(self, read=read)


def read_start(path: str) -> Start:
    """The model of a folder or a repository on the Hub, of whatever task, or of another project's
    checkpoint.

    Raises:
        InputError: no such folder, repository or file; a checkpoint of another network: see
            `read_checkpoint`.
    """
    folder = start_folder(path)
    if folder.is_file():
        found = read_checkpoint(folder)
        where = f"{path} ({found.what})"
        return Start(where=where, config=found.config, info=found.info, read=lambda: found.state)
    described = read_config(folder)
    config = UNetConfig.from_dict(described["unet"])
    return Start(
        where=path, config=config, info=described["info"], read=lambda: read_weights(folder)
    )


def at_random(start: Start, seed: int) -> Start:
    """A start with the network of another one, but random weights."""

    def read() -> Mapping[str, Tensor]:
        torch.manual_seed(seed)
        return {f"{_TRUNK}{k}": v for k, v in UNet(start.config).state_dict().items()}

    return replace(start, where="random weights", read=read)


def take_over(model: FolderModel, start: Start, *, own: Sequence[str] = ()) -> str:
    """Loads the whole trunk of a start and all layers beside it that fit, and says which.

    Args:
        own: beginnings of names that stay as the model has them.

    Raises:
        InputError: a trunk of another shape.
    """
    mine, kept = model.state_dict(), tuple(own)
    given = {k: v for k, v in start.read().items() if not (kept and k.startswith(kept))}
    # A layer of another shape is another layer, of whose bias nothing is worth keeping.
    unfit = {_layer(k) for k, v in mine.items() if k not in given or v.shape != given[k].shape}
    trunk = {k: v for k, v in given.items() if k.startswith(_TRUNK)}
    beside = {
        k: v for k, v in mine.items() if not k.startswith(_TRUNK) or k.startswith(kept or "-")
    }
    taken = {k: given[k] for k in beside if k in given and _layer(k) not in unfit}
    load_strictly(model, {**trunk, **beside, **taken}, start.where)
    anew = ", ".join(dict.fromkeys(_layer(k) for k in beside if k not in taken))
    found = ", ".join(["trunk", *dict.fromkeys(map(_layer, taken))])
    return f"{found} of {start.where}" + (f"; newly initialised: {anew}" if anew else "")


def _layer(key: str) -> str:
    """The module that a tensor belongs to."""
    return key.rpartition(".")[0]
