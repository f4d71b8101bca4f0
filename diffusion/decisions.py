"""Decides how a diffusion model is trained: once, from the options and the data."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import Parameter

from diffusion.initial import (
    PREDICTION,
    alike,
    find_start,
    fitting,
    image_channels,
    is_lora,
    noise_of,
    on_latents,
)
from diffusion.model import DiffusionUNet
from diffusion.networks import automatic_config
from diffusion.options import DiffusionOptions
from diffusion.process.levels import TrainingLevels
from diffusion.process.prediction import PredictionName, get_prediction
from diffusion.process.schedule import NoiseSchedule
from diffusion.stable.clip import ClipText, check_clip_parts
from diffusion.stable.latents import Data, LatentData, autoencoder_of, images_of
from diffusion.stable.lora import lora_targets
from diffusion.text import WordEncoder
from unet import PRESETS, UNetConfig
from unet.attention import SpatialTransformer
from unet.device import pick_device
from unet.errors import InputError
from unet.files.images import WHITE
from unet.training.plan import (
    AS_ASKED,
    Decision,
    FitPlan,
    RunPlan,
    choose_optimizer,
    filled,
    plan_fit,
    remembered,
    told,
    told_budget,
)
from unet.weights.crossing import timed, with_jumps, without_jumps
from unet.weights.start import Start
from unet.words import counted

_OWN_NOISE = ("flow", "edm")  # predictions that have noise of their own
# Mean and deviation of log(sigma): EDM's (table 1), and the logit-normal one of arXiv 2403.03206.
_LOG_SIGMA = (-1.2, 1.2), (0.0, 1.0)
_OF_TEXT = 6.0, (0.0, 1.5)  # shift and log(sigma) of flow with captions
TEXT_CHANNELS = 128  # of a token of our own text encoder


@dataclass(frozen=True, kw_only=True)
class DiffusionPlan(RunPlan):
    """Everything that the training of a diffusion model needs apart from its data.

    Attributes:
        options: the command line with each choice filled in, which repeats the run.
        levels: the noise levels that are trained on.
        clip: the CLIP that reads the captions; None: no captions, or a text encoder that is trained
            as well.
    """

    options: DiffusionOptions
    schedule: NoiseSchedule
    prediction: PredictionName
    levels: TrainingLevels
    clip: ClipText | None


def decide(options: DiffusionOptions, data: Data) -> DiffusionPlan:
    """The plan of a run with these options on these data.

    Raises:
        InputError: options that do not fit each other or the data; a pipeline that cannot be read.
    """
    info = data_info(options, data)
    start = chosen_start(options, data, info)
    schedule, prediction, told_noise = chosen_noise(options, start)
    if start:
        check_teacher(options, start, schedule, prediction)
        check_classes(options, start, data)
        start = fit_jumps(options, start)
    clip = read_clip(options)
    network, why = chosen_network(options, data, clip, start)
    text, told_text = chosen_text(options, data, network, clip, start)
    outputs = data.channels * (2 if options.learn_variance else 1)
    extras, told_extras = chosen_extras(options)
    info |= {"schedule": schedule.to_dict(), "prediction": prediction, **text, **extras}
    with torch.device("meta"):
        model = DiffusionUNet(network, outputs, info)
    fit, told_optimizer = chosen_fit(options, start)
    levels, told_levels = chosen_levels(options, schedule, prediction)
    decisions = (
        Decision("network", millions(model.parameters()), why),
        *told_part(options, model),
        *told_text,
        *told_mirroring(data),
        *told_noise,
        *told_levels,
        *told_extras,
        told_batch(options, fit),
        told_optimizer,
        told_budget(options),
        *([] if data.val else [Decision("kept weights", "the last ones", "nothing is held out")]),
    )
    decisions = remembered(decisions, fit)
    info["training"] = {"data": data.describe().splitlines(), "run": told(decisions)}
    # Also the width of an automatic network, which a resumed run must not choose anew.
    width = network.channels if options.network == "auto" and not options.init else options.width
    return DiffusionPlan(
        options=filled(
            options,
            fit,
            flips=images_of(data).flips,
            width=width,
            prediction=prediction,
            shift=levels.shift,
            log_sigma=levels.log_sigma,
        ),
        decisions=decisions,
        fit=fit,
        network=network,
        outputs=outputs,
        info=info,
        schedule=schedule,
        prediction=prediction,
        levels=levels,
        clip=clip,
        start=start,
    )


def check_options(options: DiffusionOptions) -> None:
    """Raises the InputError of `decide` that the options alone call for, without the data. Checks
    that read the weights of a single file or of a LoRA are left to `decide`.
    """
    check_network(options)
    if options.prior and clip_folder(options) is None:
        raise InputError(
            f"--prior {options.prior} needs captions that CLIP reads, as a vocabulary of our own "
            "would be built anew: give --latents or --text-encoder with a pipeline"
        )
    if folder := clip_folder(options):
        check_clip_parts(folder)
    start = None
    if options.init:
        if os.path.isfile(options.init) or is_lora(options.init):
            return
        start = find_start(options.init)
    schedule, prediction, _ = chosen_noise(options, start)
    if start:
        check_teacher(options, start, schedule, prediction)
        check_start(options, start)
    chosen_levels(options, schedule, prediction)
    chosen_fit(options, start)


def check_start(options: DiffusionOptions, start: Start) -> None:
    """Raises an InputError for a model of --init that cannot be trained, or not with these
    options."""
    if start.config.vector_channels:
        raise InputError(
            f"--init {options.init} is of Stable Diffusion XL, which txt2img runs but which "
            "cannot be trained here: give a model of version 1 or 2, or one of your own"
        )
    if not options.latents and on_latents(str(options.init), start):
        raise InputError(
            f"--init {options.init} works on latents of an autoencoder, not on pixels: give the "
            "pipeline that this belongs to with --latents, or another model"
        )
    reads = options.network == "auto" and start.config.context_channels is not None
    if reads and not options.captions:
        raise InputError(f"--init {options.init} reads text: give --captions, or another model")


def check_network(options: DiffusionOptions) -> None:
    """Raises an InputError for a --network that does not fit a diffusion model with these
    options."""
    if options.network != "auto" and options.network not in (fits := _presets(options)):
        what = "with" if options.captions else "without"
        raise InputError(
            f"--network {options.network!r} is no preset of a network that takes a timestep and is "
            f"{what} text: choose auto or one of {', '.join(fits)}"
        )


def _presets(options: DiffusionOptions) -> list[str]:
    """The presets that --network can name."""
    return [
        name
        for name, preset in PRESETS.items()
        if preset.config.block == "res"
        and not preset.config.vector_channels  # which nothing in a folder of images gives
        and (preset.config.context_channels is None) != options.captions
    ]


def data_info(options: DiffusionOptions, data: Data) -> dict[str, Any]:
    """The entries of a model's `info` on its images, and on what is given or made with them."""
    images = images_of(data)
    info: dict[str, Any] = {
        "size": list(images.size),
        "classes": list(data.classes) if options.classes else [],
        "dtype": images.dtype,
    }
    if images.ranges:
        info["ranges"] = {kind: [v.low, v.high] for kind, v in images.ranges.items()}
    if reading := options.reading.to_dict():
        info["reading"] = reading
    if options.background != WHITE:
        info["background"] = list(options.background)
    if images.channels - images.codes == 4:  # else the fourth is one of a satellite, say
        info["alpha"] = options.colour == "rgba"
    if autoencoder := autoencoder_of(data):
        info["autoencoder"] = str(autoencoder.folder)
    if images.condition is not None:
        info |= {"condition": images.condition.to_dict(), "resized": images.resized}
    if images.masks is not None:
        info["joint" if images.joint else "target"] = images.masks.to_dict()
    return info


