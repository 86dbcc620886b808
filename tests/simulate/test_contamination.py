"""Exactly who was replaced, by what, and nothing else."""

import math

import numpy as np
import pytest

from cryo_lib.simulate import projection
from cryo_lib.simulate.contamination import HARDER, Views, contaminate, correlations, screen


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    x = rng.random((103, 8, 8), dtype=np.float32)
    return x, x + rng.normal(0, 0.5, x.shape).astype(np.float32)


def changed(before, after):
    return (before != after).any(axis=(1, 2))


@pytest.mark.parametrize("unit", ["sample", "minibatch"])
@pytest.mark.parametrize("noise", ["gaussian", "uniform"])
@pytest.mark.parametrize("eps", [0, 0.1, 0.29, 0.3, 0.5, 1])
@pytest.mark.parametrize("kind", "ABC")
def test_exact_counts_and_nothing_else_touched(pair, kind, eps, noise, unit):
    x, y = pair
    before = x.copy(), y.copy()
    cx, cy, replaced = contaminate(x, y, kind, eps, 7, noise=noise, unit=unit, batch_size=10)
    assert replaced.sum() == math.floor(round(eps * 103, 9))
    np.testing.assert_array_equal(changed(x, cx), replaced & (kind in "AC"))
    np.testing.assert_array_equal(changed(y, cy), replaced & (kind in "BC"))
    np.testing.assert_array_equal(x, before[0])
    np.testing.assert_array_equal(y, before[1])
    assert cx.dtype == cy.dtype == np.float32


def test_floor_is_of_the_number_meant_not_of_its_binary_neighbour():
    x = np.random.default_rng(0).random((100, 2, 2))
    assert contaminate(x, x + 1, "A", 0.29, 0)[2].sum() == 29


def test_minibatches_are_replaced_whole(pair):
    replaced = contaminate(*pair, "A", 0.3, 1, unit="minibatch", batch_size=10)[2]
    per_block = [replaced[i : i + 10].sum() for i in range(0, 100, 10)]
    assert sum(count in (0, 10) for count in per_block) >= 9


def test_seed_fixes_the_choice_and_the_noise(pair):
    first, again, other = (contaminate(*pair, "C", 0.3, seed) for seed in (1, 1, 2))
    for a, b in zip(first, again):
        np.testing.assert_array_equal(a, b)
    assert (first[2] != other[2]).any()


def test_a_redraw_keeps_the_choice_and_changes_the_noise(pair):
    x0, _, first = contaminate(*pair, "A", 0.3, 1)
    x1, _, second = contaminate(*pair, "A", 0.3, 1, draw=1)
    np.testing.assert_array_equal(first, second)
    assert changed(x0, x1).sum() == first.sum()


def test_gaussian_noise_fills_the_grey_range_of_the_images_it_stands_among():
    rng = np.random.default_rng(0)
    x = rng.random((400, 16, 16))
    y = x + rng.normal(0.2, 2.0, x.shape)
    cx, cy, replaced = contaminate(x, y, "C", 0.5, 0)
    for before, noise in ((x, cx[replaced]), (y, cy[replaced])):
        np.testing.assert_allclose(noise.min(axis=(1, 2)), before.min(axis=(1, 2)).mean(), atol=1e-5)
        np.testing.assert_allclose(noise.max(axis=(1, 2)), before.max(axis=(1, 2)).mean(), atol=1e-5)
        standard = (noise - noise.mean(axis=(1, 2), keepdims=True)) / noise.std(axis=(1, 2), keepdims=True)
        assert np.mean(np.abs(standard) < 1) == pytest.approx(0.683, abs=0.01)
        assert np.mean(standard**4) == pytest.approx(3, abs=0.15)
    assert abs(np.corrcoef(cx[replaced].ravel(), cy[replaced].ravel())[0, 1]) < 0.02


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kind": "Z"}, "kind: expected one of A, B, C, S, O, J, I, got 'Z'"),
        ({"eps": -0.1}, "eps: expected a finite number >= 0 and <= 1, got -0.1"),
        ({"eps": 1.5}, "eps: expected a finite number >= 0 and <= 1, got 1.5"),
        ({"noise": "pink"}, "noise: expected one of gaussian, uniform, got 'pink'"),
        ({"unit": "epoch"}, "unit: expected one of sample, minibatch, got 'epoch'"),
        ({"x": np.zeros((4, 8, 8))}, r"x and y: expected the same shape, got \(4, 8, 8\) and \(103, 8, 8\)"),
        ({"y": np.full((103, 8, 8), np.nan)}, "y: expected finite pixels, got NaN or infinity in 103 of 103"),
    ],
)
def test_bad_input_is_named(pair, change, message):
    arguments = {"x": pair[0], "y": pair[1], "kind": "A", "eps": 0.1, "seed": 0} | change
    with pytest.raises(ValueError, match=message):
        contaminate(**arguments)


