"""Muon against singular values and the optimizers of torch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from unet import InputError
from unet.training.muon import OTHERS, Muon, orthogonal
from unet.training.optimizer import make_optimizer
from unet.training.options import FitOptions
from unet.training.plan import plan_fit


class Small(nn.Module):
    """A weight of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 8)
        self.wide, self.tall = nn.Linear(8, 5), nn.Linear(5, 12)
        self.conv = nn.Conv2d(12, 6, 3, padding=1)
        self.norm = nn.GroupNorm(2, 6)

    def forward(self, index: Tensor) -> Tensor:
        x = self.tall(self.wide(self.words(index)).relu())
        return self.norm(self.conv(x[:, :, None, None].expand(-1, -1, 4, 4)))


def small(**options: float) -> tuple[Small, Muon]:
    torch.manual_seed(0)
    model = Small()
    chosen = {"lr": 0.1, "momentum": 0.8, "beta2": 0.99, "weight_decay": 0.0, **options}
    return model, Muon(model, **chosen)


def backward(model: Small, seed: int) -> None:
    torch.manual_seed(seed)
    model(torch.randint(7, (4,))).mul(torch.randn(4, 6, 4, 4)).sum().backward()


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (16, 16), (1, 9), (9, 1)])
def test_a_step_has_the_directions_of_its_gradient_and_one_length(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    (found,) = orthogonal(matrix[None])
    in_its_directions = u.T @ found @ v.T
    lengths = in_its_directions.diagonal()
    assert (in_its_directions - lengths.diag()).abs().max() < 1e-4
    assert lengths[s > 0.02 * s.max()].min() > 0.65
    assert lengths.max() < 1.25
    together = orthogonal(torch.stack([torch.zeros(shape), 1e4 * matrix]))
    torch.testing.assert_close(together[1], found, rtol=1e-4, atol=1e-4)
    assert together[0].eq(0).all()


def test_matrices_move_as_with_the_muon_of_torch_but_for_its_bfloat16():
    model, optimizer = small(weight_decay=0.1)
    plain = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    matrices = {n: plain[n] for n in ("wide.weight", "tall.weight")}
    theirs = torch.optim.Muon(matrices.values(), lr=0.1, momentum=0.8, weight_decay=0.1)
    for step in range(4):
        backward(model, step)
        for name, weight in matrices.items():
            weight.grad = model.get_parameter(name).grad.clone()
        before = {n: w.detach().clone() for n, w in matrices.items()}
        optimizer.step()
        theirs.step()
        optimizer.zero_grad()
        for name, weight in matrices.items():
            moved, ours = weight - before[name], model.get_parameter(name) - before[name]
            assert (ours - moved).norm() < 0.05 * moved.norm()
            weight.data.copy_(model.get_parameter(name).data)


def test_a_convolution_is_the_matrix_of_its_outputs():
    model, optimizer = small()
    before = model.conv.weight.detach().clone()
    backward(model, 0)
    gradient = model.conv.weight.grad.clone()
    optimizer.step()
    expected = orthogonal((1 - 0.8 + 0.8 * 0) * gradient.flatten(1)[None]).view_as(gradient)
    torch.testing.assert_close(model.conv.weight, before - 0.1 * expected, rtol=1e-4, atol=1e-5)


def test_the_rest_takes_the_steps_of_adamw():
    model, optimizer = small(weight_decay=0.1)
    names = ["words.weight", "wide.bias", "norm.weight", "conv.bias"]
    copies = [model.get_parameter(n).detach().clone().requires_grad_() for n in names]
    theirs = torch.optim.AdamW(copies, lr=0.1 * OTHERS, betas=(0.8, 0.99), weight_decay=0.1)
    for step in range(3):
        backward(model, step)
        for name, twin in zip(names, copies, strict=True):
            twin.grad = model.get_parameter(name).grad.clone()
        optimizer.step()
        theirs.step()
        optimizer.zero_grad()
    for name, twin in zip(names, copies, strict=True):
        torch.testing.assert_close(model.get_parameter(name), twin)


def test_a_saved_state_goes_on_alike():
    model, optimizer = small()
    backward(model, 0)
    optimizer.step()
    again, restored = small()
    again.load_state_dict(model.state_dict())
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (again, restored)):
        m.zero_grad()
        backward(m, 1)
        o.step()
    for mine, its in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, its)


def test_an_overflow_in_half_precision_moves_nothing():
    model, optimizer = small()
    scaler = torch.amp.GradScaler("cpu")
    before = [p.detach().clone() for p in model.parameters()]
    backward(model, 0)
    scaler.scale(torch.zeros(()))
    model.conv.weight.grad[0, 0, 0, 0] = torch.inf
    scaler.step(optimizer)
    for mine, its in zip(model.parameters(), before, strict=True):
        assert torch.equal(mine, its)


def test_it_is_an_option_that_does_not_go_with_shards(tmp_path):
    options = FitOptions(out=tmp_path, optimizer="muon", lr=0.08, momentum=0.7)
    optimizer = make_optimizer(Small(), plan_fit(options))
    assert isinstance(optimizer, Muon)
    assert [g["lr"] for g in optimizer.param_groups] == [0.08, 0.08 * OTHERS]
    with pytest.raises(InputError, match="--shard does not go with --optimizer muon"):
        FitOptions(out=tmp_path, optimizer="muon", shard=True)
