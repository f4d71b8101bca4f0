"""The benchmark's harness: two sides in turns, compared before they are timed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]


def bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks/bench.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_row_compares_two_sides_and_writes_figures_and_table(tmp_path: Path) -> None:
    out = tmp_path / "b.json"
    done = bench("--rows", "v-rand", "--rounds", 1, "--threads", 1, "--out", out)
    assert done.returncode == 0, done.stderr
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
def test_what_cannot_be_measured_is_said(arguments, said, tmp_path) -> None:
    done = bench(*arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_sides_that_compute_something_else_are_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from dataclasses import replace

    from benchmarks import bench, rows
    from unet.errors import RunError

    monkeypatch.setitem(rows.ROWS, "v-rand", replace(rows.ROWS["v-rand"], tolerance=0.0))
    options = bench.Options(rows=("v-rand",), rounds=1, threads=1, out=tmp_path / "b.json")
    with pytest.raises(RunError, match="v-rand: the sides differ by"):
        bench.main(options)
    assert not (tmp_path / "b.json").exists()


def test_growth_is_told_by_its_powers(monkeypatch, tmp_path) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.bench import _table
    from benchmarks.growth import draw, exponents

    sides = {
        str(n): {"seconds": 0.1 * n**2, "MiB": 100 + 3 * n, "MiB before": 100} for n in (4, 8, 32)
    }
    powers = exponents(sides)
    assert powers == pytest.approx({"seconds": 2.0, "memory": 1.0})
    row = {"what": "work", "axis": "pixels", "sides": sides, "exponents": powers, "target": {}}
    machine = dict.fromkeys(("processor", "threads", "python", "date", "rounds", "command"), "x")
    table = _table({"machine": {**machine, "versions": {}}, "rows": {"scale": row}})
    assert "fitted exponents: seconds 2.00, memory 1.00" in table
    assert "| 32 | 102.4 | 96 |" in table
    assert "ratio" not in table
    draw([row, row], tmp_path / "b.png")
    with Image.open(tmp_path / "b.png") as picture:
        assert picture.width > picture.height > 200  # side by side
