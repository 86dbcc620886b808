"""One style, scale bars in A: how every figure of the repository looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from scipy.ndimage import gaussian_filter, map_coordinates, maximum_filter

from cryo_lib.files import atomic
from cryo_lib.paper.methods import METHODS

WIDTH = 7.0  # inches, two journal columns


def use_style() -> None:
    """Set matplotlib's defaults: 8 pt sans serif, thin axes, embedded fonts, no random ids."""
    mpl.rc("font", family="DejaVu Sans", size=8)
    mpl.rc("axes", titlesize=8, labelsize=8, linewidth=0.7)
    mpl.rc("axes.spines", top=False, right=False)
    mpl.rc("legend", fontsize=7, frameon=False)
    mpl.rc("lines", linewidth=1.3, markersize=4)
    files = {"figure.dpi": 120, "savefig.dpi": 300, "pdf.fonttype": 42, "svg.hashsalt": "cryo_lib"}
    plt.rcParams.update(files | {"figure.constrained_layout.use": True})


def save(figure: Figure, path: str | Path) -> list[Path]:
    """Write `path`.png and `path`.pdf, atomically, the same bytes for the same figure."""
    written = []
    for suffix, metadata in ((".png", {"Software": None}), (".pdf", {"CreationDate": None})):
        target = Path(f"{path}{suffix}")
        with atomic(target) as temporary:
            figure.savefig(temporary, metadata=metadata)
        written.append(target)
    return written


def letter(ax: Axes, text: str) -> None:
    """Panel letter at the upper left, outside the axes."""
    ax.set_title(text, loc="left", fontweight="bold", fontsize=8)


def scale_bar(ax: Axes, pixel_size: float, length: float, image_size: int, colour: str = "white") -> None:
    """A bar of `length` A at the lower left of an image of `image_size` px of `pixel_size` A, its length written."""
    pixels, margin = length / pixel_size, 0.06 * image_size
    ax.add_patch(Rectangle((margin, image_size - margin), pixels, 0.02 * image_size, color=colour, lw=0))
    x, y = margin + pixels / 2, image_size - 1.4 * margin
    ax.text(x, y, f"{length:g} Å", color=colour, ha="center", va="bottom", fontsize=6)


def bar_length(side: float) -> float:
    """The longest of 1, 2, 5, 10, ... A that is at most a third of `side`."""
    power = 10 ** np.floor(np.log10(side / 3))
    return float(power * max(step for step in (1, 2, 5) if step * power <= side / 3))


def show_image(ax: Axes, image: np.ndarray, title: str = "", limits: tuple[float, float] = (0.0, 1.0)) -> None:
    """One image in grey on the fixed grey scale `limits`, no ticks."""
    ax.imshow(image, cmap="gray", vmin=limits[0], vmax=limits[1], interpolation="nearest")
    ax.set(xticks=[], yticks=[], title=title)
    ax.spines[:].set_visible(False)


