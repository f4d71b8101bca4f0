"""One evaluation of a diffusion model as a file of other formats: there it is what it is here."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusion import ImageGenerator
from diffusion.export import exportable
from diffusion.model import DiffusionUNet
from diffusion.process.denoiser import Denoiser
from diffusion.process.prediction import PREDICTIONS
from diffusion.process.samplers import finish, sample
from diffusion.process.schedule import NoiseSchedule
from tests.diffusion.test_generator import build
from unet_diffusion import export

CONDITIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "classes": {"classes": torch.tensor([0, 2, 1])},
    "captions": {"tokens": torch.tensor([[2, 3, 4], [2, 1, 0], [2, 0, 0]])},
}


def given(kind: str, size: tuple[int, int]) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    images = {"noisy": torch.randn(3, 1, *size), "timestep": torch.tensor([40.5, 3, 0])}
    return images | CONDITIONS[kind]


@pytest.mark.parametrize("kind", CONDITIONS)
def test_torchscript_predicts_the_same(kind: str, tmp_path: Path) -> None:
    model = build(kind).eval()
    ImageGenerator(model).export("torchscript", tmp_path / "m.pt")
    files = {"metadata.json": ""}
    there = torch.jit.load(tmp_path / "m.pt", _extra_files=files)
    for size in ((8, 12), (16, 20)):
        values = given(kind, size)
        with torch.no_grad():
            expected = model(values["noisy"], values["timestep"], **CONDITIONS[kind])
            torch.testing.assert_close(there(*values.values()), expected, atol=1e-4, rtol=1e-4)
    said = json.loads(files["metadata.json"])
    assert said["prediction"] == "v"
    assert len(json.loads(said["alpha_bar"])) == 50
    assert json.loads(said["words"]) == (["a", "red", "circle"] if kind == "captions" else [])


def check_steps(model: DiffusionUNet, network: Any, said: Mapping[str, str]) -> None:
    """A step by a network of numpy arrays and the formulas of its metadata is one of ours."""
    step, rng = json.loads(said["step"]), np.random.default_rng(0)
    schedule = NoiseSchedule.from_dict(model.info["schedule"])
    denoiser = Denoiser(model, schedule, model.info["prediction"])
    for t in (0, 20, 48):
        x = rng.standard_normal((2, 1, 8, 12)).astype(np.float32)
        known: dict[str, Any] = {"x": x, "t": t, "sqrt": np.sqrt, "log": np.log}
        known |= {name: json.loads(said[name])[t] for name in ("signal", "noise")}
        timestep = np.full(2, eval(step["timestep"], known), np.float32)
        known["prediction"] = network(np.float32(eval(step["noisy"], known)), timestep)
        with torch.no_grad():
            expected = denoiser(torch.from_numpy(x), t)
        for name in ("x0", "eps"):
            ours = getattr(expected, name).numpy()
            atol = 1e-4 * float(abs(ours).max())
            np.testing.assert_allclose(eval(step[name], known), ours, rtol=1e-3, atol=atol)


def of(kind: Any, prediction: Any) -> DiffusionUNet:
    model = build("plain").eval()
    model.info["schedule"] = NoiseSchedule(kind=kind, steps=50).to_dict()
    model.info["prediction"] = prediction
    return model


@pytest.mark.parametrize(
    ("kind", "prediction"),
    [(k, p) for k in ("flow", "cosine", "edm") for p in PREDICTIONS if k != "flow" or p[0] != "e"],
)
def test_the_metadata_say_all_that_a_step_takes(kind: Any, prediction: Any) -> None:
    model = of(kind, prediction)
    made = exportable(model)

    def network(*given: Any) -> Any:
        with torch.no_grad():
            return made.module(*map(torch.from_numpy, given)).numpy()

    check_steps(model, network, made.metadata)


@pytest.mark.slow  # as below
def test_a_step_by_an_onnx_file_and_numpy(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
    pytest.importorskip("onnxscript", reason="pip install 'unet-diffusion[export]'")
    model = of("flow", "flow")
    ImageGenerator(model).export("onnx", tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")

    def network(noisy: Any, timestep: Any) -> Any:
        return session.run(None, {"noisy": noisy, "timestep": timestep})[0]

    check_steps(model, network, session.get_modelmeta().custom_metadata_map)


def test_eulers_steps_of_flow_matching_are_as_simple_as_the_documentation_says() -> None:
    model, schedule = of("flow", "flow"), NoiseSchedule(kind="flow", steps=50)
    denoiser = Denoiser(model, schedule, "flow")
    x = noisy = torch.randn(2, 1, 8, 12, generator=torch.Generator().manual_seed(0))
    times = torch.linspace(1, 0, 6)
    with torch.no_grad():
        for s, to in itertools.pairwise(times.tolist()):
            noisy = noisy + (to - s) * model(noisy, torch.full((2,), s * 50 - 1))
        x = finish(sample(denoiser, x, schedule.timesteps(5), "euler"))
    torch.testing.assert_close(noisy, x, atol=1e-3, rtol=1e-3)


@pytest.mark.slow  # PyTorch's exporter takes many seconds for a network with attention
@pytest.mark.parametrize("kind", ["classes", "captions"])
def test_onnx_predicts_the_same(kind: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
    pytest.importorskip("onnxscript", reason="pip install 'unet-diffusion[export]'")
    model = build(kind).eval()
    ImageGenerator(model).export("onnx", tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    for size in ((8, 12), (16, 20)):
        values = given(kind, size)
        with torch.no_grad():
            expected = model(values["noisy"], values["timestep"], **CONDITIONS[kind]).numpy()
        (found,) = session.run(None, {name: value.numpy() for name, value in values.items()})
        np.testing.assert_allclose(found, expected, atol=1e-4 * abs(expected).max())


def test_the_command_exports_and_refuses_a_package(tmp_path: Path, capsys) -> None:
    folder, out = tmp_path / "run" / "model", tmp_path / "m.pt"
    build("plain").save_pretrained(folder)
    assert export.command(["--model", str(folder), "--to", "torchscript", str(out)]) == 0
    assert out.is_file()
    argv = ["--model", str(folder), "--to", "bioimageio", "--image", str(out), str(out)]
    assert export.command(argv) == 2
    assert "called once per image, not once per step" in capsys.readouterr().err