def chosen_start(options: DiffusionOptions, data: Data, info: Mapping[str, Any]) -> Start | None:
    """The model of --init, its first weights adapted to the channels of the images and what comes
    with them.

    Args:
        info: of the new model, as `data_info` gives it.

    Raises:
        InputError: no such model, one that cannot be trained here, or, for a LoRA, of other inputs.
    """
    if not options.init:
        return None
    images = images_of(data)
    start = find_start(options.init, images.ranges)
    pictured = data.channels - (images.codes if images.joint else 0)
    if options.trained != "lora":  # which belongs to these very weights
        start = fitting(start, pictured, info)
    elif not alike(start.info, info):
        raise InputError(
            f"--init {options.init} was trained with another --condition or --joint, or with "
            "none: --trained lora needs the same"
        )
    elif image_channels(start) != pictured:
        raise InputError(
            f"--init {options.init} takes {counted(image_channels(start), 'channel')}, but "
            f"the images have {pictured}: --trained lora needs the same (--colour)"
        )
    check_start(options, start)
    return start


def fit_jumps(options: DiffusionOptions, start: Start) -> Start:
    """The start with an input for the length of jumps, if --few-steps trains it, else without."""
    jumps = options.few_steps is not None
    if start.config.jumps == jumps or options.trained == "lora":
        return start
    config = replace(start.config, jumps=jumps)
    if jumps:
        return start.changed(config, with_jumps, "with an input for jumps")
    return start.changed(config, without_jumps, "without its input for jumps")


