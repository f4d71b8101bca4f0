"""Laws of the training loop: order, randomness, resumption, processes, budgets."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from diffusion.options import DiffusionOptions
from segmentation.model import SegmentationUNet
from segmentation.options import SegmentationOptions
from tests.forks import run_forked
from tests.unet.training.toy_training import ToyOptions, toy_task
from unet import InputError, UNetConfig
from unet.device import training_format
from unet.errors import RunError
from unet.training.batches import BatchKeys, Draw, sample_rng
from unet.training.config_file import field_types
from unet.training.ema import EMA, KEPT, PowerEMA, Profile, exponent, put_together
from unet.training.fit import fit
from unet.training.options import FitOptions
from unet.training.plan import plan_fit
from unet.training.run import RunFolder, read_log, rng_state, run_folder, set_rng_state
from unet.training.task import Processes
from unet.training.timetable import Progress, Timetable

TOY = Path(__file__).parent / "toy_training.py"
ROOT = Path(__file__).parents[3]
LOGGED = ("--log-every", 7, "--snapshots", 3)
TWO = (
    *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
    *("--main_process_port", "0"),  # a free one
)


def toy(
    *arguments: object, launch: tuple[str, ...] = (), processes: int = 1, **environ: str
) -> subprocess.CompletedProcess[str]:
    if not launch and not environ:
        return run_forked(TOY, *arguments, processes=processes)
    command = [sys.executable, *launch, str(TOY), *map(str, arguments)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environ}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)


def losses(run: Path) -> list[tuple[int, float]]:
    return [(e["step"], e["loss"]) for e in read_log(run / "metrics.jsonl") if "loss" in e]


def without_times(run: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in e.items() if k != "seconds"} for e in read_log(run / "metrics.jsonl")]


# -- order and randomness -------------------------------------------------------------------------


@given(st.integers(1, 30), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.data())
def test_processes_and_parts_share_the_batches_of_one(length, part, accumulate, processes, data):
    batch = part * accumulate * processes
    start = data.draw(st.integers(0, 5))

    def stream(process: int, count: int, parts: int, first: int) -> list[list[Draw]]:
        keys = BatchKeys(
            length,
            batch,
            seed=1,
            start_step=first,
            accumulate=parts,
            process=process,
            processes=count,
        )
        iterator = iter(keys)
        return [next(iterator) for _ in range(4 * parts)]

    whole = stream(0, 1, 1, start)
    positions = [position for draws in whole for position, _, _ in draws]
    assert positions == list(range(batch * start, batch * (start + 4)))
    split = [stream(p, processes, accumulate, start) for p in range(processes)]
    for step, draws in enumerate(whole):
        turns = range(step * accumulate, (step + 1) * accumulate)
        assert [d for turn in turns for p in split for d in p[turn]] == draws


@given(st.integers(1, 40), st.integers(1, 20), st.integers(1, 5))
def test_batches_are_shared_as_evenly_as_may_be(count, size, processes):
    parts = [Processes(rank, processes).batches(count, size) for rank in range(processes)]
    assert sorted(n for part in parts for batch in part for n in batch) == list(range(count))
    assert all(1 <= len(batch) <= size for part in parts for batch in part)
    lengths = [len(part) for part in parts]
    assert max(lengths) - min(lengths) <= 1
    assert Processes().batches(count, size)[0] == range(min(count, size))


@given(st.integers(1, 20), st.integers(1, 8))
def test_every_epoch_holds_every_sample_once_and_its_order_is_its_own(length, batch):
    iterator = iter(BatchKeys(length, batch, seed=3))
    keys = [k for _ in range(3 * length) for _, *k in next(iterator)][: 3 * length]
    for epoch in range(3):
        part = keys[epoch * length : (epoch + 1) * length]
        assert sorted(part) == [[epoch, i] for i in range(length)]
    if length > 12:
        assert [i for _, i in keys[:length]] != [i for _, i in keys[length : 2 * length]]


def test_a_later_start_is_the_tail_of_an_earlier_one():
    early, late = iter(BatchKeys(7, 3, seed=0)), iter(BatchKeys(7, 3, seed=0, start_step=5))
    for _ in range(5):
        next(early)
    assert [next(early) for _ in range(9)] == [next(late) for _ in range(9)]


def test_a_batch_that_cannot_be_shared_equally_is_refused():
    with pytest.raises(InputError, match=r"--batch-size 6 .* multiple of 4"):
        BatchKeys(10, 6, seed=0, accumulate=2, processes=2)


def test_samples_draw_from_generators_of_their_own():
    draws = {key: sample_rng(*key).random() for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]}
    assert len(set(draws.values())) == 4
    assert sample_rng(0, 1, 0).random() == draws[0, 1, 0]


# -- averaging ------------------------------------------------------------------------------------


def test_ema_is_the_weighted_sum_with_warm_up_and_averages_buffers():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    ema = EMA(model, decay=0.5)
    expected = {k: v.clone() for k, v in model.state_dict().items()}
    for n in range(12):
        with torch.no_grad():
            model(torch.randn(4, 1, 3, 3))  # moves the running statistics and their counter
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        ema.update(model, n)
        decay = min(0.5, (1 + n) / (10 + n))
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                expected[key] = decay * expected[key] + (1 - decay) * value
            else:
                expected[key] = value
    torch.testing.assert_close(ema.model.state_dict(), expected)
    assert not ema.model.training
    assert not any(p.requires_grad for p in ema.model.parameters())


@pytest.mark.parametrize("std", [0.02, 0.05, 0.1, 0.25])
def test_the_exponent_gives_the_width_of_the_profile(std):
    times = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    weights = times ** exponent(std)
    mean = (weights * times).sum() / weights.sum()
    spread = ((weights * (times - mean) ** 2).sum() / weights.sum()).sqrt()
    assert spread.item() == pytest.approx(std, rel=1e-3)


def test_an_average_put_together_afterwards_is_the_one_kept_directly():
    """EDM2, arXiv 2312.02696, sec. 3: of a random walk of 640 steps, 16 snapshots of two widths."""
    model = nn.Linear(40, 1)
    kept, direct = ([PowerEMA(model, std) for std in stds] for stds in (KEPT, (0.04, 0.075, 0.15)))
    snapshots: dict[Profile, torch.Tensor] = {}
    for step in range(1, 641):
        with torch.no_grad():
            model.weight.add_(torch.randn_like(model.weight))
        for average in (*kept, *direct):
            average.update(model, step - 1)
        if step % 40 == 0:
            snapshots |= {Profile(a.std, step): a.model.weight.double().clone() for a in kept}
    for average in direct:
        factors, left = put_together(list(snapshots), Profile(average.std, 640))
        assert left < 0.06
        found = sum(f * w for f, w in zip(factors, snapshots.values(), strict=True))
        wanted = average.model.weight.double()
        assert (found - wanted).norm() < 0.01 * wanted.norm()
    factors, left = put_together(list(snapshots), Profile(0.05, 320))
    one_hot = [float(profile == (0.05, 320)) for profile in snapshots]
    assert factors == pytest.approx(one_hot, abs=1e-6)
    assert left < 1e-4
    assert put_together(list(snapshots), Profile(0.01, 320))[1] > 0.1  # too narrow for these


# -- the budget -----------------------------------------------------------------------------------


def timetable(*, samples: int = 10, **values: Any) -> Timetable:
    return Timetable(plan_fit(FitOptions(out=Path("x"), **values)), samples)


def test_the_rate_warms_up_and_falls_to_zero():
    budget = timetable(steps=100, warmup=0.1)
    rates = [budget.rate(Progress(step=s)) for s in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    flat = timetable(steps=9, warmup=0, schedule="constant")
    assert {flat.rate(Progress(step=s)) for s in range(9)} == {1.0}


def test_epochs_are_counted_in_samples():
    assert timetable(samples=9, epochs=1.5, batch_size=4).steps == 4


def test_minutes_set_the_time_of_an_evaluation_aside_and_space_slow_ones():
    options = FitOptions(out=Path("x"), max_minutes=1, evaluations=10)
    budget = Timetable(plan_fit(options), samples=10)
    assert budget.share(Progress(seconds=48, evaluation_seconds=12)) == 1.0
    assert not budget.evaluation_due(Progress(seconds=5.9))
    assert budget.evaluation_due(Progress(seconds=6.1))
    slow = {"evaluation_seconds": 2.0, "evaluated_seconds": 10.0}  # at most a tenth of the time
    assert not budget.evaluation_due(Progress(seconds=29, **slow))
    assert budget.evaluation_due(Progress(seconds=31, **slow))


@given(st.integers(1, 50), st.integers(0, 60), st.integers(0, 40))
def test_evaluations_are_spread_over_the_steps_and_over_those_of_a_larger_budget(n, count, first):
    options = FitOptions(out=Path("x"), steps=n, evaluations=count)
    budget = Timetable(plan_fit(options), samples=10)
    progress = Progress(step=first, evaluated_step=first)
    seen = []
    while progress.step < n:
        progress.step += 1
        if budget.evaluation_due(progress):
            progress.evaluated_step = progress.step
            seen.append(progress.step)
    if first == 0:
        assert len(seen) == min(count, n)
    assert all(b - a >= n // max(count, 1) for a, b in itertools.pairwise(seen))
    assert not seen or seen[-1] == n


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 3, "epochs": 1}, "--steps and --epochs are both budgets"),
        ({"steps": 0}, "--steps 0 must be a number above 0"),
        ({"max_minutes": math.nan}, "--max-minutes nan must be a number"),
        ({"epochs": math.inf}, "--epochs inf must be a number"),
        ({"batch_size": 0}, "--batch-size 0 must be at least 1"),
        ({"lr": -1.0}, "--lr -1.0 must be above 0"),
        ({"ema": 1.0}, r"--ema 1.0 must be in \[0, 1\)"),
        ({"clip": -1.0}, "--clip -1.0 must be 0 or more"),
        ({"workers": -1}, "--workers -1 must be 0 or more"),
    ],
)
def test_impossible_options_are_refused(wrong, message):
    with pytest.raises(InputError, match=message):
        FitOptions(out=Path("x"), **wrong)


@pytest.mark.parametrize("kind", [FitOptions, SegmentationOptions, DiffusionOptions])
def test_each_path_may_be_a_string(kind: type[FitOptions]) -> None:
    needed = {"images": "masks", "masks": "images", "text_encoder": "captions"}
    names = [name for name, hint in field_types(kind).items() if Path in (hint, *get_args(hint))]
    assert "out" in names
    for name in names:
        strings = dict.fromkeys({"out", name, needed.get(name, name)}, "a/b")
        paths = {key: Path(value) for key, value in strings.items() if key != "captions"}
        assert kind(**strings) == kind(**{**strings, **paths})
        assert getattr(kind(**strings), name) == Path("a/b")


# -- whole runs -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """40 steps with shuffling, random samples, dropout and averaging."""
    run = tmp_path_factory.mktemp("fit") / "uninterrupted"
    done = toy("--out", run, "--steps", 40, "--dropout", 0.3, "--norm", "batch", *LOGGED)
    assert done.returncode == 0, done.stderr
    return run


def test_a_run_goes_on_in_the_layout_of_another_processor(tmp_path, monkeypatch):
    """Fused AdamW pairs weights and means by their place in memory."""

    def train(run: str, layout: torch.memory_format, steps: int, *, resume: bool = False) -> None:
        monkeypatch.setattr("unet.training.fit.training_format", lambda device: layout)
        options = ToyOptions(
            out=tmp_path / run,
            steps=steps,
            resume=resume,
            schedule="constant",
            warmup=0,
            evaluations=1,
            log_every=1,
        )
        with run_folder(plan_fit(options)):
            fit(toy_task(options), plan_fit(options))

    train("whole", torch.channels_last, 6)
    train("over", torch.channels_last, 3)
    train("over", torch.contiguous_format, 6, resume=True)
    found, expected = losses(tmp_path / "over"), losses(tmp_path / "whole")
    assert len(expected) == 6
    assert found == [(n, pytest.approx(x, rel=1e-4)) for n, x in expected]


def test_training_maps_are_laid_out_for_the_processor(monkeypatch):
    for capability, expected in (
        ("AVX2", torch.contiguous_format),
        ("AVX512", torch.channels_last),
        ("DEFAULT", torch.channels_last),
    ):
        monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda c=capability: c)
        assert training_format(torch.device("cpu")) == expected
        assert training_format(torch.device("cuda")) == torch.channels_last


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_and_resumed_run_ends_bit_identical(uninterrupted, tmp_path, signum):
    run = tmp_path / "run"
    options = ("--steps", 40, "--dropout", 0.3, "--norm", "batch", *LOGGED)
    killed = toy("--out", run, *options, "--die-at", 24, "--with-signal", int(signum))
    if signum == signal.SIGKILL:  # the last state is that of the evaluation at step 20
        assert killed.returncode == -signal.SIGKILL
        at = 20
    else:
        assert killed.returncode == 128 + signum
        assert f"--out {run} --resume" in killed.stdout
        at = 24
    resumed = toy("--out", run, *options, "--resume", "--die-at", 0)
    assert resumed.returncode == 0, resumed.stderr
    assert f"at step {at}" in resumed.stdout

    for state in (uninterrupted / "state/state.pt", run / "state/state.pt"):
        assert state.exists()
    ours, theirs = (
        torch.load(r / "state/state.pt", weights_only=True) for r in (run, uninterrupted)
    )
    for part in ("model", "ema"):
        assert all(torch.equal(ours[part][k], v) for k, v in theirs[part].items())
    taken = [f"snapshots/{at:08d}-{std:.2f}.safetensors" for at in (14, 27, 40) for std in KEPT]
    for file in ("model/model.safetensors", *taken):
        best, expected = (load_file(r / file) for r in (run, uninterrupted))
        assert all(torch.equal(best[k], v) for k, v in expected.items()), file
    assert len(list((run / "snapshots").iterdir())) == len(taken)
    assert without_times(run) == without_times(uninterrupted)


def test_a_run_killed_before_its_first_state_starts_again(uninterrupted, tmp_path):
    run = tmp_path / "run"
    options = ("--steps", 40, "--dropout", 0.3, "--norm", "batch", *LOGGED)
    assert toy("--out", run, *options, "--die-at", 3).returncode == -signal.SIGKILL
    resumed = toy("--out", run, *options, "--resume", "--die-at", 0)
    assert "starting at the first step" in resumed.stdout
    assert without_times(run) == without_times(uninterrupted)


def test_two_processes_and_two_parts_give_the_losses_of_one(tmp_path):
    options = ("--steps", 12, "--log-every", 1, "--evaluations", 2, "--precision", "fp32")
    assert toy("--out", tmp_path / "one", *options).returncode == 0
    assert toy("--out", tmp_path / "parts", *options, "--accumulate", 2).returncode == 0
    both = toy("--out", tmp_path / "two", *options, processes=2)
    assert both.returncode == 0, both.stderr
    assert "2 processes" in both.stdout
    one = losses(tmp_path / "one")
    assert len(one) == 12
    for other in ("parts", "two"):
        curve = losses(tmp_path / other)
        assert [s for s, _ in curve] == [s for s, _ in one]
        assert [v for _, v in curve] == pytest.approx([v for _, v in one], abs=1e-5)
    held_out = [
        [e["val_loss"] for e in read_log(tmp_path / run / "metrics.jsonl") if "val_loss" in e]
        for run in ("one", "two")
    ]
    assert held_out[0] == pytest.approx(held_out[1], abs=1e-5)


def test_split_among_two_processes_the_losses_are_those_of_one(tmp_path):
    """The state that is saved is whole: it goes on split or not, on any number of processes."""
    options = ("--steps", 12, "--log-every", 1, "--evaluations", 2, "--precision", "fp32")
    assert toy("--out", tmp_path / "one", *options).returncode == 0
    runs = {
        "split": ((*options, "--shard", "--die-at", 9), 2),
        "put together": ((*options, "--no-shard", "--die-at", 9), 1),
    }
    for run, (own, processes) in runs.items():
        assert toy("--out", tmp_path / run, *own, processes=processes).returncode != 0
    for run, other in (("split", "put together"), ("put together", "split")):
        own, processes = runs[other]
        done = toy("--out", tmp_path / run, *own, "--die-at", 0, "--resume", processes=processes)
        assert done.returncode == 0, done.stderr
        assert "at step 6" in done.stdout
    one = losses(tmp_path / "one")
    for run in runs:
        assert [s for s, _ in losses(tmp_path / run)] == [s for s, _ in one]
        found = [v for _, v in losses(tmp_path / run)]
        assert found == pytest.approx([v for _, v in one], abs=1e-5)
        models = [load_file(tmp_path / r / "model/model.safetensors") for r in ("one", run)]
        assert models[0].keys() == models[1].keys()
        assert all(torch.allclose(v, models[1][k], atol=1e-4) for k, v in models[0].items())


def test_weights_that_are_split_are_gathered_in_the_precision_of_the_network(tmp_path):
    options = ("--steps", 12, "--log-every", 1, "--evaluations", 2, "--precision", "bf16")
    for run, own in (("whole", ()), ("split", ("--shard",))):
        assert toy("--out", tmp_path / run, *options, *own, processes=2).returncode == 0
    whole, split = (losses(tmp_path / run) for run in ("whole", "split"))
    assert [v for _, v in split] == pytest.approx([v for _, v in whole], rel=0.02)
    model = load_file(tmp_path / "split/model/model.safetensors")
    assert {v.dtype for v in model.values() if v.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize(
    ("options", "said"), [((), "but there is one"), (("--compile",), "does not go with --compile")]
)
def test_splitting_is_refused_where_it_cannot_be(options, said, tmp_path):
    done = toy("--out", tmp_path / "run", "--steps", 2, "--shard", *options)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert said in done.stderr
    assert not (tmp_path / "run" / "model").exists()


@pytest.fixture
def one_thread():
    """As the toy's own process has: more of them add up in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_deterministic_algorithms_are_taken_for_the_run_alone(uninterrupted, tmp_path):
    """On a CPU they are those that it takes anyway."""
    options = ToyOptions(
        out=tmp_path / "run", steps=40, dropout=0.3, norm="batch", log_every=7, deterministic=True
    )
    task, during = toy_task(options), []

    def loss(model, batch):
        during.append(torch.are_deterministic_algorithms_enabled())
        return task.loss(model, batch)

    with run_folder(plan_fit(options)):
        fit(replace(task, loss=loss), plan_fit(options))
    assert all(during)
    assert not torch.are_deterministic_algorithms_enabled()
    assert without_times(tmp_path / "run") == without_times(uninterrupted)


