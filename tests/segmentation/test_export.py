"""A segmentation as a file of other formats: there it gives what it gives here."""

from __future__ import annotations

import json
import re
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from segmentation import Segmenter, load
from segmentation.data.normalisation import Normalisation
from segmentation.data.phantom import phantom_stack
from segmentation.export.graph import PixelsToProbabilities
from segmentation.model import SegmentationUNet
from tests.segmentation.test_segmenter import GREY, table
from tests.segmentation.test_segmenter import saved as cells
from unet import InputError, UNetConfig
from unet.files.images import write_image
from unet_diffusion import export

ROOT = Path(__file__).parents[2]
SIZES = ((45, 61), (1, 1), (16, 100))
SMALL = {"in_channels": 1, "channels": 4, "multipliers": (1, 2, 4)}
GROUPS = {"norm": "group", "groups": 4, "attention_levels": (1,), "patch": 2, "up": "bilinear"}
NETWORKS: dict[str, dict[str, Any]] = {
    "2015": {},
    "valid": {"padding": "valid", "multipliers": (1, 2)},
    "residual": {"block": "res", "skips": "block", **GROUPS},
}
EXTRA = "pip install 'unet-diffusion[export]'"


def saved(folder: Path, values: list[int], normalisation: dict[str, Any], **network: Any) -> Path:
    torch.manual_seed(0)
    info = {"classes": table(values), "normalisation": normalisation, "threshold": 0.47}
    config = UNetConfig(**SMALL | network)
    model = SegmentationUNet(config, 1 if len(values) == 2 else len(values), info)
    for parameter in model.head.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return folder


def here(model: Segmenter, image: np.ndarray) -> np.ndarray:
    """Probabilities (K, H, W) of all classes."""
    found = model.probability(image)
    return np.stack([1 - found, found]) if found.ndim == 2 else found.transpose(2, 0, 1)


def pictures(sizes: tuple[tuple[int, int], ...] = SIZES) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, size, dtype=np.uint8) for size in sizes]


def as_input(image: np.ndarray) -> np.ndarray:
    return image[None, None].astype(np.float32)


@pytest.mark.parametrize("network", NETWORKS)
def test_torchscript_gives_the_same_for_every_size(network: str, tmp_path: Path) -> None:
    values = [0, 255] if network == "2015" else [0, 7, 9]
    model = load(saved(tmp_path / "m", values, GREY, **NETWORKS[network]), device="cpu")
    model.export("torchscript", tmp_path / "m.pt")
    files = {"metadata.json": ""}
    there = torch.jit.load(tmp_path / "m.pt", _extra_files=files)
    for image in pictures():
        found = there(torch.from_numpy(as_input(image))).numpy()[0]
        np.testing.assert_allclose(found, here(model, image), atol=1e-5)
    said = json.loads(files["metadata.json"])
    assert json.loads(said["classes"]) == values
    assert (said["threshold"], said["dtype"]) == ("0.47", "uint8")


