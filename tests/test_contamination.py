"""Exactly who was replaced, by what, and nothing else."""

import math

import numpy as np
import pytest

from cryo_lib.contamination import contaminate


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
        ({"kind": "Z"}, "kind: expected one of A, B, C, got 'Z'"),
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
