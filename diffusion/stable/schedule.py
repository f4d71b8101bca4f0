"""The `scheduler/scheduler_config.json` of a diffusers pipeline, as our schedule and timesteps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffusion.process.prediction import PredictionName, get_prediction
from diffusion.process.schedule import CLEAN, Kind, NoiseSchedule, Spacing
from diffusion.stable.recipe import TextSampler
from unet.errors import InputError

KINDS: dict[Any, Kind] = {  # beta_schedule
    "linear": "linear",
    "scaled_linear": "scaled-linear",
    "squaredcos_cap_v2": "cosine",
}
PREDICTIONS: dict[Any, PredictionName] = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
_SPACINGS: dict[Any, Spacing | None] = {
    None: None,
    "leading": "leading",
    "trailing": "trailing",
    "linspace": "linspace",
}
_HIGHER = (0.00085, 0.012)
# The schedulers whose noise is ours, with their default beta_start and beta_end.
_SCHEDULERS: dict[Any, tuple[float, float]] = {
    **dict.fromkeys(
        (
            "DDIMScheduler",
            "DDIMParallelScheduler",
            "DDPMScheduler",
            "DDPMParallelScheduler",
            "DEISMultistepScheduler",
            "DPMSolverMultistepScheduler",
            "DPMSolverSinglestepScheduler",
            "EulerAncestralDiscreteScheduler",
            "EulerDiscreteScheduler",
            "LMSDiscreteScheduler",
            "PNDMScheduler",
            "UniPCMultistepScheduler",
        ),
        (0.0001, 0.02),
    ),
    "DPMSolverSDEScheduler": _HIGHER,
    "HeunDiscreteScheduler": _HIGHER,
    "KDPM2AncestralDiscreteScheduler": _HIGHER,
    "KDPM2DiscreteScheduler": _HIGHER,
}
# Fields that must be off: other noise, or other timesteps.
_OFF = (
    *("trained_betas", "thresholding"),
    *("use_flow_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"),
)
_LARGEST = 10**9  # of a scheduler's numbers
_ENDS: dict[Any, float] = {"zero": CLEAN, "sigma_min": 0}


@dataclass(frozen=True, kw_only=True)
class PipelineSchedule:
    """What a pipeline's scheduler says of the model: its noise, its prediction, its timesteps.

    Of the scheduler's class it is asked that it adds noise as DDPM does, which is what a model was
    trained for: then any of our samplers can be used, as the `from_config` of diffusers' schedulers
    lets one do. Flow matching, EDM and distilled models (LCM, TCD) are something else.
    """

    noise: NoiseSchedule
    prediction: PredictionName
    spacing: Spacing | None  # None: each sampler has its own
    offset: int  # of leading timesteps
    karras: bool  # Karras' spacing for the samplers that count sigmas
    ddim_end: float  # the level of DDIM's last step: CLEAN, or 0 without set_alpha_to_one
    sigma_end: float  # of the others': CLEAN, or 0 for sigma_min

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PipelineSchedule:
        """Reads the fields of a `scheduler_config.json`; a missing one has diffusers' default,
        steps_offset that of its StableDiffusionPipeline, 1.

        Fields of a solver (its order, say) and `clip_sample`, which that pipeline turns off, are
        not read.

        Raises:
            InputError: a scheduler or a value that our schedule cannot express.
        """
        name = values.get("_class_name")
        if not isinstance(name, str) or name not in _SCHEDULERS:
            raise InputError(
                f"a model of the scheduler {name!r:.200} cannot be used here, as its noise or its "
                f"sampling is another: _class_name must be one of {', '.join(_SCHEDULERS)}"
            )
        steps = _number(values, "num_train_timesteps", 1000, whole=True)
        for name in _OFF:
            if values.get(name):
                raise InputError(f"{name} of the scheduler cannot be used here: it must be off")
        _choice(values, "timestep_type", "discrete", {"discrete": None})
        start, end = _SCHEDULERS[values["_class_name"]]
        scale = steps / 1000  # our betas are those of T = 1000, diffusers' those of its own T
        schedule = NoiseSchedule(
            kind=_choice(values, "beta_schedule", "linear", KINDS),
            steps=int(steps),
            beta_start=scale * _number(values, "beta_start", start),
            beta_end=scale * _number(values, "beta_end", end),
            zero_snr=_flag(values, "rescale_betas_zero_snr", False),
        )
        prediction = _choice(values, "prediction_type", "epsilon", PREDICTIONS)
        get_prediction(prediction, schedule)  # which refuses eps without a last signal
        return cls(
            noise=schedule,
            prediction=prediction,
            spacing=_choice(values, "timestep_spacing", None, _SPACINGS),
            offset=int(_number(values, "steps_offset", 1, whole=True)),
            karras=_flag(values, "use_karras_sigmas", False),
            ddim_end=CLEAN if _flag(values, "set_alpha_to_one", True) else 0,
            sigma_end=_choice(values, "final_sigmas_type", "zero", _ENDS),
        )

    def timesteps(self, sampler: TextSampler, steps: int) -> tuple[list[float], float]:
        """The timesteps of a whole run, descending, and the level at which it ends.

        They are those of diffusers' DDIMScheduler, DPMSolverMultistepScheduler and
        EulerDiscreteScheduler; but DDIM steps to the next of them, where diffusers steps to
        t - T // n, which is the same for leading ones. With sigma_min diffusers' Euler ends in
        units of the signal, which are larger by less than a thousandth.

        Raises:
            InputError: more steps than the schedule has timesteps for.
        """
        last = self.noise.steps - 1
        spacing = self.spacing or ("leading" if sampler == "ddim" else "linspace")
        offset = self.offset if spacing == "leading" else 0
        end = self.ddim_end if sampler == "ddim" else self.sigma_end
        if self.karras and sampler != "ddim":
            return self.noise.timesteps(steps, "karras"), end
        if sampler == "dpmpp-2m" and spacing != "trailing":
            # One more than asked for: the last is where the run would end.
            times = [t + offset for t in self.noise.timesteps(steps + 1, spacing)[:-1]]
            if times[0] > last:
                raise InputError(
                    f"{steps} steps begin at timestep {times[0]}, but this model's noise schedule "
                    f"has 0 to {last}: choose fewer steps"
                )
            return times, end
        if sampler == "euler" and spacing == "linspace" and steps <= last:
            return np.linspace(last, 0, steps).tolist(), end  # not rounded
        return self.noise.timesteps(steps, spacing, offset=offset), end

    def start_scale(self, sampler: TextSampler, first: float) -> float:
        """What standard normal noise is multiplied with to be x at the first timestep.

        diffusers' Euler leaves out the signal's share of the variance, except for leading
        timesteps.
        """
        if sampler == "euler" and self.spacing != "leading":
            return self.noise.level(first).noise
        return 1.0


def _choice(values: Mapping[str, Any], name: str, default: Any, table: Mapping[Any, Any]) -> Any:
    value = values.get(name, default)
    if not (value is None or isinstance(value, str)) or value not in table:
        known = ", ".join(repr(key) for key in table if key is not None)
        raise InputError(f"{name}={value!r} of the scheduler is unknown here: it must be {known}")
    return table[value]


def _number(values: Mapping[str, Any], name: str, default: float, *, whole: bool = False) -> float:
    value = values.get(name, default)
    if type(value) not in ((int,) if whole else (int, float)) or not abs(value) <= _LARGEST:
        raise InputError(
            f"{name}={value!r} of the scheduler must be a {'whole ' * whole}number of at most "
            f"{_LARGEST:,}"
        )
    return value


def _flag(values: Mapping[str, Any], name: str, default: bool) -> bool:
    value = values.get(name, default)
    if not isinstance(value, (bool, type(None))):
        raise InputError(f"{name}={value!r} of the scheduler must be true or false")
    return bool(value)