def test_an_operation_that_has_no_deterministic_form_is_named(tmp_path):
    options = ToyOptions(out=tmp_path / "run", steps=2, deterministic=True)

    def loss(model, batch):
        return torch.zeros(2).put_(torch.tensor([0]), torch.ones(1)).sum()

    with (
        pytest.raises(RunError, match="--deterministic: put_ gives the same bits each time on no"),
        run_folder(plan_fit(options)),
    ):
        fit(replace(toy_task(options), loss=loss), plan_fit(options))
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("kind", ["mps", "xpu", "cuda"])
def test_random_numbers_of_any_device_are_saved_and_go_on(monkeypatch, kind):
    class Device:
        state = torch.arange(3, dtype=torch.uint8)

        def get_rng_state(self, device):
            return self.state.clone()

        def set_rng_state(self, state, device):
            Device.state = state

    monkeypatch.setattr(torch, "get_device_module", lambda device: Device())
    device = torch.device(kind)
    saved = rng_state(device)
    drawn, Device.state = torch.rand(3), Device.state + 1
    set_rng_state(device, saved)
    assert torch.equal(torch.rand(3), drawn)
    assert torch.equal(Device.state, torch.arange(3, dtype=torch.uint8))
    set_rng_state(device, {"cpu": saved["cpu"]})  # of a run on a CPU


