"""The weights that a training run starts from, and those that it freezes.

The model folder of a LoRA run holds the LoRA alone. Its `info["lora"]` says what that belongs to:
the "base", its path from there, or its name alone (`diffusion.model.noted_path`); "stamp", a digest
of some of its weights; "rank".
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.data.conditions import Condition
from diffusion.data.masks import MaskCoding
from diffusion.data.pixels import WHOLE, ValueRange
from diffusion.model import DiffusionUNet, placed_path
from diffusion.process.prediction import PredictionName
from diffusion.process.schedule import NoiseSchedule
from diffusion.stable.folder import CONFIGS, read_schedule, read_unet, read_unet_config
from diffusion.stable.kinds import check_parts
from diffusion.stable.lora import LORA, add_lora, lora_state, merge_loras
from unet.attention import SpatialTransformer
from unet.config import UNetConfig
from unet.errors import InputError
from unet.files.writing import read_json
from unet.weights.crossing import timed, with_pixels, with_time
from unet.weights.folder import CONFIG, load_strictly, read_config
from unet.weights.start import Start, read_start
from unet.weights.start import take_over as start_with
from unet.words import counted

PREDICTION: PredictionName = "v"  # where neither the user nor a model says another


def their_unet(path: str) -> Path | None:
    """The folder of the diffusers U-Net that --init names; None: it is one of ours.

    Raises:
        InputError: it is of another kind, such as a LoRA.
    """
    if is_lora(path):
        return None
    check_parts(Path(path))
    inside, file = Path(path, "unet"), Path(path, "config.json")
    if inside.is_dir():
        return inside
    theirs = file.is_file() and "_class_name" in read_json(file)
    return Path(path).resolve() if theirs else None


def find_start(path: str, ranges: Mapping[str, ValueRange] | None = None) -> Start:
    """A model of either task, or of diffusers, as a start: a segmentation gets a timestep.

    A segmentation's normalisation of images is folded into its first convolution.

    Args:
        ranges: the values of each type that are -1 and 1 to the diffusion model; None: all that the
            type has.

    Raises:
        InputError: no such model; a segmentation whose network takes no timestep.
    """
    if is_lora(path):
        model = load_model(path)
        return Start(where=path, config=model.config, info=model.info, read=model.state_dict)
    if unet := their_unet(path):
        return Start(
            where=path,
            config=read_unet_config(unet)[0],
            info={},
            read=lambda: {k: v.float() for k, v in read_unet(unet).state_dict().items()},
        )
    start = read_start(path)
    if start.config.time:
        return start
    try:
        pixels = _pixels(start.info, ranges or {})
        with_timestep = timed(start.config)
    except InputError as error:
        raise InputError(f"--init {path}: {error}") from error
    start = start.changed(
        with_timestep,
        lambda config, trunk: with_time(*with_pixels(config, trunk, *pixels)),
        "the same at every timestep",
    )
    return replace(start, info={}, crossed=True)


def noise_of(path: str, start: Start) -> tuple[NoiseSchedule, PredictionName] | None:
    """The noise schedule that the start from this path was trained with, and what it predicts;
    None: unknown.

    Raises:
        InputError: a pipeline's scheduler, or what our model says, cannot be read.
    """
    if unet := their_unet(path):
        if not (unet.parent / "scheduler" / CONFIGS["scheduler"]).is_file():
            return None
        theirs = read_schedule(unet.parent)
        return theirs.noise, theirs.prediction
    if "schedule" not in start.info:
        return None
    schedule = NoiseSchedule.from_dict(start.info["schedule"])
    return schedule, start.info.get("prediction", PREDICTION)


def image_channels(start: Start) -> int:
    """The number of a start's input channels that belong to the image, which come first."""
    return start.config.in_channels - sum(_beside(start.info).values())


def on_latents(path: str, start: Start) -> bool:
    """Whether the start from this path makes latents of an autoencoder, not pixels: its training
    noted one, or it is a diffusers U-Net of four channels, as are Stable Diffusion's."""
    return "autoencoder" in start.info or (bool(their_unet(path)) and image_channels(start) == 4)


