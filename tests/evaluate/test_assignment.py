"""Conformations: agreement is that of the textbooks, and separable images are separated."""

import warnings

import numpy as np
import pytest

from cryo_lib.evaluate import assignment
from cryo_lib.simulate import noise, projection


def test_agreement_does_not_depend_on_names_and_is_zero_by_chance():
    truth = np.repeat(np.arange(4), 50)
    renamed = np.array([7, 3, 9, 1])[truth]
    assert assignment.agreement(truth, renamed) == {"ari": 1.0, "accuracy": 1.0}
    shuffled = np.random.default_rng(0).permutation(truth)
    by_chance = assignment.agreement(truth, shuffled)
    assert abs(by_chance["ari"]) < 0.03 and 0.25 <= by_chance["accuracy"] < 0.4


def test_agreement_matches_hand_counts():
    """Two classes of 4; clusters {3 of the first, 1 of the second}, {1, 3}: accuracy 6/8, Rand index 16/28."""
    scores = assignment.agreement([0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 0, 1, 1, 1])
    pairs, expected = 3 + 0 + 0 + 3, 12 * 12 / 28
    assert scores["accuracy"] == 0.75 and scores["ari"] == pytest.approx((pairs - expected) / (12 - expected))


def test_more_or_fewer_clusters_than_classes_still_match():
    truth = np.repeat([0, 1], 6)
    assert assignment.agreement(truth, np.repeat([0, 1, 2, 3], 3))["accuracy"] == 0.5
    assert assignment.agreement(truth, np.zeros(12, int))["accuracy"] == 0.5


@pytest.fixture(scope="module")
def states():
    """Three volumes that differ in one blob, their projections at 60 poses and which each shows."""
    axis = np.arange(32) - 16
    z, y, x = np.meshgrid(axis, axis, axis, indexing="ij")
    body = np.exp(-(x**2 + y**2 + z**2) / 30)
    volumes = [body + np.exp(-((x - 8) ** 2 + (y - shift) ** 2 + z**2) / 6) for shift in (-6, 0, 6)]
    rotations, shown = projection.random_views(60, 3, 0)
    return volumes, rotations, shown


def test_the_nearest_projection_is_the_right_one_whatever_gain_and_offset(states):
    volumes, rotations, shown = states
    images = projection.views(volumes, rotations, shown)
    templates = [projection.project(volume, rotations) for volume in volumes]
    gain = np.linspace(0.5, 2, 60)[:, None, None]
    assert (assignment.nearest(gain * images - 3, templates) == shown).all()


def test_noise_makes_the_nearest_projection_worse_towards_chance(states):
    volumes, rotations, shown = states
    templates = [projection.project(volume, rotations) for volume in volumes]
    images = projection.views(volumes, rotations, shown)
    right = [
        np.mean(assignment.nearest(noise.add_noise(images, snr, 1), templates) == shown) for snr in (10, 0.02, 1e-5)
    ]
    assert right[0] > right[1] > right[2] and right[2] < 0.6


def test_states_in_one_view_are_found_without_labels(states):
    volumes, _, _ = states
    shown = np.arange(60) % 3
    rotations = projection.jittered(np.eye(3), 60, 0.5, 0)
    images = noise.add_noise(projection.views(volumes, rotations, shown), 2.0, 0)
    components = assignment.principal_components(images, 5)
    assert components.shape == (60, 5)
    assert assignment.agreement(shown, assignment.cluster(components, 3))["ari"] == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a graph of neighbours that falls apart is no news here
        maps = assignment.embed(components)
    for points in maps.values():
        assert points.shape == (60, 2) and np.isfinite(points).all()
        assert assignment.agreement(shown, assignment.cluster(points, 3))["ari"] > 0.9


def test_the_same_points_give_the_same_map_bit_for_bit():
    points = np.random.default_rng(0).standard_normal((300, 10))
    first, second = assignment.embed(points), assignment.embed(points)
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


def test_templates_of_another_size_are_named():
    with pytest.raises(ValueError, match=r"images and templates\[1\]: expected the same shape"):
        assignment.nearest(np.ones((2, 8, 8)), [np.ones((2, 8, 8)), np.ones((2, 9, 9))])
