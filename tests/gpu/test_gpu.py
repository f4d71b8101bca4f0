"""On a GPU: the CPU's numbers, both trainings, resumption, sampling, tiles, memory, no waits.

`make test-gpu` runs them. UNET_GPU_TESTS=cpu rehearses them on the CPU, where what only a GPU can
show is skipped.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffusion.data.images import DiffusionData
from diffusion.decisions import decide
from diffusion.model import DiffusionUNet
from diffusion.options import DiffusionOptions, SamplingOptions
from diffusion.process.denoiser import Denoiser
from diffusion.process.noise import NoiseSource
from diffusion.process.samplers import SamplerName, finish, sample
from diffusion.process.schedule import NoiseSchedule
from diffusion.sampling import ImageSampler
from diffusion.training import DiffusionTask, NoisedSamples, Timesteps
from diffusion.training import train as train_diffusion
from segmentation.model import SegmentationUNet
from segmentation.options import SegmentationOptions
from segmentation.predict import Predictor, TensorSource
from segmentation.training import train as train_segmentation
from unet import PRESETS, UNetConfig
from unet.device import training_format
from unet.errors import RunError
from unet.training.ema import EMA
from unet.training.muon import Muon
from unet.training.run import RunFolder, rng_state, set_rng_state

DEVICE = os.environ.get("UNET_GPU_TESTS", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE == "cuda" and not torch.cuda.is_available(), reason="there is no CUDA GPU here"
    ),
]
only_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="only a GPU can show it")
# Of the length of what the CPU gives in float32: of the output, and of the first weights' gradient,
# which has gone through every layer. In bfloat16 the CPU itself is up to 0.018 and 0.19 off.
TOLERANCES = {
    torch.float32: (2e-4, 2e-3),
    torch.bfloat16: (4e-2, 0.4),
    torch.float16: (1e-2, 0.1),
}


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """Float32 without TF32, whose ten bits are compared with nothing here."""
    flags = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    yield
    torch.backends.cudnn.allow_tf32 = flags[0]
    torch.set_float32_matmul_precision(flags[1])


def small(name: str) -> UNetConfig:
    """A preset at a width at which the CPU takes a moment."""
    config = PRESETS[name].config
    heads = config.head_channels and 16
    return replace(config, channels=32, head_channels=heads, groups=min(config.groups, 16))


def model_of(name: str, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    config = replace(small(name), **changes)
    kind: Any = DiffusionUNet if config.time else SegmentationUNet
    model: nn.Module = kind(config, 2)
    for weight in (w for w in model.parameters() if not w.any()):  # what starts at zero
        nn.init.normal_(weight, std=0.05)
    return model


def given(config: UNetConfig, side: int) -> dict[str, Tensor]:
    torch.manual_seed(1)
    inputs = {"x": torch.randn(2, config.in_channels, side, side)}
    if config.time:
        inputs["t"] = torch.tensor([3, 700])
    if config.context_channels is not None:
        inputs["context"] = torch.randn(2, 7, config.context_channels)
    if config.vector_channels:
        inputs["vector"] = torch.randn(2, config.vector_channels)
    return inputs


def outcome(
    model: nn.Module, inputs: dict[str, Tensor], device: str, dtype: torch.dtype, *, compiled: bool
) -> tuple[Tensor, Tensor]:
    """What the model gives, and the gradient of its first weights, on the CPU in float32."""
    model = model.to(device).train(False)
    model.zero_grad()
    run = torch.compile(model) if compiled else model
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        found = run(**{k: v.to(device) for k, v in inputs.items()})
    found.float().square().mean().backward()
    gradient = next(p.grad for p in model.parameters() if p.grad is not None)
    return found.detach().float().cpu(), gradient.detach().float().cpu()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("name", list(PRESETS))
def test_a_preset_gives_the_numbers_of_the_cpu(
    name: str, dtype: torch.dtype, compiled: bool
) -> None:
    if DEVICE == "cpu" and (compiled or dtype == torch.float16):
        pytest.skip("only a GPU can show it")
    model = model_of(name)
    inputs = given(small(name), 188 if name == "paper" else 64)
    wanted = outcome(model, inputs, "cpu", torch.float32, compiled=False)
    found = outcome(model, inputs, DEVICE, dtype, compiled=compiled)
    for ours, theirs, tolerance in zip(found, wanted, TOLERANCES[dtype], strict=True):
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


def segmentation_options(out: Path, **values: Any) -> SegmentationOptions:
    chosen = {"crop": 64, "width": 8, "batch_size": 4, "evaluations": 2, "workers": 0}
    return SegmentationOptions(out=out, **{**chosen, **values})


def diffusion_options(out: Path, **values: Any) -> DiffusionOptions:
    chosen = {"width": 32, "batch_size": 16, "evaluations": 1, "val": 64, "workers": 0}
    return DiffusionOptions(out=out, **{**chosen, **values})


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer pictures and generated images."""
    monkeypatch.setattr("segmentation.training.PHANTOM_SLICES", 6)
    for name in ("SHOWN", "FRAMES", "JUDGED"):
        monkeypatch.setattr(f"diffusion.judging.report.{name}", 4)
    monkeypatch.setattr("diffusion.judging.report.MOST_COMPARED", 200)


