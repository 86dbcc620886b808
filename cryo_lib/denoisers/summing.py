"""The posterior of images over references and their turns in the plane, summed as references come.

Of y = C R_phi x_i + noise, where reference i and angle phi are unknown and equally likely,

    E[x | y] = sum_i,phi w_i,phi R_phi x_i,    w_i,phi ~ exp(-|y - C R_phi x_i|^2 / (2 sigma^2)).

In a steerable basis the correlations with all angles of a reference are one Fourier transform. Memory does not grow
with the number of references.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.fft
import torch
from torch import Tensor

from cryo_lib.denoisers.steerable import Basis
from cryo_lib.simulate.noise import background
from cryo_lib.simulate.projection import square

PAIRS, FEW = 8192, 16  # image-reference pairs that are correlated at a time, and of how many images
NEGLIGIBLE = 18.0  # nats below the most likely, left out of sums
LEAST_ANGLES = 180  # that every reference is turned by
NEIGHBOURS = 32  # references that are remembered of each image, the most likely


@dataclass(frozen=True)
class Posterior:
    """What the posterior says of n images.

    Attributes
    ----------
    x_hat : `(n, h, h)` float32, the estimate.
    evidence : `(n,)` log of the likelihood ratio of "one of the references" to "noise alone", nats.
    reference, angle : `(n,)`, the most likely reference, and the degrees that it is turned by, from x towards y.
    labels : `(n, labels)`, the posterior probability of each label of the references.
    """

    x_hat: np.ndarray
    evidence: np.ndarray
    reference: np.ndarray
    angle: np.ndarray
    labels: np.ndarray


def noise_level(y: Any) -> np.ndarray:
    """The sd of each image's noise, `(n,)`, estimated where no particle is: outside the circle inscribed in the box."""
    return background(y)[1]


