"""Noise at the SNR that was asked for; backgrounds and spectra."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from cryo_lib.simulate import noise, projection
from tests.simulate.blobs import Blobs


@pytest.fixture(scope="module")
def clean():
    blobs = Blobs(48, reach=14)
    images, _, _ = projection.simulate([blobs.volume()], 60, seed=1)
    return images


@pytest.mark.parametrize("snr", [0.05, 0.1, 2.0])
def test_the_snr_is_met_image_by_image(clean, snr):
    added = noise.add_noise(clean, snr, seed=0) - clean
    realised = clean.var(axis=(1, 2)) / added.var(axis=(1, 2))
    assert np.mean(realised) == pytest.approx(snr, rel=0.02)
    np.testing.assert_allclose(realised, snr, rtol=5 * np.sqrt(2 / clean[0].size))  # 5 sd of a sample variance
    np.testing.assert_allclose(added.std(axis=(1, 2)), noise.noise_sigma(clean, snr), rtol=0.08)


def test_the_noise_is_gaussian_white_and_independent(clean):
    added = noise.add_noise(clean, 0.1, seed=0) - clean
    added /= noise.noise_sigma(clean, 0.1)[:, None, None]
    assert stats.kstest(added.ravel(), "norm").pvalue > 0.01
    power = (np.abs(np.fft.fft2(added)) ** 2).mean(axis=0)[:, 1:24] / added[0].size
    assert stats.kstest(power.ravel() * 2 * len(added), stats.chi2(2 * len(added)).cdf).pvalue > 0.01
    lag = np.corrcoef(added[:-1].ravel(), added[1:].ravel())[0, 1]
    assert abs(lag) < 4 / np.sqrt(added[1:].size)


def test_clipped_is_awgn_clipped(clean):
    awgn, clipped = (noise.add_noise(clean, 0.1, seed=4, protocol=protocol) for protocol in noise.PROTOCOLS)
    assert awgn.min() < 0 and awgn.max() > 1
    assert clipped.min() == 0 and clipped.max() == 1
    np.testing.assert_array_equal(clipped, np.clip(awgn, 0, 1))


def test_binned_noise_is_that_of_the_larger_images_cropped(clean):
    """In the band that both hold, but for its edge, which a crop folds, its power is theirs, and so is the SNR."""
    large = projection.resample(clean, 1 / 48, 128, 1 / 128)
    theirs = noise.add_noise(large, 0.1, seed=0) - large
    cropped = projection.resample(theirs, 1 / 128, 48, 1 / 48)
    ours = noise.add_noise(clean, 0.1, seed=1, binned_from=128) - clean
    powers = [noise.power_spectrum(images, 1.0)[1][:23] for images in (ours, cropped)]
    np.testing.assert_allclose(powers[0], powers[1], rtol=0.2)
    assert powers[0][2:].mean() == pytest.approx(powers[1][2:].mean(), rel=0.02)
    assert clean.var() / ours.var() == pytest.approx(0.1 * (128 / 48) ** 2, rel=0.02)
    np.testing.assert_allclose(large.var(axis=(1, 2)), clean.var(axis=(1, 2)), rtol=0.02)


def test_binned_images_are_clipped_before_the_crop(clean):
    large = projection.resample(clean, 1 / 48, 128, 1 / 128)
    theirs = noise.add_noise(large, 0.1, seed=4, protocol="clipped")
    ours = noise.add_noise(clean, 0.1, seed=4, protocol="clipped", binned_from=128)
    np.testing.assert_allclose(ours, projection.resample(theirs, 1 / 128, 48, 1 / 48), atol=2e-3)
    np.testing.assert_array_equal(
        ours[:7], noise.add_noise(clean[:7], 0.1, seed=4, protocol="clipped", binned_from=128)
    )
    with pytest.raises(ValueError, match="binned_from: expected an integer >= 48"):
        noise.add_noise(clean, 0.1, seed=4, binned_from=32)


def test_noise_follows_the_seed_and_the_order_only(clean):
    untouched = clean.copy()
    y = noise.add_noise(clean, 0.1, seed=7)
    assert y.dtype == np.float32 and y.shape == clean.shape
    np.testing.assert_array_equal(clean, untouched)
    np.testing.assert_array_equal(y, noise.add_noise(clean, 0.1, seed=7))
    np.testing.assert_array_equal(y[:13], noise.add_noise(clean[:13], 0.1, seed=7))
    assert not np.allclose(y, noise.add_noise(clean, 0.1, seed=8))


def test_noise_refuses_bad_input(clean):
    constant, broken = clean.copy(), clean.copy()
    constant[5], broken[3, 0, 0] = 0.1, np.nan
    for arguments, message in [
        ((clean, 0.0, 1), "snr: expected a finite number > 0.*got 0.0"),
        ((clean, -1.0, 1), "snr"),
        ((clean, np.inf, 1), "snr: expected a finite"),
        ((clean, np.nan, 1), "snr: expected a finite"),
        ((constant, 0.1, 1), "x: expected images that vary, got 1 constant of 60, the first is image 5"),
        ((broken, 0.1, 1), "x: expected finite pixels.*the first is image 3"),
        ((1e39 * (constant == 0.1), 0.1, 1), "x: expected finite pixels.*in 1 of 60 images, the first is image 5"),
        ((clean, 0.1, 1, "poisson"), "protocol: expected one of awgn, clipped, got 'poisson'"),
    ]:
        with pytest.raises(ValueError, match=message):
            noise.add_noise(*arguments)
    with pytest.raises(TypeError, match="snr: expected a number, got '0.1'"):
        noise.noise_sigma(clean, "0.1")


@pytest.mark.parametrize("contrast, sign", [("bright", 1), ("dark", -1)])
@pytest.mark.parametrize("n, to", [(48, 1.0), (32, 1.0), (24, 2.0), (64, 1.0)])
def test_standardised_backgrounds_have_mean_0_and_sd_1(contrast, sign, n, to):
    """Also where a larger box surrounds the image with 0; a bright disc comes out bright, a dark one inverted."""
    rng = np.random.default_rng(0)
    y, x = np.ogrid[-1:1:48j, -1:1:48j]
    images = 7 + sign * 3 * (np.hypot(x, y) < 0.3) + 2 * rng.normal(size=(50, 48, 48))
    ours = noise.standardise(images, 1.0, n, to, contrast)
    mean, sd = noise.background(ours, min(1.0, 48 / (n * to)))
    np.testing.assert_allclose(mean, 0, atol=1e-5)
    np.testing.assert_allclose(sd, 1, rtol=1e-5)
    assert ours[:, n // 2, n // 2].mean() > 1


def test_a_background_that_does_not_vary_is_named():
    images = np.random.default_rng(0).normal(size=(3, 16, 16))
    y, x = np.ogrid[-1:1:16j, -1:1:16j]
    images[1][np.hypot(y, x) > 1] = 0
    with pytest.raises(ValueError, match="expected backgrounds that vary, got 1 constant of 3, the first of image 1"):
        noise.standardise(images, 1.0, 16, 1.0)


def test_the_power_spectrum_of_white_noise_is_flat_at_its_variance():
    images = 3 * np.random.default_rng(0).normal(size=(200, 32, 32))
    frequency, power = noise.power_spectrum(images, 2.0)
    np.testing.assert_allclose(power[2:], 9, rtol=0.1)
    assert frequency[-1] == pytest.approx(0.25) and len(frequency) == 17
    with pytest.raises(ValueError, match="images: expected square ones, got 16 x 20; crop or pad them"):
        noise.power_spectrum(np.ones((1, 16, 20)), 1.0)
