"""What a training run starts from: noise, text encoder, the network's shape and weights."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.model import DiffusionUNet
from diffusion.networks import automatic_config
from diffusion.options import DiffusionOptions
from diffusion.process.prediction import PredictionName, get_prediction
from diffusion.process.schedule import NoiseSchedule
from diffusion.stable.clip import ClipText
from diffusion.stable.folder import CONFIGS, read_schedule, read_unet, read_unet_config
from diffusion.stable.latents import Data, LatentData
from unet import PRESETS, UNetConfig
from unet.attention import SpatialTransformer
from unet.device import pick_device
from unet.errors import InputError
from unet.files.writing import read_json
from unet.weights.folder import load_strictly, read_config, read_weights

PREDICTION: PredictionName = "v"  # where neither the user nor a pipeline says another
TEXT_CHANNELS = 128  # of a token of our own text encoder
_CLASSES = "trunk.class_embedding."


def chosen_noise(options: DiffusionOptions) -> tuple[NoiseSchedule, PredictionName, str]:
    """The noise schedule and the kind of prediction, and what they are, in words.

    Raises:
        InputError: they do not go together, or a pipeline's cannot be read.
    """
    unet = _their_unet(options.init)
    pipeline = unet.parent if unet else None
    theirs = None
    if pipeline and (pipeline / "scheduler" / CONFIGS["scheduler"]).is_file():
        theirs = read_schedule(pipeline)
    if theirs and not options.noise:
        schedule = theirs.noise
        if options.timesteps not in (None, schedule.steps):
            raise InputError(
                f"--timesteps {options.timesteps} is not that of --init {options.init}, "
                f"{schedule.steps}: leave it out, or give --noise as well"
            )
        if options.zero_snr:
            schedule = replace(schedule, zero_snr=True)
    else:
        schedule = NoiseSchedule(
            kind=options.noise or "cosine",
            steps=1000 if options.timesteps is None else options.timesteps,
            zero_snr=options.zero_snr,
        )
    prediction = options.prediction or (theirs.prediction if theirs else PREDICTION)
    get_prediction(prediction, schedule)
    by = {
        "noise": "" if options.noise or not theirs else f" as of {pipeline}",
        "prediction": "" if options.prediction or not theirs else f" as of {pipeline}",
    }
    return (
        schedule,
        prediction,
        f"noise {schedule.kind}{by['noise']}, the network predicts {prediction}{by['prediction']}",
    )


# ----------------------------------------------------------------------------------------------
# Text


def clip_folder(options: DiffusionOptions) -> Path | None:
    """The pipeline folder whose CLIP reads the captions; None: no captions, or our own encoder."""
    if options.text_encoder or not (options.captions and options.latents):
        return options.text_encoder
    parts = (options.latents / name for name in ("text_encoder", "tokenizer"))
    return options.latents if all(part.is_dir() for part in parts) else None


def read_clip(options: DiffusionOptions) -> ClipText | None:
    """The CLIP text model that reads the captions, on the device of the run, if one does."""
    folder = clip_folder(options)
    if folder is None:
        return None
    clip = ClipText.from_pretrained(folder)
    clip.model.to(pick_device(options.device))
    return clip


# ----------------------------------------------------------------------------------------------
# The network's shape


def chosen_config(
    options: DiffusionOptions, data: Data, clip: ClipText | None
) -> tuple[UNetConfig, str]:
    """The config that the options name, or the automatic one, and why it is this one."""
    fits = [
        name
        for name, preset in PRESETS.items()
        if preset.config.time and (preset.config.context_channels is None) != options.captions
    ]
    if options.network == "auto" and options.init:
        config, why = (
            _config_of(options.init, data.channels, captions=options.captions),
            f"as of {options.init}",
        )
    elif options.network == "auto":
        on_gpu = options.device != "cpu" and pick_device("auto").type != "cpu"
        config, why = automatic_config(
            data.channels,
            data.size,
            len(data.train),
            options.max_minutes,
            accelerator=on_gpu,
            text=options.captions,
        )
        if isinstance(data, LatentData) and config.patch > 1:
            config, why = without_patches(config), f"{why}; in latents as more levels, not patches"
    elif options.network in fits:
        preset = PRESETS[options.network]
        config, why = replace(preset.config, in_channels=data.channels), preset.source
        if clip:
            config = replace(config, context_channels=clip.channels)
    else:
        what = "with" if options.captions else "without"
        raise InputError(
            f"--network {options.network!r} is no preset of a network with a timestep and {what} "
            f"text: choose auto or one of {', '.join(fits)}"
        )
    if options.width:
        heads = config.head_channels and math.gcd(config.head_channels, options.width)
        config = replace(config, channels=options.width, head_channels=heads)
        why = f"{options.width} channels as asked for, else: {why}"
    if options.captions and config.context_channels is None:
        width = clip.channels if clip else TEXT_CHANNELS
        config = replace(config, attention="transformer", context_channels=width)
        if not options.init:  # branches that start at zero learn later to look at the text
            config = replace(config, zero_init=False)
    if clip and config.context_channels != clip.channels:
        raise InputError(
            f"--init {options.init} reads text of {config.context_channels} channels, but the text "
            f"encoder in '{clip_folder(options)}' makes {clip.channels}: take both from one model"
        )
    return config, why


def without_patches(config: UNetConfig) -> UNetConfig:
    """As deep a network that works on every pixel: a level more for each halving by patches."""
    more = config.patch.bit_length() - 1
    return replace(
        config,
        patch=1,
        multipliers=(*config.multipliers, *[config.multipliers[-1]] * more),
        attention_levels=tuple(level + more for level in config.attention_levels),
    )


def _config_of(path: str, channels: int, *, captions: bool) -> UNetConfig:
    """The config of a model to start from, without what belongs to its classes and its text."""
    unet = _their_unet(path)
    config = (
        read_unet_config(unet)[0] if unet else UNetConfig.from_dict(read_config(Path(path))["unet"])
    )
    if not config.time:
        raise InputError(
            f"--init {path} has no timestep: name a --network for it, or start from a diffusion "
            "model"
        )
    if config.context_channels is not None and not captions:
        raise InputError(f"--init {path} reads text: give --captions, or another model")
    return replace(config, in_channels=channels, classes=0)


def _their_unet(path: str | None) -> Path | None:
    """The folder of the diffusers U-Net that --init names; None: it names none, or one of ours."""
    if path is None:
        return None
    inside, file = Path(path, "unet"), Path(path, "config.json")
    if inside.is_dir():
        return inside
    theirs = file.is_file() and "_class_name" in read_json(file)
    return Path(path).resolve() if theirs else None


# ----------------------------------------------------------------------------------------------
# Weights


def initialise(model: DiffusionUNet, path: str) -> None:
    """Starts from a model of either task, or of diffusers: all of its weights that the model has.

    What belongs to classes and texts is taken over only where these are the same.

    Raises:
        InputError: a trunk of another shape.
    """
    state, info = _start(path)
    own = model.state_dict()
    differs = tuple(
        prefix
        for key, prefix in (("classes", _CLASSES), ("text", "text."))
        if info.get(key) != model.info.get(key)
    )
    trunk = {
        k: v for k, v in state.items() if k.startswith("trunk.") and not k.startswith(_CLASSES)
    }
    rest = {k: v for k, v in own.items() if not k.startswith("trunk.") or k.startswith(_CLASSES)}
    for k in rest.keys() & state.keys():
        if state[k].shape == rest[k].shape and not k.startswith(differs):
            rest[k] = state[k]
    load_strictly(model, {**trunk, **rest}, path)


def _start(path: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights of a model under our names, in float32, and what else is known of it."""
    if unet := _their_unet(path):
        state = read_unet(unet).state_dict()
        return {k: v.float() for k, v in state.items()}, {}
    return read_weights(Path(path)), read_config(Path(path))["info"]


def freeze_all_but_attention(model: DiffusionUNet) -> None:
    """Leaves the spatial transformers alone to be trained.

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