def alike(info: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two models read the same inputs behind the channels of an image, whatever its
    values."""
    return _beside(info) == _beside(other)


def fitting(start: Start, images: int, info: Mapping[str, Any]) -> Start:
    """The same start for images with so many channels, and the inputs behind these.

    These inputs are a condition, or the codes of a mask that is made with the image. If they differ
    from the start's, their weights are zero: at first the network gives what the start gives for
    the noisy image alone, and zeros for the codes.

    Args:
        info: of the model that is started, where it has "condition" or "joint".

    Raises:
        InputError: a damaged model; neither grey nor colour on one of the sides.
    """
    theirs = image_channels(start)
    if theirs == images and alike(info, start.info):
        return start
    patch, codes = start.config.patch**2, 0
    for name in _beside(start.info):
        start = start.for_inputs(theirs, 0, f"without the {_weights(name)} of its {name[0]}")
    start = start.for_channels(images)
    kept = images
    for name, channels in _beside(info).items():
        zeros = f"zeros for {counted(channels, 'channel')} of the {name[0]}"
        start = start.for_inputs(kept, channels, f"its {_weights(name)} with {zeros}")
        kept += channels
        codes += channels if name[0] == "masks" else 0
    if "joint" in info or "joint" in start.info:
        drawn = theirs == images and not start.crossed
        start = start.for_outputs(images * patch if drawn else 0, codes * patch)
    return start


def _weights(beside: tuple[Any, ...]) -> str:
    """Which weights belong to what is beside the image; codes of masks come out again."""
    return "first and last weights" if beside[0] == "masks" else "first weights"


def _beside(info: Mapping[str, Any]) -> dict[tuple[Any, ...], int]:
    """What a model reads behind the channels of an image, in this order: the name of each, what
    else its weights depend on; and its channels."""
    found: dict[tuple[Any, ...], int] = {}
    if "joint" in info:
        masks = MaskCoding.from_dict(info["joint"])
        found["masks", masks] = masks.channels
    if "condition" in info:
        condition = Condition.from_dict(info["condition"])
        found["condition", condition.kind, condition.values] = condition.channels
    return found


def take_over(model: DiffusionUNet, start: Start) -> str:
    """Loads the whole trunk and all other layers that fit, and says which. Layers for classes and
    texts are taken over only where these are the same.

    Raises:
        InputError: a trunk of another shape.
    """
    parts = (("classes", "trunk.class_embedding."), ("text", "text."))
    own = [part for key, part in parts if start.info.get(key) != model.info.get(key)]
    return start_with(model, start, own=own)


def _pixels(
    info: Mapping[str, Any], ranges: Mapping[str, ValueRange]
) -> tuple[list[float], list[float]]:
    """Scale and shift of each channel from [-1, 1] to what a segmentation was trained on."""
    found: Any = info.get("normalisation")
    try:
        values = ranges.get(found["dtype"], WHOLE[found["dtype"]])
        mean, std = ([float(v) for v in found[key]] for key in ("mean", "std"))
        known = list(zip(mean, std, *values.each(len(mean)), strict=True))
        scale = [(high - low) / 2 / s for _, s, low, high in known]
        return scale, [((high + low) / 2 - m) / s for m, s, low, high in known]
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"the model's normalisation is damaged: {found!r:.200}") from error


def is_lora(path: str | Path) -> bool:
    """Whether it is the model folder of a LoRA run."""
    known = isinstance(path, str | Path)  # else it is refused where the folder is read
    return known and all(Path(path, name).is_file() for name in (CONFIG, LORA))


def load_model(path: str | Path) -> DiffusionUNet:
    """The model of a folder or a repository on the Hub, in evaluation mode; of a LoRA run the
    whole one, with what was learnt merged into it.

    Raises:
        InputError: see `DiffusionUNet.from_pretrained`; what a LoRA belongs to is not there any
            more, or not the same.
    """
    if not is_lora(path):
        return DiffusionUNet.from_pretrained(path)
    model, base = described_lora(path)
    where = placed_path(base["base"], Path(path), ["init"])
    try:
        start = find_start(str(where.resolve()))
        state = start.read()
    except InputError as error:
        raise InputError(
            f"'{path}' is a LoRA of '{base['base']}', which cannot be read ({error}): put it back, "
            f"or change the path in {Path(path, CONFIG)}"
        ) from error
    if stamp(state) != base["stamp"]:
        raise InputError(
            f"'{path}' is a LoRA of '{base['base']}', whose weights are not those that it was "
            "trained with: put them back"
        )
    load_strictly(model, state, start.where)
    merge_loras([str(Path(path, LORA))], model)
    return model.eval()


def described_lora(path: str | Path) -> tuple[DiffusionUNet, dict[str, Any]]:
    """The model that a LoRA run was about, on the meta device, and what it belongs to."""
    described = read_config(Path(path), LORA)
    info = described["info"]
    base = info.pop("lora", None)
    kinds = {"base": str, "stamp": str, "rank": int}
    if not isinstance(base, dict) or any(type(base.get(k)) is not t for k, t in kinds.items()):
        raise InputError(
            f"{Path(path, CONFIG)} does not say in info.lora which model the LoRA belongs to: give "
            "that model, and the LoRA with --lora"
        )
    with torch.device("meta"):
        config = UNetConfig.from_dict(described["unet"])
        info = DiffusionUNet.placed(info, Path(path))
        return DiffusionUNet(config, described["out_channels"], info), base


def stamp(state: Mapping[str, Tensor]) -> str:
    """A cheap fingerprint of weights: a digest of the biases of the head and the stem."""
    parts = (
        state[key].float().cpu()
        for key in ("head.conv.bias", "trunk.encoder.0.stem.conv.bias")
        if key in state
    )
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()


def start_lora(model: DiffusionUNet, start: Start, rank: int, base: str) -> None:
    """Loads all of a start into a model, and adds what a LoRA trains.

    Args:
        base: see `noted_path`.

    Raises:
        InputError: a model with weights that the start does not have, which would stay random.
    """
    state = start.read()
    try:
        load_strictly(model, state, start.where)
    except InputError as error:
        raise InputError(
            "--trained lora leaves the network as it is, so it must be exactly that of --init "
            f"({error}): give data of the kind that it was trained on, such as with --classes or "
            "--captions"
        ) from error
    model.info["lora"] = {"base": base, "stamp": stamp(state), "rank": rank}
    add_lora(model, rank)


def save_lora(model: DiffusionUNet, folder: Path) -> None:
    """Writes the model folder of a LoRA run."""
    model.write(folder, lora_state(model), LORA)


def freeze_all_but_attention(model: DiffusionUNet) -> None:
    """Freezes everything but the spatial transformers.

    Raises:
        InputError: the network has none.
    """
    transformers = [m for m in model.modules() if isinstance(m, SpatialTransformer)]
    if not transformers:
        raise InputError(
            "--trained attention needs a network with spatial transformers, such as Stable "
            "Diffusion's, and this one has none: leave it out"
        )
    model.requires_grad_(False)
    for transformer in transformers:
        transformer.requires_grad_(True)
        transformer.norm.register_forward_pre_hook(_with_gradient)


def _with_gradient(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """PyTorch 2.13 crashes in a group norm that is trained on a channels_last input that is not,
    on a CPU: so the input is."""
    (x,) = args
    return (x if x.requires_grad or not torch.is_grad_enabled() else x.detach().requires_grad_(),)
