"""Pairs of many particles: random structures, poses, microscopes, noise and signal-to-noise ratios.

What a network learns from them is to denoise particles that it has never seen. A pair is of one of these kinds: a
particle (in some images with another one beside it), a filament that crosses the box, or noise alone. Images are
phase-flipped in their box, as RELION's `--ctf_phase_flip` does; the background of each has mean 0 and sd 1 by
`noise.background`, which takes what is outside the circle inscribed in the box, a radius of half the box.

References are projections without CTF, background 0, on the grey scale of their images: each is that multiple of the
projection which comes closest to the noise-free image (least squares). Noise alone has the reference 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy.fft

from cryo_lib import checks
from cryo_lib.simulate.assemblies import blob, draw, filament
from cryo_lib.simulate.ctf import CTF_LABELS, apply_ctf, ctf, phase_flip
from cryo_lib.simulate.density import density
from cryo_lib.simulate.library import Points
from cryo_lib.simulate.noise import background
from cryo_lib.simulate.noises import filtered
from cryo_lib.simulate.projection import project, random_rotations

BATCH = 25  # pairs of one particle and pixel size
DIAMETER = (80.0, 400.0)  # A, of particles
FRACTION = (0.40, 0.75)  # of the box that a particle's diameter takes
FILAMENT_PIXEL = (2.0, 8.0)  # A, pixel sizes of images of filaments
SHARPNESS = (3.0, 5.0)  # resolution of the density, in pixels
SHIFT = 2.0  # pixels, sd of a particle's offset from the middle, each way
FILAMENTS, BLOBS, NEIGHBOURS, EMPTY = 0.06, 0.10, 0.25, 0.08  # shares of the particles, and, from the third on, images
SNR = (0.005, 1.0)
DEFOCUS, ASTIGMATISM = (5000.0, 30000.0), 200.0  # A; the sd of defocus_u - defocus_v
VOLTAGES, ABERRATIONS, CONTRAST, B_FACTOR = (300.0, 200.0), (2.7, 2.0), (0.07, 0.10), (40.0, 200.0)  # kV, mm, 1, A^2
ICE, ICE_B = (0.3, 5.0), (200.0, 2000.0)  # scattering around the particle: power relative to shot noise, and A^2
FOG, FOG_WIDTH = (0.3, 10.0), (0.02, 0.10)  # noise that falls as a Lorentzian: power, and cycles a pixel
GRADIENT = 0.4  # the greatest sd of the slope across the box, in sd of the noise


class Pairs(NamedTuple):
    """References, noisy images, the same without noise, poses, and a row each of what was drawn."""

    x: np.ndarray  # (m, n, n) float32
    y: np.ndarray  # (m, n, n) float32
    signal: np.ndarray  # (m, n, n) float32: the projection through the microscope, phase-flipped, on the scale of y
    rotations: np.ndarray  # (m, 3, 3)
    table: pd.DataFrame  # particle, kind, diameter (A), pixel_size (A), snr (0 of noise alone), CTF_LABELS


def particle_pairs(
    points: Points,
    m: int,
    box: int,
    rng: np.random.Generator,
    *,
    fraction: float | None = None,
    snr: tuple[float, float] = SNR,
    neighbours: float = 0.0,
    empty: float = 0.0,
) -> Pairs:
    """Return pairs of one particle at uniformly random poses.

    Parameters
    ----------
    points : the particle. m : pairs. box : pixels, a multiple of 4.
    fraction : of the box that the particle's diameter takes, which sets the pixel size; None draws it from `FRACTION`.
    snr : Var(signal) / Var(noise) over the whole image after the CTF, log-uniform between these for each image.
    neighbours, empty : share of images with another particle beside the first, and of noise alone.
    """
    box = checks.integer("box", box, low=16, multiple_of=4)
    pixel_size = points.diameter / (box * (rng.uniform(*FRACTION) if fraction is None else fraction))
    volume = density(points.structure(), box, pixel_size, pixel_size * rng.uniform(*SHARPNESS))
    rotations, pad = random_rotations(m, rng), box // 4
    shifts = rng.normal(0.0, SHIFT, (m, 2))
    images = project(volume, rotations, shifts)
    beside = np.flatnonzero(rng.random(m) < neighbours)
    if len(beside):
        angle = rng.uniform(0, 2 * np.pi, len(beside))
        away = rng.uniform(0.9, 1.5, len(beside)) * points.diameter / pixel_size
        there = shifts[beside] + (away * (np.cos(angle), np.sin(angle))).T
        images[beside] += project(volume, random_rotations(len(beside), rng), there)
    images = np.pad(images, ((0, 0), (pad, pad), (pad, pad)))
    return _observed(images, points, "particle", rotations, pixel_size, snr, rng.random(m) < empty, rng)


def filament_pairs(
    part: Points, m: int, box: int, rng: np.random.Generator, *, snr: tuple[float, float] = SNR
) -> Pairs:
    """Return pairs of a filament of `part` that crosses the box, within 30 degrees of the image's plane."""
    wide = checks.integer("box", box, low=16, multiple_of=4) * 3 // 2
    pixel_size = float(np.exp(rng.uniform(*np.log(FILAMENT_PIXEL))))
    sharpness = rng.uniform(*SHARPNESS)
    points = filament(part, wide * pixel_size, rng)
    reach = ((wide - 1) // 2 - sharpness / 2 - 0.5) * pixel_size
    inside = (np.abs(points.xyz - points.middle) < reach).all(axis=1)
    points = Points(points.name, points.xyz[inside], points.electrons[inside])
    volume = density(points.structure(), wide, pixel_size, pixel_size * sharpness)
    rotations = random_rotations(8 * m + 40, rng)
    rotations = rotations[np.abs(rotations[:, 2, 2]) < 0.5][:m]
    images = project(volume, rotations, rng.normal(0.0, SHIFT, (m, 2)))
    return _observed(images, points, "filament", rotations, pixel_size, snr, np.zeros(m, bool), rng)


def drawn_pairs(structures: Sequence[Points], box: int, rng: np.random.Generator) -> Pairs:
    """Return `BATCH` pairs of a particle or filament that is drawn from structures, or of a blob: training data.

    ValueError where none of the structures is smaller than the least of `DIAMETER`: of these filaments are made.
    """
    if not any(part.diameter < DIAMETER[0] for part in structures):
        raise ValueError(f"structures: expected some of less than {DIAMETER[0]:g} A, got none; add smaller ones")
    kind = rng.random()
    if kind < FILAMENTS:
        small = [part for part in structures if part.diameter < DIAMETER[0]]
        return filament_pairs(small[rng.integers(len(small))], BATCH, box, rng)
    points = blob(rng) if kind < FILAMENTS + BLOBS else draw(structures, *DIAMETER, rng)
    return particle_pairs(points, BATCH, box, rng, neighbours=NEIGHBOURS, empty=EMPTY)


def microscope(m: int, rng: np.random.Generator) -> pd.DataFrame:
    """Draw CTF parameters of `m` images, columns `CTF_LABELS`: one microscope, a defocus for each image."""
    defocus, spread = rng.uniform(*DEFOCUS, m), rng.normal(0.0, ASTIGMATISM, m)
    which = int(rng.random() < 0.3)
    values = (defocus + spread / 2, defocus - spread / 2, rng.uniform(0, 180, m), np.zeros(m))
    constants = (VOLTAGES[which], ABERRATIONS[which], rng.uniform(*CONTRAST), rng.uniform(*B_FACTOR), 1.0)
    return pd.DataFrame(dict(zip(CTF_LABELS, (*values, *(np.full(m, each) for each in constants)))))


def coloured(parameters: pd.DataFrame, box: int, pixel_size: float, rng: np.random.Generator) -> np.ndarray:
    """Return noise `(m, box, box)` float32 of variance 1, of one spectrum that is drawn: white, or not.

    Shot noise; in seven of ten spectra what the ice scatters through the CTF; in half of them a fog of low frequencies;
    a gradient.
    """
    m = len(parameters)
    ky, kx = scipy.fft.fftfreq(box)[:, None], scipy.fft.rfftfreq(box)
    squared = (ky**2 + kx**2).astype(np.float32)
    power = np.ones((m, *squared.shape), np.float32)
    if rng.random() < 0.7:
        height, b_factor = (np.exp(rng.uniform(*np.log(limits))) for limits in (ICE, ICE_B))
        decay = np.exp(-b_factor / pixel_size**2 * squared)
        power += (height * ctf(parameters, box, pixel_size) ** 2 * decay).astype(np.float32)
    if rng.random() < 0.5:
        height, width = np.exp(rng.uniform(*np.log(FOG))), rng.uniform(*FOG_WIDTH)
        power += (height / (1 + squared / width**2)).astype(np.float32)
    images = filtered(rng.standard_normal((m, box, box), np.float32), power)
    steep = rng.uniform(0, GRADIENT)
    slopes = rng.normal(0, steep, (2, m, 1, 1)).astype(np.float32)
    across = np.linspace(-0.5, 0.5, box, dtype=np.float32)
    images += slopes[0] * across + slopes[1] * across[:, None]
    return images / np.sqrt(1 + 2 * steep**2 / 12, dtype=np.float32)


def _observed(
    clean: np.ndarray,
    points: Points,
    kind: str,
    rotations: np.ndarray,
    pixel_size: float,
    snr: tuple[float, float],
    empty: np.ndarray,
    rng: np.random.Generator,
) -> Pairs:
    """Pairs of clean images `(m, 1.5 n, 1.5 n)`: through the microscope, of which the middle is boxed and flipped."""
    m, box = len(clean), clean.shape[1] * 2 // 3
    middle = slice(box // 4, box // 4 + box)
    clean[empty] = 0.0
    parameters, low_high = microscope(m, rng), np.log(snr)
    ratio = np.exp(rng.uniform(*low_high, m))
    signal = apply_ctf(clean, parameters, pixel_size)[:, middle, middle]
    sigma = np.where(empty, 1.0, np.sqrt(signal.var(axis=(1, 2)) / ratio)).astype(np.float32)
    noise = sigma[:, None, None] * coloured(parameters, box, pixel_size, rng)
    signal, noise = (phase_flip(images, parameters, pixel_size) for images in (signal, noise))
    x, signal, y = (_above_background(images) for images in (clean[:, middle, middle], signal, signal + noise))
    sd = background(y)[1].astype(np.float32)[:, None, None]
    gain = np.einsum("mij,mij->m", x, signal) / np.maximum(np.einsum("mij,mij->m", x, x), 1e-12)
    kinds = np.where(empty, "noise", kind)
    columns = {"particle": points.name, "kind": kinds, "diameter": points.diameter, "pixel_size": pixel_size}
    table = pd.DataFrame(columns | {"snr": np.where(empty, 0.0, ratio)}).join(parameters)
    return Pairs(x * gain[:, None, None] / sd, y / sd, signal / sd, rotations, table)


def _above_background(images: np.ndarray) -> np.ndarray:
    return images - background(images)[0].astype(np.float32)[:, None, None]
