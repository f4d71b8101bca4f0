"""unet-describe: its numbers against a computation by hand, and its refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion.model import DiffusionUNet
from segmentation.model import SegmentationUNet
from tests.forks import SCRIPTS, run_forked
from tests.unet.weights.test_checkpoints import DECODER, WIDTHS, Smp
from unet.config import UNetConfig
from unet.presets import PRESETS
from unet.weights.convert import to_layout
from unet_diffusion import describe


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert describe.command(argv) == 0
    return capsys.readouterr().out


def conv(channels_in: int, channels_out: int, side: int, kernel: int = 3) -> int:
    """Multiply-adds of a convolution that puts out side x side pixels."""
    return channels_in * channels_out * kernel**2 * side**2


def test_multiply_adds_of_a_segmentation_network_by_hand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    SegmentationUNet(UNetConfig(in_channels=2, channels=4, multipliers=(1, 3)), 5).save_pretrained(
        tmp_path
    )
    facts = json.loads(run(capsys, str(tmp_path), "--size", "16", "--json"))
    expected = [
        ("encoder.0", [1, 4, 16, 16], conv(2, 4, 16) + conv(4, 4, 16)),
        ("encoder.1", [1, 4, 8, 8], 0),
        ("middle", [1, 12, 8, 8], conv(4, 12, 8) + conv(12, 12, 8)),
        ("decoder.0", [1, 4, 16, 16], 12 * 4 * 16 * 16),  # 2 x 2, stride 2: one tap a pixel
        ("decoder.1", [1, 4, 16, 16], conv(8, 4, 16) + conv(4, 4, 16)),
        ("head", [1, 5, 16, 16], conv(4, 5, 16, kernel=1)),
    ]
    assert [(s["name"], s["output"], s["multiply_adds"]) for s in facts["steps"]] == expected
    assert facts["multiply_adds"] == sum(adds for _, _, adds in expected)


def test_multiply_adds_of_a_text_network_by_hand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    c, d, n, tokens = 8, 6, 8 * 8, 77
    config = UNetConfig(
        in_channels=3,
        channels=c,
        multipliers=(1,),
        block="res",
        skips="block",
        norm="group",
        groups=4,
        time=True,
        classes=2,
        attention="transformer",
        middle_attention=True,
        heads=2,
        context_channels=d,
    )
    DiffusionUNet(config, 3).save_pretrained(tmp_path)
    facts = json.loads(run(capsys, str(tmp_path), "--size", "8", "--json"))
    adds = {s["name"]: s["multiply_adds"] for s in facts["steps"]}
    block = 2 * conv(c, c, 8) + 4 * c * c  # with the embedding's projection
    joined = conv(2 * c, c, 8) + conv(c, c, 8) + 4 * c * c + conv(2 * c, c, 8, kernel=1)
    own = 4 * n * c * c + 2 * n * n * c  # q, k, v, out; scores and their weighted sum
    cross = 2 * n * c * c + 2 * tokens * d * c + 2 * n * tokens * c
    feed_forward = n * c * 8 * c + n * 4 * c * c
    projections = 2 * n * c * c
    assert adds == {
        "time_embedding": c * 4 * c + (4 * c) ** 2,
        "class_embedding": 0,
        "encoder.0": conv(3, c, 8),
        "encoder.1": block,
        "middle": 2 * block + own + cross + feed_forward + projections,
        "decoder.0": joined,
        "decoder.1": joined,
        "head": conv(c, 3, 8),
    }
    assert facts["multiply_adds"] == sum(adds.values())
    assert facts["inputs"]["context"] == [1, 77, d]


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("paper", (1, 572, 572)),
        ("classic", (3, 512, 512)),
        ("ddpm-cifar10", (3, 32, 32)),
        ("ddpm-256", (3, 256, 256)),
        ("sd-v1", (4, 64, 64)),
    ],
)
def test_presets(name: str, size: tuple[int, int, int], capsys: pytest.CaptureFixture[str]) -> None:
    facts = json.loads(run(capsys, name, "--json"))
    assert facts["inputs"]["x"] == [1, *size]
    assert facts["source"] == PRESETS[name].source
    for total in ("parameters", "multiply_adds"):
        assert sum(step[total] for step in facts["steps"]) == facts[total]
    output = 388 if name == "paper" else size[-1]
    assert facts["output"] == [1, PRESETS[name].out_channels, output, output]


def test_sizes_of_the_paper(capsys: pytest.CaptureFixture[str]) -> None:
    steps = json.loads(run(capsys, "paper", "--json"))["steps"]
    blocks = [s["output"][-1] for s in steps if s["parts"] in (["block"], ["block1"])]
    assert blocks == [568, 280, 136, 64, 28, 52, 100, 196, 388]


def test_a_folder_of_valid_convolutions_gets_a_size_it_can_take(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(PRESETS["paper"].config, channels=2)
    SegmentationUNet(config, 1).save_pretrained(tmp_path)
    facts = json.loads(run(capsys, str(tmp_path), "--json"))
    assert (facts["inputs"]["x"], facts["output"]) == ([1, 1, 700, 700], [1, 1, 516, 516])


def test_the_table_shows_the_totals(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "sd-v1")
    total = next(line.split() for line in text.splitlines() if line.startswith("total"))
    facts = json.loads(run(capsys, "sd-v1", "--json"))
    assert total[-2:] == ["859,520,964", f"{facts['multiply_adds']:,}"]
    assert "x (1, 4, 64, 64), t (1,), context (1, 77, 768)" in text
    assert "memory of the weights: 3,438.08 MB as float32" in text


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_list(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "--list", *flags)
    for name, preset in PRESETS.items():
        assert name in text
        assert preset.source in text
    if flags:
        rows = {row["name"]: row["parameters"] for row in json.loads(text)["presets"]}
        assert list(rows) == list(PRESETS)
        assert rows["tutorial"] == 13_394_177
    else:
        assert "13,394,177" in text


def test_memory_of_stored_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = SegmentationUNet(UNetConfig(channels=8, multipliers=(1, 2)), 1).bfloat16()
    model.save_pretrained(tmp_path)
    count = sum(v.numel() for v in model.state_dict().values() if v.is_floating_point())
    facts = json.loads(run(capsys, str(tmp_path), "--json", "--size", "8"))
    assert (facts["bytes_as_float32"], facts["bytes_as_stored"]) == (4 * count, 2 * count)
    assert facts["types"] == ["bfloat16"]
    assert f"{2 * count / 1e6:,.2f} MB (bfloat16)" in run(capsys, str(tmp_path))


def test_checkpoints_of_other_projects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a folder of the network that they become, and what they start."""
    config = replace(PRESETS["classic"].config, channels=2)
    model = SegmentationUNet(config, 1)
    model.save_pretrained(tmp_path / "ours")
    classic, smp = tmp_path / "theirs.pth", tmp_path / "smp.pth"
    torch.save({"model": to_layout(model.state_dict(), config, "classic")}, classic)
    torch.save(Smp(WIDTHS, DECODER).state_dict(), smp)
    known = ("steps", "parameters", "multiply_adds", "task")
    ours, theirs = (
        json.loads(run(capsys, str(path), "--json", "--size", "32"))
        for path in (tmp_path / "ours", classic)
    )
    assert {key: theirs[key] for key in known} == {key: ours[key] for key in known}
    for file, name in ((classic, "Pytorch-UNet"), (smp, "smp's Unet with vgg13_bn")):
        text = run(capsys, str(file), "--size", "32")
        assert f"segmentation, checkpoint of {name}" in text
        assert f"unet-train-seg --init {file}" in text
        assert "can start a diffusion model: no: " in text
    torch.save({"weight": torch.ones(2)}, tmp_path / "other.pth")
    assert describe.command([str(tmp_path / "other.pth")]) == 2
    assert "other.pth holds no network that starts a training here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give a preset or a model folder to describe, or --list alone"),
        (["paper", "--list"], "or --list alone"),
        (["papier"], "'papier' is neither a preset ("),
        (["paper", "--size", "512"], "nearest sizes that work are 508 and 524"),
        (["classic", "--size", "0"], "--size 0 must be from 1 to"),
        (["classic", "--size", "1000000"], "--size 1000000 must be from 1 to"),
        ([str(SCRIPTS)], "config.json is missing"),
        ([f"{SCRIPTS}/model"], f"or checkpoint; '{SCRIPTS}' holds "),
        (["classic", "--sizes", "8"], "no option --sizes; did you mean --size?"),
    ],
)
def test_mistakes_are_one_sentence(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert describe.command(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("change", [{"task": "poetry"}, {"unet": {"channels": 0}}, {"info": 1}])
def test_a_damaged_folder_is_refused(
    change: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    SegmentationUNet(UNetConfig(channels=4, multipliers=(1,)), 1).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert describe.command([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_as_a_command() -> None:
    done = run_forked(SCRIPTS / "describe.py", "tutorial", "--size", 64, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["parameters"] == 13_394_177


def test_nothing_is_allocated() -> None:
    model, _ = describe.build("sd-v2")
    assert {v.device for v in model.state_dict().values()} == {torch.device("meta")}
