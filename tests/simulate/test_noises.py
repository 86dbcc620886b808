"""Kinds of noise: of one level, of mean 0 given the particle, each with the variance or spectrum that it says."""

import numpy as np
import pytest
from scipy import stats

from cryo_lib.simulate import noise, noises, projection
from tests.simulate.blobs import Blobs

PIXEL, SNR, COPIES = 2.0, 0.1, 3000  # A; few electrons in a pixel, so that shot noise is far from Gaussian


@pytest.fixture(scope="module")
def clean():
    images, _, _ = projection.simulate([Blobs(32, reach=9).volume()], 24, seed=1)
    return images


@pytest.fixture(scope="module")
def drawn(clean):
    """Noise of every kind on copies of one image."""
    x = np.broadcast_to(clean[:1], (COPIES, *clean.shape[1:]))
    return {kind: noises.add(x, kind, SNR, 3, PIXEL) - x for kind in noises.KINDS}


def slope(variance, on):
    """Of variances relative to their mean on another number relative to its, by least squares."""
    return np.polyfit((on / on.mean()).ravel(), (variance / variance.mean()).ravel(), 1)[0]


@pytest.mark.parametrize("binned_from", [None, 80])
@pytest.mark.parametrize("kind", noises.KINDS)
def test_every_image_has_exactly_the_noise_that_was_asked_for(clean, kind, binned_from):
    before = clean.copy()
    y = noises.add(clean, kind, SNR, 0, PIXEL, binned_from)
    level = np.sqrt(np.square(y.astype(float) - clean).mean(axis=(1, 2)))
    np.testing.assert_allclose(level, noise.noise_sigma(clean, SNR, binned_from), rtol=1e-5)
    np.testing.assert_array_equal(clean, before)
    assert y.dtype == np.float32 and np.array_equal(y, noises.add(clean, kind, SNR, 0, PIXEL, binned_from))


@pytest.mark.parametrize("kind", noises.KINDS)
def test_given_the_clean_image_the_mean_of_the_noise_is_0(drawn, kind):
    each = drawn[kind].astype(float)
    z = each.mean(axis=0) / each.std(axis=0) * np.sqrt(COPIES)
    assert np.abs(z).max() < 5.5
    if kind not in ("ice", "coloured"):  # neighbours are independent, and so are their means
        assert stats.kstest(z.ravel(), "norm").pvalue > 1e-3


def test_white_is_the_noise_that_networks_are_trained_on_but_for_its_level(clean):
    ours, theirs = noises.add(clean, "white", SNR, 5, PIXEL) - clean, noise.add_noise(clean, SNR, 5) - clean
    ratio = (ours * theirs).sum(axis=(1, 2)) / np.square(theirs).sum(axis=(1, 2))
    np.testing.assert_allclose(ours, ratio[:, None, None] * theirs, atol=1e-5)


def test_the_variance_of_shot_noise_is_the_intensity_which_protein_lessens(clean, drawn):
    """An image of N electrons a pixel and contrast c x has the SNR N Var(c x), and the skewness of counts."""
    x, n = clean[0].astype(float), noises.DOSE * PIXEL**2
    intensity = 1 - (x - x.mean()) / x.std() * np.sqrt(SNR / n)
    found = slope(drawn["shot"].var(axis=0, dtype=float), intensity)
    error = np.sqrt(2 / COPIES / x.size) / intensity.std()
    assert found == pytest.approx(1, abs=5 * error) and error < 0.06
    skewness = stats.skew(-drawn["shot"][:, intensity > 1], axis=None)
    assert skewness == pytest.approx(n**-0.5, rel=0.1)


def test_the_sd_of_noise_that_grows_with_the_particle_does(clean, drawn):
    x = clean[0].astype(float)
    wanted = 1 + noises.GROWTH * (x - x.min()) / (x.max() - x.min())
    ratio = drawn["particle"].std(axis=0, dtype=float) / wanted
    np.testing.assert_allclose(ratio, ratio.mean(), rtol=6 / np.sqrt(2 * COPIES))


def test_heavy_tails_are_those_of_students_t(drawn):
    standard = drawn["heavy"].ravel() / drawn["heavy"].std() * stats.t(noises.TAILS).std()
    quantiles = np.array([0.75, 0.9, 0.99, 0.999])
    np.testing.assert_allclose(np.quantile(standard, quantiles), stats.t(noises.TAILS).ppf(quantiles), rtol=0.05)


def test_a_spectrum_is_that_which_was_asked_for():
    n, power = 32, noises.lorentzian(32, *noises.FOG)
    images = noises.filtered(np.random.default_rng(0).standard_normal((12000, n, n), np.float32), power)
    found = noise.power_spectrum(images, 1.0)[1]
    ring = np.rint(np.hypot(*np.meshgrid(np.fft.rfftfreq(n, 1 / n), np.fft.fftfreq(n, 1 / n)))).astype(int)
    k = np.hypot(*np.meshgrid(np.fft.rfftfreq(n), np.fft.fftfreq(n)))
    formula = 1 + noises.FOG[0] / (1 + (k / noises.FOG[1]) ** 2)
    wanted = np.array([formula[ring == r].mean() for r in range(n // 2 + 1)])
    np.testing.assert_allclose(found[1:] / wanted[1:], (found[1:] / wanted[1:]).mean(), rtol=0.02)
    assert images.var() == pytest.approx(1, rel=0.01)
    whole = 1 + noises.FOG[0] / (1 + (np.hypot(*np.meshgrid(*2 * [np.fft.fftfreq(n)])) / noises.FOG[1]) ** 2)
    assert (found[1:] / wanted[1:]).mean() == pytest.approx(1 / whole.mean(), rel=0.02)


def test_ice_and_coloured_noise_are_not_white_and_the_others_are(drawn):
    for kind, each in drawn.items():
        rings = noise.power_spectrum(each, PIXEL)[1][1:]
        uneven = rings[:3].mean() / rings[-3:].mean()
        assert uneven > 1.2 if kind in ("ice", "coloured") else uneven == pytest.approx(1, abs=0.05), kind


def test_what_cannot_be_is_refused(clean):
    with pytest.raises(ValueError, match="kind: expected one of white, shot"):
        noises.add(clean, "pink", SNR, 0, PIXEL)
    with pytest.raises(ValueError, match="pixel_size: expected electrons enough in each pixel, got 0.2"):
        noises.add(clean, "shot", SNR, 0, 0.1)
    with pytest.raises(ValueError, match="pixel_size"):
        noises.add(clean, "white", SNR, 0, 0)