def test_both_trainings_learn(tmp_path: Path, quick: None) -> None:
    found = train_segmentation(segmentation_options(tmp_path / "s", steps=100))
    assert found["dice"] > 0.65  # all cell: 0.44; the accuracy is at the threshold of V_Rand
    found = train_diffusion(diffusion_options(tmp_path / "d", steps=100))
    assert found["loss"] < 0.25


@pytest.mark.parametrize("task", ["segmentation", "diffusion"])
def test_a_run_goes_on_where_it_stopped(task: str, tmp_path: Path, quick: None) -> None:
    """With --deterministic, bit by bit; dropout's random numbers go on, too."""
    train: Any = train_segmentation if task == "segmentation" else train_diffusion
    options: Any = segmentation_options if task == "segmentation" else diffusion_options
    constant = {"schedule": "constant", "warmup": 0.0, "optimizer": "adamw"}
    constant |= {"deterministic": True}
    train(options(tmp_path / "one", steps=8, **constant))
    train(options(tmp_path / "two", steps=4, **constant))
    train(options(tmp_path / "two", steps=8, resume=True, **constant))
    states = [RunFolder(tmp_path / run).load_state() for run in ("one", "two")]
    assert states[0] is not None
    assert states[1] is not None
    for name, value in states[0]["model"].items():
        assert torch.equal(states[1]["model"][name], value)


def test_dropout_goes_on_from_a_saved_state() -> None:
    device = torch.device(DEVICE)
    ones, state = torch.ones(100, device=device), rng_state(device)
    drawn = nn.functional.dropout(ones)
    assert not torch.equal(nn.functional.dropout(ones), drawn)
    set_rng_state(device, state)
    assert torch.equal(nn.functional.dropout(ones), drawn)


@only_gpu
@pytest.mark.filterwarnings("default")  # the compiler's own
def test_both_trainings_are_compiled(tmp_path: Path, quick: None) -> None:
    given = {"steps": 20, "compile": True}
    for deep in (False, True):
        out = tmp_path / f"s{deep}"
        found = train_segmentation(segmentation_options(out, deep_supervision=deep, **given))
        assert 0 < found["loss"] < 1
    found = train_diffusion(diffusion_options(tmp_path / "d", **given))
    assert 0 < found["loss"] < 1.2


@pytest.mark.parametrize("name", get_args(SamplerName))
def test_a_sampler_makes_the_images_of_the_cpu(name: SamplerName) -> None:
    """From the same noise, which is drawn on the CPU for each image."""
    model = model_of("diffusion", jumps=name == "jump").eval()
    schedule, images = NoiseSchedule(kind="cosine"), []
    for device in ("cpu", DEVICE):
        noise = NoiseSource([0, 1])
        x = noise.draw((3, 16, 16)).to(device)
        denoiser = Denoiser(narrowed(model.to(device)), schedule, "v")
        run = sample(denoiser, x, schedule.timesteps(6), name, noise=noise)
        images.append(finish(run).cpu())
    assert (images[0] - images[1]).abs().max() < 2e-2 * images[0].abs().max()


