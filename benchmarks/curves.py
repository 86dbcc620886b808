"""The growth curves as a figure."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import matplotlib.pyplot as plt

from cryo_lib.files import atomic
from cryo_lib.paper import figures
from cryo_lib.paper.methods import METHODS

AXES = {"size": "image size (px)", "width": "width (channels)", "pairs": "training pairs", "images": "images denoised"}


def _points(results: dict[str, Any]) -> dict[str, list[tuple[int, float, int]]]:
    """axis -> (value, seconds, peak bytes) of each of its points."""
    points: dict[str, list[tuple[int, float, int]]] = {}
    for row in results.get("growth", []):
        point = row["value"], median(row["seconds_per_iteration"]), row["peak_memory"]
        points.setdefault(row["axis"], []).append(point)
    for row in results.get("memory", []):
        if row["file"] == ".mrcs":
            points.setdefault("images", []).append((row["images"], row["seconds"], row["peak_memory"]))
    return points


def _curve(ax: plt.Axes, x: tuple[int, ...], y: list[float], style: str, colour: str) -> None:
    """Logarithmic, over two decades at least: a flat curve must look flat."""
    ax.loglog(x, y, style, color=colour)
    centre = (min(y) * max(y)) ** 0.5
    reach = max(10.0, 1.5 * max(y) / centre)
    ax.set_ylim(centre / reach, centre * reach)


def _numbers(values: tuple[int, ...]) -> list[str]:
    """Tick labels; none where the next one would stand in its way."""
    exponents = [len(str(value)) - 1 for value in values]
    labels = [
        f"$10^{exponent}$" if value == 10**exponent and exponent > 2 else f"{value:,}"
        for value, exponent in zip(values, exponents)
    ]
    crowded = [after < 1.5 * value for value, after in zip(values, values[1:])]
    return ["" if near else label for label, near in zip(labels, [*crowded, False])]


def draw(results: dict[str, Any], path: Path) -> Path | None:
    """Write a `.png`: time above and memory below, a column an axis, logarithmic; None where no growth was measured."""
    points = _points(results)
    if not points:
        return None
    figures.use_style()
    figure, axes = plt.subplots(2, len(points), figsize=(figures.WIDTH, 3.4), sharex="col", squeeze=False)
    for (above, below), (axis, of_axis) in zip(axes.T, points.items()):
        value, seconds, memory = zip(*of_axis)
        scale = 1 if axis == "images" else 1e3
        _curve(above, value, [scale * each for each in seconds], "o-", METHODS["beta_05_05_l1"].colour)
        _curve(below, value, [each / 2**20 for each in memory], "s-", METHODS["l2_ae"].colour)
        below.set_xlabel(AXES[axis])
        below.set_xticks(value, _numbers(value))
        below.minorticks_off()
        above.set_ylabel("s, all images" if axis == "images" else "ms an iteration")
        below.set_ylabel("peak memory (MiB)")
    with atomic(path) as temporary:
        figure.savefig(temporary, metadata={"Software": None})
    plt.close(figure)
    return path
