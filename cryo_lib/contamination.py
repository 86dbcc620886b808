"""The Huber contamination model, Eq. (2): a fraction of the training pairs replaced by noise."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cryo_lib import checks

KINDS = {"A": "references replaced", "B": "noisy images replaced", "C": "both replaced"}
NOISES = ("gaussian", "uniform")
UNITS = ("sample", "minibatch")


def contaminate(
    x: Any,
    y: Any,
    kind: str,
    eps: float,
    seed: int,
    *,
    noise: str = "gaussian",
    unit: str = "sample",
    batch_size: int = 20,
    draw: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Replace exactly floor(eps * n) training pairs by pure noise, Eq. (2).

    Parameters
    ----------
    x, y : references and noisy images, `(n, h, w)`, numpy arrays or CPU tensors; left untouched.
    kind : "A" replaces references, "B" noisy images, "C" both (with independent noise).
    eps : contaminated fraction in [0, 1].
    seed : of the choice of pairs and of the noise.
    noise : "gaussian" (as the text), each image rescaled to the grey range of the images it stands among, which is the
        mean of their minima to the mean of their maxima: [0, 1] for references; "uniform" on [0, 1] is what the authors'
        scripts use.
    unit : "sample" (as the text) chooses single pairs; "minibatch" chooses whole blocks of `batch_size` consecutive
        pairs, and a part of one more where floor(eps * n) is no multiple of it.
    draw : index of the noise draw. Every draw replaces the same pairs by fresh noise (redrawing it each epoch).

    Returns
    -------
    x, y : float32 copies with the replacements.
    replaced : (n,) bool, True where the pair was replaced.

    Raises
    ------
    ValueError : unknown kind, noise or unit, eps outside [0, 1], shapes that differ, NaN.
    """
    x, y = checks.as_images("x", x).copy(), checks.as_images("y", y).copy()
    checks.same_shape("x", x, "y", y)
    checks.choice("kind", kind, KINDS)
    checks.choice("noise", noise, NOISES)
    checks.choice("unit", unit, UNITS)
    eps = checks.number("eps", eps, low=0, high=1)
    n, block = len(x), 1 if unit == "sample" else checks.integer("batch_size", batch_size, low=1)

    blocks = np.random.default_rng([seed, 1]).permutation(math.ceil(n / block))
    order = (blocks[:, None] * block + np.arange(block)).ravel()
    # eps = 0.29 is stored as 0.28999...: the small term makes floor(0.29 * 100) the 29 that was meant.
    chosen = np.sort(order[order < n][: math.floor(eps * n + 1e-9)])

    rng = np.random.default_rng([seed, 2, checks.integer("draw", draw, low=0)])
    for images, replaced in ((x, kind in "AC"), (y, kind in "BC")):
        if replaced and len(chosen):
            images[chosen] = _pure_noise(rng, noise, len(chosen), images)
    return x, y, np.isin(np.arange(n), chosen)


def _pure_noise(rng: np.random.Generator, noise: str, n: int, among: np.ndarray) -> np.ndarray:
    shape = (n, *among.shape[1:])
    if noise == "uniform":
        return rng.random(shape, dtype=np.float32)
    values = rng.standard_normal(shape, dtype=np.float32)
    low, high = values.min(axis=(1, 2), keepdims=True), values.max(axis=(1, 2), keepdims=True)
    start, stop = among.min(axis=(1, 2)).mean(), among.max(axis=(1, 2)).mean()
    return start + (stop - start) * (values - low) / np.maximum(high - low, np.finfo(np.float32).tiny)
