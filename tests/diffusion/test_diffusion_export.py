"""One evaluation of a diffusion model as a file of other formats: there it is what it is here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusion import ImageGenerator
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