@pytest.fixture
def views():
    """Two conformations of unlike shape in the middle of a box, 40 references of them, and noisy images."""
    grid = np.arange(16) - 8
    z, y, x = np.meshgrid(grid, grid, grid, indexing="ij")
    volumes = np.exp([-(x**2 / a + y**2 / b + (z - 1) ** 2 / 3) for a, b in ((9, 2), (2, 4))]).astype(np.float32)
    rotations = projection.random_rotations(40, 0)
    conformations = np.arange(40) % 2
    references = projection.views(volumes, rotations, conformations)
    noisy = references + np.random.default_rng(1).normal(0, 0.5, references.shape).astype(np.float32)
    return references, noisy, Views(volumes, rotations, conformations)


@pytest.mark.parametrize("unit", ["sample", "minibatch"])
@pytest.mark.parametrize("eps", [0, 0.1, 0.29, 1])
@pytest.mark.parametrize("kind", HARDER)
def test_harder_kinds_touch_exactly_those_they_name(views, kind, eps, unit):
    x, y, source = views
    cx, cy, replaced = contaminate(x, y, kind, eps, 3, unit=unit, batch_size=10, views=source)
    assert replaced.sum() == math.floor(eps * 40 + 1e-9)
    np.testing.assert_array_equal(changed(x, cx), replaced & (kind != "I"))
    np.testing.assert_array_equal(changed(y, cy), replaced & (kind == "I"))
    again = contaminate(x, y, kind, eps, 3, unit=unit, batch_size=10, views=source)
    np.testing.assert_array_equal(cx, again[0])
    np.testing.assert_array_equal(cy, again[1])


def test_swapped_references_are_a_derangement(views):
    """Every reference is still there, once, and none of the chosen at its place."""
    x, y, _ = views
    cx, _, replaced = contaminate(x, y, "S", 0.5, 0)
    distance = np.abs(cx[:, None] - x[None]).max(axis=(2, 3))
    source = distance.argmin(axis=1)
    assert (distance.min(axis=1) == 0).all() and sorted(source) == list(range(40))
    np.testing.assert_array_equal(source != np.arange(40), replaced)


def test_another_conformation_keeps_the_pose(views):
    x, y, source = views
    cx, _, _ = contaminate(x, y, "O", 1.0, 0, views=source)
    expected = projection.views(source.volumes, source.rotations, 1 - source.conformations)
    np.testing.assert_allclose(cx, expected, atol=1e-6)


def test_of_several_other_conformations_each_is_as_likely():
    volumes = np.random.default_rng(0).random((4, 8, 8, 8)).astype(np.float32)
    source = Views(volumes, projection.random_rotations(600, 0), np.zeros(600, int))
    x = projection.views(volumes, source.rotations, source.conformations)
    cx, _, _ = contaminate(x, x, "O", 1.0, 0, views=source)
    candidates = np.stack([projection.views(volumes, source.rotations, np.full(600, k)) for k in range(4)])
    counts = np.bincount(np.abs(candidates - cx).max(axis=(2, 3)).argmin(axis=0), minlength=4)
    assert counts[0] == 0 and (np.abs(counts[1:] - 200) < 4 * np.sqrt(600 * 2 / 9)).all()


def test_imprecise_poses_are_off_by_the_degrees_and_pixels_asked_for(views):
    """Without either nothing changes; with pixels alone the centre of mass moves by that sd."""
    x, y, source = views
    same, _, _ = contaminate(x, y, "J", 1.0, 0, views=source, jitter_degrees=0.0, jitter_pixels=0.0)
    np.testing.assert_allclose(same, x, atol=1e-5)
    turned, _, _ = contaminate(x, y, "J", 1.0, 0, views=source, jitter_degrees=5.0, jitter_pixels=0.0)
    further, _, _ = contaminate(x, y, "J", 1.0, 0, views=source, jitter_degrees=20.0, jitter_pixels=0.0)
    assert 0 < np.square(turned - x).mean() < np.square(further - x).mean()
    moves, grid = [], np.arange(16) - 8
    for seed in range(20):
        moved, _, _ = contaminate(x, y, "J", 1.0, seed, views=source, jitter_degrees=0.0, jitter_pixels=0.7)
        for images, sign in ((moved, 1), (x, -1)):
            weight = images / images.sum(axis=(1, 2), keepdims=True)
            moves.append(sign * np.stack([(weight * grid).sum(axis=(1, 2)), (weight * grid[:, None]).sum(axis=(1, 2))]))
    found = np.concatenate([a + b for a, b in zip(moves[::2], moves[1::2])], axis=1)
    np.testing.assert_allclose(found.std(axis=1), 0.7, rtol=0.1)


