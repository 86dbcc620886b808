"""The principal component over volumes: scores of the states that were mixed, whatever the images' grey scale."""

import numpy as np
import pytest

from cryo_lib.evaluate import reconstruction, variability
from cryo_lib.simulate import density, projection
from cryo_lib.simulate.phantom import phantom

BOX, PIXEL, N = 28, 7.3, 300


@pytest.fixture(scope="module")
def stack():
    """Noisy images of the phantom, closed and open; their states, rotations, and the mean map's projections."""
    first, last = (density.density(atoms, BOX, PIXEL, 2.5 * PIXEL) for atoms in phantom(2))
    rotations, state = projection.random_rotations(N, 0), np.arange(N) % 2
    x = np.where(state[:, None, None] == 0, projection.project(first, rotations), projection.project(last, rotations))
    noise = np.random.default_rng(1).normal(0, 0.5 * x.std(), x.shape)
    mean = reconstruction.reconstruct(x + noise, rotations)
    return (x + noise).astype(np.float32), state, rotations, projection.project(mean, rotations)


def test_scores_tell_the_states_apart_without_labels(stack):
    images, state, rotations, seen = stack
    scores = variability.principal_scores(images, seen, rotations, PIXEL, resolution=30.0)
    assert abs(np.corrcoef(scores, state)[0, 1]) > 0.8
    assert scores.mean() == pytest.approx(0, abs=1e-5) and scores.std() == pytest.approx(1, abs=1e-5)


def test_gains_and_offsets_are_undone(stack):
    images, _, _, seen = stack
    gains = np.random.default_rng(3).uniform(0.5, 2, (N, 1, 1)).astype(np.float32)
    np.testing.assert_allclose(
        variability.on_one_scale(gains * images + 3 * gains, seen), variability.on_one_scale(images, seen), atol=2e-3
    )
    np.testing.assert_allclose(variability.on_one_scale(gains * seen - 1, seen), seen, atol=1e-3)


def test_an_image_unlike_its_projection_is_named(stack):
    images, _, _, seen = stack
    wrong = np.concatenate([seen[:5], -seen[5:6], seen[6:]])
    with pytest.raises(ValueError, match="got 1 that do not, the first is image 5"):
        variability.on_one_scale(wrong, seen)
