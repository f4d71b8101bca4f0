"""The benchmark's harness: two sides in turns, compared before they are timed."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import bench
from benchmarks.growth import draw, exponents
from benchmarks.restoration import Regression, applied
from diffusion.data.images import DiffusionData
from diffusion.data.shapes import example
from diffusion.judging.restoration import Pairs
from diffusion.model import DiffusionUNet
from unet import UNetConfig
from unet.errors import RunError
from unet.files.images import write_image
from unet.training.cli import run_script
from unet.training.task import Processes


def run_bench(*arguments: object) -> int:
    return run_script(bench.main, bench.Options, list(map(str, arguments)))


def test_a_row_compares_two_sides_and_writes_figures_and_table(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(bench, "MATRIX", 256)
    out = tmp_path / "b.json"
    assert run_bench("--rows", "v-rand", "--rounds", 1, "--threads", 1, "--out", out) == 0
    found = json.loads(out.read_text())
    row = found["rows"]["v-rand"]
    assert list(row["sides"]) == ["ours", "scikit-image"]
    for side in row["sides"].values():
        assert side["all"] == [side["seconds"]]
        assert side["MiB"] > 50
    assert row["difference"] <= 1e-5
    assert row["peak GFLOP/s"] > 1
    assert found["machine"]["threads"] == 1
    table = out.with_suffix(".md").read_text()
    ratio = row["sides"]["ours"]["seconds"] / row["sides"]["scikit-image"]["seconds"]
    assert (
        f"| scikit-image | {row['sides']['scikit-image']['seconds']:.4g} | {ratio:.2f} |" in table
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--rows", "nothing"), "there is no row 'nothing': choose from classic-step"),
        (("--out", "no/such/folder.json"), "no/such' for --out: make it first"),
    ],
)
def test_what_cannot_be_measured_is_said(arguments, said, capsys) -> None:
    assert run_bench(*arguments) == 2
    assert said in capsys.readouterr().err


def test_sides_that_compute_something_else_are_refused(tmp_path) -> None:
    sides = []
    for value in (1.0, 1.25):
        np.save(tmp_path / f"{value}.npy", np.full(3, value))
        sides.append(SimpleNamespace(ask=lambda _, v=value: {"file": tmp_path / f"{v}.npy"}))
    assert bench._difference("v-rand", sides, 0.3) == 0.25
    with pytest.raises(RunError, match=r"v-rand: the sides differ by 0\.25, more than 0\.2"):
        bench._difference("v-rand", sides, 0.2)


def test_growth_is_told_by_its_powers(tmp_path) -> None:
    sides = {
        str(n): {"seconds": 0.1 * n**2, "MiB": 100 + 3 * n, "MiB before": 100} for n in (4, 8, 32)
    }
    powers = exponents(sides)
    assert powers == pytest.approx({"seconds": 2.0, "memory": 1.0})
    row = {"what": "work", "axis": "pixels", "sides": sides, "exponents": powers, "target": {}}
    machine = dict.fromkeys(("processor", "threads", "python", "date", "rounds", "command"), "x")
    table = bench._table({"machine": {**machine, "versions": {}}, "rows": {"scale": row}})
    assert "fitted exponents: seconds 2.00, memory 1.00" in table
    assert "| 32 | 102.4 | 96 |" in table
    assert "ratio" not in table
    draw([row, row], tmp_path / "b.png")
    with Image.open(tmp_path / "b.png") as picture:
        assert picture.width > picture.height > 200  # side by side


def test_a_regression_starts_as_what_takes_no_model(tmp_path: Path) -> None:
    for i in range(6):
        write_image(tmp_path / f"{i}.png", example(0, i, 16)[1].picture)
    data = DiffusionData(tmp_path, condition="lowres:4", val=2)
    pairs = Pairs.of(data, data.val, 2, SimpleNamespace(classes=[]))  # type: ignore[arg-type]
    config = UNetConfig(in_channels=3, channels=8, multipliers=(1, 2), block="res", zero_init=True)
    regression = Regression(DiffusionUNet(config, 3), data.condition, data)
    assert np.array_equal(applied(regression, pairs), pairs.floor)
    images, _ = data.batch(data.val)
    pictures = torch.stack([asked.read() for asked in data.conditions(data.val)])
    expected = torch.nn.functional.mse_loss(pictures, images)
    assert regression.evaluate(regression.model, Processes())["loss"] == pytest.approx(
        expected.item()
    )
