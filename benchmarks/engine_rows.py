"""Rows of exported networks: the engines that run them, beside our own prediction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.work import Row, Work
from segmentation import load
from segmentation.data.classes import ClassTable
from segmentation.data.normalisation import Normalisation
from segmentation.model import SegmentationUNet
from unet import PRESETS
from unet.files.images import write_image
from unet.memory import PREDICTED, keep_freed_memory

Found = Callable[[np.ndarray], np.ndarray]  # pixels (1, 1, H, W) to a probability (H, W)
SIDE, CALIBRATION = 512, 4  # pixels; images by which activations are quantised


def _image(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE), np.uint8)


def _export(folder: Path) -> None:
    """Our default network with random weights, as each of the files."""
    torch.manual_seed(0)
    info = {
        "classes": ClassTable(values=(0, 255), shares=(0.5, 0.5)).to_dict(),
        "normalisation": Normalisation((127.5,), (73.9,), "uint8").to_dict(),
        "threshold": 0.5,
    }
    config = replace(PRESETS["segmentation"].config, in_channels=1)
    SegmentationUNet(config, 1, info).save_pretrained(folder / "model")
    files = [folder / f"{i}.png" for i in range(1, CALIBRATION + 1)]
    for i, file in enumerate(files, 1):
        write_image(file, _image(i))
    segmenter = load(folder / "model", device="cpu")
    segmenter.export("onnx", folder / "float.onnx")
    segmenter.export("onnx", folder / "int8.onnx", int8=files)
    segmenter.export("openvino", folder / "model.xml")
    segmenter.export("torchscript", folder / "model.pt")


def _by_onnxruntime(file: Path) -> Found:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options)
    return lambda pixels: session.run(None, {"image": pixels})[0][0, 1]


def _by_openvino(file: Path, **more: str) -> Found:
    import openvino

    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), **more}
    compiled = openvino.Core().compile_model(file, "CPU", settings)
    return lambda pixels: compiled(pixels)[0][0, 1]


def _by_torchscript(file: Path) -> Found:
    script = torch.jit.load(file)

    @torch.inference_mode()
    def found(pixels: np.ndarray) -> np.ndarray:
        return script(torch.from_numpy(pixels))[0, 1].numpy()

    return found


def _ours(folder: Path) -> Work:
    keep_freed_memory(PREDICTED)  # as predict_seg.py does
    segmenter, image = load(folder / "model", device="cpu"), _image(0)

    def run() -> np.ndarray:
        return segmenter.probability(image)

    return Work(run, segmenter.predict.models[0], run)


def _engine(found: Found) -> Work:
    pixels = _image(0).astype(np.float32)[None, None]

    def run() -> np.ndarray:
        return found(pixels)

    return Work(run, check=run)


ROWS = {
    "engines": Row(
        "segmentation of 512 x 512 by our default network, exported, float32",
        {
            "ours": _ours,
            "ONNX Runtime": lambda folder: _engine(_by_onnxruntime(folder / "float.onnx")),
            "OpenVINO": lambda folder: _engine(
                _by_openvino(folder / "model.xml", INFERENCE_PRECISION_HINT="f32")
            ),
            "TorchScript": lambda folder: _engine(_by_torchscript(folder / "model.pt")),
        },
        repeats=10,
        tolerance=1e-4,
        prepare=_export,
    ),
    "engines-rounded": Row(
        "the same, in the types that an engine takes by itself, and in 8-bit integers",
        {
            "ours": _ours,
            "OpenVINO as it comes": lambda folder: _engine(_by_openvino(folder / "model.xml")),
            "ONNX Runtime, int8": lambda folder: _engine(_by_onnxruntime(folder / "int8.onnx")),
        },
        repeats=10,
        prepare=_export,
    ),
}