def image_grid(
    images: Sequence[np.ndarray],
    titles: Sequence[str],
    limits: Sequence[tuple[float, float]],
    pixel_size: float,
    columns: int | None = None,
    bar: float = 50.0,
    bar_in: int = 0,
) -> Figure:
    """Images in rows of `columns`, each on its own grey scale, a scale bar of `bar` A in image `bar_in`.

    Without `columns` up to five are one row, and more two.
    """
    columns = columns or (len(images) if len(images) <= 5 else -(-len(images) // 2))
    rows = -(-len(images) // columns)
    side, lines = WIDTH / columns, 1 + max(title.count("\n") for title in titles)
    figure, axes = plt.subplots(rows, columns, figsize=(WIDTH, rows * (side + 0.15 + 0.15 * lines)), squeeze=False)
    for ax in axes.flat[len(images) :]:
        ax.set_axis_off()
    for ax, image, title, limit in zip(axes.flat, images, titles, limits):
        show_image(ax, image, title, limit)
    scale_bar(axes.flat[bar_in], pixel_size, bar, images[bar_in].shape[-1])
    return figure


def noise_limits(image: np.ndarray) -> tuple[float, float]:
    """Grey limits of a noisy image: mean +- 3 sd."""
    return image.mean() - 3 * image.std(), image.mean() + 3 * image.std()


def surface_view(volume: np.ndarray, level: float, rotation: np.ndarray | None = None, pixels: int = 360) -> np.ndarray:
    """A volume's isosurface as a molecular viewer draws it: orthographic, lit from the upper left, creases darkened.

    Parameters
    ----------
    volume : `(n, n, n)`, [z, y, x]. level : density of the surface.
    rotation : (3, 3), the viewing orientation, as `projection.project` has it: x_view = rotation.T @ x_volume; the
        viewer looks along +z, x to the right and y downwards, as images are shown.
    pixels : side of the picture.

    Returns
    -------
    `(pixels, pixels, 4)` float RGBA in [0, 1], transparent where no density reaches the level.
    """
    n = len(volume)
    rotation = np.eye(3) if rotation is None else rotation
    centre = n // 2
    side = (np.arange(pixels) + 0.5) * n / pixels - 0.5 - centre
    smooth = gaussian_filter(volume.astype(np.float32), 0.7)

    def sample(array: np.ndarray, x: Any, y: Any, z: Any) -> np.ndarray:
        points = np.tensordot(rotation, np.stack(np.broadcast_arrays(x, y, z)), axes=1) + centre
        return map_coordinates(array, points[::-1], order=1, mode="constant")

    front = np.full((pixels, pixels), np.nan)
    y, x = np.nonzero(_covered(smooth >= level, rotation, pixels))  # of the rays that have hit nothing yet
    previous = np.zeros(len(x))
    for z in np.arange(-centre, centre, 0.5):
        plane = sample(smooth, side[x], side[y], z)
        new = plane >= level
        front[y[new], x[new]] = z - 0.5 * (plane[new] - level) / np.maximum(plane[new] - previous[new], 1e-9)
        y, x, previous = y[~new], x[~new], plane[~new]
    picture, hit = np.zeros((pixels, pixels, 4)), np.isfinite(front)
    if not hit.any():
        return picture
    y, x = np.nonzero(hit)
    gradient = np.stack([sample(g, side[x], side[y], front[hit]) for g in np.gradient(smooth)[::-1]])
    normal = -(rotation.T @ gradient)
    normal /= np.linalg.norm(normal, axis=0) + 1e-9
    light = np.array([-0.45, -0.55, -0.7])
    lit = np.clip(light / np.linalg.norm(light) @ normal, 0, 1)
    filled = np.where(hit, front, centre)
    crease = front[hit] - gaussian_filter(filled, pixels / 60)[hit]
    shade = (0.30 + 0.70 * lit) * np.clip(1 - 0.05 * np.clip(crease, 0, None), 0.45, 1)
    shade *= 1 - 0.25 * (front[hit] - front[hit].min()) / max(np.ptp(front[hit]), 1e-9)
    picture[hit, :3] = np.clip(shade, 0, 1)[:, None]
    picture[hit, 3] = 1
    return picture


def _covered(inside: np.ndarray, rotation: np.ndarray, pixels: int) -> np.ndarray:
    """The pixels of a view that a surface around some voxels can lie on: those near a voxel's own."""
    n = len(inside)
    x, y, _ = rotation.T @ (np.argwhere(inside).T[::-1] - n // 2)
    near = np.zeros((pixels, pixels), bool)
    column, row = (np.clip((v + 0.5 + n // 2) * pixels / n, 0, pixels - 1).astype(int) for v in (x, y))
    near[row, column] = True
    return maximum_filter(near, size=2 * int(np.ceil(np.sqrt(3) * pixels / n)) + 3)  # a corner of its voxel is inside


def tint(picture: np.ndarray, colour: str) -> np.ndarray:
    """A grey RGBA picture of `surface_view` in a colour, highlights going to white."""
    base, shade = np.array(mpl.colors.to_rgb(colour)), picture[..., :1]
    tinted = np.clip(base * shade * 1.35, 0, 1) + 0.35 * np.clip(shade - 0.8, 0, 1)
    return np.concatenate([np.clip(tinted, 0, 1), picture[..., 3:]], axis=-1)


def level_holding(volume: np.ndarray, fraction: float) -> float:
    """The density above which the densest `fraction` of the voxels lie: the level of the surface around them."""
    return float(np.quantile(volume, 1 - fraction))


def show_slices(maps: dict[str, np.ndarray], z: int) -> Figure:
    """Slice `z` of 8-bit volumes `(n, n, n)`, side by side under their titles."""
    figure, axes = plt.subplots(1, len(maps), figsize=(WIDTH, WIDTH / len(maps) + 0.3), squeeze=False)
    for ax, (title, volume) in zip(axes.flat, maps.items()):
        show_image(ax, volume[z], title, limits=(0, 255))
    return figure


def reconstructions(
    maps: Mapping[str, np.ndarray],
    letters: Sequence[str],
    labels: Mapping[str, str],
    curves: pd.DataFrame,
    relion: Mapping[str, Any] | None,
    stored: Mapping[str, Any],
    reference: str = "the true volume",
) -> Figure:
    """Maps as surfaces over their central slices, and below them their FSC between half-maps and against the truth.

    Parameters
    ----------
    maps : title -> 8-bit volume `(n, n, n)`, [z, y, x]. letters : of the maps, then of the FSC, "" for none.
    labels : stack (`clean`, `noisy` or `study/method/...`) -> what the legend calls it; those below `halves/` or
        `posterior_halves/`, of a denoiser for each half-set, are drawn dashed.
    curves : the rows of `results/<scale>/fsc.csv`.
    relion : `results/<scale>/relion.json`; its curves are drawn dotted, and where it was left out the legend says so.
        None where it has no part.
    stored : `results/<scale>/maps.npz`: `view`, `enclosed` and `pixel_size` are used.
    reference : what the maps are compared with.
    """
    pixel_size = float(stored["pixel_size"])
    figure = plt.figure(figsize=(WIDTH, 6.2))
    above, below = figure.subfigures(2, 1, height_ratios=(3.5, 2.7))
    axes = above.subplots(2, len(maps), squeeze=False)
    for (top, bottom), (title, volume), mark in zip(axes.T, maps.items(), letters):
        solid = volume.astype(np.float32)
        picture = surface_view(solid, level_holding(solid, float(stored["enclosed"])), stored["view"])
        top.imshow(tint(picture, "#7a9cc6"))
        top.set_axis_off()
        top.set_title(title)
        letter(top, mark)
        show_image(bottom, volume[len(volume) // 2], limits=(0, 255))
    scale_bar(axes[1, 0], pixel_size, 50.0, volume.shape[-1])

    halves, truth = below.subplots(1, 2, sharey=True)
    for stack, label in labels.items():
        rows = curves[curves["stack"] == stack]
        colour = METHODS[stack.split("/")[1] if "/" in stack else stack].colour
        style = {"color": colour, "ls": "--" if stack.split("/")[0].endswith("halves") else "-", "label": label}
        halves.plot(rows["frequency"], rows["halves_corrected"], **style)
        truth.plot(rows["frequency"], rows["truth_masked"], **style)
        if refined := relion and relion["stacks"].get(stack):
            style |= {"ls": ":", "label": f"{label}, poses by RELION"}
            halves.plot(refined["frequency"], refined["corrected"], **style)
            truth.plot(refined["frequency"], refined["truth"], **style)
    if relion and not relion["ran"]:
        halves.plot([], [], " ", label=relion["reason"])
    _fsc_axes(halves, 0.143, "Between half-maps", pixel_size)
    _fsc_axes(truth, 0.5, f"Against {reference}", pixel_size)
    halves.set_ylabel("Fourier shell correlation")
    letter(halves, letters[-1])
    below.legend(*halves.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _fsc_axes(ax: Axes, threshold: float, title: str, pixel_size: float) -> None:
    """Dress the axes of FSC curves over spatial frequency in 1/A: the threshold as a line, ticks written in A."""
    nyquist = 0.5 / pixel_size
    ticks = [100]
    for resolution in (50, 30, 20, 15, 12, 10, 8, 7, 6, 5, 4, 3.5):
        if 0.06 * nyquist < 1 / resolution - 1 / ticks[-1] and 1 / resolution < 0.97 * nyquist:
            ticks.append(resolution)
    ax.axhline(0, color="#cccccc", lw=0.6)
    ax.axhline(threshold, color="#444444", lw=0.8, ls=(0, (4, 2)))
    ax.text(0.01 * nyquist, threshold + 0.015, f"{threshold:g}", fontsize=6.5, color="#444444")
    ax.set_xticks([1 / resolution for resolution in ticks], [f"{resolution:g}" for resolution in ticks])
    lowest = min(np.min(line.get_ydata(), initial=0.0) for line in ax.lines)
    bottom = min(-0.1, lowest - 0.04, ax.get_ylim()[0])
    ax.set(xlim=(0, nyquist), ylim=(bottom, 1.04), xlabel="resolution (Å)", title=title)
