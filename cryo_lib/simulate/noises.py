"""Kinds of noise of one level, so that nothing but the kind differs: white or not, independent of the particle or not.

| kind | noise |
|---|---|
| white | Gaussian and white, as `noise.add_noise` adds it |
| shot | of counted electrons (Poisson): its variance is the intensity, which is less where protein is bright |
| ice | that of the stand-in (`standin.noise`): shot noise, what the ice scatters through the CTF, gradients |
| coloured | Gaussian, the power 1 + height / (1 + (k / width)^2), `FOG`, k in cycles a pixel |
| particle | Gaussian, white where x is constant; its sd grows with x, to 1 + `GROWTH` times that of the background |
| heavy | white, of Student's t distribution with `TAILS` degrees of freedom |

All but the ice are made of the same normal deviates where the seed is the same, and the ice is made of them as well.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.fft
from scipy import stats

from cryo_lib import checks
from cryo_lib.simulate import standin
from cryo_lib.simulate.noise import noise_sigma
from cryo_lib.simulate.projection import square

KINDS = {
    "white": "white",
    "shot": "shot noise",
    "ice": "ice that scatters",
    "coloured": "coloured",
    "particle": "grows with the particle",
    "heavy": "heavy tails",
}
DOSE = 20.0  # electrons / A^2, of EMPIAR-10028 (Wong et al. 2014), which the stand-in stands for
FOG = (10.0, 0.05)  # height and width of the Lorentzian, as `general` draws them: power, and cycles a pixel
GROWTH = 4.0
TAILS = 3.0


def add(x: Any, kind: str, snr: float, seed: Any, pixel_size: float, binned_from: int | None = None) -> np.ndarray:
    """Return noisy images, `(n, h, h)` float32: the noise of image i has the mean square `noise_sigma(x, snr)[i] ** 2`.

    Parameters
    ----------
    x : clean images `(n, h, h)`, protein bright. kind : a key of `KINDS`.
    snr, binned_from : as of `noise.noise_sigma`. seed : an integer >= 0, or several.
    pixel_size : A.

    Raises
    ------
    TypeError, ValueError : see `noise_sigma`; images that are not square; an unknown kind; a dose so low that the
        contrast of an image would have to be more than 1.
    """
    x = square(x, "x")
    checks.choice("kind", kind, KINDS)
    pixel_size, sigma = checks.number("pixel_size", pixel_size, above=0), noise_sigma(x, snr, binned_from)
    if kind == "ice":
        parameters = standin.microscope(len(x), np.random.SeedSequence(seed).spawn(1)[0])
        drawn = standin.noise(parameters, x.shape[1], pixel_size, np.random.default_rng(seed))
    else:
        drawn = np.random.default_rng(seed).standard_normal(x.shape, np.float32)
    if kind == "shot":
        drawn = _shot(x, sigma, drawn, DOSE * pixel_size**2)
    elif kind == "coloured":
        drawn = filtered(drawn, lorentzian(x.shape[1], *FOG))
    elif kind == "particle":
        low, high = (level[:, None, None] for level in checks.grey_range("x", x))
        drawn = drawn * (1 + GROWTH * (x - low) / (high - low))
    elif kind == "heavy":
        drawn = stats.t.ppf(stats.norm.cdf(drawn.astype(np.float64)), TAILS)
    scale = sigma / np.sqrt(np.square(drawn, dtype=np.float64).mean(axis=(1, 2)))
    return (x + scale[:, None, None] * drawn).astype(np.float32)


def lorentzian(n: int, height: float, width: float) -> np.ndarray:
    """The power 1 + height / (1 + (k / width)^2), `(n, n // 2 + 1)` float32, of n px images; k in cycles a pixel."""
    squared = (scipy.fft.fftfreq(n)[:, None] ** 2 + scipy.fft.rfftfreq(n) ** 2).astype(np.float32)
    return 1 + height / (1 + squared / width**2)


def filtered(white: np.ndarray, power: np.ndarray) -> np.ndarray:
    """White noise `(m, n, n)` float32 of variance 1 with a spectrum in proportion to `power`, still of variance 1.

    power : `(n, n // 2 + 1)`, or one for each image, `(m, n, n // 2 + 1)`.
    """
    n = white.shape[-1]
    twice = np.where(np.arange(n // 2 + 1) % (n / 2) == 0, 1, 2)  # columns that stand for their mates as well
    power = (power / ((power * twice).sum(axis=(-2, -1), keepdims=True) / n**2)).astype(np.float32)
    return scipy.fft.irfft2(scipy.fft.rfft2(white) * np.sqrt(power), s=(n, n))


def _shot(x: np.ndarray, sigma: np.ndarray, white: np.ndarray, electrons: float) -> np.ndarray:
    """Electrons that are missing in each pixel, where `electrons` are expected in the mean over an image.

    The contrast is that with which their variance is sigma^2 on the scale of x.
    """
    contrast = (x - x.mean(axis=(1, 2), keepdims=True)) / (sigma * np.sqrt(electrons))[:, None, None]
    if contrast.max() >= 1:
        raise ValueError(
            f"pixel_size: expected electrons enough in each pixel, got {electrons:.3g}, with which the contrast would "
            f"have to be {contrast.max():.3g}; take larger pixels, or a lower snr"
        )
    intensity = electrons * (1 - contrast)
    return intensity - stats.poisson.ppf(stats.norm.cdf(-white.astype(np.float64)), intensity)