def narrowed(model: nn.Module) -> Any:
    """The first three channels of what a model puts out, or as often what there are of them."""
    return lambda x, t, **given: model(x, t, **given).repeat(1, 2, 1, 1)[:, :3]


def test_an_image_is_predicted_in_tiles_as_on_the_cpu() -> None:
    torch.manual_seed(0)
    model = SegmentationUNet(small("segmentation"), 1).eval()
    image = TensorSource(torch.randn(1, 300, 200))
    found = [Predictor([model.to(d)], tile=128, overlap=32)(image) for d in ("cpu", DEVICE)]
    np.testing.assert_allclose(found[0], found[1], atol=2e-3)


@pytest.mark.parametrize("size", [(48, 48), (40, 64), (200, 300)])
def test_symmetries_and_half_precision_predict_what_the_cpu_does(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model, image = SegmentationUNet(small("segmentation"), 1).eval(), torch.randn(1, *size)
    found = [
        Predictor([model.to(d)], tile=128, overlap=32, symmetries=True, precision=p)(
            TensorSource(image)
        )
        for d, p in (("cpu", "fp32"), (DEVICE, "fp32"), (DEVICE, "auto"))
    ]
    np.testing.assert_allclose(found[1], found[0], atol=2e-3)
    np.testing.assert_allclose(found[2], found[0], atol=3e-2)


@pytest.mark.parametrize("precision", ["fp32", "auto"])
def test_samples_are_those_of_the_cpu_up_to_the_precision(precision: Any) -> None:
    info = {"schedule": NoiseSchedule(kind="cosine").to_dict(), "prediction": "v", "size": [16, 16]}
    torch.manual_seed(0)
    model = DiffusionUNet(small("diffusion"), 3, info)
    nn.init.normal_(model.head.conv.weight, std=0.02)
    images = []
    for device, asked in (("cpu", "fp32"), (DEVICE, precision)):
        options = SamplingOptions(steps=6, precision=asked)
        images.append(ImageSampler(model.to(device), options)(4).astype(int))
    assert np.abs(images[0] - images[1]).mean() < (0.5 if precision == "fp32" else 4)


@only_gpu
def test_memory_that_runs_out_is_told_and_the_run_can_go_on(tmp_path: Path, quick: None) -> None:
    train_segmentation(segmentation_options(tmp_path / "run", steps=2))
    torch.cuda.empty_cache()
    held = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, 2**29 / held))
    try:
        with pytest.raises(
            RunError, match=r"the memory of cuda.* ran out at step 3: .* GiB per sample"
        ):
            train_segmentation(
                segmentation_options(
                    tmp_path / "run", steps=4, resume=True, batch_size=64, crop=256, width=64
                )
            )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    train_segmentation(segmentation_options(tmp_path / "run", steps=4, resume=True))


@only_gpu
def test_a_step_does_not_wait_for_the_gpu() -> None:
    """Forward, loss, backward, optimizer and average of a diffusion training."""
    options = diffusion_options(Path("unused"))
    data = DiffusionData("shapes", val=64)
    plan = decide(options, data)
    torch.manual_seed(0)
    model = DiffusionUNet(plan.network, plan.outputs, plan.info).to(DEVICE)
    model.to(memory_format=training_format(torch.device(DEVICE)))  # type: ignore[call-overload]
    task, samples = DiffusionTask(plan, data), NoisedSamples(data, plan, model)
    items = [{**samples[0, i], "position": i} for i in range(16)]
    batch = Timesteps.of(plan)(torch.utils.data.default_collate(items))
    batch = {k: v.to(DEVICE) for k, v in batch.items()}
    muon = Muon(model, lr=0.02, momentum=0.8, beta2=0.99, weight_decay=0.0)
    average = EMA(model, 0.999)
    for step in range(3):
        if step:  # the first one builds what is kept
            torch.cuda.set_sync_debug_mode("error")
        try:
            task.loss(model, batch).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
            muon.step()
            muon.zero_grad()
            average.update(model, step)
        finally:
            torch.cuda.set_sync_debug_mode("default")
