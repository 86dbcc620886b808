"""The growth curves as a figure."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import matplotlib.pyplot as plt

from cryo_lib import figures
from cryo_lib.files import atomic

LABELS = {
    "size": "image size (px)",
    "width": "width (channels)",
    "pairs": "training pairs",
    "images": "images denoised",
}


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


def draw(results: dict[str, Any], path: Path) -> Path | None:
    """Write a `.png`: time above and memory below, a column an axis, logarithmic; None where no growth was measured."""
    points = _points(results)
    if not points:
        return None
    figures.use_style()
    figure, axes = plt.subplots(2, len(points), figsize=(figures.WIDTH, 3.4), sharex="col", squeeze=False)
    for (above, below), (axis, of_axis) in zip(axes.T, points.items()):
        value, seconds, memory = zip(*of_axis)
        above.loglog(value, seconds, "o-", color=figures.COLOURS["beta_05_05_l1"])
        mib = [each / 2**20 for each in memory]
        below.loglog(value, mib, "s-", color=figures.COLOURS["l2_ae"])
        below.set_ylim(min(100, min(mib) / 2), 2 * max(mib))  # down to 100 MiB: a flat curve must look flat
        below.set_xlabel(LABELS[axis])
        below.set_xticks(value, [f"{each:,}" if each < 10_000 else f"{each:.0e}".replace("e+0", "e") for each in value])
        below.minorticks_off()
        above.set_ylabel("s, all images" if axis == "images" else "s an iteration")
        below.set_ylabel("peak memory (MiB)")
    with atomic(path) as temporary:
        figure.savefig(temporary, metadata={"Software": None})
    plt.close(figure)
    return path
