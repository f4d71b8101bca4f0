"""Describe a network step by step: output shapes, parameters, multiply-adds, memory of the weights.

All of it follows from shapes (on the meta device), so even Stable Diffusion takes seconds. The
multiply-adds are those of convolutions, linear layers and attention: half of the FLOPs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from unet.errors import InputError
from unet.presets import PRESETS
from unet.training.cli import run_script, say_next

if TYPE_CHECKING:
    from unet.weights.folder import FolderModel

LARGEST = 65536  # pixels a side


@dataclass(frozen=True, kw_only=True)
class Options:
    model: Positional[str | None] = None
    """A preset from --list, a model folder, such as RUN/model, or a checkpoint of another project
    that --init takes."""
    size: int | None = None
    """Height and width of the input. Default: what a preset is made for (64 for Stable Diffusion:
    the latent of a 512 x 512 image); of a folder, 512 for segmentation and 64 for diffusion."""
    json: bool = False
    """Print one JSON object instead of a table."""
    list: bool = False
    """List the presets with their parameter counts and sources."""


def main(options: Options) -> None:
    if options.list == (options.model is not None):
        raise InputError("give a preset or a model folder to describe, or --list alone")
    if options.model is None:
        facts: dict[str, Any] = {"presets": [build(name)[1] for name in PRESETS]}
        form = "{name:18}{parameters:>13,}  {task:14}{source}"
        text = "\n".join(form.format(**row) for row in facts["presets"])
    else:
        facts = describe(options.model, options.size)
        if options.model not in PRESETS:
            from unet_diffusion.starting import what_it_starts

            facts["starts"] = what_it_starts(options.model)
        text = table(facts)
    print(json.dumps(facts, indent=2) if options.json else text)
    if options.list and not options.json:
        say_next("describe", "sd-v1")


def describe(name: str, size: int | None) -> dict[str, Any]:
    """Sends one input through a preset's or a folder's model and records every step as it runs."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from unet.geometry import input_size
    from unet.model import Step

    model, facts = build(name)
    config = model.config
    if size is None:
        usual = input_size(config, 64 if config.time else 512)
        size = PRESETS[name].size if name in PRESETS else usual
    if not 1 <= size <= LARGEST:
        raise InputError(f"--size {size} must be from 1 to {LARGEST}")
    with torch.device("meta"):
        inputs = {"x": torch.empty(1, config.in_channels, size, size)}
        if config.time:
            inputs["t"] = torch.empty(1)
        if config.jumps:
            inputs["jump"] = torch.empty(1)
        if config.context_channels is not None:
            inputs["context"] = torch.empty(1, 77, config.context_channels)  # as many as CLIP gives
        if config.classes:
            inputs["classes"] = torch.empty(1, dtype=torch.long)
        if config.vector_channels:
            inputs["vector"] = torch.empty(1, config.vector_channels)

    shapes: dict[str, list[int]] = {}  # in the order of execution
    for path, module in model.named_modules():
        if isinstance(module, Step) or path.endswith("_embedding") or path == "head":
            module.register_forward_hook(
                lambda _module, _args, output, path=path: shapes.update({path: list(output.shape)})
            )
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        facts["output"] = list(model(**inputs).shape)
    facts["inputs"] = {key: list(value.shape) for key, value in inputs.items()}
    facts["multiply_adds"] = counter.get_total_flops() // 2
    facts["steps"] = []
    for path, shape in shapes.items():
        module, name = model.get_submodule(path), path.removeprefix("trunk.")
        parts = [part for part, _ in module.named_children()]
        flops = sum(counter.get_flop_counts().get(f"{type(model).__name__}.{path}", {}).values())
        count = sum(p.numel() for p in module.parameters())
        step = {"name": name, "parts": parts, "output": shape, "parameters": count}
        facts["steps"].append(step | {"multiply_adds": flops // 2})
    return facts


def build(name: str) -> tuple[FolderModel, dict[str, Any]]:
    """A model by its name, without memory for its weights, and facts about it.

    Raises:
        InputError: neither a preset nor a model folder or checkpoint.
    """
    model, source, lora = _opened(name)
    weights = [v for v in model.state_dict().values() if v.is_floating_point()]
    stored = name not in PRESETS and not (Path(name).is_file() or lora)
    facts = {
        "name": name,
        "task": model.task,
        "source": source,
        **({"lora": lora} if lora else {}),
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes_as_float32": sum(4 * v.numel() for v in weights),
        "bytes_as_stored": sum(v.nbytes for v in weights) if stored else None,
        "types": sorted({str(v.dtype).removeprefix("torch.") for v in weights}),
    }
    return model.to("meta").float(), facts


def _opened(name: str) -> tuple[FolderModel, str, dict[str, Any]]:
    """The model of a preset, a folder or a checkpoint; its source; and facts about a LoRA, or
    {}."""
    import torch
    from safetensors.torch import load_file

    from diffusion.initial import described_lora, is_lora
    from diffusion.stable.lora import LORA
    from unet.weights.folder import near, start_folder
    from unet_diffusion.starting import KINDS, read_model

    if preset := PRESETS.get(name):
        kind = KINDS["diffusion" if preset.config.time else "segmentation"]
        with torch.device("meta"):
            return kind(preset.config, preset.out_channels).eval(), preset.source, {}
    if not (folder := start_folder(name)).exists():
        raise InputError(
            f"'{name}' is neither a preset ({', '.join(PRESETS)}) nor a model folder or checkpoint"
            f"{near(folder)}"
        )
    if Path(name).is_file():
        return *_in_checkpoint(Path(name)), {}
    if is_lora(name):
        model, lora = described_lora(name)
        state = load_file(Path(name, LORA))
        sizes = {"layers": len(state) // 2, "parameters": sum(v.numel() for v in state.values())}
        return model, "LoRA folder", lora | sizes
    return read_model(folder), "model folder", {}


def _in_checkpoint(file: Path) -> tuple[FolderModel, str]:
    """The segmentation in a file of another project, and what it is.

    Raises:
        InputError: a network without a counterpart here.
    """
    from segmentation.model import SegmentationUNet
    from unet.weights.checkpoints import read_checkpoint

    found = read_checkpoint(file)
    head = found.state.get("head.conv.weight")
    model = SegmentationUNet(found.config, 1 if head is None else len(head)).eval()
    model.load_state_dict(found.state, strict=False)
    return model, f"checkpoint of {found.what}"


def table(facts: dict[str, Any]) -> str:
    form = "{:16}{:26}{:22}{:>14}{:>18}".format
    inputs = ", ".join(f"{key} {tuple(shape)}" for key, shape in facts["inputs"].items())
    lines = [f"{facts['name']}: {facts['task']}, {facts['source']}", f"input {inputs}", ""]
    lines += [form("step", "parts", "output", "parameters", "multiply-adds")]
    for row in (*facts["steps"], facts | {"name": "total", "parts": []}):
        counts = (f"{row[key]:,}" for key in ("parameters", "multiply_adds"))
        lines += [form(row["name"], " ".join(row["parts"]), str(tuple(row["output"])), *counts)]
    lines += ["", f"memory of the weights: {facts['bytes_as_float32'] / 1e6:,.2f} MB as float32"]
    if stored := facts["bytes_as_stored"]:
        lines += [f"as stored in the folder: {stored / 1e6:,.2f} MB ({', '.join(facts['types'])})"]
    if lora := facts.get("lora"):
        lines += [
            f"LoRA of rank {lora['rank']}: {lora['parameters']:,} parameters beside "
            f"{lora['layers']} layers of {lora['base']}"
        ]
    for task, how in facts.get("starts", {}).items():
        kind = "diffusion model" if task == "diffusion" else task
        lines += [f"can start a {kind + ':':16} {how}"]
    return "\n".join(lines)


def command(argv: Sequence[str] | None = None) -> int:
    return run_script(main, Options, argv, description=__doc__)
