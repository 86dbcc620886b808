"""Scores of unseen particles do not depend on grey scales, and a painted blob shows in the profile."""

import numpy as np
import pytest

from cryo_lib.evaluate import metrics
from cryo_lib.evaluate.unseen import BROKEN, on_scale, radial_profile, scores


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    x = rng.random((5, 16, 16))
    x -= x.min(axis=(1, 2), keepdims=True)
    x /= x.max(axis=(1, 2), keepdims=True)
    return x, x + 0.2 * rng.standard_normal(x.shape)


def test_scores_are_the_same_on_every_grey_scale(images):
    x, x_hat = images
    plain, scaled = scores(x, x_hat), scores(7 * x - 3, 7 * x_hat - 3)
    for name in plain:
        np.testing.assert_allclose(plain[name], scaled[name])
    np.testing.assert_allclose(plain["psnr"], metrics.psnr(x, x_hat))  # on [0, 1]
    wanted = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(x, x_hat)]
    np.testing.assert_allclose(plain["correlation"], wanted)
    np.testing.assert_array_equal(scores(x, np.zeros_like(x))["correlation"], 0)


def test_one_scale_and_offset_bring_a_whole_stack_back():
    """However large the stack is: millions of float32 pixels are not a problem of single precision."""
    x = np.random.default_rng(0).random((400, 128, 128), np.float32)
    np.testing.assert_allclose(on_scale(x, 7 - 3 * x), x, atol=1e-5)
    np.testing.assert_allclose(on_scale(x, np.ones_like(x)), x.mean(), rtol=1e-4)
    x, x_hat = x[:4], x[4:8]
    slope, offset = np.polyfit(x_hat.ravel().astype(float), x.ravel().astype(float), 1)
    np.testing.assert_allclose(on_scale(x, x_hat), slope * x_hat + offset, atol=1e-6)


def test_an_image_is_broken_from_0_3_of_the_range_below_the_reference_on(images):
    x, _ = images
    x_hat = x.copy()
    x_hat[1, 3, 4], x_hat[2, 3, 4] = -BROKEN - 0.01, -BROKEN + 0.01
    np.testing.assert_array_equal(scores(x, x_hat)["broken"], [False, True, False, False, False])


def test_a_reference_that_does_not_vary_is_refused():
    with pytest.raises(ValueError, match="x: expected images that vary"):
        scores(np.zeros((2, 8, 8)), np.ones((2, 8, 8)))


def test_the_profile_of_a_function_of_the_radius_is_that_function():
    axis = np.arange(16) - 8
    image = np.rint(np.hypot(axis[:, None], axis)) ** 2
    mean, error = radial_profile([image, image])
    np.testing.assert_allclose(mean, np.arange(8) ** 2)
    np.testing.assert_allclose(error, 0)
    for images in ([image], np.zeros((2, 4, 6))):
        with pytest.raises(ValueError, match="images: expected two or more square ones"):
            radial_profile(images)


def test_a_blob_painted_in_every_image_stands_out_and_noise_does_not():
    """Of noise the profile is within its standard error; a tenth of a sd in the middle of each image is not."""
    noise = np.random.default_rng(1).standard_normal((400, 32, 32))
    mean, error = radial_profile(noise)
    assert np.square(mean / error).mean() == pytest.approx(1, abs=1)
    axis = np.arange(32) - 16
    blob = 0.1 * np.exp(-(axis[:, None] ** 2 + axis**2) / 50)
    painted, error = radial_profile(noise + blob)
    assert (painted / error)[2:6].min() > 5
    np.testing.assert_allclose((painted - mean)[0], 0.1, rtol=0.01)
