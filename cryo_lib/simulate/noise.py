"""Grey levels and noise, Eq. (1): images on [0, 1], noise at a signal-to-noise ratio, backgrounds and spectra."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.fft

from cryo_lib import checks
from cryo_lib.simulate.projection import resample, square

PROTOCOLS = ("awgn", "clipped")


def noise_sigma(x: Any, snr: float) -> np.ndarray:
    """Return the `(n,)` float64 noise standard deviations, `sqrt(Var(x_i) / snr)`, Var over the whole clean image.

    Raises
    ------
    TypeError, ValueError : `x` not finite `(n, h, w)` images that vary, or `snr` not a finite number > 0.
    """
    x = checks.as_images("x", x)
    snr = checks.number("snr", snr, above=0)
    checks.grey_range("x", x)
    parts = np.array_split(x, -(-len(x) // 256))  # the variance makes a float64 copy: of a part at a time
    return np.sqrt(np.concatenate([part.var(axis=(1, 2), dtype=np.float64) for part in parts]) / snr)


def add_noise(x: Any, snr: float, seed: Any, protocol: str = "awgn") -> np.ndarray:
    """Return noisy images, Eq. (1) with a the identity: y = x + noise, SNR = Var(x_i) / Var(noise_i) for every image.

    Parameters
    ----------
    x : `(n, h, w)` clean images, for "clipped" in [0, 1].
    snr : > 0.
    seed : as numpy's `default_rng` takes it. Noise is drawn image after image: the noise of the first m images does
        not depend on those that follow.
    protocol : "awgn", Gaussian noise as printed; "clipped", the same noise, then y clipped to [0, 1], which is what the
        paper's numbers suggest.

    Returns
    -------
    `(n, h, w)` float32; `x` is untouched.

    Raises
    ------
    TypeError, ValueError : see `noise_sigma`; an unknown protocol.
    """
    x = checks.as_images("x", x)
    checks.choice("protocol", protocol, PROTOCOLS)
    sigma = noise_sigma(x, snr).astype(np.float32)
    y = np.random.default_rng(seed).standard_normal(x.shape, dtype=np.float32)
    y *= sigma[:, None, None]
    y += x
    return np.clip(y, 0, 1, out=y) if protocol == "clipped" else y


def background(images: Any, reach: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and sd, `(m,)` float64 each, of every image's background.

    It lies outside the circle inscribed in the middle `reach` of the box (1: the whole), and inside that square;
    RELION's extraction, which has the same purpose, takes a circle of 75 % of the box.
    """
    images = checks.as_images("images", images)
    y, x = np.ogrid[tuple(slice(-1, 1, side * 1j) for side in images.shape[1:])]
    chosen = images[:, (np.hypot(y, x) > reach) & (np.maximum(abs(y), abs(x)) <= reach)]
    return chosen.mean(axis=1, dtype=float), chosen.std(axis=1, dtype=float)


def standardise(images: Any, pixel_size: float, n: int, to: float, contrast: str = "bright") -> np.ndarray:
    """Return particles on another grid, protein bright, the background of each of mean 0 and sd 1 (see `background`).

    Parameters
    ----------
    images, pixel_size, n, to : see `resample`; where the new box is larger than the image, 0 surrounds it.
    contrast : "bright", or "dark" for particles darker than their background: they are inverted.

    Returns
    -------
    `(m, n, n)` float32.

    Raises
    ------
    TypeError, ValueError : see `resample`; another contrast; a background that does not vary (the image is named).
    """
    sign = {"bright": 1, "dark": -1}[checks.choice("contrast", contrast, ("bright", "dark"))]
    images = square(images)
    reach = min(1.0, images.shape[1] * pixel_size / (n * to))
    level, _ = background(images)
    images = resample(images - level[:, None, None].astype(np.float32), pixel_size, n, to)
    mean, sd = background(images, reach)
    if not sd.all():
        raise ValueError(
            f"images: expected backgrounds that vary, got {int((sd == 0).sum())} constant of {len(images)}, the first "
            f"of image {int(np.argmin(sd))}; remove these images, or give stacks that were not masked"
        )
    images -= mean[:, None, None].astype(np.float32)
    images *= (sign / sd)[:, None, None].astype(np.float32)
    return images


def power_spectrum(images: Any, pixel_size: float) -> tuple[np.ndarray, np.ndarray]:
    """Return frequencies in 1/A and the rotationally averaged mean power of images at them, `(n // 2 + 1,)` each.

    Images are `(m, n, n)`; ValueError where they are not square.
    """
    images = square(images)
    n = images.shape[1]
    ring = np.rint(np.hypot(scipy.fft.fftfreq(n, 1 / n)[:, None], scipy.fft.rfftfreq(n, 1 / n))).astype(int)
    power = (np.abs(scipy.fft.rfft2(images)) ** 2).mean(axis=0) / n**2
    rings = np.bincount(ring.ravel(), power.ravel())[: n // 2 + 1] / np.bincount(ring.ravel())[: n // 2 + 1]
    return np.arange(n // 2 + 1) / (n * pixel_size), rings
