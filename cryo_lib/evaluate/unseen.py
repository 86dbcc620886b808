"""How a denoiser does on particles that it has never seen, and whether it paints particles where there are none."""

from __future__ import annotations

from typing import Any

import numpy as np

from cryo_lib import checks
from cryo_lib.evaluate.metrics import mse

BROKEN = 0.3  # of the reference's range, below its background: a denoised image that falls deeper is broken


def scores(x: Any, x_hat: Any) -> dict[str, np.ndarray]:
    """Scores of each image, `(n,)` float64, that do not depend on the references' grey scales.

    psnr : dB, the peak being the reference's range. correlation : Pearson's, 0 for a constant denoised image.
    broken : whether the denoised image falls below the reference's minimum by more than `BROKEN` of the range.

    TypeError or ValueError for shapes that differ, NaN, and references that do not vary.
    """
    x, x_hat = checks.as_images("x", x, np.float64), checks.as_images("x_hat", x_hat, np.float64)
    checks.same_shape("x", x, "x_hat", x_hat)
    low, high = checks.grey_range("x", x)
    a, b = (images - images.mean(axis=(1, 2), keepdims=True) for images in (x, x_hat))
    length = np.sqrt(np.square(a).sum(axis=(1, 2)) * np.square(b).sum(axis=(1, 2)))
    return {
        "psnr": 10 * np.log10((high - low) ** 2 / np.maximum(mse(x, x_hat), np.finfo(float).tiny)),
        "correlation": np.divide((a * b).sum(axis=(1, 2)), length, out=np.zeros(len(x)), where=length > 0),
        "broken": x_hat.min(axis=(1, 2)) < low - BROKEN * (high - low),
    }


def on_scale(x: Any, x_hat: Any) -> np.ndarray:
    """Denoised images on the grey scale of the references: by one slope and offset for all, least squares."""
    x, x_hat = np.asarray(x, np.float64), np.asarray(x_hat, np.float64)
    level, around = x.mean(), x_hat - x_hat.mean()
    return level + around * (np.vdot(around, x - level) / max(np.vdot(around, around), np.finfo(float).tiny))


def radial_profile(images: Any) -> tuple[np.ndarray, np.ndarray]:
    """The mean image on circles around its middle, one a pixel of radius, and its standard error: `(n // 2,)` each.

    Circle r holds the pixels whose distance from pixel `n // 2` rounds to r. What a denoiser paints by habit where
    particles use to be adds up here; what it paints at random does not.

    Images are `(m, n, n)`, two or more; ValueError for others.
    """
    images = checks.as_images("images", images, np.float64)
    m, n = images.shape[:2]
    if images.shape[2] != n or m < 2:
        raise ValueError(f"images: expected two or more square ones, got {images.shape}; crop them, or give more")
    axis = np.arange(n) - n // 2
    ring = np.rint(np.hypot(axis[:, None], axis)).astype(int).ravel()
    member = (ring[:, None] == np.arange(n // 2)) / np.bincount(ring)[: n // 2]
    each = images.reshape(m, -1) @ member
    return each.mean(axis=0), each.std(axis=0, ddof=1) / m**0.5
