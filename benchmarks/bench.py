"""Measure this code and others on this machine: bench.py [--rows classic-step sd-v1].

Each side of a row runs in a process of its own; the sides take turns, round by round, and the
medians of their seconds are compared. Where they share weights, what they compute is compared
first. The processor's own matrix products, timed between the rounds, give the share of the peak.
"""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import growth  # noqa: E402
from unet.errors import InputError, RunError  # noqa: E402
from unet.files.writing import write_text  # noqa: E402
from unet.training.cli import run_script  # noqa: E402

PACKAGES = ("torch", "numpy", "diffusers", "monai", "scikit-image", "onnxruntime", "openvino")
MATRIX = 2048  # side of the matrices whose product is the peak of a processor
SCRIPTS = ("train_seg", "train_ddpm", "sample_ddpm", "txt2img")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    rows: tuple[str, ...] = ()
    """Rows by name; none given: all of them."""

    rounds: int = 5
    """Rounds, after one that is not counted."""

    threads: int = 2
    """Threads of each process."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where networks and images are. On a GPU memory is the GPU's, and the peak is that of products
    of bfloat16 matrices."""

    out: Path = Path("benchmarks.json")
    """JSON file for the figures; beside it, .md, the table, and .png, how cost grows."""


class Side:
    """A worker process and what it has answered."""

    def __init__(self, row: str, name: str, options: Options, shared: Path) -> None:
        self.name, threads = name, options.threads
        command = [sys.executable, str(ROOT / "benchmarks/worker.py"), row, name]
        env = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "BENCH_DEVICE": options.device,
        }
        self.process = subprocess.Popen(
            [*command, str(threads), str(shared)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        self.seconds: list[float] = []
        self.peak = 0.0
        first = self._answer()
        self.parameters: int = first["parameters"]
        self.before: float = first["before"]  # MiB

    def ask(self, *words: object) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(*words, file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            _, said = self.process.communicate()
            raise RunError(f"{self.name} ended: {(said.strip().splitlines() or ['?'])[-1]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def main(options: Options) -> None:
    from benchmarks.rows import ROWS

    if options.device == "cuda":
        from unet.device import pick_device

        pick_device("cuda")
    known = [*ROWS, "start"]
    if unknown := [name for name in options.rows if name not in known]:
        raise InputError(f"there is no row {unknown[0]!r}: choose from {', '.join(known)}")
    folder = options.out.absolute().parent
    if not folder.is_dir():
        raise InputError(f"there is no folder '{folder}' for --out: make it first")
    found: dict[str, Any] = {"machine": _machine(options), "rows": {}}
    usual = [n for n in known if n == "start" or options.device == "cuda" or not ROWS[n].gpu]
    for name in options.rows or usual:
        if name == "start":
            found["rows"][name] = _start(options)
        elif (needs := ROWS[name].needs) and needs not in os.environ:
            print(f"{name}: left out, as {needs} is not set", flush=True)
            continue
        else:
            found["rows"][name] = _measure(name, options)
        print("\n".join(_lines(found["rows"][name])), flush=True)
        write_text(options.out, json.dumps(found, indent=2) + "\n")
        write_text(options.out.with_suffix(".md"), _table(found))
        if grown := [row for row in found["rows"].values() if row.get("axis")]:
            growth.draw(grown, options.out.with_suffix(".png"))


def _measure(name: str, options: Options) -> dict[str, Any]:
    from benchmarks.rows import ROWS

    row = ROWS[name]
    sides: list[Side] = []
    with tempfile.TemporaryDirectory() as shared:
        try:
            if row.prepare:
                process = multiprocessing.get_context("spawn").Process(
                    target=row.prepare, args=(Path(shared),)
                )
                process.start()
                process.join()
            for side in row.sides:
                sides.append(Side(name, side, options, Path(shared)))
            difference = _difference(name, sides, row.tolerance)
            peaks = []
            for turn in range(options.rounds + 1):
                # Each side is first as often as last.
                for side in sides if turn % 2 else reversed(sides):
                    answer = side.ask("run", row.repeats)
                    if turn:
                        side.seconds.append(answer["seconds"])
                    side.peak = max(side.peak, answer["peak"])
                peaks.append(_matrix_peak(options))
            peak = statistics.median(peaks)
            found = {
                side.name: {
                    "seconds": statistics.median(side.seconds),
                    "all": side.seconds,
                    "MiB": side.peak,
                    "MiB before": side.before,
                    "parameters": side.parameters,
                    "share of peak": side.ask("flops")["flops"]
                    / statistics.median(side.seconds)
                    / peak,
                }
                for side in sides
            }
        finally:
            for side in sides:
                side.close()
    return {
        "what": row.what,
        "axis": row.axis,
        "images": row.images,
        "exponents": growth.exponents(found) if row.axis else {},
        "sides": found,
        "target": dict(row.target or {}),
        "difference": difference,
        "peak GFLOP/s": peak / 1e9,
    }


def _difference(name: str, sides: list[Side], tolerance: float | None) -> float | None:
    """The difference between the results of the sides; too large a one is an error."""
    if tolerance is None:
        return None
    import numpy as np

    first, *others = (np.load(side.ask("check")["file"]) for side in sides)
    difference = max(float(np.abs(first - other).max()) for other in others)
    if not difference <= tolerance:
        raise RunError(f"{name}: the sides differ by {difference:g}, more than {tolerance:g}")
    return difference


def _matrix_peak(options: Options) -> float:
    """Floating-point operations a second of a product of two matrices.

    On a GPU of 8192 x 8192 in bfloat16, else of 2048 x 2048 in float32.

    PyTorch computes it in two ways, of which some processors like one: as a matrix product, by
    MKL, and as a 1x1 convolution, by oneDNN. The faster counts.
    """
    import torch

    if options.device == "cuda":
        b = torch.rand(8192, 8192, dtype=torch.bfloat16, device="cuda")
        times = []
        for _ in range(5):
            start = time.perf_counter()
            b @ b
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return 2 * 8192**3 / min(times)
    torch.set_num_threads(options.threads)
    a = torch.rand(MATRIX, MATRIX)
    maps = a.view(16, MATRIX // 16, 1, MATRIX).permute(0, 3, 1, 2)
    times = []
    for _ in range(2):
        for product in (lambda: a @ a, lambda: torch.conv2d(maps, a[:, :, None, None])):
            start = time.perf_counter()
            product()
            times.append(time.perf_counter() - start)
    return 2 * MATRIX**3 / min(times)


def _start(options: Options) -> dict[str, Any]:
    """The start-up time of commands."""
    commands = {"import torch": ["-c", "import torch"]}
    commands |= {f"{s}.py --help": [str(ROOT / f"scripts/{s}.py"), "--help"] for s in SCRIPTS}
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(options.rounds + 1):
        for name, command in commands.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, capture_output=True)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    sides = {
        name: {"seconds": statistics.median(values), "all": values}
        for name, values in seconds.items()
    }
    return {"what": "time of a command that does nothing yet", "sides": sides, "target": {}}


def _machine(options: Options) -> dict[str, Any]:
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        processor = names[0].partition(":")[2].strip() if names else processor
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "missing"
    if options.device == "cuda":
        import torch

        processor = torch.cuda.get_device_name()
    return {
        "processor": processor,
        "threads": options.threads,
        "rounds": options.rounds,
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
    }


def _ratios(row: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of the first side for one second of each other."""
    sides = row["sides"]
    first, *others = sides
    return {name: sides[first]["seconds"] / sides[name]["seconds"] for name in others}


def _lines(row: Mapping[str, Any]) -> list[str]:
    lines = [row["what"]]
    for name, side in row["sides"].items():
        text = f"  {name}: {side['seconds']:.4g} s"
        if "MiB" in side:
            text += f", {side['MiB']:.0f} MiB"
        if side.get("share of peak"):  # engines do not say what they compute
            text += f", {side['share of peak']:.0%} of the peak"
        if row.get("images"):
            text += f", {row['images'] / side['seconds']:.4g} images/s"
        lines.append(text)
    for unit, exponent in row.get("exponents", {}).items():
        lines.append(f"  {unit} grow with {row['axis']} to the power of {exponent:.2f}")
    for name, ratio in ({} if row.get("axis") else _ratios(row)).items():
        target = row["target"].get(name)
        aim = f" (aim: at most {target})" if target else ""
        lines.append(f"  first / {name}: {ratio:.2f}{aim}")
    return lines


def _table(found: Mapping[str, Any]) -> str:
    machine = found["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
    lines = [
        f"{machine['processor']}, {machine['threads']} threads, Python {machine['python']}, "
        f"{versions}; {machine['date']}; medians of {machine['rounds']} rounds, "
        f"`{machine['command']}`",
    ]
    grown = [row for row in found["rows"].values() if row.get("axis")]
    compared = [row for row in found["rows"].values() if not row.get("axis")]
    if compared:
        lines += [
            "",
            "| work | side | seconds | ratio | aim | MiB | share of the peak | images/s |",
            "|---|---|---|---|---|---|---|---|",
        ]
    for row in compared:
        ratios = _ratios(row)
        what = row["what"]
        for name, side in row["sides"].items():
            cells = [
                what,
                name,
                f"{side['seconds']:.4g}",
                f"{ratios[name]:.2f}" if name in ratios else "",
                str(row["target"].get(name, "")),
                f"{side['MiB']:.0f}" if "MiB" in side else "",
                f"{side['share of peak']:.0%}" if side.get("share of peak") else "",
                f"{row['images'] / side['seconds']:.4g}" if row.get("images") else "",
            ]
            lines.append(f"| {' | '.join(cells)} |")
            what = ""
    return "\n".join(lines + [line for row in grown for line in growth.table(row)]) + "\n"


if __name__ == "__main__":
    sys.exit(run_script(main, Options, description=__doc__))
