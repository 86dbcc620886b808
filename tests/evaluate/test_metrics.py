"""The metrics equal scikit-image's, image by image."""

import numpy as np
import pytest
import torch
from skimage import metrics as reference

from cryo_lib.evaluate import metrics


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    x = rng.random((4, 24, 31)).astype(np.float32)
    return x, (x + rng.normal(0, 0.2, x.shape)).astype(np.float32)


@pytest.mark.parametrize("data_range", [1.0, 2.0])
def test_values_equal_those_of_scikit_image(pair, data_range):
    x, x_hat = (a.astype(np.float64) for a in pair)
    ssim = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": data_range}
    for i in range(len(x)):
        assert metrics.mse(*pair)[i] == pytest.approx(reference.mean_squared_error(x[i], x_hat[i]), rel=1e-12)
        expected = reference.peak_signal_noise_ratio(x[i], x_hat[i], data_range=data_range)
        assert metrics.psnr(*pair, data_range=data_range)[i] == pytest.approx(expected, rel=1e-12)
        expected = reference.structural_similarity(x[i], x_hat[i], **ssim)
        assert metrics.ssim(*pair, data_range=data_range)[i] == pytest.approx(expected, rel=1e-9)


def test_shapes_and_dtypes(pair):
    for metric in (metrics.mse, metrics.psnr, metrics.ssim):
        value = metric(torch.from_numpy(pair[0]), pair[1])
        assert value.shape == (4,) and value.dtype == np.float64


def test_identical_images_are_perfect(pair):
    x = pair[0]
    assert (metrics.mse(x, x) == 0).all() and np.isinf(metrics.psnr(x, x)).all()
    np.testing.assert_allclose(metrics.ssim(x, x), 1)


def test_jensen_mean_psnr_is_at_least_psnr_of_the_mean(pair):
    assert metrics.psnr(*pair).mean() >= -10 * np.log10(metrics.mse(*pair).mean())


@pytest.mark.parametrize("metric", [metrics.mse, metrics.psnr, metrics.ssim])
def test_bad_input_is_named(metric, pair):
    x, x_hat = pair
    with pytest.raises(ValueError, match=r"expected images of shape \(n, h, w\)"):
        metric(x[0], x_hat[0])
    with pytest.raises(ValueError, match="expected the same shape"):
        metric(x, x_hat[:2])
    x_hat[2, 0, 0] = np.nan
    with pytest.raises(
        ValueError, match="x_hat: expected finite pixels, got NaN or infinity in 1 of 4 images, the first is image 2"
    ):
        metric(x, x_hat)


def test_images_too_small_for_the_window_are_refused():
    with pytest.raises(ValueError, match="at least 11 x 11 px, got 8 x 8"):
        metrics.ssim(np.zeros((1, 8, 8)), np.zeros((1, 8, 8)))


def test_fourier_ring_correlation_is_that_of_its_definition():
    """Summed ring by ring over the full Fourier transform, pixel by pixel."""
    rng = np.random.default_rng(0)
    x = rng.random((2, 9, 9))
    x_hat = x + rng.normal(0, 0.3, x.shape)
    for n in (9, 8):
        for a, b, found in zip(x, x_hat, metrics.frc(x[:, :n, :n], x_hat[:, :n, :n])):
            a, b = np.fft.fft2(a[:n, :n]), np.fft.fft2(b[:n, :n])
            sums = np.zeros((3, n))
            for i, j in np.ndindex(n, n):
                ring = round(np.hypot(min(i, n - i), min(j, n - j)))
                sums[:, ring] += (a[i, j] * b[i, j].conj()).real, abs(a[i, j]) ** 2, abs(b[i, j]) ** 2
            expected = sums[0] / np.sqrt(sums[1] * sums[2] + 1e-300)
            np.testing.assert_allclose(found, expected[: n // 2 + 1], atol=1e-10)


def test_no_radial_filter_changes_the_fourier_ring_correlation():
    """Nearly: a smooth filter weights the frequencies of a ring nearly alike; a step between rings is exact."""
    rng = np.random.default_rng(0)
    x = rng.random((3, 32, 32))
    y = x + rng.normal(0, 1.0, x.shape)
    ring = np.rint(np.hypot(np.fft.fftfreq(32)[:, None], np.fft.fftfreq(32)) * 32)
    filtered = np.fft.ifft2(np.fft.fft2(y) / (1 + ring) ** 2).real
    np.testing.assert_allclose(metrics.frc(x, filtered), metrics.frc(x, y), atol=1e-9)
    assert metrics.mse(x, filtered).mean() < metrics.mse(x, y).mean() / 2
    np.testing.assert_allclose(metrics.frc(x, x), 1)


def test_rings_need_square_images():
    with pytest.raises(ValueError, match="needs square images, got 8 x 9"):
        metrics.frc(np.ones((1, 8, 9)), np.ones((1, 8, 9)))