class PosteriorSum:
    """The posterior of images, summed over references as they come.

    Parameters
    ----------
    basis : of the references.
    y : noisy images `(n, h, h)`. sigma : sd of their noise, a number or `(n,)`.
    labels : how many labels references have, such as conformations.
    transfer : `(n, h, h // 2 + 1)`, C of each image (`simulate.ctf.ctf`), by which references are multiplied; None: 1.
    spectrum : `(h // 2 + 1,)`, the noise's power in rings of Fourier pixels in units of sigma^2; None: white, 1.
        Both act exactly on the images; in the energy of a reference their mean over each ring counts.

    Raises
    ------
    ValueError : images that are not square or of another size than the references; sigma, transfer or spectrum that are
        not finite, or not > 0 where they must be.
    """

    def __init__(
        self, basis: Basis, y: Any, sigma: Any, labels: int = 1, transfer: Any = None, spectrum: Any = None
    ) -> None:
        y = square(y)
        sigma = np.asarray(sigma, np.float64)
        if sigma.shape not in {(), (len(y),)} or not (np.isfinite(sigma) & (sigma > 0)).all():
            raise ValueError(
                f"sigma: expected the noise's sd, one finite number > 0 or {len(y)}, got {sigma}; "
                "estimate it with noise_level"
            )
        sigma = np.broadcast_to(sigma, len(y))
        self.basis, self.count, n, device = basis, 0, len(y), basis.device
        self.rings: Tensor | None = None
        if transfer is not None or spectrum is not None:
            y, rings = _filtered(y, transfer, spectrum, basis)
            self.rings = torch.from_numpy(rings).to(device)
        self.y = basis.expand(y)
        self.precision = torch.from_numpy(1 / sigma**2).float().to(device)
        self.angles = scipy.fft.next_fast_len(max(LEAST_ANGLES, 4 * len(basis.blocks)), real=True)
        self.mean = torch.zeros_like(self.y)
        self.largest = torch.full((n,), -math.inf, device=device)
        self.total = torch.zeros(n, labels, device=device)
        self.likelihoods = torch.full((n, NEIGHBOURS), -math.inf, device=device)  # of the most likely references ...
        self.numbers = torch.zeros(n, NEIGHBOURS, dtype=torch.long, device=device)  # ... which they are
        self.turns = torch.zeros(n, NEIGHBOURS, device=device)  # ... and how they are turned, radians

    def add(self, references: Tensor, label: int = 0) -> Tensor:
        """Take up references, coefficients `(m, d)`, of one label; they are numbered on.

        Returns
        -------
        `(n, m)`, the log likelihood of each image and reference at its best angle, less that of noise alone.
        """
        found = []
        for part in references.split(PAIRS // FEW):
            energy = self._energy(part)
            rows = [slice(start, start + FEW) for start in range(0, len(self.y), FEW)]
            found.append(torch.cat([self._add(each, part, energy[each], label) for each in rows]))
            self.count += len(part)
        return torch.cat(found, 1)

    def _energy(self, part: Tensor) -> Tensor:
        """|C R x|^2 of each image and reference, `(n or 1, m)`; the same for all angles."""
        if self.rings is None:
            return part.abs().square().sum(1).expand(len(self.y), -1)
        return self.rings @ self.basis.power(part).T

    def _add(self, rows: slice, part: Tensor, energy: Tensor, label: int) -> Tensor:
        y, blocks = self.y[rows], self.basis.blocks
        products = y.new_zeros(len(y), len(part), self.angles // 2 + 1)
        for k, block in enumerate(blocks):
            products[:, :, k] = (0.5 if k else 1.0) * (y[:, block] @ part[:, block].conj().T)
        correlations = torch.fft.irfft(products, n=self.angles, norm="forward")
        likelihoods = (correlations - 0.5 * energy[:, :, None]) * self.precision[rows, None, None]
        best, turns = likelihoods.max(2)
        self._remember(rows, best, turns * (2 * math.pi / self.angles))
        largest = torch.maximum(self.largest[rows], best.amax(1))
        shrunk = torch.exp(self.largest[rows] - largest)[:, None]
        self.largest[rows] = largest
        self.mean[rows] *= shrunk
        self.total[rows] *= shrunk
        chosen = (best > largest[:, None] - NEGLIGIBLE).any(0)
        if not chosen.any():
            return best
        weights = torch.exp(likelihoods[:, chosen] - largest[:, None, None])
        self.total[rows, label] += weights.sum((1, 2))
        turned = torch.fft.rfft(weights)  # sum over angles of w exp(-1j k phi), the factor of a turned reference
        for k, block in enumerate(blocks):
            self.mean[rows, block] += turned[:, :, k] @ part[chosen][:, block]
        return best

    def _remember(self, rows: slice, best: Tensor, turns: Tensor) -> None:
        numbers = torch.arange(self.count, self.count + best.shape[1], device=best.device).expand_as(best)
        self.likelihoods[rows], index = torch.cat([self.likelihoods[rows], best], 1).topk(NEIGHBOURS)
        self.numbers[rows] = torch.cat([self.numbers[rows], numbers], 1).gather(1, index)
        self.turns[rows] = torch.cat([self.turns[rows], turns], 1).gather(1, index)

    def coefficients(self) -> Tensor:
        """The posterior mean of each image, `(n, d)`; ValueError where no reference has come."""
        if not self.count:
            raise ValueError("references: expected one or more, got none; add some")
        return self.mean / self.total.sum(1, keepdim=True)

    def result(self, coefficients: Tensor | None = None, size: int | None = None) -> Posterior:
        """The posterior, with the images of `coefficients` for the estimate; None: those of its mean.

        size : how many references there are, where those that came are the likely ones among them.
        """
        coefficients = self.coefficients() if coefficients is None else coefficients
        total = self.total.sum(1, keepdim=True)
        evidence = (self.largest + total[:, 0].log()).cpu().double().numpy()
        evidence -= math.log((size or self.count) * self.angles)
        nearest = self.numbers[:, 0].cpu().numpy(), np.rad2deg(self.turns[:, 0].cpu().numpy())
        return Posterior(self.basis.images(coefficients), evidence, *nearest, (self.total / total).cpu().numpy())


def _filtered(y: np.ndarray, transfer: Any, spectrum: Any, basis: Basis) -> tuple[np.ndarray, np.ndarray]:
    """Images times C / S, and C^2 / S in the mean over each ring of the basis, `(n, rings)`."""
    h = y.shape[-1]
    ring = np.rint(np.hypot(scipy.fft.fftfreq(h, 1 / h)[:, None], scipy.fft.rfftfreq(h, 1 / h))).astype(int)
    transfer = np.ones((1, *ring.shape), np.float32) if transfer is None else np.asarray(transfer, np.float32)
    spectrum = np.ones(h // 2 + 1) if spectrum is None else np.asarray(spectrum, np.float64)
    if transfer.shape not in {(len(y), *ring.shape), (1, *ring.shape)} or not np.isfinite(transfer).all():
        raise ValueError(f"transfer: expected finite values of shape {(len(y), *ring.shape)}, got {transfer.shape}")
    if spectrum.shape != (h // 2 + 1,) or not (np.isfinite(spectrum) & (spectrum > 0)).all():
        raise ValueError(f"spectrum: expected {h // 2 + 1} finite powers > 0, one a ring, got shape {spectrum.shape}")
    noise = np.interp(ring, np.arange(h // 2 + 1), spectrum).astype(np.float32)
    filtered = scipy.fft.irfft2(scipy.fft.rfft2(y) * transfer / noise, s=y.shape[1:])
    counts = np.bincount(ring.ravel())
    means = np.stack([np.bincount(ring.ravel(), each.ravel()) / counts for each in transfer**2 / noise])
    at = basis.rings.radius * h / (2 * np.pi)
    weights = np.stack([np.interp(at, np.arange(len(counts)), each) for each in means]).astype(np.float32)
    return filtered, np.broadcast_to(weights, (len(y), weights.shape[1])).copy()