def check_classes(options: DiffusionOptions, start: Start, data: Data) -> None:
    """Raises an InputError where a model that is used unchanged has other classes."""
    theirs, ours = start.info.get("classes", []), list(data.classes) if options.classes else []
    if (as_it_is := _as_it_is(options)) and theirs != ours:
        trained = f"--init {options.init} was trained on the classes {theirs}"
        if not options.classes:
            raise InputError(f"{trained}: {as_it_is} needs --classes, and data of these")
        raise InputError(
            f"{trained}, but these data have {ours}: {as_it_is} needs the same classes"
        )


def _as_it_is(options: DiffusionOptions) -> str:
    """The option that uses the model of --init unchanged, if there is one."""
    if options.trained == "lora":
        return "--trained lora"
    return "" if options.few_steps is None else "--few-steps"


def check_teacher(
    options: DiffusionOptions, start: Start, schedule: NoiseSchedule, prediction: PredictionName
) -> None:
    """Raises an InputError where the model of --init cannot be the teacher of --few-steps."""
    if options.few_steps is None:
        return
    if "prediction" not in start.info:
        raise InputError(
            f"--few-steps makes a model of train-ddpm faster, and --init {options.init} is none: "
            "train it on these data first"
        )
    if (schedule, prediction) != noise_of(str(options.init), start):
        raise InputError(
            f"--few-steps imitates how --init {options.init} samples, with its noise levels and "
            "its kind of prediction: leave out --noise, --timesteps, --zero-snr and --prediction"
        )
    if options.few_steps != 1 and not (options.classes or options.captions):
        raise InputError(
            f"--few-steps {options.few_steps} guides by a class or a text, but the model takes "
            "neither: give --few-steps 1"
        )
    if "coupling" in start.info:
        raise InputError(
            f"--init {options.init} was trained with --coupling ot, which does not allow fresh "
            "noise during sampling, but sampling in few steps draws it: give a model that was "
            "trained without"
        )
    if options.captions != bool({"text", "text_encoder"} & start.info.keys()):
        raise InputError(
            f"--init {options.init} and this run differ in --captions: --few-steps needs the same"
        )


def chosen_extras(options: DiffusionOptions) -> tuple[dict[str, Any], list[Decision]]:
    """What is requested beyond the usual training: entries of `info`, and decisions."""
    info: dict[str, Any] = {}
    decisions = []
    if options.few_steps is not None:
        info["few_steps"] = options.few_steps
        guided = "" if options.few_steps == 1 else f", guidance {options.few_steps:g}"
        decisions.append(Decision("few steps", f"learnt from {options.init}{guided}", AS_ASKED))
    if options.coupling == "ot":
        info["coupling"] = "ot"
        decisions.append(Decision("coupling", "images get noise near them", AS_ASKED))
    return info, decisions


def told_mirroring(data: Data) -> list[Decision]:
    """Whether images are mirrored; nothing for latents, which never are."""
    if isinstance(data, LatentData):
        return []
    return [Decision("mirrored", "left to right" if data.flips else "no", data.flips_why)]


def told_batch(options: DiffusionOptions, fit: FitPlan) -> Decision:
    """The batch of a step."""
    why = AS_ASKED if options.batch_size else f"the default for {fit.optimizer}"
    return Decision("batch", counted(fit.batch_size, "image"), why)


