"""Images in a basis in which a turn in the plane is a phase: by angular frequency, and principal components within
each.

The Fourier transform of an image on polar rings, `f(r, theta) = sum_k a_k(r) exp(1j k theta)`, becomes `a_k(r)
exp(-1j k phi)` when the image is turned by phi. The rings are Gauss-Legendre nodes, so that inner products of
coefficients are those of the pixels; the principal components of references within each k (steerable PCA, Zhao,
Shkolnisky and Singer 2016) keep what references hold and no more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import finufft
import numpy as np
import scipy.fft
import torch
from torch import Tensor

from cryo_lib import checks
from cryo_lib.denoisers.workers import Workers
from cryo_lib.simulate.projection import square

PRECISION = 3e-5  # relative error of the Fourier transform on the rings
FITTED = 2000  # images at most that principal components are taken from
BATCH = 64  # images that a thread transforms at a time
TOGETHER = 512  # images whose products are taken at a time


def _in_parts(work: Callable[[slice], None], n: int) -> None:
    """Do some work for all of n images, `BATCH` at a time."""
    parts = [slice(start, start + BATCH) for start in range(0, n, BATCH)]
    with Workers() as workers:
        for some in (parts[:1], parts[1:]):  # two first calls of finufft at once can crash, see `projection.project`
            workers.map(lambda part, _: work(part), some)


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
        # Of a real image the values at opposite points are conjugate: half of the circle is computed.
        theta = 2 * np.pi / self.angles * np.arange(self.angles // 2)
        self.points = [np.outer(radius, f(theta)).ravel().astype(np.float32) for f in (np.sin, np.cos)]  # y, x
        off_centre = (n + 1) // 2 - n // 2  # RELION centres images of odd side one pixel further
        self.phase = np.exp(1j * off_centre * (self.points[0] + self.points[1])).astype(np.complex64)
        self.options = {"eps": PRECISION, "nthreads": 1, "upsampfac": 1.25}

    def analyse(self, images: np.ndarray) -> np.ndarray:
        """Coefficients `(m, k, ring)` complex64 of images `(m, n, n)`."""
        images = np.ascontiguousarray(images, np.complex64)
        values = finufft.nufft2d2(*self.points, images, isign=-1, **self.options).reshape(len(images), -1)
        half = (values * self.phase).reshape(len(images), len(self.radius), -1)
        rings = scipy.fft.fft(np.concatenate([half, half.conj()], axis=2), overwrite_x=True)[..., : self.count]
        return rings.transpose(0, 2, 1) * (self.scale / self.angles)

    def synthesise(self, coefficients: np.ndarray) -> np.ndarray:
        """Images `(m, n, n)` float32 of coefficients `(m, k, ring)`: the adjoint of `analyse`, and its inverse."""
        rings = scipy.fft.ifft((coefficients * self.scale).transpose(0, 2, 1), n=self.angles)
        half = rings[..., : self.angles // 2] + rings[..., self.angles // 2 :].conj()
        values = half.reshape(len(rings), -1) * self.phase.conj()
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
    on_rings : for each k, the matrix that takes its coefficients to the rings.
    """

    def __init__(self, images: Any, tolerance: float = 1e-4, device: torch.device | str = "cpu") -> None:
        images, tolerance = square(images, "references"), checks.number("tolerance", tolerance, low=0, high=1)
        self.rings, self.device = Rings(images.shape[-1]), torch.device(device)
        with Workers() as workers:
            found = workers.map(lambda each, _: torch.linalg.eigh(each), self._products(images[:FITTED]))
        energies, vectors = (np.stack([each.numpy() for each in values]) for values in zip(*found))
        ascending = np.sort(energies, axis=None)
        if ascending[-1] <= 0:
            raise ValueError(
                f"references: expected images that show something, got {len(images)} that are 0; correct them"
            )
        left_out = np.searchsorted(np.cumsum(ascending), tolerance * ascending.sum())
        kept = [vector[:, energy > ascending[left_out] * (1 - 1e-6)] for energy, vector in zip(energies, vectors)]
        sizes = np.array([vector.shape[1] for vector in kept])
        kept, ends = kept[: np.flatnonzero(sizes)[-1] + 1], np.cumsum(sizes)
        self.blocks = [slice(int(end - size), int(end)) for end, size in zip(ends, sizes)][: len(kept)]
        self.frequencies = torch.from_numpy(np.repeat(np.arange(len(kept)), sizes[: len(kept)])).to(self.device)
        self._vectors = [torch.from_numpy(vector.astype(np.complex64)) for vector in kept]
        self.on_rings = [vector.T.contiguous().to(self.device) for vector in self._vectors]

    def _products(self, images: np.ndarray) -> Tensor:
        """The sum over images of the products of their coefficients, `(k, ring, ring)`."""
        total = torch.zeros(self.rings.count, *(2 * self.rings.radius.shape), dtype=torch.complex128)
        values = torch.empty(min(TOGETHER, len(images)), *total.shape[:2], dtype=torch.complex64)
        for start in range(0, len(images), TOGETHER):
            some = images[start : start + TOGETHER]

            def analyse(part: slice, some: np.ndarray = some) -> None:
                values[: len(some)][part] = torch.from_numpy(self.rings.analyse(some[part]))

            def add(k: int, _: Any, m: int = len(some)) -> None:
                total[k] += values[:m, k].T @ values[:m, k].conj()

            _in_parts(analyse, len(some))
            with Workers() as workers:
                workers.map(add, range(len(total)))
        return total

    def expand(self, images: Any) -> Tensor:
        """Coefficients `(m, d)` complex64, of images `(m, n, n)`; their real inner products are those of the pixels."""
        images = square(images)
        if images.shape[-1] != self.rings.n:
            n = self.rings.n
            raise ValueError(f"images: expected {n} x {n} px, as the references, got {images.shape[-1]}; resample them")
        coefficients = torch.empty(len(images), len(self.frequencies), dtype=torch.complex64)

        def fill(part: slice) -> None:
            values = torch.from_numpy(self.rings.analyse(images[part]))
            for k, (block, vectors) in enumerate(zip(self.blocks, self._vectors)):
                coefficients[part, block] = values[:, k] @ vectors.conj()

        _in_parts(fill, len(images))
        return coefficients.to(self.device)

    def power(self, coefficients: Tensor) -> Tensor:
        """The energy in each ring, `(m, rings)` float32, of images with coefficients `(m, d)`."""
        power = torch.zeros(len(coefficients), len(self.rings.radius), device=self.device)
        for block, vectors in zip(self.blocks, self.on_rings):
            power += (coefficients[:, block] @ vectors).abs().square()
        return power

    def turned(self, coefficients: Tensor, angle: Tensor) -> Tensor:
        """Coefficients `(..., d)` of images turned by `angle` `(...)`, radians, from x towards y."""
        return coefficients * torch.exp(-1j * angle[..., None] * self.frequencies)

    def images(self, coefficients: Tensor) -> np.ndarray:
        """The images `(m, n, n)` float32 of coefficients `(m, d)`."""
        coefficients = coefficients.cpu()
        images = np.empty((len(coefficients), self.rings.n, self.rings.n), np.float32)

        def fill(part: slice) -> None:
            values = torch.zeros(len(images[part]), self.rings.count, len(self.rings.radius), dtype=torch.complex64)
            for k, (block, vectors) in enumerate(zip(self.blocks, self._vectors)):
                values[:, k] = coefficients[part, block] @ vectors.T
            images[part] = self.rings.synthesise(values.numpy())

        _in_parts(fill, len(images))
        return images
