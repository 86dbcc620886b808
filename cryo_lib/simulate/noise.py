"""Grey levels and noise, Eq. (1): images on [0, 1], noise at a signal-to-noise ratio, backgrounds and spectra."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.fft

from cryo_lib import checks
from cryo_lib.simulate.projection import resample, square

PROTOCOLS = ("awgn", "clipped")


def noise_sigma(x: Any, snr: float, binned_from: int | None = None) -> np.ndarray:
    """Return the `(n,)` float64 noise standard deviations, `sqrt(Var(x_i) / snr)`, Var over the whole clean image.

    Of images `(n, h, h)` that are Fourier crops of larger ones with that SNR, the deviations are h / binned_from of
    these: a crop keeps the signal, and of white noise the part that lies in its band.

    Raises
    ------
    TypeError, ValueError : `x` not finite `(n, h, w)` images that vary; `snr` not a finite number > 0; `binned_from`
        less than h, or images that are not square with it.
    """
    x = checks.as_images("x", x)
    snr = checks.number("snr", snr, above=0)
    checks.grey_range("x", x)
    parts = np.array_split(x, -(-len(x) // 256))  # the variance makes a float64 copy: of a part at a time
    whole = np.sqrt(np.concatenate([part.var(axis=(1, 2), dtype=np.float64) for part in parts]) / snr)
    return whole if binned_from is None else whole * (_side(x, binned_from) / binned_from)


def _side(x: np.ndarray, binned_from: int) -> int:
    """The side of square images, px; ValueError where they are larger than those that they were binned from."""
    side = square(x, "x").shape[1]
    checks.integer("binned_from", binned_from, low=side)
    return side


def add_noise(x: Any, snr: float, seed: Any, protocol: str = "awgn", binned_from: int | None = None) -> np.ndarray:
    """Return noisy images, Eq. (1) with a the identity: y = x + noise, SNR = Var(x_i) / Var(noise_i) for every image.

    Parameters
    ----------
    x : `(n, h, w)` clean images, for "clipped" in [0, 1].
    snr : > 0.
    seed : as numpy's `default_rng` takes it. Noise is drawn image after image: the noise of the first m images does
        not depend on those that follow.
    protocol : "awgn", Gaussian noise as printed; "clipped", the same noise, then y clipped to [0, 1], which is what the
        paper's numbers suggest.
    binned_from : side, px, of the images whose Fourier crop these are: SNR and clipping are those of the larger
        images, which are cropped after both. For "awgn" that is white noise of less deviation (`noise_sigma`), drawn
        as such. None: they are as they are.

    Returns
    -------
    `(n, h, w)` float32; `x` is untouched.

    Raises
    ------
    TypeError, ValueError : see `noise_sigma`; an unknown protocol.
    """
    x = checks.as_images("x", x)
    checks.choice("protocol", protocol, PROTOCOLS)
    rng, clipped = np.random.default_rng(seed), protocol == "clipped"
    if clipped and binned_from is not None:
        sigma, side = noise_sigma(x, snr), _side(x, binned_from)
        parts = np.array_split(np.arange(len(x)), -(-len(x) // 256))
        large = (resample(x[part], 1 / side, binned_from, 1 / binned_from) for part in parts)
        noisy = (np.clip(_noisy(z, sigma[part], rng), 0, 1) for z, part in zip(large, parts))
        return np.concatenate([resample(y, 1 / binned_from, side, 1 / side) for y in noisy])
    y = _noisy(x, noise_sigma(x, snr, binned_from), rng)
    return np.clip(y, 0, 1, out=y) if clipped else y


def _noisy(x: np.ndarray, sigma: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    y = rng.standard_normal(x.shape, dtype=np.float32)
    y *= sigma.astype(np.float32)[:, None, None]
    y += x
    return y


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
    images, pixel_size, n, to : see `resample`; where the new box is larger, a grey level near 0 surrounds the image.
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
