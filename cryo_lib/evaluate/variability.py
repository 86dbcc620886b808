"""How particles of known poses vary about their mean map, without labels: the first principal component, a volume.

Images y_i of views A_i are taken as A_i (m + c_i u) and noise: m is the least-squares map of all, u and the scores c_i
are found by turns. This is the linear counterpart of cryoDRGN's latent space.

Source: Punjani & Fleet (2021), J. Struct. Biol. 213, 107702 (3D variability analysis), with hard scores in place of
expectations and a low-pass in place of their filter.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cryo_lib import checks
from cryo_lib.evaluate.reconstruction import low_pass, reconstruct
from cryo_lib.simulate import projection


def on_one_scale(images: Any, projections: Any) -> np.ndarray:
    """Return the images `(n, h, w)` on the grey scale of projections of their mean map at their poses, `(n, h, w)`.

    Each is divided by its gain and freed of its offset, those of the least-squares fit. ValueError for a constant
    projection, or an image that does not resemble its own.
    """
    images, projections = checks.as_images("images", images), checks.as_images("projections", projections)
    checks.same_shape("images", images, "projections", projections)
    centred, power = _centred(projections), _dot(_centred(projections), projections)
    gain = np.divide(_dot(centred, images), power, out=np.zeros_like(power), where=power > 0)
    if (gain <= 0).any():
        raise ValueError(
            f"images: expected ones that resemble their projections, got {int((gain <= 0).sum())} that do not, the "
            f"first is image {int(np.argmax(gain <= 0))}; leave them out, or correct their poses"
        )
    return _centred(images) / gain + projections.mean(axis=(1, 2), keepdims=True)


def principal_scores(
    images: Any,
    projections: Any,
    rotations: Any,
    pixel_size: float,
    *,
    resolution: float = 20.0,
    iterations: int = 5,
    seed: int = 0,
) -> np.ndarray:
    """Return each image's score along the first principal component of the volumes, `(n,)`, of mean 0 and sd 1.

    Parameters
    ----------
    images, projections : `(n, h, h)`, on one scale (see `on_one_scale`); projections of the mean map at the poses.
    rotations : `(n, 3, 3)`, image axes to volume axes. pixel_size : A.
    resolution : A, to which the component is low-passed. iterations : turns. seed : of the scores it starts from.
    """
    projections = checks.as_images("projections", projections)
    residuals = _centred(checks.as_images("images", images) - projections)
    centred = _centred(projections)
    scores = np.random.default_rng(seed).standard_normal((len(residuals), 1, 1)).astype(np.float32)
    for _ in range(checks.integer("iterations", iterations, low=1)):
        volume = low_pass(reconstruct(scores * residuals, rotations, iterations=5), resolution, pixel_size)
        seen = _centred(projection.project(volume, rotations))
        seen -= _dot(seen, centred) / _dot(centred, centred) * centred  # what a gain would do as well
        scores = _dot(seen, residuals) / _dot(seen, seen)
        scores = (scores - scores.mean()) / scores.std()
    return scores[:, 0, 0]


def _centred(images: np.ndarray) -> np.ndarray:
    return images - images.mean(axis=(1, 2), keepdims=True)


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(axis=(1, 2), keepdims=True)
