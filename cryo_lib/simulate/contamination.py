"""The Huber contamination model, Eq. (2): a fraction of the training pairs replaced by noise, and harder kinds.

And the other way round: which pairs belong together, told by the pairs alone (`screen`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy  # `scipy.stats`, which takes half a second to import, is imported where it is first used
from scipy.special import expit

from cryo_lib import checks
from cryo_lib.simulate import projection

KINDS = {"A": "references replaced", "B": "noisy images replaced", "C": "both replaced"}
HARDER = {"S": "references swapped", "O": "another conformation", "J": "imprecise poses", "I": "ice patches"}
PROJECTED = "OJ"  # kinds that project references anew
NOISES = ("gaussian", "uniform")
UNITS = ("sample", "minibatch")
FEWEST = 20  # pairs that the spread of the good ones can be told from
ROUNDS, CHUNK = 50, 1024  # of the estimate; pairs that are correlated at a time
FDR = 0.05  # of the pairs that `screen` leaves out, the share that is good
CENTRAL = -1.5, 2.5  # sd from the centre of the good pairs, between which values are taken to be theirs


@dataclass(frozen=True)
class Views:
    """What the references were projected from, for the kinds that project them anew.

    Attributes
    ----------
    volumes : `(c, h, h, h)`, the density of each conformation.
    rotations : `(n, 3, 3)`, the pose of each reference. conformations : `(n,)`, which volume it shows.
    """

    volumes: np.ndarray
    rotations: np.ndarray
    conformations: np.ndarray

    def another_conformation(self, chosen: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """References `chosen`, `(len(chosen), h, h)`, at their poses, each of a conformation drawn from the others."""
        count = len(self.volumes)
        if count < 2:
            raise ValueError(f"kind O: expected volumes of two or more conformations, got {count}; use another kind")
        others = (self.conformations[chosen] + rng.integers(1, count, len(chosen))) % count
        return projection.views(self.volumes, self.rotations[chosen], others)

    def imprecise(self, chosen: np.ndarray, degrees: float, pixels: float, rng: np.random.Generator) -> np.ndarray:
        """References `chosen` turned about each image axis by sd `degrees`, moved along x and y by sd `pixels`."""
        rotations = projection.jittered(self.rotations[chosen], len(chosen), degrees, rng)
        shifts = rng.normal(0.0, checks.number("jitter_pixels", pixels, low=0), (len(chosen), 2))
        return projection.views(self.volumes, rotations, self.conformations[chosen], shifts)


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
    views: Views | None = None,
    jitter_degrees: float = 10.0,
    jitter_pixels: float = 1.0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Contaminate exactly floor(eps * n) training pairs: by pure noise, Eq. (2), or by mistakes of real pipelines.

    Parameters
    ----------
    x, y : references and noisy images, `(n, h, w)`, numpy arrays or CPU tensors; left untouched.
    kind : "A" replaces references by noise, "B" noisy images, "C" both (with independent noise). Harder than those:
        "S" gives each chosen pair the reference of another of them; "O" a reference of another conformation at the same
        pose; "J" one at an imprecise pose; "I" adds one to three bright patches of ice to the noisy image.
    eps : contaminated fraction in [0, 1].
    seed : of the choice of pairs and of the noise.
    noise : "gaussian" (as the text), each image rescaled to the grey range of the images it stands among, which is the
        mean of their minima to the mean of their maxima: [0, 1] for references; "uniform" on [0, 1] is what the
        authors' scripts use.
    unit : "sample" (as the text) chooses single pairs; "minibatch" chooses whole blocks of `batch_size` consecutive
        pairs, and a part of one more where floor(eps * n) is no multiple of it.
    draw : index of the noise draw. Every draw replaces the same pairs by fresh noise (redrawing it each epoch).
    views : of the references; needed by kinds "O" and "J".
    jitter_degrees, jitter_pixels : sd of the mistake in pose of kind "J", about each axis and along x and y.

    Returns
    -------
    x, y : float32 copies with the replacements.
    replaced : (n,) bool, True where the pair was replaced.

    Raises
    ------
    ValueError : unknown kind, noise or unit, eps outside [0, 1], shapes that differ, NaN, no `views` where they are
        needed, a single pair to swap.
    """
    x, y = checks.as_images("x", x).copy(), checks.as_images("y", y).copy()
    checks.same_shape("x", x, "y", y)
    checks.choice("kind", kind, KINDS | HARDER)
    checks.choice("noise", noise, NOISES)
    checks.choice("unit", unit, UNITS)
    eps = checks.number("eps", eps, low=0, high=1)
    n, block = len(x), 1 if unit == "sample" else checks.integer("batch_size", batch_size, low=1)

    blocks = np.random.default_rng([seed, 1]).permutation(math.ceil(n / block))
    order = (blocks[:, None] * block + np.arange(block)).ravel()
    # eps = 0.29 is stored as 0.28999...: the small term makes floor(0.29 * 100) the 29 that was meant.
    chosen = np.sort(order[order < n][: math.floor(eps * n + 1e-9)])

    rng = np.random.default_rng([seed, 2, checks.integer("draw", draw, low=0)])
    if len(chosen):
        if kind in "AC":
            x[chosen] = _pure_noise(rng, noise, len(chosen), x)
        if kind in "BC":
            y[chosen] = _pure_noise(rng, noise, len(chosen), y)
        if kind == "S":
            _swap(x, rng.permutation(chosen))
        if kind == "O":
            x[chosen] = _checked(views, kind, x).another_conformation(chosen, rng)
        if kind == "J":
            x[chosen] = _checked(views, kind, x).imprecise(chosen, jitter_degrees, jitter_pixels, rng)
        if kind == "I":
            y[chosen] += _ice(rng, y[chosen])
    return x, y, np.isin(np.arange(n), chosen)


