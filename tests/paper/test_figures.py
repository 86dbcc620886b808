"""Figures show what they claim: true shapes, true lengths, the right hand, the same bytes each time."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.patches import Rectangle
from scipy.ndimage import gaussian_filter, map_coordinates

from cryo_lib.paper import figures, methods
from cryo_lib.simulate import projection


@pytest.fixture(autouse=True)
def style():
    with plt.rc_context():
        figures.use_style()
        yield
    plt.close("all")


def test_a_scale_bar_has_its_length_in_pixels():
    _, ax = plt.subplots()
    figures.scale_bar(ax, pixel_size=1.6, length=40, image_size=128)
    (bar,) = [patch for patch in ax.patches if isinstance(patch, Rectangle)]
    assert bar.get_width() == pytest.approx(25) and ax.texts[0].get_text() == "40 Å"


def test_a_saved_figure_is_the_same_bytes_each_time(tmp_path):
    written = []
    for name in "ab":
        figure = figures.image_grid([np.eye(8)] * 3, ["a", "b", "c"], [(0, 1)] * 3, 2.0, columns=2)
        written.append([path.read_bytes() for path in figures.save(figure, tmp_path / name)])
    assert written[0] == written[1] and written[0][0][:4] == b"\x89PNG" and written[0][1][:4] == b"%PDF"


def test_a_surface_lies_where_the_projection_does_for_any_view():
    """The silhouette of the surface is the support of the projection: same axes, same hand."""
    grid = np.arange(32) - 16
    z, y, x = np.meshgrid(grid, grid, grid, indexing="ij")
    centres = [(8, 2, 0), (-5, 7, 3), (0, -8, -6)]
    volume = sum(np.exp(-((x - a) ** 2 + (y - b) ** 2 + (z - c) ** 2) / 8) for a, b, c in centres).astype(np.float32)
    for rotation in projection.random_rotations(3, 0):
        surface = figures.surface_view(volume, 0.5, rotation, pixels=32)[..., 3] > 0
        seen = projection.project(volume, rotation[None])[0]
        support = seen > 0.5 * seen.max()
        assert (surface & support).sum() > 0.6 * (surface | support).sum()


def test_a_surface_is_seen_in_every_pixel_whose_ray_meets_it():
    """No ray that meets the level is left out: of a point near a corner of the box, an arc, and noise."""
    point, arc = np.zeros((2, 16, 16, 16), np.float32)
    point[1, 14, 1], arc[8, 8, 2:14] = 40.0, 10.0
    noise = np.random.default_rng(0).normal(size=(16, 16, 16)).astype(np.float32)
    at = (np.arange(64) + 0.5) / 4 - 8.5
    y, x, z = np.meshgrid(at, at, np.arange(-8, 8, 0.5), indexing="ij")
    for rotation in [np.eye(3), *projection.random_rotations(2, 0)]:
        points = np.tensordot(rotation, np.stack([x, y, z]), axes=1)[::-1] + 8
        for volume in (point, arc, noise):
            met = map_coordinates(gaussian_filter(volume, 0.7), points, order=1, mode="constant").max(axis=-1) >= 0.5
            np.testing.assert_array_equal(figures.surface_view(volume, 0.5, rotation, pixels=64)[..., 3] > 0, met)


def test_the_nearer_of_two_balls_is_in_front():
    """The viewer looks along +z: a ball at smaller z hides one behind it, and is lit as the nearer."""
    grid = np.arange(32) - 16
    z, y, x = np.meshgrid(grid, grid, grid, indexing="ij")
    near, far = (np.exp(-((x - dx) ** 2 + y**2 + (z - dz) ** 2) / 10) for dx, dz in ((-6, -9), (6, 9)))
    picture = figures.surface_view((near + far).astype(np.float32), 0.5, pixels=32)
    left, right = picture[16, 10, 0], picture[16, 22, 0]
    assert left > right > 0


@pytest.fixture
def reconstructed():
    """Maps, FSC curves and RELION's report, as `results/<scale>/` holds them, of a box of 16 voxels of 2 A."""
    squared = (np.arange(16) - 8) ** 2
    volume = (255 * np.exp(-(squared[:, None, None] + squared[:, None] + squared) / 20)).astype(np.uint8)
    frequency = np.arange(9) / 32
    stacks = ["clean", "halves/l2_ae/awgn-0.1-none", "table1/l2_ae/awgn-0.1-none"]
    falling = {"frequency": frequency, "halves_corrected": 1 - 3 * frequency, "truth_masked": 1 - 2 * frequency}
    curves = pd.concat([pd.DataFrame({"stack": stack} | falling) for stack in stacks])
    stored = {"pixel_size": 2.0, "enclosed": 0.2, "view": np.eye(3)}
    labels = {stack: f"label of {stack}" for stack in stacks}
    return {"truth": volume, "map": volume}, ["", "b", "d"], labels, curves, stored


