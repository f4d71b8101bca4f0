"""Training a diffusion model: noise levels, labels, held-out figures, the automatic network."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils.data import default_collate

from diffusion.data.images import DiffusionData
from diffusion.decisions import chosen_fit, chosen_levels, chosen_noise, decide
from diffusion.judging.report import affordable, level_errors
from diffusion.model import DiffusionUNet
from diffusion.networks import automatic_config
from diffusion.options import DiffusionOptions
from diffusion.process.levels import TrainingLevels
from diffusion.process.schedule import NoiseSchedule
from diffusion.text import PADDING
from diffusion.training import (
    DiffusionTask,
    NoisedSamples,
    Timesteps,
    make_model,
    stratified,
)
from tests.forks import as_spawned
from unet import UNetConfig
from unet.errors import InputError
from unet.training.batches import BatchKeys
from unet.training.task import Processes
from unet.weights.start import Start

pytestmark = pytest.mark.usefixtures("short_runs")


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "noise.npz"
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (90, 12, 16), np.uint8)
    np.savez(path, images=images, labels=np.arange(90) % 3)
    return path


def options(archive: Path, **values: Any) -> DiffusionOptions:
    return DiffusionOptions(data=str(archive), **{"width": 8, **values})


def network(data: DiffusionData, **values: Any) -> DiffusionUNet:
    return make_model(decide(options(Path("unused"), **values), data))


# -- noise levels


@pytest.mark.parametrize(
    ("given", "kind", "prediction", "drawn"),
    [
        ({}, "flow", "flow", (0.0, 1.0)),
        ({"levels": "uniform"}, "flow", "flow", None),
        ({"noise": "cosine"}, "cosine", "v", None),
        ({"prediction": "v"}, "cosine", "v", None),
        ({"prediction": "edm"}, "edm", "edm", (-1.2, 1.2)),
        ({"zero_snr": True}, "cosine", "v", None),
        ({"learn_variance": True}, "cosine", "v", None),
        ({"captions": True}, "flow", "flow", (0.0, 1.5)),
        ({"condition": "edges"}, "flow", "flow", (0.0, 1.0)),
        ({"condition": "edges", "joint": "masks"}, "cosine", "v", None),
        ({"condition": "edges", "target": "mask"}, "cosine", "v", None),
    ],
)
def test_images_are_learnt_by_flow_matching(
    given: dict[str, Any], kind: str, prediction: str, drawn: object
) -> None:
    asked = DiffusionOptions(**given)
    schedule, predicted, _ = chosen_noise(asked, None)
    levels, _ = chosen_levels(asked, schedule, predicted)
    assert (schedule.kind, predicted, levels.log_sigma) == (kind, prediction, drawn)


def timesteps(
    batch: int, turn: int, steps: int, *, seed: int = 0, shift: float = 1.0
) -> torch.Tensor:
    """Those of a whole batch."""
    place = torch.from_numpy(np.random.default_rng((batch, turn)).random(batch))
    u = stratified(turn * batch + torch.arange(batch), place, batch, seed=seed)
    return TrainingLevels(NoiseSchedule(steps=steps), shift)(u)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_a_shift_makes_noisy_levels_likelier_by_its_formula(shift: float) -> None:
    t = timesteps(50_000, 0, 1000, shift=shift)
    for u in (0.1, 0.5, 0.9):
        below = shift * u / (1 + (shift - 1) * u) * 1000
        assert float((t < below).float().mean()) == pytest.approx(u, abs=2e-3)


@given(st.integers(1, 40), st.sampled_from([10, 100, 1000]), st.integers(0, 2**16))
def test_a_batch_has_a_noise_level_from_each_of_as_many_equal_parts(
    batch: int, steps: int, turn: int
) -> None:
    t = timesteps(batch, turn, steps)
    assert t.dtype == torch.long
    for i, level in enumerate(t.sort().values.tolist()):
        assert i * steps // batch <= level <= (i + 1) * steps / batch


def test_each_level_is_as_likely_as_any_other() -> None:
    found = torch.stack([timesteps(6, turn, 10) for turn in range(4000)])
    counts = torch.bincount(found.flatten(), minlength=10)
    assert len(counts) == 10
    assert (counts / 2400 - 1).abs().max() < 0.05
    for slot in range(6):  # of one place in the batch alone
        assert (torch.bincount(found[:, slot], minlength=10) / 400 - 1).abs().max() < 0.2
    # Of one image alone, where each batch is an epoch.
    draws = itertools.islice(BatchKeys(6, 6, seed=0), 4000)
    mine = torch.stack(
        [found[turn, [index for _, _, index in keys].index(2)] for turn, keys in enumerate(draws)]
    )
    assert (torch.bincount(mine, minlength=10) / 400 - 1).abs().max() < 0.2
    order = torch.stack([timesteps(6, turn, 10, seed=1) for turn in range(4000)])
    assert (order != found).any(dim=1).float().mean() > 0.9


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 50))
def test_a_batch_in_parts_has_the_noise_levels_of_the_whole(
    part: int, accumulate: int, processes: int, turn: int
) -> None:
    batch = part * accumulate * processes
    whole = timesteps(batch, turn, 1000)
    place = torch.from_numpy(np.random.default_rng((batch, turn)).random(batch))
    for process in range(processes):
        keys = BatchKeys(
            7,
            batch,
            seed=0,
            start_step=turn,
            accumulate=accumulate,
            process=process,
            processes=processes,
        )
        for _, draws in zip(range(accumulate), keys, strict=False):
            position = torch.tensor([position for position, _, _ in draws])
            slots = position % batch
            u = stratified(position, place[slots], batch)
            found = TrainingLevels(NoiseSchedule())(u)
            assert torch.equal(found, whole[slots])


# -- samples


def test_noise_and_level_belong_to_the_sample(archive: Path) -> None:
    data = DiffusionData(archive, classes=True)
    plan = decide(options(archive, classes=True), data)
    samples = NoisedSamples(data, plan, make_model(plan))
    first, again, later = samples[0, 3], samples[0, 3], samples[1, 3]
    assert torch.equal(first["noise"], again["noise"])
    assert not torch.equal(first["noise"], later["noise"])
    noise = torch.stack([samples[0, i]["noise"] for i in range(len(samples))])
    assert abs(float(noise.mean())) < 0.03
    assert float(noise.std()) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize(("dropout", "share"), [(0.0, 0.0), (0.3, 0.3)])
def test_labels_are_dropped_as_often_as_asked_for(
    archive: Path, dropout: float, share: float
) -> None:
    data = DiffusionData(archive, classes=True)
    plan = decide(options(archive, classes=True, label_dropout=dropout), data)
    samples = NoisedSamples(data, plan, make_model(plan))
    labels = [int(samples[e, i]["label"]) for e in range(20) for i in range(len(samples))]
    assert np.mean(np.array(labels) == 3) == pytest.approx(share, abs=0.03)
    assert set(labels) <= {0, 1, 2, 3}
    data = DiffusionData(archive)
    without = NoisedSamples(data, decide(options(archive), data), network(data))
    assert "label" not in without[0, 0]


def test_captions_are_dropped_as_often_as_asked_for_and_padded_to_one_length() -> None:
    data = DiffusionData("shapes", captions=True)
    plan = decide(options(Path("shapes"), captions=True, label_dropout=0.3), data)
    model = make_model(plan)
    samples = NoisedSamples(data, plan, model)
    assert model.text is not None
    empty = model.text.tokenize([""])[0]
    dropped = 0
    for i in range(300):
        tokens = samples[0, i]["tokens"]
        assert len(tokens) == model.text.longest
        words = tokens[tokens != PADDING]
        whole = model.text.tokenize([data.captions(data.train[i])[0]])[0]
        assert torch.equal(words, whole) or torch.equal(words, empty)
        dropped += len(words) == 1
    assert dropped / 300 == pytest.approx(0.3, abs=0.08)


@pytest.mark.parametrize("condition", ["captions", "classes", None])
def test_samples_can_be_handed_to_a_process_that_is_spawned(
    archive: Path, condition: str | None
) -> None:
    source = "shapes" if condition == "captions" else archive
    given: dict[str, Any] = {condition: True} if condition else {}
    data = DiffusionData(source, **given)
    plan = decide(options(Path(source), **given), data)
    samples = NoisedSamples(data, plan, make_model(plan))
    assert_close(as_spawned(samples)[2, 5], samples[2, 5], rtol=0, atol=0)
    assert as_spawned(Timesteps.of(plan)) == Timesteps.of(plan)


def test_a_loss_teaches_the_words_that_its_captions_have() -> None:
    data = DiffusionData("shapes", captions=True)
    plan = decide(options(Path("shapes"), captions=True), data)
    model = make_model(plan)
    for weight in (w for w in model.parameters() if not w.any()):  # what starts at zero
        torch.nn.init.normal_(weight, std=0.1)
    task, samples = DiffusionTask(plan, data), NoisedSamples(data, plan, model)
    batch = default_collate([{**samples[0, i], "position": i} for i in range(2)])
    batch = Timesteps.of(plan)(batch)
    task.loss(model, batch).backward()
    assert model.text is not None
    gradient = model.text.embedding.weight.grad
    assert gradient is not None
    taught = set(gradient.abs().sum(dim=1).nonzero().flatten().tolist())
    assert taught == set(batch["tokens"].flatten().tolist()) - {PADDING}


# -- held-out figures


@dataclass(frozen=True)
class Alone(Processes):
    """One of several processes, whose parts are collected by hand."""

    def gather(self, part: Any) -> list[Any]:
        return [part]


@pytest.mark.parametrize("size", [(8, 8), (64, 64), (64, 65), (128, 32), (256, 256), (4096, 512)])
def test_pictures_of_large_images_show_fewer(size):
    """No more pixels than so many images of 64 x 64 have, but for the least number."""
    count = affordable(36, size)
    assert 4 <= count <= 36
    assert count == 4 or count * size[0] * size[1] <= 36 * 64**2
    assert count == 36 or (count + 1) * size[0] * size[1] > 36 * 64**2
    assert affordable(3, size) == 3


def test_held_out_figures_are_the_same_each_time_and_in_any_number_of_parts(archive: Path) -> None:
    data = DiffusionData(archive, classes=True)
    plan = decide(options(archive, classes=True), data)
    model = make_model(plan)
    torch.nn.init.normal_(model.head.conv.weight, std=0.1)
    task = DiffusionTask(plan, data)
    with torch.no_grad():
        whole = task.evaluate(model.eval(), Processes())
        assert whole == task.evaluate(model, Processes())
        parts = [task.evaluate(model, Alone(rank, 2)) for rank in (0, 1)]
    assert whole.keys() == {"loss", "seen"}
    small = DiffusionTask(replace(plan, fit=replace(plan.fit, batch_size=5)), data)
    with torch.no_grad():  # five at a time, where memory holds no more
        few = small.evaluate(model, Processes())
    for name, value in whole.items():
        assert sum(part[name] for part in parts) == pytest.approx(value, rel=1e-5)
        assert few[name] == pytest.approx(value, rel=1e-5)
    of_all, of_few = (level_errors(model, data, size) for size in (64, 5))
    for name in ("held_out", "training"):
        assert of_few[name] == pytest.approx(of_all[name], rel=1e-5)


def test_the_loss_falls_on_the_noise_of_a_network_that_learns(archive: Path) -> None:
    data = DiffusionData(archive)
    plan = decide(options(archive, batch_size=32), data)
    model = make_model(plan)
    task, samples = DiffusionTask(plan, data), NoisedSamples(data, plan, model)
    keys = ("image", "noise", "place")
    batch = {k: torch.stack([samples[0, i][k] for i in range(32)]) for k in keys}
    batch = Timesteps.of(plan)({**batch, "position": torch.arange(32)})
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(30):
        loss = task.loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


# -- starting from another model


def saved(path: Path, archive: Path, **values: Any) -> DiffusionUNet:
    """A model with random weights of its own, in a folder."""
    data = DiffusionData(values.pop("data", archive), **dict.fromkeys(values, True))
    torch.manual_seed(1)
    model = make_model(decide(options(archive, seed=1, **values), data))
    for weight in model.parameters():
        torch.nn.init.normal_(weight)
    model.save_pretrained(path)
    return model


def started(path: Path, data: Path | str, **values: Any) -> DiffusionUNet:
    given = options(Path(data), init=str(path), **values)
    kinds = {k: v for k, v in values.items() if k in ("classes", "captions")}
    return make_model(decide(given, DiffusionData(data, **kinds)))


def same(a: DiffusionUNet, b: DiffusionUNet, prefix: str) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return all(torch.equal(v, theirs[k]) for k, v in ours.items() if k.startswith(prefix))


def test_a_model_starts_as_another_one_but_for_what_differs(archive: Path, tmp_path: Path) -> None:
    first = saved(tmp_path / "a", archive, classes=True)
    assert same(first, started(tmp_path / "a", archive, classes=True), "")
    without = started(tmp_path / "a", archive)
    assert without.trunk.class_embedding is None
    assert same(without, first, "trunk.encoder")
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (90, 12, 16), np.uint8)
    np.savez(tmp_path / "other.npz", images=images, labels=np.arange(90) % 4)
    other = started(tmp_path / "a", tmp_path / "other.npz", classes=True)
    assert same(other, first, "trunk.encoder")
    assert len(other.trunk.class_embedding.weight) == 5
    with pytest.raises(InputError, match="lacks trunk"):
        started(tmp_path / "a", "shapes", captions=True)


def test_a_model_that_reads_keeps_its_words_where_these_are_the_same(tmp_path: Path) -> None:
    first = saved(tmp_path / "a", Path("shapes"), captions=True)
    assert same(first, started(tmp_path / "a", "shapes", captions=True), "")
    with pytest.raises(InputError, match="reads text"):
        started(tmp_path / "a", "shapes")


# -- the network


@settings(max_examples=8)
@given(
    st.integers(1, 700),
    st.integers(1, 700),
    st.sampled_from([1, 3]),
    st.sampled_from([None, 1.0, 30.0, 500.0, 10_000.0]),
    st.booleans(),
)
def test_the_automatic_network_can_be_built_for_any_image(
    height: int, width: int, channels: int, minutes: float | None, accelerator: bool
) -> None:
    config, why = automatic_config(
        channels, (height, width), 5_000, minutes, accelerator=accelerator
    )
    with torch.device("meta"):
        model = DiffusionUNet(config, channels)
        x = torch.empty(1, channels, height, width)
        assert model(x, torch.zeros(1)).shape == x.shape
    assert -(-max(height, width) // config.stride) <= 8
    assert f"{height} x {width}" in why


def test_text_is_learned_by_an_optimizer_and_a_start_of_its_own() -> None:
    text = DiffusionOptions(captions=True, width=8)
    plain = DiffusionOptions(width=8)
    fit, _ = chosen_fit(text)
    assert (fit.optimizer, fit.lr, fit.beta2, fit.batch_size) == ("muon", 7e-3, 0.99, 32)
    fit, _ = chosen_fit(replace(text, optimizer="adamw"))
    assert (fit.lr, fit.batch_size) == (7e-4, 32)
    fit, _ = chosen_fit(plain)
    assert (fit.lr, fit.beta2, fit.batch_size) == (2e-2, 0.999, 32)
    fit, why = chosen_fit(replace(plain, optimizer="adamw"))
    assert (fit.lr, fit.batch_size, why.why) == (2e-3, 64, "as requested")
    assert [
        chosen_fit(replace(plain, **given))[0].optimizer
        for given in ({}, {"init": "a/model"}, {"shard": True}, {"lr": 1e-3})
    ] == ["muon", "adamw", "adamw", "adamw"]
    begun = replace(plain, init="a/model")
    for crossed, expected in ((False, "adamw"), (True, "muon")):
        start = Start(where="a/model", config=UNetConfig(), info={}, read=dict, crossed=crossed)
        assert chosen_fit(begun, start)[0].optimizer == expected
    assert chosen_fit(DiffusionOptions(captions=True, lr=1e-3))[0].lr == 1e-3
    for asked, starts_at_zero in ((text, False), (plain, True)):
        data = DiffusionData("shapes", captions=asked.captions)
        plan = decide(asked, data)
        model = make_model(plan)
        expected = (6.0, (0.0, 1.5)) if asked.captions else (1.0, (0.0, 1.0))
        assert (plan.levels.shift, plan.levels.log_sigma) == expected
        assert (plan.options.shift, plan.options.log_sigma) == expected
        assert model.config.zero_init is starts_at_zero
        assert bool(model.head.conv.weight.any()) is not starts_at_zero


def test_more_time_and_more_images_make_a_wider_network() -> None:
    def width(
        minutes: float, count: int = 50_000, accelerator: bool = False, side: int = 64
    ) -> int:
        config, _ = automatic_config(3, (side, side), count, minutes, accelerator=accelerator)
        return config.channels

    widths = [width(m) for m in (1, 120, 600, 3000, 10_000)]
    assert widths == sorted(set(widths))
    assert width(60, accelerator=True) > width(60)
    assert width(120, side=256) < width(120)
    assert width(5000, count=500) < width(5000)
