"""A state dict is found in whatever people save around it, and never guessed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from segmentation.model import SegmentationUNet
from unet import PRESETS
from unet.errors import InputError
from unet.weights.convert import detect_layout, from_layout, to_layout

CONFIG = replace(PRESETS["classic"].config, channels=8, multipliers=(1, 2))
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def ours() -> State:
    torch.manual_seed(0)
    return SegmentationUNet(CONFIG, 1).state_dict()


def behind(prefix: str, state: State) -> State:
    return {f"{prefix}{key}": value for key, value in state.items()}


def compiled_parts(state: State) -> State:
    """Of a network whose levels were compiled one by one."""
    return {key.replace(".", "._orig_mod.", 1): value for key, value in state.items()}


WRAPPINGS: dict[str, Callable[[State], dict[str, Any]]] = {
    **{
        prefix: lambda state, prefix=prefix: behind(prefix, state)
        for prefix in ("module.", "model.", "_orig_mod.", "module._orig_mod.", "net.unet.")
    },
    **{
        name: lambda state, name=name: {name: state, "epoch": 3, "optimizer": {"state": {0: {}}}}
        for name in ("state_dict", "model_state_dict", "ema", "params_ema", "model")
    },
    "in each other": lambda state: {"checkpoint": {"ema": behind("module.", state)}},
    "compiled parts": compiled_parts,
    "Lightning": lambda state: {
        "state_dict": behind("model.", state) | {"loss.weight": torch.ones(2)},
        "pytorch-lightning_version": "2.4.0",
        "callbacks": {"ModelCheckpoint{'monitor': 'loss'}": {"best_model_score": torch.ones(())}},
    },
    "AveragedModel": lambda state: behind("module.", state) | {"n_averaged": torch.tensor(4)},
    "averaged beside last": lambda state: {
        "params": {key: torch.zeros_like(value) for key, value in state.items()},
        "params_ema": state,
    },
    "one dictionary by two names": lambda state: {"model": state, "net": state},
}


@pytest.mark.parametrize("name", WRAPPINGS)
def test_the_network_is_found(ours: State, name: str) -> None:
    content = WRAPPINGS[name](to_layout(ours, CONFIG, "classic"))
    assert detect_layout(content) == "classic"
    found = from_layout(content, CONFIG, "classic")
    assert found.keys() == ours.keys()
    assert all(torch.equal(found[key], value) for key, value in ours.items())


def test_pytorchs_own_wrappers_are_among_them(ours: State) -> None:
    class Network(nn.Module):
        """With the names of the classic layout."""

        def __init__(self, state: State) -> None:
            super().__init__()
            for key, value in state.items():
                *path, last = key.split(".")
                module: nn.Module = self
                for part in path:
                    if part not in module._modules:
                        module.add_module(part, nn.Module())
                    module = module._modules[part]  # type: ignore[assignment]
                module.register_buffer(last, value)

    network = Network(to_layout(ours, CONFIG, "classic"))
    for wrapped in (nn.DataParallel(network), AveragedModel(network), torch.compile(network)):
        found = from_layout(wrapped.state_dict(), CONFIG, "classic")
        assert all(torch.equal(found[key], value) for key, value in ours.items())


def test_what_is_not_clear_or_not_whole_is_refused(ours: State) -> None:
    theirs = to_layout(ours, CONFIG, "classic")
    two = {"teacher": theirs, "student": behind("module.", {k: v + 1 for k, v in theirs.items()})}
    with pytest.raises(InputError, match=r"several classic networks .*'teacher\.', 'student\.modu"):
        from_layout(two, CONFIG, "classic")
    with pytest.raises(InputError, match=r"unknown stray \(2,\)"):  # it belongs to the network
        from_layout(behind("module.", theirs | {"stray": torch.ones(2)}), CONFIG, "classic")
    with pytest.raises(InputError, match="'epoch' holds a int"):  # a bare state dict is all of it
        from_layout(theirs | {"epoch": 3}, CONFIG, "classic")
    with pytest.raises(InputError, match=r"lacks outc\.conv\.bias"):
        from_layout({"ema": {k: v for k, v in theirs.items() if k != "outc.conv.bias"}}, *LAYOUT)


LAYOUT = (CONFIG, "classic")


def test_dictionaries_that_hold_each_other_are_looked_at_once(ours: State) -> None:
    content: dict[str, Any] = {"model": to_layout(ours, CONFIG, "classic")}
    content |= {f"again {i}": content for i in range(1000)}
    assert from_layout(content, CONFIG, "classic").keys() == ours.keys()
    deep: dict[str, Any] = content
    for _ in range(100):
        deep = {"x": deep}
    with pytest.raises(InputError, match="'x' holds a dict"):
        from_layout(deep, CONFIG, "classic")
