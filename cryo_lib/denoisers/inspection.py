"""What a denoiser did to each image of a stack, as it streams: which images are broken, and why.

- range: grey levels leave those of clean images by more than `OUTSIDE` of their range. Clean images lie within; the
  laptop's network leaves them by 0.06 where it works.
- checkerboard: more than `CHECKED` of the spectral power are peaks at the networks' strides that the input lacks. In
  projections of a ribosome they are 0.001, in filaments whose subunits repeat at just a stride 0.08.
- correlation: the image is no more like its low-passed input than chance makes unrelated ones, 3 / sqrt(m) where m
  Fourier components are independent.

The checkerboard and the correlation do not depend on the grey scale. Source of the checkerboards: transposed
convolutions (Odena, Dumoulin and Olah 2016).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pandas as pd
import scipy.fft
import scipy.sparse

from cryo_lib.denoisers.ofstack import OfStack

LABEL = "rlnParticleSelectZScore"  # the score in star files; to RELION, "high Z-scores are likely to be outliers"
STRIDES = 2, 4, 8  # px: of layers that make images larger, one after another
OUTSIDE, CHECKED = 0.3, 0.1  # of the range of clean images; of an image's spectral power
LOWPASS = 40.0  # A: what the input is low-passed to
WHY = {
    "range": "grey levels that no clean image has",
    "checkerboard": "a checkerboard that the input lacks",
    "correlation": "no likeness to the low-passed input",
}


class Inspection:
    """The inspection of a stack as it is denoised: `take` is what `apply.denoise_stack` calls for each batch.

    Parameters
    ----------
    denoiser : of the stack; images are inspected on its grid.

    Attributes
    ----------
    measured : `(n,)` float64 each: minimum, maximum, checkerboard (share of the power), correlation.
    limits : beyond which one of these breaks an image.
    score : `(n,)` float64, the worst of the criteria in units of its limit: above 1 an image is broken.
    """

    def __init__(self, denoiser: OfStack) -> None:
        self.denoiser, n = denoiser, len(denoiser.stack)
        self.limits = {"checkerboard": CHECKED, "correlation": chance(denoiser.n, denoiser.pixel_size)}
        if denoiser.grey is not None:
            low, high = denoiser.grey
            self.limits |= {"minimum": low - OUTSIDE * (high - low), "maximum": high + OUTSIDE * (high - low)}
        self.measured = {name: np.zeros(n) for name in ("minimum", "maximum", "checkerboard", "correlation")}
        self.ratios = {name: np.zeros(n) for name in WHY}
        self.score = np.zeros(n)

    def take(self, rows: slice, x_hat: np.ndarray) -> None:
        """Inspect denoised images `(m, h, h)`, those of these rows of the stack."""
        of = self.denoiser
        y = of.seen(of.stack.images[rows])
        x = of.onto(x_hat)
        found = {"minimum": x.min(axis=(1, 2)), "maximum": x.max(axis=(1, 2))}
        found["checkerboard"] = np.maximum(checkerboard(x) - checkerboard(y), 0)
        found["correlation"] = likeness(y, x, of.pixel_size)
        for name, values in found.items():
            self.measured[name][rows] = values
        ratios = {"checkerboard": found["checkerboard"] / CHECKED}
        ratios["correlation"] = (1 - found["correlation"]) / (1 - self.limits["correlation"])
        if of.grey is not None:
            low, high = of.grey
            away = np.maximum(low - found["minimum"], found["maximum"] - high)
            ratios["range"] = np.maximum(away, 0) / (OUTSIDE * (high - low))
        for name, values in ratios.items():
            self.ratios[name][rows] = values
        self.score[rows] = np.max(list(ratios.values()), axis=0)

    @property
    def table(self) -> pd.DataFrame:
        """A row an image: what was measured, the score, and `why` it is broken ("" where it is not)."""
        broken = {name: ratio > 1 for name, ratio in self.ratios.items()}
        why = ["; ".join(name for name in WHY if broken[name][row]) for row in range(len(self.score))]
        return pd.DataFrame({**self.measured, "score": self.score, "why": why})

    @property
    def broken(self) -> int:
        """How many images are broken."""
        return int(np.count_nonzero(self.score > 1))

    def said(self) -> str:
        """How many images are broken, and why, as a sentence."""
        n, broken = len(self.score), self.broken
        if not broken:
            return f"None of {n} denoised images is broken."
        counts = {WHY[name]: int(np.count_nonzero(ratio > 1)) for name, ratio in self.ratios.items()}
        reasons = ", ".join(f"{count} have {reason}" for reason, count in counts.items() if count)
        return f"{broken} of {n} denoised images are broken ({broken / n:.1%}): {reasons}."


def checkerboard(images: np.ndarray) -> np.ndarray:
    """The share of each image's spectral power in peaks at its strides' frequencies, `(m,)`, of images `(m, n, n)`.

    A stride s makes peaks at multiples of 1/s along both axes. Each is as wide as 1/(4 s) around it, less the greatest
    of the eight as wide windows halfway to the next: a spectrum that falls, or a line through it, as of a filament,
    leaves nothing.
    """
    power = np.square(np.abs(scipy.fft.fft2(images - images.mean(axis=(1, 2), keepdims=True)))).reshape(len(images), -1)
    found = np.zeros(len(images))
    for windows, peaks, around in _windows(images.shape[-1]):
        held = (windows @ power.T).T
        found += np.maximum(held[:, peaks] - held[:, around].max(axis=2), 0).sum(axis=1)
    return found / np.maximum(power.sum(axis=1), np.finfo(np.float32).tiny)


@functools.lru_cache(maxsize=4)
def _windows(n: int) -> list[tuple[Any, np.ndarray, np.ndarray]]:
    """For each stride: windows at multiples of half its frequency, `(windows, n n)`; the peaks; those around each."""
    frequency, found = scipy.fft.fftfreq(n), []
    for stride in (each for each in STRIDES if n >= 4 * each):
        count = 2 * stride
        off = (frequency - np.arange(count)[:, None] / count + 0.5) % 1 - 0.5
        near = np.hypot(off[:, None, :, None], off[None, :, None, :]) <= 1 / (4 * stride) + 1e-9
        windows = scipy.sparse.csr_array(near.reshape(count * count, n * n).astype(np.float32))
        y, x = (axis.ravel() for axis in np.mgrid[:count:2, :count:2])
        new = (y % 4 > 0) | (x % 4 > 0)  # those of half the stride are its own, the origin is none's
        y, x = y[new], x[new]
        steps = np.array([(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if i or j])
        around = (y[:, None] + steps[:, 0]) % count * count + (x[:, None] + steps[:, 1]) % count
        found.append((windows, y * count + x, around))
    return found


def likeness(y: np.ndarray, x_hat: np.ndarray, pixel_size: float) -> np.ndarray:
    """The correlation of images `(m, n, n)` with their low-passed inputs, `(m,)`."""
    n = y.shape[-1]
    k = np.hypot(scipy.fft.fftfreq(n)[:, None], scipy.fft.fftfreq(n))
    kept = (k <= cutoff(pixel_size)) & (k > 0)
    a, b = (scipy.fft.fft2(images)[:, kept] for images in (y, x_hat))
    power = np.sqrt(np.square(np.abs(a)).sum(axis=1) * np.square(np.abs(b)).sum(axis=1))
    return (a.conj() * b).real.sum(axis=1) / np.maximum(power, np.finfo(np.float32).tiny)


def chance(n: int, pixel_size: float) -> float:
    """The likeness that one unrelated image in a thousand has: three standard deviations, 0.9 at most."""
    return min(3 / math.sqrt(math.pi * (cutoff(pixel_size) * n) ** 2), 0.9)


def cutoff(pixel_size: float) -> float:
    """The frequency, 1 / px, that inputs are low-passed to: half of Nyquist where pixels are large."""
    return min(pixel_size / LOWPASS, 0.25)
