"""Images in a basis in which a turn in the plane is a phase: by angular frequency, and principal components within
each.

The Fourier transform of an image on polar rings, `f(r, theta) = sum_k a_k(r) exp(1j k theta)`, becomes `a_k(r)
exp(-1j k phi)` when the image is turned by phi. The rings are Gauss-Legendre nodes, so that inner products of
coefficients are those of the pixels; the principal components of references within each k (steerable PCA, Zhao,
Shkolnisky and Singer 2016) keep what references hold and no more.
"""

from __future__ import annotations

import math
from typing import Any

import finufft
import numpy as np
import torch
from torch import Tensor

from cryo_lib import checks
from cryo_lib.simulate.projection import square

PRECISION = 1e-5  # relative error of the Fourier transform on the rings
FITTED = 2000  # images at most that principal components are taken from
BATCH = 64


class Rings:
    """The Fourier transform of square images on rings, by angular frequency; images are real, so k >= 0 says all.

    Parameters
    ----------
    n : side of the images, px. They are taken to vanish outside the circle inscribed in the box.
    """

    def __init__(self, n: int) -> None:
        self.n, self.count = n, math.ceil(math.pi * n / 2) + 4
        nodes, weights = np.polynomial.legendre.leggauss(math.ceil(0.8 * n) + 8)
        self.radius = radius = (nodes + 1) * math.pi / 2  # radians a pixel
        # Coefficients of both signs of k are held by one, hence the factor 2: sums over k >= 0 are inner products.
        both = np.where(np.arange(self.count), 2.0, 1.0)
        self.scale = np.sqrt(weights * radius / 4 * both[:, None]).astype(np.float32)
        self.angles = 2 * (self.count + 4)
        theta = 2 * np.pi / self.angles * np.arange(self.angles)
        self.points = [np.outer(radius, f(theta)).ravel().astype(np.float32) for f in (np.sin, np.cos)]  # y, x
        off_centre = (n + 1) // 2 - n // 2  # RELION centres images of odd side one pixel further
        self.phase = np.exp(1j * off_centre * (self.points[0] + self.points[1])).astype(np.complex64)
        self.options = {"eps": PRECISION, "nthreads": 1, "upsampfac": 2.0}

    def analyse(self, images: np.ndarray) -> np.ndarray:
        """Coefficients `(m, k, ring)` complex64 of images `(m, n, n)`."""
        parts = [images[start : start + BATCH].astype(np.complex64) for start in range(0, len(images), BATCH)]
        return np.concatenate([self._analyse(part) for part in parts])

    def _analyse(self, images: np.ndarray) -> np.ndarray:
        values = finufft.nufft2d2(*self.points, images, isign=-1, **self.options).reshape(len(images), -1)
        rings = (values * self.phase).reshape(len(images), -1, self.angles)
        return np.fft.fft(rings, axis=-1)[..., : self.count].transpose(0, 2, 1) / self.angles * self.scale

    def synthesise(self, coefficients: np.ndarray) -> np.ndarray:
        """Images `(m, n, n)` float32 of coefficients `(m, k, ring)`: the adjoint of `analyse`, and its inverse."""
        parts = range(0, len(coefficients), BATCH)
        return np.concatenate([self._synthesise(coefficients[start : start + BATCH]) for start in parts])

    def _synthesise(self, coefficients: np.ndarray) -> np.ndarray:
        rings = (coefficients * self.scale).transpose(0, 2, 1)
        values = np.fft.ifft(rings, n=self.angles, axis=-1).reshape(len(rings), -1) * self.phase.conj()
        return finufft.nufft2d1(*self.points, values, (self.n, self.n), isign=1, **self.options).real.astype(np.float32)


class Basis:
    """Steerable principal components of references.

    Parameters
    ----------
    images : references `(m, n, n)`, of which the first 2,000 are used.
    tolerance : share of their energy that the basis may leave out.
    device : where coefficients lie.

    Attributes
    ----------
    frequencies : `(d,)`, k of each coefficient, ascending. blocks : for each k, which coefficients are its.
    """

    def __init__(self, images: Any, tolerance: float = 1e-4, device: torch.device | str = "cpu") -> None:
        images = square(images)
        self.rings, self.device = Rings(images.shape[-1]), torch.device(device)
        values = self.rings.analyse(images[:FITTED])
        energies, vectors = np.linalg.eigh(np.einsum("mkr,mks->krs", values, values.conj()))
        ascending = np.sort(energies, axis=None)
        left_out = np.searchsorted(np.cumsum(ascending), checks.number("tolerance", tolerance, low=0) * ascending.sum())
        kept = [vector[:, energy > ascending[left_out] * (1 - 1e-6)] for energy, vector in zip(energies, vectors)]
        sizes = np.array([vector.shape[1] for vector in kept])
        kept, ends = kept[: np.flatnonzero(sizes)[-1] + 1], np.cumsum(sizes)
        self.blocks = [slice(int(end - size), int(end)) for end, size in zip(ends, sizes)][: len(kept)]
        self.frequencies = torch.from_numpy(np.repeat(np.arange(len(kept)), sizes[: len(kept)])).to(self.device)
        self._vectors = [np.ascontiguousarray(vector) for vector in kept]

    def expand(self, images: Any) -> Tensor:
        """Coefficients `(m, d)` complex64, of images `(m, n, n)`; their real inner products are those of the pixels."""
        images = square(images)
        if images.shape[-1] != self.rings.n:
            n = self.rings.n
            raise ValueError(f"images: expected {n} x {n} px, as the references, got {images.shape[-1]}; resample them")
        values = self.rings.analyse(images)
        parts = [values[:, k] @ vectors.conj() for k, vectors in enumerate(self._vectors)]
        return torch.from_numpy(np.concatenate(parts, axis=1)).to(self.device)

    def power(self, coefficients: Tensor) -> Tensor:
        """The energy in each ring, `(m, rings)` float32, of images with coefficients `(m, d)`."""
        power = torch.zeros(len(coefficients), len(self.rings.radius), device=self.device)
        for block, vectors in zip(self.blocks, self._vectors):
            power += (coefficients[:, block] @ torch.from_numpy(vectors.T).to(self.device)).abs().square()
        return power

    def turned(self, coefficients: Tensor, angle: Tensor) -> Tensor:
        """Coefficients `(..., d)` of images turned by `angle` `(...)`, radians, from x towards y."""
        return coefficients * torch.exp(-1j * angle[..., None] * self.frequencies)

    def images(self, coefficients: Tensor) -> np.ndarray:
        """The images `(m, n, n)` float32 of coefficients `(m, d)`."""
        values = np.zeros((len(coefficients), self.rings.count, self.rings.scale.shape[1]), np.complex64)
        for k, (block, vectors) in enumerate(zip(self.blocks, self._vectors)):
            values[:, k] = coefficients[:, block].cpu().numpy() @ vectors.T
        return self.rings.synthesise(values)
