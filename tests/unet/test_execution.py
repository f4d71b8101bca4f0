"""The same numbers however it is run: memory format, autocast, checkpoints, compile, export."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffusion.model import DiffusionUNet
from segmentation.model import SegmentationUNet
from unet.config import UNetConfig
from unet.model import UNet
from unet.weights.folder import FolderModel

_DDPM = UNetConfig(
    channels=8,
    multipliers=(1, 2),
    block="res",
    skips="block",
    norm="group",
    groups=4,
    activation="silu",
    down="conv-asymmetric",
    up="nearest-conv",
    dropout=0.1,
    time=True,
    attention_levels=(1,),
)
_TEXT = replace(
    _DDPM, down="conv", attention="transformer", heads=2, context_channels=6, time_cos_first=True
)
CONFIGS = {
    "paper": UNetConfig(channels=8, multipliers=(1, 2), padding="valid", norm="none", init="he"),
    "classic": UNetConfig(channels=8, multipliers=(1, 2, 4)),
    "bilinear": UNetConfig(
        channels=8, multipliers=(1, 2, 2), decoder_mid="half-in", up="bilinear-aligned", down="avg"
    ),
    "instance": UNetConfig(channels=8, multipliers=(1, 2), norm="instance", up="nearest", patch=2),
    "ddpm": _DDPM,
    "film": replace(_DDPM, scale_shift=True, classes=3, attention_levels=(), up="transposed"),
    "sd-v1": _TEXT,
    "sd-v2": replace(_TEXT, heads=None, head_channels=4, linear_projections=True),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def build(config: UNetConfig) -> FolderModel:
    return (DiffusionUNet if config.time else SegmentationUNet)(config, 2).eval()


def arguments(
    config: UNetConfig, batch: int = 2, size: tuple[int, int] = (28, 20)
) -> dict[str, Tensor]:
    given: dict[str, Tensor] = {"x": torch.randn(batch, config.in_channels, *size)}
    if config.time:
        given["t"] = torch.arange(batch) * 7
    if config.context_channels is not None:
        given["context"] = torch.randn(batch, 3, config.context_channels)
    if config.classes:
        given["classes"] = torch.arange(batch) % config.classes
    return given


class Operations(TorchDispatchMode):
    """Records the tensors that operations allocate; views of their inputs do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[tuple[str, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {
            x.untyped_storage().data_ptr()
            for x in tree_leaves((args, kwargs))
            if torch.is_tensor(x)
        }
        for x in tree_leaves(result):
            if torch.is_tensor(x) and x.untyped_storage().data_ptr() not in inputs:
                self.outputs.append((str(func), x.detach()))
        return result


# --- memory format and precision ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"),
    [*((name, (28, 20)) for name in CONFIGS), ("classic", (23, 17)), ("ddpm", (23, 17))],
)
def test_channels_last_stays_channels_last(
    name: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Padding copies the heads, which is for narrow ones, and these networks have no others.
    monkeypatch.setattr("unet.attention._VECTOR", 1)
    model, given = build(CONFIGS[name]), arguments(CONFIGS[name], size=size)
    with torch.no_grad():
        expected = model(**given)
        model = model.to(memory_format=torch.channels_last)
        given["x"] = given["x"].to(memory_format=torch.channels_last)
        with Operations() as operations:
            output = model(**given)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert output.is_contiguous(memory_format=torch.channels_last)
    maps = {op: x for op, x in operations.outputs if x.ndim == 4 and "dot_product" not in op}
    assert len(maps) >= 3  # convolutions, pooling, joins; a ReLU allocates nothing
    strayed = [k for k, x in maps.items() if not x.is_contiguous(memory_format=torch.channels_last)]
    assert strayed == []
    copies = [op for op, x in operations.outputs if x.ndim > 2 and ("clone" in op or "copy" in op)]
    assert copies == []


@pytest.mark.parametrize("name", CONFIGS)
def test_autocast_is_near_float32(name: str) -> None:
    model, given = build(CONFIGS[name]), arguments(CONFIGS[name])
    with torch.no_grad():
        expected = model(**given)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(**given)
    assert output.dtype == torch.bfloat16
    assert (output - expected).square().mean() < 0.03**2 * expected.square().mean()


@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16_weights_run(name: str) -> None:
    given = {
        k: v.bfloat16() if k in ("x", "context") else v for k, v in arguments(CONFIGS[name]).items()
    }
    with torch.no_grad():
        output = build(CONFIGS[name]).bfloat16()(**given)
    assert output.dtype == torch.bfloat16
    assert output.isfinite().all()


# --- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddpm", "sd-v1"])
def test_attention_memory_grows_linearly_with_the_pixels(name: str) -> None:
    """No operation of forward and backward makes a tensor of more than some multiple of N values.

    N x N attention weights would make the largest of them grow 16-fold where N grows 4-fold.
    """
    largest = []
    for side in (16, 32, 64):
        trunk = UNet(replace(CONFIGS[name], attention_levels=(0,), multipliers=(1,)))
        given = arguments(CONFIGS[name], batch=1, size=(side, side))
        with Operations() as operations:
            trunk(**given).sum().backward()
        assert any("dot_product" in op and "backward" in op for op, _ in operations.outputs)
        largest.append(max(x.numel() for _, x in operations.outputs))
    assert largest[1] <= 4 * largest[0]
    assert largest[2] <= 4 * largest[1]


def saved_bytes(run: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """What `run` returns, and the bytes of the activations that it keeps for the backward pass."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if not isinstance(x, nn.Parameter):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        return run(), sum(kept.values())


@pytest.mark.parametrize("name", CONFIGS)
def test_checkpointing_gives_the_same_gradients_in_less_memory(name: str) -> None:
    config = replace(CONFIGS[name], dropout=0.2)
    plain = build(config).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.trunk.checkpointing = True
    given = arguments(config)
    outputs, sizes = [], []
    for model in (plain, checkpointed):
        for _ in range(2):  # the second step reads what the first has left behind
            torch.manual_seed(1)
            output, size = saved_bytes(lambda model=model: model(**given))
            output.square().mean().backward()
        outputs.append(output)
        sizes.append(size)
    assert torch.equal(*outputs)
    for (key, p), q in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), key
    for (key, p), q in zip(plain.named_buffers(), checkpointed.buffers(), strict=True):
        assert torch.equal(p, q), key
        assert "num_batches" not in key or p == 2
    assert sizes[1] < 0.7 * sizes[0]


def test_checkpointing_keeps_evaluation_as_it_is() -> None:
    model, given = build(CONFIGS["classic"]), arguments(CONFIGS["classic"])
    before = copy.deepcopy(model.state_dict())
    expected = model(**given)
    model.trunk.checkpointing = True
    output = model(**given)
    output.sum().backward()
    assert torch.equal(output, expected)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# --- compile and export -------------------------------------------------------------------------


def compiled(model: nn.Module, backend: str) -> Callable[..., Tensor]:
    torch._dynamo.reset()
    function: Callable[..., Tensor] = torch.compile(model, fullgraph=True, backend=backend)
    return function


@pytest.mark.parametrize("name", ["paper", "classic", "instance", "film", "sd-v1"])
def test_one_graph_holds_the_whole_network(name: str) -> None:
    model, given = build(CONFIGS[name]), arguments(CONFIGS[name])
    with torch.no_grad():
        output = compiled(model, "eager")(**given)
        torch.testing.assert_close(output, model(**given), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the compiler's own
@pytest.mark.parametrize("name", CONFIGS)
def test_compiled_network_computes_the_same(name: str) -> None:
    model, given = build(CONFIGS[name]), arguments(CONFIGS[name])
    with torch.no_grad():
        output = compiled(model, "inductor")(**given)
        torch.testing.assert_close(output, model(**given), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["classic", "sd-v1"])
def test_compiled_training_step_is_the_same(name: str, checkpointing: bool) -> None:
    config = replace(CONFIGS[name], dropout=0.0)  # compiled dropout draws other numbers
    model, given = build(config).train(), arguments(config)
    twin = copy.deepcopy(model)
    twin.trunk.checkpointing = checkpointing
    model(**given).square().mean().backward()
    compiled(twin, "aot_eager")(**given).square().mean().backward()
    for (key, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6, msg=key)
    for (key, p), q in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", ["classic", "paper", "instance", "sd-v1"])
def test_export_with_any_batch_height_and_width(name: str) -> None:
    config = CONFIGS[name]
    model, given = build(config), arguments(config)
    multiple = config.patch * 2 ** (config.levels - 1)
    batch, height, width = Dim("batch"), Dim("height", min=2), Dim("width", min=2)
    dynamic = {key: {0: batch} for key in given}
    dynamic["x"] |= {2: multiple * height, 3: multiple * width}
    program = export(model, (), given, dynamic_shapes=dynamic).module()
    other = arguments(config, batch=3, size=(12 * multiple, 20 * multiple))
    with torch.no_grad():
        torch.testing.assert_close(program(**other), model(**other), rtol=1e-5, atol=1e-6)