def _swap(x: np.ndarray, chosen: np.ndarray) -> None:
    """Give each chosen image the next one's place, in a circle: none keeps its own."""
    if len(chosen) < 2:
        raise ValueError("kind S: expected two or more pairs to swap references between, got 1; raise eps")
    x[chosen] = x[np.roll(chosen, 1)]


def _checked(views: Views | None, kind: str, x: np.ndarray) -> Views:
    if views is None:
        raise ValueError(f"kind {kind}: expected the `views` that the references were projected from, got None")
    shapes = views.volumes.shape[1:], views.rotations.shape, views.conformations.shape
    wanted = (x.shape[-1],) * 3, (len(x), 3, 3), (len(x),)
    if shapes != wanted:
        raise ValueError(
            f"views: expected volumes, rotations and conformations of shapes {wanted}, got {shapes}; pass those of x"
        )
    return views


def _ice(rng: np.random.Generator, y: np.ndarray) -> np.ndarray:
    """One to three patches an image: soft-edged discs of radius 0.08 to 0.2 sides, 1 to 3 sd of the image brighter."""
    n, h, w = y.shape
    rows, columns = np.arange(h, dtype=np.float32)[:, None], np.arange(w, dtype=np.float32)
    patches, count = np.zeros_like(y), rng.integers(1, 4, (n, 1, 1))
    for number in range(3):
        cy, cx = (side * rng.random((n, 1, 1), dtype=np.float32) for side in (h, w))
        radius = h * rng.uniform(0.08, 0.2, (n, 1, 1)).astype(np.float32)
        height = rng.uniform(1, 3, (n, 1, 1)).astype(np.float32) * (number < count)
        patches += height * expit((radius - np.hypot(rows - cy, columns - cx)) / (0.1 * radius))
    return patches * y.std(axis=(1, 2), keepdims=True)


def _pure_noise(rng: np.random.Generator, noise: str, n: int, among: np.ndarray) -> np.ndarray:
    shape = (n, *among.shape[1:])
    if noise == "uniform":
        return rng.random(shape, dtype=np.float32)
    values = rng.standard_normal(shape, dtype=np.float32)
    low, high = values.min(axis=(1, 2), keepdims=True), values.max(axis=(1, 2), keepdims=True)
    start, stop = among.min(axis=(1, 2)).mean(), among.max(axis=(1, 2)).mean()
    return start + (stop - start) * (values - low) / np.maximum(high - low, np.finfo(np.float32).tiny)


def correlations(x: Any, y: Any) -> np.ndarray:
    """Pearson's correlation of each pair over its pixels, `(n,)` float64; x, y as of `contaminate`."""
    x, y = checks.as_images("x", x), checks.as_images("y", y)
    checks.same_shape("x", x, "y", y)
    found = np.empty(len(x))
    for start in range(0, len(x), CHUNK):
        part = slice(start, start + CHUNK)
        a, b = (z[part].reshape(len(z[part]), -1) for z in (x, y))
        a, b = (z - z.mean(axis=1, keepdims=True) for z in (a, b))
        size = np.sqrt(np.einsum("ij,ij->i", a, a, dtype=np.float64) * np.einsum("ij,ij->i", b, b, dtype=np.float64))
        if not size.all():
            where = start + int(np.argmin(size))
            raise ValueError(
                f"pairs: expected images of some contrast, got a constant one in pair {where}; leave it out"
            )
        found[part] = np.einsum("ij,ij->i", a, b, dtype=np.float64) / size
    return found


def screen(x: Any, y: Any, fdr: float = FDR) -> np.ndarray:
    """Which training pairs belong together, `(n,)` bool, by their correlation and no truth.

    Fisher's transform of the correlation of good pairs is normal. Pairs that do not belong together correlate less, so
    its centre and spread are taken from the upper ones (an empirical null, Efron 2004; sound while most pairs are
    good). Pairs that are too low for it are told by the procedure of Benjamini and Hochberg (1995): of those left out
    at most the share `fdr` is good, in the mean.

    Parameters
    ----------
    x, y : references and noisy images, `(n, h, w)`, at least 20.
    fdr : false-discovery rate, above 0 and at most 0.5.

    Raises
    ------
    ValueError : fewer pairs, an fdr outside its range, a constant image, shapes that differ, NaN.
    """
    fdr = checks.number("fdr", fdr, above=0, high=0.5)
    if len(x) < FEWEST:
        raise ValueError(f"pairs: expected at least {FEWEST}, to see how good ones are spread, got {len(x)}; give more")
    z = np.arctanh(np.clip(correlations(x, y), -1 + 1e-9, 1 - 1e-9))
    return scipy.stats.false_discovery_control(scipy.stats.norm.cdf(z, *_good(z))) > fdr


def _good(z: np.ndarray) -> tuple[float, float]:
    """Centre and sd of the normal distribution that the upper values follow, by its moments between two cuts."""
    mean, variance = scipy.stats.truncnorm.stats(*CENTRAL)
    centre = np.median(z)
    spread = np.median(z[z >= centre] - centre) / scipy.stats.norm.ppf(0.75)
    for _ in range(ROUNDS):
        low, high = (centre + cut * spread for cut in CENTRAL)
        inside = z[(z >= low) & (z <= high)]
        spread = np.sqrt(inside.var() / variance)
        centre = inside.mean() - mean * spread
    return centre, spread