def test_ice_is_one_to_three_bright_patches_of_a_few_sd():
    y = np.random.default_rng(0).normal(0, 2.0, (300, 64, 64)).astype(np.float32)
    _, cy, replaced = contaminate(y, y, "I", 1.0, 0)
    patches = (cy - y) / y.std(axis=(1, 2), keepdims=True)
    assert replaced.all() and patches.min() >= 0 and 0.2 < patches.max(axis=(1, 2)).min() and patches.max() < 9.1
    covered = (patches > 0.5).mean(axis=(1, 2))
    assert 0.003 < covered.min() and covered.max() < 3 * np.pi * 0.22**2 and covered.std() > 0.02


@pytest.mark.parametrize("kind", "OJ")
def test_kinds_that_project_anew_need_the_views_of_these_references(views, kind):
    x, y, source = views
    with pytest.raises(ValueError, match=f"kind {kind}: expected the `views` that .* were projected from, got None"):
        contaminate(x, y, kind, 0.1, 0)
    with pytest.raises(
        ValueError,
        match=r"views: expected volumes, rotations and .* of shapes \(\(16, 16, 16\), \(20, 3, 3\), \(20,\)\)",
    ):
        contaminate(x[:20], y[:20], kind, 0.1, 0, views=source)


def test_one_pair_cannot_be_swapped_and_one_conformation_has_no_other(views):
    x, y, source = views
    with pytest.raises(ValueError, match="kind S: expected two or more pairs to swap .* between, got 1; raise eps"):
        contaminate(x, y, "S", 1 / 40, 0)
    with pytest.raises(ValueError, match="kind O: expected volumes of two or more conformations, got 1"):
        contaminate(x, y, "O", 0.5, 0, views=Views(source.volumes[:1], source.rotations, 0 * source.conformations))


@pytest.fixture(scope="module")
def world():
    """400 pairs of blobs in white noise at SNR 0.2: like the paper's, a good pair correlates by 0.41 +- 0.03."""
    rng = np.random.default_rng(3)
    at, rows, columns = rng.uniform(8, 16, (2, 400, 1, 1)), np.arange(24)[:, None], np.arange(24)
    x = np.exp(-((rows - at[0]) ** 2 + (columns - at[1]) ** 2) / rng.uniform(4, 30, (400, 1, 1)))
    noise = rng.standard_normal((40, *x.shape)).astype(np.float32)
    return x, x + noise * (x.std(axis=(1, 2), keepdims=True) / np.sqrt(0.2)).astype(np.float32)


def test_correlations_are_pearsons(world):
    x, y = world
    expected = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(x[:5], y[0, :5])]
    np.testing.assert_allclose(correlations(x[:5], y[0, :5]), expected, rtol=1e-6)


def test_a_screen_of_good_pairs_leaves_some_out_as_rarely_as_its_rate_says(world):
    """Where no pair is bad, the rate is that of leaving any out: 0.1 of 40 draws, rarely above 10."""
    x, noisy = world
    assert sum(not screen(x, y, 0.1).all() for y in noisy) <= 10


@pytest.mark.parametrize("kind", "ABCS")
@pytest.mark.parametrize("eps", [0.05, 0.3, 0.45])
def test_a_screen_finds_bad_pairs_and_few_good_ones_go_with_them(world, kind, eps):
    x, noisy = world
    mistakes, found = [], []
    for seed, y in enumerate(noisy[:8]):
        *pairs, bad = contaminate(x, y, kind, eps, seed)
        left_out = ~screen(*pairs, 0.1)
        mistakes.append((left_out & ~bad).sum() / max(1, left_out.sum()))
        found.append(left_out[bad].mean())
    assert np.mean(mistakes) < 0.1 + 3 * 0.1 / np.sqrt(8) and np.mean(found) > (0.99 if kind != "S" else 0.7)


@pytest.mark.parametrize(
    "count, fdr, message",
    [
        (19, 0.05, "pairs: expected at least 20"),
        (30, 0, "fdr: expected a finite number > 0"),
        (30, 0.6, "fdr: expected"),
    ],
)
def test_a_screen_names_bad_input(world, count, fdr, message):
    with pytest.raises(ValueError, match=message):
        screen(world[0][:count], world[1][0, :count], fdr)


def test_a_constant_image_has_no_correlation(world):
    x = world[0][:30].copy()
    x[7] = 0.5
    with pytest.raises(ValueError, match="got a constant one in pair 7"):
        screen(x, world[1][0, :30])