def test_what_was_not_measured_is_normalised_as_here() -> None:
    for dtype, nodata in (("float32", None), ("float32", -9.0), ("uint8", 7.0)):
        normalisation = {"mean": [128.0, 3.0], "std": [40.0, 2.0], "dtype": dtype, "nodata": nodata}
        info = {"normalisation": normalisation, "classes": table([0, 1]), "threshold": 0.5}
        model = SegmentationUNet(UNetConfig(**SMALL | {"in_channels": 2}), 1, info).eval()
        image = np.random.default_rng(0).integers(0, 256, (6, 5, 2)).astype(dtype)
        image[0, 0], image[1, 1, 0] = nodata or 0, nodata or 0
        if dtype == "float32":
            image[2, 2, 1] = np.nan
        x = torch.from_numpy(image.transpose(2, 0, 1)[None].astype(np.float32))
        expected = Normalisation.from_dict(normalisation)(image)
        np.testing.assert_allclose(
            PixelsToProbabilities(model).normalised(x)[0], expected, atol=1e-6
        )


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cells.onnx, by the command; its model is in model/ beside it."""
    pytest.importorskip("onnx", reason=EXTRA)
    pytest.importorskip("onnxscript", reason=EXTRA)
    folder = tmp_path_factory.mktemp("exported")
    argv = [
        "--model",
        cells(folder / "model", [0, 255]),
        "--to",
        "onnx",
        str(folder / "cells.onnx"),
    ]
    assert export.command(argv) == 0
    return folder / "cells.onnx"


def test_onnx_gives_the_same_and_the_example_of_the_page_its_mask(
    onnx_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
    model = load(onnx_file.with_name("model"), device="cpu")
    session = onnxruntime.InferenceSession(onnx_file)
    assert session.get_inputs()[0].shape == ["batch", 1, "height", "width"]
    assert session.get_outputs()[0].shape == ["batch", 2, "height", "width"]
    images = pictures()
    for image in images:
        (found,) = session.run(None, {"image": as_input(image)})
        np.testing.assert_allclose(found[0], here(model, image), atol=1e-4)

    page = (ROOT / "docs/how-to/export.md").read_text(encoding="utf-8")
    *_, example = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(example.split("\n\n", 1)[1].splitlines()) <= 20
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cells.onnx").write_bytes(onnx_file.read_bytes())
    write_image(Path("image.png"), images[0])
    exec(compile(example, "export.md", "exec"), {})
    mask = np.asarray(Image.open("mask.png"))
    np.testing.assert_array_equal(mask, model(images[0]))
    assert len(np.unique(mask)) == 2


@pytest.mark.slow  # PyTorch's exporter takes seconds a network, and OpenVINO some to be imported
@pytest.mark.parametrize("network", NETWORKS)
def test_every_format_gives_the_same(network: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
    pytest.importorskip("onnxscript", reason=EXTRA)
    model = load(saved(tmp_path / "m", [0, 7, 9], GREY, **NETWORKS[network]), device="cpu")
    model.export("pt2", tmp_path / "m.pt2")
    program = torch.export.load(tmp_path / "m.pt2").module(check_guards=False)
    model.export("onnx", tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    there = {
        "pt2": lambda x: program(torch.from_numpy(x)).numpy(),
        "onnx": lambda x: session.run(None, {"image": x})[0],
    }
    try:
        import openvino
    except ModuleNotFoundError:
        print("not OpenVINO: pip install 'unet-diffusion[openvino]'", file=sys.stderr)
    else:
        model.export("openvino", tmp_path / "m.xml")
        exact = {"INFERENCE_PRECISION_HINT": "f32"}
        compiled = openvino.Core().compile_model(tmp_path / "m.xml", "CPU", exact)
        there["openvino"] = lambda x: compiled(x)[0]
    for image in pictures():
        for name, run in there.items():
            found = run(as_input(image))[0]
            np.testing.assert_allclose(found, here(model, image), atol=1e-4, err_msg=name)


@pytest.mark.slow  # a second export, and the calibration
def test_int8_is_smaller_and_gives_nearly_the_same_masks(onnx_file: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
    onnx = pytest.importorskip("onnx", reason=EXTRA)
    for i, image in enumerate(pictures(((64, 64), (50, 70)))):
        write_image(tmp_path / f"{i}.png", image)
    out, model = tmp_path / "int8.onnx", onnx_file.with_name("model")
    argv = ["--model", str(model), "--to", "onnx", str(out)]
    assert export.command([*argv, "--int8", *map(str, sorted(tmp_path.glob("*.png")))]) == 0
    kinds = {node.op_type for node in onnx.load(out).graph.node}
    assert "QuantizeLinear" in kinds
    session = onnxruntime.InferenceSession(out)
    assert session.get_modelmeta().custom_metadata_map["threshold"] == "0.47"
    for image in pictures(((45, 61), (16, 100))):
        (found,) = session.run(None, {"image": as_input(image)})
        mask = found[0, 1] > 0.47
        assert (mask == (here(load(model, device="cpu"), image)[1] > 0.47)).mean() > 0.9


@pytest.mark.filterwarnings("ignore")  # the zoo's code leaves files open
@pytest.mark.slow  # a package is exported twice, and the zoo's test takes seconds
def test_the_zoo_s_own_test_passes_without_the_net(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxscript", reason=EXTRA)
    pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
    core = pytest.importorskip("bioimageio.core", reason="pip install 'unet-diffusion[bioimageio]'")
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("it asked the network"))
    model = saved(tmp_path / "run" / "model", [0, 255], GREY)
    write_image(tmp_path / "image.png", phantom_stack(1, (300, 310), seed=0)[0][0])
    out = tmp_path / "cells.zip"
    argv = ["--model", str(model), "--to", "bioimageio", "--image", str(tmp_path / "image.png")]
    argv += ["--authors", "A. Author", "--licence", "CC-BY-4.0", str(out)]
    assert export.command(argv) == 0
    summary = core.test_model(out)
    if "index_key" in (said := summary.format()):
        pytest.skip("bioimageio.spec does not work with this pydantic: install an older one")
    assert summary.status == "passed", said


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--to", "onnx", "x.pt"], "a file of onnx ends in .onnx: give x.onnx instead of x.pt"),
        (["--to", "onnx", "--licence", "MIT", "x.onnx"], "--licence is for --to bioimageio alone"),
        (["--to", "bioimageio", "x.zip"], "--to bioimageio needs --image FILE"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path: Path, capsys, argv: list[str], sentence: str) -> None:
    model = saved(tmp_path / "m", [0, 255], GREY)
    assert export.command(["--model", str(model), *argv]) == 2
    assert sentence in capsys.readouterr().err


def test_refusals_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path / "m", [0, 255], GREY)
    with pytest.raises(InputError, match="2 models cannot be exported as one"):
        load(folder, folder, device="cpu").export("onnx", tmp_path / "m.onnx")
    with pytest.raises(InputError, match="needs an image like the training images"):
        load(folder, device="cpu").export("bioimageio", tmp_path / "m.zip")
    image = np.zeros((20, 20), np.uint8)
    with pytest.raises(InputError, match="has 20 x 20 pixels, but its test needs"):
        load(folder, device="cpu").export("bioimageio", tmp_path / "m.zip", image=image)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(InputError, match=r'onnx, which is not installed: pip install "unet-dif'):
        load(folder, device="cpu").export("onnx", tmp_path / "m.onnx")
    assert not list(tmp_path.glob("*.onnx"))
