"""A network drawn as it runs: Figure 2."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle

from cryo_lib.networks import models


def trace(model: torch.nn.Module) -> list[tuple[str, int, tuple[int, ...]]]:
    """The stages of a network as it runs: (operation, residual blocks, output shape (c, h, w)), by forward hooks."""
    stages: list[tuple[str, int, tuple[int, ...]]] = []

    def hook(module: torch.nn.Module, _: Any, output: Any) -> None:
        level = isinstance(module, models.Level)
        shape = tuple((output[0] if level else output).shape[1:])
        conv = module.resample if level else next(m for m in module.modules() if hasattr(m, "kernel_size"))
        transposed = isinstance(conv, torch.nn.ConvTranspose2d)
        name = f"conv {conv.kernel_size[0]}×{conv.kernel_size[1]}, stride {conv.stride[0]}"
        stages.append(("transposed " * transposed + name, len(module.blocks) if level else 0, shape))

    watched = [*model.down, *getattr(model, "up", []), model.last]
    handles = [module.register_forward_hook(hook) for module in watched]
    with torch.no_grad():
        model.eval()(torch.zeros(1, 1, model.image_size, model.image_size))
    for handle in handles:
        handle.remove()
    return stages


def draw_network(ax: Axes, model: torch.nn.Module, tail: str) -> None:
    """Draw a network from its trace: a slab a map (height: pixels, width: channels), residual blocks, skips.

    `tail` names what follows the last map.
    """
    stages = trace(model)
    shapes = [(1, model.image_size, model.image_size)] + [shape for *_, shape in stages]
    colours = {"in": "#dddddd", "conv": "#7fb2d9", "transposed": "#f0b27a", "residual": "#8cc9a1"}
    tallest, at, tops, arrow = model.image_size, 0.0, [], {"arrowstyle": "-|>", "mutation_scale": 6}

    def slab(shape: tuple[int, ...], colour: str, thickness: float) -> float:
        nonlocal at
        height = 0.35 + 2.2 * (shape[1] / tallest) ** 0.6
        ax.add_patch(Rectangle((at, -height / 2), thickness, height, facecolor=colour, edgecolor="#333333", lw=0.5))
        at += thickness
        return height

    for i, shape in enumerate(shapes):
        thickness = 0.12 + 0.045 * np.log2(max(shape[0], 1))
        name, blocks = ("in", 0) if i == 0 else stages[i - 1][:2]
        start = at
        height = slab(shape, colours["in" if i == 0 else "transposed" if "transposed" in name else "conv"], thickness)
        for _ in range(blocks):
            at += 0.03
            slab(shape, colours["residual"], 0.11)
        middle, bottom = (start + at) / 2, -height / 2 - 0.08
        tops.append((start + thickness / 2, height / 2))
        ax.text(middle, bottom, f"{shape[0]} × {shape[1]}²", ha="center", va="top", fontsize=6.5)
        note = f"+ {blocks} residual" if blocks else ("" if i == 0 else name.replace(", ", ",\n"))
        colour = "#2e7d4f" if blocks else "#333333"
        ax.text(middle, bottom - 0.22, note, ha="center", va="top", fontsize=5.5, color=colour)
        if i + 1 < len(shapes):
            ax.add_patch(FancyArrowPatch((at + 0.04, 0), (at + 0.42, 0), lw=0.7, color="#333333", **arrow))
            at += 0.46
    ax.text(at + 0.1, 0, tail, ha="left", va="center", fontsize=6.5)
    for up in range(1, len(getattr(model, "up", [])) + 1):
        (x0, y0), (x1, y1) = tops[len(model.down) - up], tops[len(model.down) + up]
        y = max(y0, y1) + 0.3
        ax.plot([x0, x0, x1], [y0, y, y], color="#b03a2e", lw=0.8, ls=(0, (3, 1.5)))
        ax.add_patch(FancyArrowPatch((x1, y), (x1, y1), lw=0.8, color="#b03a2e", shrinkB=0, **arrow))
        style = {"fontsize": 5.5, "color": "#b03a2e", "ha": "center", "va": "bottom"}
        ax.text((x0 + x1) / 2, y + 0.03, "skip, added before ReLU", **style)
    names = {"conv": "conv 4×4, stride 2 + BN + ReLU"}
    if hasattr(model, "up"):
        names["transposed"] = "transposed conv 4×4, stride 2 + BN + ReLU"
    names["residual"] = "residual block: ReLU(x + BN(conv 3×3 x))"
    handles = [Rectangle((0, 0), 1, 1, facecolor=colours[name], edgecolor="#333333", lw=0.5) for name in names]
    place = {"loc": "lower center", "bbox_to_anchor": (0.5, -0.1), "ncols": 3}
    ax.legend(handles, names.values(), fontsize=6, handlelength=1, **place)
    ax.set(xlim=(-0.3, at + 1.2), ylim=(-1.95, 1.45), aspect="equal")
    ax.set_axis_off()
