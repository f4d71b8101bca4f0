"""How cost grows with size: fitted exponents, a table for each row, and one figure of them all."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_UNITS = {"seconds": "C0", "memory": "C1"}  # memory: MiB beyond what the network takes


def exponents(sides: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The slopes of a line through the logarithms: 1 where twice the size takes twice as much."""
    return {unit: _line(sides, unit)[0] for unit in _UNITS}


def table(row: Mapping[str, Any]) -> list[str]:
    """Lines of Markdown for a row whose sides are sizes."""
    powers = ", ".join(f"{unit} {exponent:.2f}" for unit, exponent in row["exponents"].items())
    return [
        "",
        f"{row['what']}; fitted exponents: {powers}",
        "",
        f"| {row['axis']} | seconds | MiB beyond what the network takes |",
        "|---|---|---|",
        *(
            f"| {size} | {side['seconds']:.4g} | {_memory(side):.0f} |"
            for size, side in row["sides"].items()
        ),
    ]


def draw(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Seconds and memory of each row over its sizes, in logarithms, with the fitted lines.

    Both as multiples of what the smallest size takes, so that slopes can be compared.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(rows), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for row, axes in zip(rows, np.ravel(figure.subplots(1, len(rows))), strict=True):
        sizes = [float(size) for size in row["sides"]]
        for unit, colour in _UNITS.items():
            grown = np.array(_grown(row["sides"], unit))
            slope, offset = _line(row["sides"], unit)
            fitted = np.exp(offset) * np.power(sizes, slope)
            axes.loglog(sizes, fitted / grown[0], color=colour, lw=1)
            axes.loglog(
                sizes, grown / grown[0], "o", color=colour, label=f"{unit}: power {slope:.2f}"
            )
        axes.minorticks_off()
        axes.set_xticks(sizes, [f"{size:g}" for size in sizes], rotation=45)
        axes.set_xlabel(row["axis"])
        axes.set_title(textwrap.fill(row["what"], 36), fontsize="small")
        axes.legend(fontsize="small")
    figure.axes[0].set_ylabel("times the smallest size's")
    figure.savefig(file, dpi=80)


def _line(sides: Mapping[str, Mapping[str, Any]], unit: str) -> tuple[float, float]:
    import numpy as np

    sizes = np.log([float(size) for size in sides])
    slope, offset = np.polyfit(sizes, np.log(_grown(sides, unit)), 1)
    return float(slope), float(offset)


def _grown(sides: Mapping[str, Mapping[str, Any]], unit: str) -> list[float]:
    if unit == "seconds":
        return [side["seconds"] for side in sides.values()]
    return [max(_memory(side), 1) for side in sides.values()]


def _memory(side: Mapping[str, Any]) -> float:
    return max(side["MiB"] - side["MiB before"], 0)
