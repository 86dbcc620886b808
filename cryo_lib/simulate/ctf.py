"""The contrast transfer function, RELION's: the Fourier transform of the point spread function of Eq. (1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.fft

from cryo_lib import checks
from cryo_lib.simulate.projection import square

CTF_LABELS = (
    "rlnDefocusU",
    "rlnDefocusV",
    "rlnDefocusAngle",
    "rlnPhaseShift",
    "rlnVoltage",
    "rlnSphericalAberration",
    "rlnAmplitudeContrast",
    "rlnCtfBfactor",
    "rlnCtfScalefactor",
)


def ctf(parameters: Mapping[str, Any], n: int, pixel_size: float) -> np.ndarray:
    """Return the contrast transfer functions of `n` px images, the transform of Eq. (1)'s point spread function.

    sin(pi lambda z k^2 - pi/2 Cs lambda^3 k^4 + phase shift + asin(amplitude contrast)) exp(-B k^2 / 4) scale: positive
    at low frequency, so that protein stays bright; z is the defocus in the direction of k, underfocus positive.

    Parameters
    ----------
    parameters : RELION's labels -> `(m,)`, such as `ParticleStack.ctf`: rlnDefocusU, rlnDefocusV (A), rlnDefocusAngle,
        rlnPhaseShift (degrees), rlnVoltage (kV), rlnSphericalAberration (mm), rlnAmplitudeContrast, rlnCtfBfactor (A^2)
        and rlnCtfScalefactor.
    n : side of the images in pixels. pixel_size : A.

    Returns
    -------
    `(m, n, n // 2 + 1)` float32, in the layout of `scipy.fft.rfft2`.

    Raises
    ------
    ValueError : a parameter missing, not finite, or impossible (voltage <= 0, amplitude contrast outside [0, 1]).

    Source: Mindell & Grigorieff 2003; signs and constants as RELION's ctf.cpp.
    """
    if missing := [label for label in CTF_LABELS if label not in parameters]:
        raise ValueError(f"ctf: expected {', '.join(CTF_LABELS)}, got no {', '.join(missing)}; add them")
    values = np.stack([np.atleast_1d(np.asarray(parameters[label], np.float64)) for label in CTF_LABELS])
    if not np.isfinite(values).all():
        label, row = (index[0] for index in np.nonzero(~np.isfinite(values)))
        raise ValueError(
            f"ctf: expected finite parameters, got {CTF_LABELS[label]} {values[label, row]} in row {row + 1}"
        )
    u, v, angle, phase, voltage, aberration, contrast, b_factor, scale = values[..., None, None]
    if voltage.min() <= 0 or contrast.min() < 0 or contrast.max() > 1:
        raise ValueError(
            "ctf: expected rlnVoltage > 0 and rlnAmplitudeContrast in [0, 1], got others; correct the file"
        )
    n, pixel_size = checks.integer("n", n, low=2), checks.number("pixel_size", pixel_size, above=0)
    ky, kx = scipy.fft.fftfreq(n, pixel_size)[:, None], scipy.fft.rfftfreq(n, pixel_size)
    squared, direction = kx**2 + ky**2, np.arctan2(ky, kx) - np.deg2rad(angle)
    wavelength = 12.2643247 / np.sqrt(1e3 * voltage * (1 + 0.978466e-6 * 1e3 * voltage))
    defocus = 0.5 * (u + v + (u - v) * np.cos(2 * direction))
    turned = np.pi * wavelength * (defocus - 0.5e7 * aberration * wavelength**2 * squared) * squared
    turned += np.deg2rad(phase) + np.arcsin(contrast)
    return (scale * np.exp(-0.25 * b_factor * squared) * np.sin(turned)).astype(np.float32)


def apply_ctf(images: Any, parameters: Mapping[str, Any], pixel_size: float) -> np.ndarray:
    """Return images `(m, n, n)` float32 convolved with their point spread functions, periodically; see `ctf`."""
    images = square(images)
    return _times(images, ctf(parameters, images.shape[1], pixel_size))


def phase_flip(images: Any, parameters: Mapping[str, Any], pixel_size: float) -> np.ndarray:
    """Return images `(m, n, n)` float32, negated at the frequencies where their CTF is negative: it becomes |CTF|.

    The spectrum of their noise stays. Parameters are those of `ctf`, a row an image.
    """
    images = square(images)
    negative = ctf(parameters, images.shape[1], pixel_size) < 0
    return _times(images, np.where(negative, np.float32(-1), np.float32(1)))


def _times(images: np.ndarray, transfer: np.ndarray) -> np.ndarray:
    if len(transfer) != len(images):
        raise ValueError(f"images: expected ({len(transfer)}, n, n), one a row of the parameters, got {images.shape}")
    return scipy.fft.irfft2(scipy.fft.rfft2(images) * transfer, s=images.shape[1:])
