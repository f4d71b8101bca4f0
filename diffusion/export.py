"""One evaluation of a trained diffusion network as a file that other programs run."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from diffusion.model import DiffusionUNet
from diffusion.process.prediction import PredictionName, get_prediction
from diffusion.process.schedule import NoiseSchedule
from unet.errors import InputError
from unet.weights.formats import Exportable

TOKENS = 5  # of the example that is traced

# What `diffusion.process.prediction` computes around the network, for programs without it: the
# inputs for x = signal x0 + noise eps, and x0 and eps from what comes out.
_EDM = "(signal**2 / 4 + noise**2)"
FORMULAS: dict[PredictionName, dict[str, str]] = {
    "eps": {"x0": "(x - noise * prediction) / signal", "eps": "prediction"},
    "x0": {"x0": "prediction", "eps": "(x - signal * prediction) / noise"},
    "v": {"x0": "signal * x - noise * prediction", "eps": "noise * x + signal * prediction"},
    "flow": {
        "noisy": "x / (signal + noise)",
        "x0": "(x - noise * prediction) / (signal + noise)",
        "eps": "(x + signal * prediction) / (signal + noise)",
    },
    "edm": {
        "noisy": f"x / sqrt{_EDM}",
        "timestep": "log(noise / signal) / 4",
        "x0": f"signal * x / 4 / {_EDM} + noise * prediction / 2 / sqrt{_EDM}",
        "eps": f"noise * x / {_EDM} - signal * prediction / 2 / sqrt{_EDM}",
    },
}


class Evaluation(nn.Module):
    """What the network predicts for noisy images.

    Args:
        model: in evaluation mode, on the CPU.
        condition: the name of the argument of `DiffusionUNet.forward` that it is conditioned by.
    """

    def __init__(self, model: DiffusionUNet, condition: str | None) -> None:
        super().__init__()
        self.model, self.condition = model, condition

    def forward(self, noisy: Tensor, timestep: Tensor, condition: Tensor | None = None) -> Tensor:
        given = {} if self.condition is None else {self.condition: condition}
        found: Tensor = self.model(noisy, timestep, **given)
        return found


def exportable(model: DiffusionUNet) -> Exportable:
    """A model with its schedule and prediction as metadata.

    Images have the size of the training images or, if that is a multiple of the network's stride,
    any multiple.

    Raises:
        InputError: a model that lacks its schedule or prediction, or with several conditions.
    """
    for name in ("schedule", "prediction", "size"):
        if name not in model.info:
            raise InputError(f"the model lacks '{name}' in its config.json: train-ddpm saves it")
    # A copy, for the exporters change what they are given.
    twin = type(model)(model.config, model.out_channels, model.info)
    twin.load_state_dict(model.state_dict())
    twin.eval().requires_grad_(False)
    (height, width), stride = _network_size(model), model.config.stride
    any_size = height % stride == width % stride == 0
    space = {2: "height", 3: "width"} if any_size else {}
    images = {0: "batch", **space}
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "noisy": torch.randn(2, model.image_channels, height, width, generator=generator),
        "timestep": torch.tensor([1.0, 2.0]),
    }
    axes: dict[str, Mapping[int, str]] = {"noisy": images, "timestep": {0: "batch"}}
    if (condition := model.condition) is not None:
        inputs["picture"] = torch.randn(2, condition.channels, height, width, generator=generator)
        axes["picture"] = images
    if model.text is not None:
        inputs["tokens"] = torch.ones(2, min(TOKENS, model.text.longest), dtype=torch.int64)
        axes["tokens"] = {0: "batch", 1: "length"}
    elif (channels := model.config.context_channels) is not None:
        inputs["context"] = torch.randn(2, TOKENS, channels, generator=generator)
        axes["context"] = {0: "batch", 1: "length"}
    if model.config.classes:
        inputs["classes"] = torch.zeros(2, dtype=torch.int64)
        axes["classes"] = {0: "batch"}
    names = tuple(inputs)[2:]
    if len(names) > 1:
        raise InputError(
            f"a model with {' and '.join(names)} at once cannot be exported, only one with one of "
            "them"
        )
    return Exportable(
        module=Evaluation(twin, *(names or (None,))).eval(),
        inputs=inputs,
        axes=axes,
        output="prediction",
        metadata=metadata(model, stride if any_size else None),
    )


def metadata(model: DiffusionUNet, multiple: int | None) -> dict[str, str]:
    """What using the file needs, as texts; lists and objects are JSON."""
    schedule = NoiseSchedule.from_dict(model.info["schedule"])
    prediction = model.info["prediction"]
    get_prediction(prediction, schedule)  # which says what is wrong with one that is none
    size = "images of {} x {} in training".format(*model.size)
    size += f"; the network takes multiples of {multiple}" if multiple else " and only these"
    formulas = {"noisy": "x", "timestep": "t"} | FORMULAS[prediction]
    noisy = "" if formulas["noisy"] == "x" else ", scaled"
    parts = [
        "noisy: float32 (batch, channels, height, width), images from -1 to 1 with noise" + noisy,
        f"timestep: float32 (batch,), {formulas['timestep']} for t from 0 to steps - 1",
    ]
    if model.condition is not None:
        parts.append("picture: float32 (batch, channels, height, width), what it is made from")
    if model.text is not None:
        parts.append("tokens: int64 (batch, length), 0 padding, 1 unknown, 2 first, then 3 + word")
    elif model.config.context_channels is not None:
        parts.append("context: float32 (batch, length, channels) of the text encoder")
    if model.config.classes:
        parts.append(f"classes: int64 (batch,), {model.config.classes - 1} is any")
    output = f"prediction: {prediction}, float32, of the images' size"
    if model.out_channels == 2 * model.image_channels:
        output += ", in the first half of the channels; the others are of the learned variance"
    coded = {}
    if (masks := model.masks) is not None:
        codes = (masks.codes / 127.5 - 1).astype(int).tolist()
        coded = {"masks": json.dumps({"values": masks.values, "codes": codes})}
    return {
        "task": "diffusion",
        "input": "; ".join(parts),
        "output": output,
        "prediction": str(prediction),
        "size": size,
        "classes": json.dumps(model.classes),
        "words": json.dumps(model.info["text"]["vocabulary"] if model.text is not None else []),
        "schedule": json.dumps(schedule.to_dict()),
        "alpha_bar": json.dumps([round(x, 9) for x in schedule.alpha_bar.tolist()]),
        "signal": _listed(schedule.signal),
        "noise": _listed(schedule.noise),
        "step": json.dumps({"x": "signal[t] * x0 + noise[t] * eps"} | formulas),
        **coded,
        "values": f"{model.pixels.values}, of {model.pixels.dtype}, are -1 to 1",
        "works_on": "latents of an autoencoder" if "autoencoder" in model.info else "pixels",
    }


def _listed(rates: Tensor) -> str:
    return json.dumps([float(f"{rate:.9g}") for rate in rates.tolist()])


def _network_size(model: DiffusionUNet) -> tuple[int, int]:
    """Height and width of an input; of latents, whose autoencoder knows theirs, some that fit."""
    return (2 * model.config.stride,) * 2 if "autoencoder" in model.info else model.size