def told_part(options: DiffusionOptions, model: DiffusionUNet) -> list[Decision]:
    """The part of the network that is trained, if it is not all of it."""
    if options.trained == "all":
        return []
    if options.trained == "lora":
        targets = [model.get_submodule(name) for name in lora_targets(model)]
        why = f"a LoRA of rank {options.rank}, as requested"
        return [Decision("trained", f"small matrices beside {counted(len(targets), 'layer')}", why)]
    parts = (m for m in model.modules() if isinstance(m, SpatialTransformer))
    found = millions(p for part in parts for p in part.parameters())
    return [Decision("trained", f"{found} of the spatial transformers", AS_ASKED)]


def millions(parameters: Iterable[Parameter]) -> str:
    """The number of parameters, in words."""
    return f"{sum(p.numel() for p in parameters) / 1e6:.2f} M parameters"


def chosen_fit(options: DiffusionOptions, start: Start | None = None) -> tuple[FitPlan, Decision]:
    """Optimizer, rate and batch where none is named.

    A model that starts from a segmentation knows nothing of noise, and one that starts from a model
    of images knows nothing of the masks that are made with them: adamw's steps are as much too
    small there as for random weights (docs/experiments.md). At a high rate a network learns the
    look of images, but not the positions that a text gives, which only the noisiest levels show.
    """
    new = ""  # what the start knows nothing of
    if start and start.crossed:
        new = "noise"
    elif start and options.joint and "joint" not in start.info:
        new = "masks"
    optimizer, why = choose_optimizer(
        options,
        {
            "muon's steps would move the weights of --init too far": (
                options.init and options.few_steps is None and not new
            ),
        },
    )
    if optimizer == "muon" and options.few_steps is not None and not options.optimizer:
        why = "with small steps, as the weights are trained already"
    elif optimizer == "muon" and options.init and not options.optimizer:
        why = f"as from random weights: the start knows nothing of {new}"
    lr, beta2 = (7e-4, 0.99) if options.captions else (2e-3, 0.999)
    if options.trained == "lora" and clip_folder(options):
        lr = 1e-4  # as is usual for Stable Diffusion
    if options.few_steps is not None:
        lr /= 4
    if optimizer == "muon":
        lr *= 10
    small = options.captions or optimizer == "muon"
    fit = plan_fit(options, batch_size=32 if small else 64, optimizer=optimizer, lr=lr, beta2=beta2)
    return fit, Decision("optimizer", f"{optimizer} at {fit.lr:g}", why)


def chosen_noise(
    options: DiffusionOptions, start: Start | None
) -> tuple[NoiseSchedule, PredictionName, list[Decision]]:
    """The noise schedule and the kind of prediction, and why these.

    Raises:
        InputError: they do not go together, or a pipeline's cannot be read.
    """
    theirs = noise_of(str(options.init), start) if start else None
    if theirs and not options.noise:
        schedule = theirs[0]
        if options.timesteps not in (None, schedule.steps):
            raise InputError(
                f"--timesteps {options.timesteps} is not that of --init {options.init}, "
                f"{schedule.steps}: leave it out, or give --noise as well"
            )
        if options.zero_snr:
            schedule = replace(schedule, zero_snr=True)
    else:
        schedule = NoiseSchedule(
            kind=options.noise or _own_noise(options),
            steps=1000 if options.timesteps is None else options.timesteps,
            zero_snr=options.zero_snr,
        )
    own: Any = schedule.kind if schedule.kind in _OWN_NOISE else PREDICTION
    prediction = options.prediction or (theirs[1] if theirs else own)
    get_prediction(prediction, schedule)
    theirs_why = f"that of {options.init}" if theirs else "the default"
    decisions = [
        Decision("noise", schedule.said, AS_ASKED if options.noise else theirs_why),
        Decision("predicted", prediction, AS_ASKED if options.prediction else theirs_why),
    ]
    return schedule, prediction, decisions


def _own_noise(options: DiffusionOptions) -> Any:
    """The kind of noise where neither an option nor a start gives one: flow for images, where it
    was measured to be at least as good (docs/experiments.md), alone or with a condition.
    """
    if options.prediction in _OWN_NOISE:
        return options.prediction
    of_betas = options.prediction or options.zero_snr or options.learn_variance
    more = options.joint or options.target == "mask" or options.latents
    return "cosine" if of_betas or more else "flow"