def drawn(figure) -> tuple[list, list, set[str]]:
    """The lines of the two FSC panels and the words of the legend."""
    halves, truth = (ax for ax in figure.axes if "resolution" in ax.get_xlabel())
    legend = {text.get_text() for part in figure.subfigs for box in part.legends for text in box.get_texts()}
    return halves.lines, truth.lines, legend


def test_fsc_panels_hold_every_curve_and_say_that_relion_was_left_out(reconstructed):
    *given, stored = reconstructed
    relion = {"ran": False, "reason": "RELION left out", "stacks": {}}
    halves, truth, legend = drawn(figures.reconstructions(*given, relion, stored))
    assert legend == {*given[2].values(), "RELION left out"}
    styles = {line.get_label(): line.get_linestyle() for line in truth}
    assert (
        styles["label of halves/l2_ae/awgn-0.1-none"] == "--" and styles["label of table1/l2_ae/awgn-0.1-none"] == "-"
    )
    colours = {line.get_color() for line in truth if "l2_ae" in line.get_label()}
    assert colours == {methods.METHODS["l2_ae"].colour}
    for lines, threshold in ((halves, 0.143), (truth, 0.5)):
        assert [threshold] * 2 in [list(line.get_ydata()) for line in lines]


def test_relions_curves_are_drawn_where_it_ran(reconstructed):
    *given, stored = reconstructed
    found = {"frequency": [0, 0.1], "corrected": [1, 0.2], "truth": [1, 0.4]}
    relion = {"ran": True, "reason": "", "stacks": {"clean": found}}
    halves, truth, legend = drawn(figures.reconstructions(*given, relion, stored))
    assert "label of clean, poses by RELION" in legend and "" not in legend
    for lines, values in ((halves, [1, 0.2]), (truth, [1, 0.4])):
        (line,) = [line for line in lines if line.get_linestyle() == ":"]
        assert list(line.get_ydata()) == values


def test_ticks_of_fsc_stand_at_the_frequencies_they_name(reconstructed):
    *given, stored = reconstructed
    figure = figures.reconstructions(*given, {"ran": True, "reason": "", "stacks": {}}, stored)
    ax = next(ax for ax in figure.axes if "resolution" in ax.get_xlabel())
    for tick, label in zip(ax.get_xticks(), ax.get_xticklabels()):
        assert tick == pytest.approx(1 / float(label.get_text()))
    assert ax.get_xlim() == (0, 0.25)  # Nyquist of 2 A


def test_a_slice_is_the_one_asked_for():
    volume = np.arange(8, dtype=np.uint8)[:, None, None] * np.ones((8, 8, 8), np.uint8)
    figure = figures.show_slices({"a": volume, "b": volume}, 5)
    assert [ax.get_title() for ax in figure.axes] == ["a", "b"]
    assert all((ax.images[0].get_array() == 5).all() for ax in figure.axes)
