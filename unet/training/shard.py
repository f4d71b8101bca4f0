"""Sharding: each process holds a part of the weights, the gradients and the optimizer's state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from unet.errors import InputError


def shard(
    models: Iterable[Any], processes: int, device: torch.device, dtype: torch.dtype | None = None
) -> None:
    """Splits the parameters of `FolderModel`s among the processes, in place.

    A step of the network gathers its weights when it runs and forgets them afterwards; gradients
    are averaged and split in the backward pass (ZeRO-3, arXiv 1910.02054, sec. 5).

    Args:
        dtype: in which weights are gathered, half as much as in the float32 in which they are kept
            and their gradients averaged; None: in that.

    Raises:
        InputError: there is one process alone.
    """
    if processes == 1:
        raise InputError(
            "--shard splits the network among processes, but there is one: start several with "
            "torchrun --nproc-per-node N, or drop it"
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # a second to import

    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    mesh = init_device_mesh(device.type, (processes,))
    for model in models:
        trunk = model.trunk
        for step in (*trunk.encoder, trunk.middle, *trunk.decoder, model):
            fully_shard(step, mesh=mesh, mp_policy=policy)


def local(tensor: Any) -> Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local() if _is_split(tensor) else tensor


def whole(state: Any) -> Any:
    """A state with all of its split tensors put together, on the CPU; called by all processes."""
    if _is_split(state):
        return state.full_tensor().cpu()
    if isinstance(state, Mapping):
        return {key: whole(value) for key, value in state.items()}
    return state


def parts(state: Mapping[str, Any], like: Mapping[str, Tensor]) -> dict[str, Any]:
    """What of a model's whole state belongs to this process; `like`: the model's own state."""
    return {key: _part(value, like[key]) for key, value in state.items()}


def optimizer_parts(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The same of an optimizer's state."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    found = {
        i: {key: _part(value, parameters[i]) for key, value in values.items()}
        for i, values in state["state"].items()
    }
    return {**state, "state": found}


def _is_split(value: Any) -> bool:
    """Whether it is a `DTensor`, whose module takes half a second to import."""
    return hasattr(value, "full_tensor")


def _part(value: Any, like: Any) -> Any:
    """`value`, split and laid out in memory as `like`: fused AdamW pairs its tensors by address."""
    if not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    if not _is_split(like):
        return torch.empty_like(like, dtype=value.dtype).copy_(value)
    from torch.distributed.tensor import distribute_tensor

    moved = value.to(like.device).contiguous()
    return distribute_tensor(moved, like.device_mesh, like.placements, src_data_rank=None)


def load_whole(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Loads a whole state into a model, be it split or not; it may lack what is not trained."""
    model.load_state_dict(parts(state, model.state_dict()), strict=False)