def test_batch_norm_over_a_few_samples_at_a_time_is_remarked_on(tmp_path, capsys):
    values = {"steps": 1, "batch_size": 6}
    for name, few, own in (
        ("parts", True, {"accumulate": 2, "norm": "batch"}),
        ("whole", False, {"norm": "batch"}),
        ("group", False, {"accumulate": 2}),
    ):
        options = ToyOptions(out=tmp_path / name, **values, **own)
        with run_folder(plan_fit(options)):
            fit(toy_task(options), plan_fit(options))
        said = "batch norm takes its statistics over the 3 samples" in capsys.readouterr().out
        assert said == few, name


@pytest.mark.parametrize(("processes", "precision"), [(1, "bf16"), (2, "fp32")])
def test_a_compiled_network_takes_the_same_steps(tmp_path, processes, precision):
    """As it is trained: with autocast, averaged, scored, and in the wrapper of two processes."""
    options = ("--steps", 4, "--log-every", 1, "--evaluations", 2, "--precision", precision)
    for run, own in (("eager", ()), ("compiled", ("--compile",))):
        done = toy("--out", tmp_path / run, *options, *own, processes=processes)
        assert done.returncode == 0, done.stderr
    eager, compiled = (without_times(tmp_path / run) for run in ("eager", "compiled"))
    assert len(eager) == 6
    assert [e.keys() for e in eager] == [e.keys() for e in compiled]
    for ours, theirs in zip(compiled, eager, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_workers_do_not_change_a_run(uninterrupted, tmp_path):
    options = ("--steps", 40, "--dropout", 0.3, "--norm", "batch", *LOGGED)
    assert toy("--out", tmp_path / "run", *options, "--workers", 2).returncode == 0
    assert without_times(tmp_path / "run") == without_times(uninterrupted)


def test_processes_agree_on_the_model_that_is_scored_and_saved(tmp_path):
    """Each process has batch statistics of its own between two steps."""
    run = tmp_path / "run"
    options = ("--steps", 6, "--norm", "batch", "--evaluations", 2)
    done = toy("--out", run, *options, launch=TWO)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held out") == 2
    logged = [e["val_loss"] for e in read_log(run / "metrics.jsonl") if "val_loss" in e]
    model = SegmentationUNet.from_pretrained(run / "model")
    task = toy_task(ToyOptions(out=run, norm="batch"))
    with torch.no_grad():
        found = task.evaluate(model, Processes())["loss"]
    assert found == pytest.approx(min(logged), abs=2e-3)  # logged in the precision of the training


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_with_workers_saves(tmp_path, signum):
    run = tmp_path / "run"
    options = ("--steps", 100_000, "--workers", 2, "--die-at", 5, "--whole-group")
    done = toy("--out", run, *options, "--with-signal", int(signum))
    assert done.returncode == 128 + signum, done.stderr
    assert "--resume" in done.stdout
    assert RunFolder(run).load_state()["step"] > 0


def test_a_refused_run_leaves_nothing_and_a_refused_resume_changes_nothing(uninterrupted, tmp_path):
    new = toy("--out", tmp_path / "new", "--steps", 4, "--batch-size", 3, "--accumulate", 2)
    assert new.returncode == 2
    assert not (tmp_path / "new").exists()
    before = (uninterrupted / "config.yaml").read_bytes()
    refused = toy("--out", uninterrupted, "--resume", "--norm", "none")
    assert refused.returncode == 2
    assert "does not fit" in refused.stderr
    assert (uninterrupted / "config.yaml").read_bytes() == before


def test_a_state_that_cannot_be_written_is_one_sentence_and_the_last_one_stays(tmp_path):
    run = tmp_path / "run"
    assert toy("--out", run, "--steps", 4).returncode == 0
    before = (run / "state/state.pt").read_bytes()
    limited = tmp_path / "limited.py"  # no file above 20 kB
    limited.write_text(
        "import resource, runpy\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        f"runpy.run_path({str(TOY)!r}, run_name='__main__')\n"
    )
    full = run_forked(limited, "--out", run, "--resume", "--steps", 8)
    assert full.returncode in (1, 2), full.stderr
    assert "Traceback" not in full.stderr
    assert "error: " in full.stderr
    assert (run / "state/state.pt").read_bytes() == before
    assert not list(run.rglob("*.tmp"))


def test_other_peoples_temporary_files_are_left_alone(tmp_path):
    theirs = tmp_path / "other" / "state" / ".state.pt.x.tmp"
    ours = tmp_path / "state" / ".state.pt.x.tmp"
    for file in (theirs, ours):
        file.parent.mkdir(parents=True)
        file.write_text("")
    with RunFolder(tmp_path).locked(resume=True):
        assert theirs.exists()
        assert not ours.exists()


@pytest.mark.parametrize(("clip", "cure"), [(2, "a lower --clip than 2"), (0, "a --clip such as")])
def test_a_loss_that_is_not_finite_stops_with_the_file(tmp_path, clip, cure):
    run = tmp_path / "run"
    done = toy("--out", run, "--steps", 40, "--nan-at", 5, "--clip", clip)
    assert done.returncode == 1
    message = done.stderr.strip()
    assert re.search(rf"error: the loss is nan at step [123],.*disc-5\.png.*--lr.*{cure}", message)
    assert "Traceback" not in message
    assert not (run / "model").exists()


def test_a_budget_in_minutes_ends_in_time_with_its_last_evaluation(tmp_path):
    run = tmp_path / "run"
    assert toy("--out", run, "--max-minutes", 0.03).returncode == 0
    entries = read_log(run / "metrics.jsonl")
    held_out = [e for e in entries if "val_loss" in e]
    assert held_out[-1]["step"] == entries[-1]["step"]
    losses, kept = ([e[name] for e in held_out] for name in ("val_loss", "kept"))
    assert kept == [loss < min(losses[:i], default=math.inf) for i, loss in enumerate(losses)]
    training = [e for e in entries if "loss" in e]
    assert 1.2 < training[-1]["seconds"] < 2.8
    assert training[-1]["lr"] < 1e-4


def test_tensorboard_events_when_asked_for(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    options = ("--steps", 10, "--log-every", 5, "--trackers", "tensorboard")
    assert toy("--out", run, *options).returncode == 0
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    logged = [(e.step, e.value) for e in events.Scalars("train/loss")]
    assert [s for s, _ in logged] == [5, 10]
    assert [v for _, v in logged] == pytest.approx([v for _, v in losses(run)], rel=1e-6)
    assert "val/loss" in events.Tags()["scalars"]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_other_trackers_are_told_offline_and_go_on_with_their_run(name, tmp_path, monkeypatch):
    tracker = pytest.importorskip(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    if name == "mlflow":
        pytest.importorskip("sqlalchemy")  # of the whole package, for a database on the disk
    run, names = tmp_path / "run", []
    for steps, resume in ((4, False), (8, True)):
        options = ToyOptions(
            out=run, steps=steps, log_every=2, trackers=(name,), evaluations=1, resume=resume
        )
        fit(toy_task(options), plan_fit(options))
        names.append((run / "state/trackers.json").read_text())
    assert names[0] == names[1]
    if name == "wandb":
        assert len(list((run / "wandb").glob("offline-run-*"))) == 2
    else:
        (kept,) = tracker.search_runs(search_all_experiments=True, output_format="list")
        assert kept.data.metrics["train/loss"] > 0


def test_a_tracker_that_is_missing_is_named_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    options = ToyOptions(out=tmp_path / "run", steps=4, trackers=("wandb",))
    with pytest.raises(InputError, match="--trackers wandb needs a package that is missing"):
        fit(toy_task(options), plan_fit(options))
    assert not (tmp_path / "run").exists()


# -- the run folder -------------------------------------------------------------------------------


def test_a_folder_that_holds_a_run_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with (
        pytest.raises(InputError, match="holds a run already"),
        RunFolder(tmp_path).locked(resume=False),
    ):
        pass


def test_nothing_to_resume(tmp_path):
    with (
        pytest.raises(InputError, match="holds no run to resume"),
        RunFolder(tmp_path / "none").locked(resume=True),
    ):
        pass
    assert not (tmp_path / "none").exists()


def test_a_second_process_is_kept_out(tmp_path):
    with RunFolder(tmp_path / "run").locked(resume=False):
        done = toy("--out", tmp_path / "run", "--steps", 2)
    assert done.returncode == 2
    assert "another process is training" in done.stderr


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "run").write_text("")
    with (
        pytest.raises(InputError, match="cannot be a folder"),
        RunFolder(tmp_path / "run").locked(resume=False),
    ):
        pass


def test_the_log_drops_what_a_resumed_run_writes_again(tmp_path):
    folder = RunFolder(tmp_path)
    for step in (10, 20, 30):
        folder.log(step=step, loss=1 / step)
    with folder.metrics.open("a") as file:
        file.write('{"step": 40, "lo')  # a kill in the middle of a line
    folder.cut_log(20)
    assert [e["step"] for e in map(json.loads, folder.metrics.read_text().splitlines())] == [10, 20]


def test_a_damaged_or_foreign_state_is_refused(tmp_path):
    folder = RunFolder(tmp_path)
    folder.save_state({"step": 3, "model": {}})
    whole = folder.state.read_bytes()
    assert folder.load_state() == {"step": 3, "model": {}}
    for damaged in (b"", whole[: len(whole) // 2], b"not a state"):
        folder.state.write_bytes(damaged)
        with pytest.raises(InputError, match="cannot be read as a saved state"):
            folder.load_state()
    torch.save([1, 2], folder.state)
    with pytest.raises(InputError, match="is no saved state"):
        folder.load_state()


def test_a_state_of_another_network_is_refused(uninterrupted):
    from unet.weights.folder import check_fit

    state = torch.load(uninterrupted / "state/state.pt", weights_only=True)
    other = SegmentationUNet(UNetConfig(channels=4, multipliers=(1, 2)), 1)
    with pytest.raises(InputError, match=r"state.pt does not fit .* instead of"):
        check_fit(other.state_dict(), state["model"], "state.pt")