def chosen_levels(
    options: DiffusionOptions, schedule: NoiseSchedule, prediction: PredictionName
) -> tuple[TrainingLevels, list[Decision]]:
    """The noise levels that are trained on, with a decision unless all timesteps are equally
    likely.

    Where things are, which a text may say, is decided at the noisiest levels (docs/experiments.md).

    Raises:
        InputError: a mean for levels that are uniform.
    """
    flow = schedule.kind == "flow"
    usual = (3.0 if options.captions else 1.0), _LOG_SIGMA[flow]
    shift, log_sigma = _OF_TEXT if flow and options.captions else usual
    shift = shift if options.shift is None else options.shift
    levels = options.levels
    if levels is None:
        normal = options.log_sigma is not None or prediction == "edm" or flow
        levels = "log-normal" if normal else "uniform"
    if levels == "uniform":
        if options.log_sigma is not None:
            raise InputError(
                f"--log-sigma {options.log_sigma} is for --levels log-normal, not uniform"
            )
        return TrainingLevels(schedule, shift), []
    mean, std = log_sigma = options.log_sigma or log_sigma
    usual_for = prediction + " with captions" * (flow and options.captions)
    why = AS_ASKED if options.levels or options.log_sigma else f"the default for {usual_for}"
    more = "" if shift == 1 else f", shift {shift:g}"
    told_levels = Decision("levels", f"log(sigma) {mean:g} +- {std:g}{more}", why)
    return TrainingLevels(schedule, shift, log_sigma), [told_levels]


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


def chosen_text(
    options: DiffusionOptions,
    data: Data,
    network: UNetConfig,
    clip: ClipText | None,
    start: Start | None,
) -> tuple[dict[str, Any], list[Decision]]:
    """The entry of `info` on the text encoder, and the decision about it."""
    if clip:
        folder = str(Path(str(clip_folder(options))).resolve())
        told_clip = Decision(
            "text", f"CLIP, {clip.channels} channels", f"from {clip_folder(options)}"
        )
        return {"text_encoder": folder}, [told_clip]
    if network.context_channels is None:
        return {}, []
    if _as_it_is(options) and start and "text" in start.info:
        taken = Decision("text", "encoder and vocabulary", f"that of {options.init}")
        return {"text": start.info["text"]}, [taken]
    captions = (text for i in (*data.train, *data.val) for text in data.captions(i))
    words = WordEncoder.from_captions(captions, width=network.context_channels)
    found = f"{counted(len(words.vocabulary), 'word')}, {words.longest - 1} in the longest caption"
    told_words = Decision("text", found, "the text encoder is trained as well")
    return {"text": words.to_dict()}, [told_words]


def chosen_network(
    options: DiffusionOptions, data: Data, clip: ClipText | None, start: Start | None
) -> tuple[UNetConfig, str]:
    """The config of the network for these data, and why it is this one."""
    check_network(options)
    config, why = _named_network(options, data, clip, start)
    if options.width:
        heads = config.head_channels and math.gcd(config.head_channels, options.width)
        config = replace(config, channels=options.width, head_channels=heads)
        why = f"{options.width} channels, as requested; otherwise: {why}"
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
    if options.classes:
        config = replace(config, classes=len(data.classes) + 1)  # the last one stands for none
    if (condition := images_of(data).condition) is not None:
        config = replace(config, in_channels=data.channels + condition.channels)
    return config, why


def _named_network(
    options: DiffusionOptions, data: Data, clip: ClipText | None, start: Start | None
) -> tuple[UNetConfig, str]:
    """The config of the start, that of the preset which --network names, or the automatic one."""
    if options.network != "auto":
        return _preset(options, data, clip)
    if start:
        return replace(start.config, classes=0), f"that of {options.init}"
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
        config, why = without_patches(config), f"{why}; for latents, more levels instead of patches"
    return config, why


def _preset(options: DiffusionOptions, data: Data, clip: ClipText | None) -> tuple[UNetConfig, str]:
    preset = PRESETS[options.network]
    config = replace(preset.config, in_channels=data.channels)
    config = config if config.time else timed(config)
    if clip:
        config = replace(config, context_channels=clip.channels)
    return config, preset.source


def without_patches(config: UNetConfig) -> UNetConfig:
    """A network of the same depth that works on every pixel: one more level for each halving by
    patches."""
    more = config.patch.bit_length() - 1
    return replace(
        config,
        patch=1,
        multipliers=(*config.multipliers, *[config.multipliers[-1]] * more),
        attention_levels=tuple(level + more for level in config.attention_levels),
    )
