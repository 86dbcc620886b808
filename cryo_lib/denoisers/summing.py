"""The posterior of images over references and their turns in the plane, summed as references come.

Of y = C R_phi x_i + noise, where reference i and angle phi are unknown and equally likely,

    E[x | y] = sum_i,phi w_i,phi R_phi x_i,    w_i,phi ~ exp(-|y - C R_phi x_i|^2 / (2 sigma^2)).

In a steerable basis the correlations with all angles of a reference are one Fourier transform. Where particles are off
the centre, the sum is over their shifts as well: an image is compared once for each, moved back. Memory does not grow
with the number of references.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import scipy.fft
import torch
from torch import Tensor

from cryo_lib import checks
from cryo_lib.denoisers.steerable import Basis
from cryo_lib.denoisers.workers import Workers
from cryo_lib.simulate.noise import background
from cryo_lib.simulate.projection import square

TOGETHER = {"cpu": (16, 512), "cuda": (256, 1024)}  # images and references that are correlated at a time
NEGLIGIBLE = 18.0  # nats below the most likely, left out of sums
LEAST_ANGLES = 180  # that every reference is turned by
NEIGHBOURS = 32  # references that are remembered of each image, the most likely
SURE = 5.0  # standard errors by which a grey scale must differ to be named
BRIGHT, DIM, DARK = 2.0, 0.1, -0.1  # times the references' own mean, beyond which it is another grey scale


@dataclass(frozen=True)
class Posterior:
    """What the posterior says of n images.

    Attributes
    ----------
    x_hat : `(n, h, h)` float32, the estimate.
    evidence : `(n,)` log of the likelihood ratio of "one of the references" to "noise alone", nats.
    reference, angle : `(n,)`, the most likely reference, and the degrees that it is turned by, from x towards y.
    labels : `(n, labels)`, the posterior probability of each label of the references.
    shift : `(n, 2)`, px along x and y that the most likely reference is moved by after its turn; 0 where none is tried.
    """

    x_hat: np.ndarray
    evidence: np.ndarray
    reference: np.ndarray
    angle: np.ndarray
    labels: np.ndarray
    shift: np.ndarray


def noise_level(y: Any) -> np.ndarray:
    """The sd of each image's noise, `(n,)`, estimated where no particle is: outside the circle inscribed in the box.

    ValueError where that does not vary, as in images that were masked.
    """
    level = background(y)[1]
    if not (level > 0).all():
        raise ValueError(
            f"y: expected noise outside the particle, got none in {int((level == 0).sum())} of {len(level)} images, "
            f"the first is image {int(np.argmin(level))}; give images that were not masked, or sigma"
        )
    return level


def noise_sd(sigma: Any, n: int) -> np.ndarray:
    """Sigma of each of n images, `(n,)` float64, of a number or `(n,)`; ValueError where one is not finite and > 0."""
    try:
        values = np.asarray(sigma, np.float64)
    except (TypeError, ValueError):
        values = np.array(math.nan)
    if values.shape not in {(), (n,)} or not (np.isfinite(values) & (values > 0)).all():
        raise ValueError(
            f"sigma: expected the noise's sd, one finite number > 0 or {n}, got {sigma}; estimate it with noise_level"
        )
    return np.broadcast_to(values, n)


def shift_grid(shifts: tuple[float, float] | None) -> np.ndarray:
    """The shifts `(t, 2)`, px along x and y, of a grid `(reach, step)` within a circle, from the centre; None: 0."""
    if shifts is None:
        return np.zeros((1, 2))
    if np.shape(shifts) != (2,):
        raise ValueError(f"shifts: expected reach and step, px, such as (4, 1), got {shifts!r}")
    reach, step = checks.number("shifts[0]", shifts[0], low=0), checks.number("shifts[1]", shifts[1], above=0)
    steps = int(reach / step + 1e-6)
    axis = step * np.arange(-steps, steps + 1)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    distance = np.hypot(*grid.T)
    return grid[np.argsort(distance, kind="stable")][: int((distance <= reach * (1 + 1e-6)).sum())]


def angle_count(basis: Basis) -> int:
    """How many angles every reference is turned by: more than its finest angular frequency needs."""
    return scipy.fft.next_fast_len(max(LEAST_ANGLES, 4 * len(basis.blocks)), real=True)


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
    shifts : reach and step, px, of the grid of equally likely shifts of the turned references; None: they are centred.

    Raises
    ------
    ValueError : images that are not square or of another size than the references; sigma, transfer or spectrum that are
        not finite, or not > 0 where they must be; shifts beyond half of the box.
    """

    def __init__(
        self,
        basis: Basis,
        y: Any,
        sigma: Any,
        labels: int = 1,
        transfer: Any = None,
        spectrum: Any = None,
        shifts: tuple[float, float] | None = None,
    ) -> None:
        y, device = square(y), basis.device
        self.basis, self.labels = basis, labels
        self.precision = torch.from_numpy(1 / noise_sd(sigma, len(y)) ** 2).float().to(device)
        self.shifts = shift_grid(shifts)
        if np.abs(self.shifts).max() >= y.shape[-1] / 2:
            raise ValueError(
                f"shifts: expected less than half of the box of {y.shape[-1]} px, got {shifts}; choose less"
            )
        self.rings: Tensor | None = None
        if transfer is not None or spectrum is not None:
            y, rings = _filtered(y, transfer, spectrum, basis)
            self.rings = torch.from_numpy(rings).to(device)
        back = [basis.expand(moved(y, -shift)) for shift in self.shifts]
        self.y = back[0] if len(back) == 1 else torch.stack(back, 1).flatten(0, 1)  # a row an image and shift
        self.precision = self._of_rows(self.precision)
        self.angles = angle_count(basis)
        self._halves = 1 - 0.5 * (basis.frequencies > 0).float()
        # On a GPU what is negligible is summed as well: to leave it out the host would have to wait.
        self.everything = device.type == "cuda"
        self._empty()

    def _empty(self) -> None:
        n, device, self.count = len(self.y), self.y.device, 0
        self.mean = torch.zeros_like(self.y)
        self.largest = torch.full((n,), -math.inf, device=device)
        self.total = torch.zeros(n, self.labels, device=device)
        self.likelihoods = torch.full((n, NEIGHBOURS), -math.inf, device=device)  # of the most likely references ...
        self.numbers = torch.zeros(n, NEIGHBOURS, dtype=torch.long, device=device)  # ... which they are
        self.turns = torch.zeros(n, NEIGHBOURS, device=device)  # ... and how they are turned, radians

    def some(self, images: slice) -> PosteriorSum:
        """An empty sum for some of the images."""
        part, t = copy.copy(self), len(self.shifts)
        rows = slice(images.start * t, images.stop * t)
        part.y, part.precision = self.y[rows], self.precision[rows]
        part.rings = None if self.rings is None else self.rings[images]
        part._empty()
        return part

    @property
    def n(self) -> int:
        """How many images there are."""
        return len(self.y) // len(self.shifts)

    def _of_rows(self, values: Tensor) -> Tensor:
        """Values of images, `(n, ...)`, for each of their rows."""
        return values.repeat_interleave(len(self.shifts), 0) if len(self.shifts) > 1 else values

    def check_scale(self, references: Tensor) -> None:
        """Raise ValueError where the images are on another grey scale than references with coefficients `(m, d)`.

        What is compared is how much of the references' rotational mean the median image holds: more than twice as much
        as any reference, less than a tenth of any, or the negative of it cannot come from them; nor can the negative of
        it and an offset, which are fitted together. Images that hold none within the noise's error are noise alone,
        and pass.
        """
        block = self.basis.blocks[0]
        rings = references[:, block] @ self.basis.on_rings[0]
        ones = self.basis.expand(np.ones((1, self.basis.rings.n, self.basis.rings.n), np.float32))[:, block]
        shapes = torch.stack([rings.mean(0), (ones @ self.basis.on_rings[0])[0]])  # the mean, and an offset
        weights = torch.ones(1, rings.shape[1], device=rings.device) if self.rings is None else self.rings
        y, precision = self.y[:: len(self.shifts), block], self.precision[:: len(self.shifts)]
        with_shapes = torch.cat([references[:, block].mean(0, keepdim=True), ones]).conj().T
        values, products = (y @ with_shapes).real, (shapes[:, None] * shapes.conj()).real
        cross = torch.einsum("nr,abr->nab", weights, products)
        held, error, own = values[:, 0] / cross[:, 0, 0], cross[:, 0, 0].rsqrt(), weights.mean(0)
        mean_cross, of_references = cross.mean(0), torch.einsum("mr,ar,r->ma", rings, shapes.conj(), own.to(rings)).real
        self._check_held(held, precision.rsqrt() * error, of_references[:, 0] / mean_cross[0, 0], False)
        # Of a mean and an offset, which no transfer weighs: the first row of the inverse, and its error.
        mixed = torch.stack([cross[:, :, 0], products.sum(2)[:, 1].expand(len(cross), 2)], 2)
        first = torch.linalg.inv(mixed.double())[:, :1].float()
        held, error = (first[:, 0] * values).sum(1), (first @ cross @ first.mT)[:, 0, 0].sqrt()
        self._check_held(held, precision.rsqrt() * error, of_references @ first.mean(0)[0], True)

    def _check_held(self, held: Tensor, error: Tensor, own: Tensor, negative: bool) -> None:
        """ValueError where the median image holds what no reference does; with `negative`, of that alone."""
        found, low, high = float(held.median()), float(own.min()), float(own.max())
        spread = 1.25 * float(error.median()) / self.n**0.5
        sure = SURE * spread
        bright, dark = found - sure > BRIGHT * high, found + sure < min(DARK * high, 2 * low)
        if dark or not negative and (bright or sure < found < DIM * low - sure):
            raise ValueError(
                f"y: expected images on the grey scale of the references, got a median image that holds {found:.3g} "
                f"(within {spread:.1g}) times their mean{', beside an offset' if negative else ''}, of which the "
                f"references hold {low:.3g} to {high:.3g}; subtract the background of the images, protein bright, and "
                "divide them by their contrast"
            )

    def add(self, references: Tensor, label: int = 0, scores: bool = True) -> Tensor | None:
        """Take up references, coefficients `(m, d)`, of one label; they are numbered on.

        Returns
        -------
        `(n, m)`, the log likelihood of each image and reference at its best angle and shift, less that of noise alone.
        None where `scores` are not asked for: on a CPU, references then cost less that can neither count in the sum nor
        be among the most likely, since a bound over all angles is below both.
        """
        few, many = TOGETHER[self.basis.device.type]
        pairs, found = min(few, len(self.y)) * min(many, len(references)), []
        rows = [slice(start, start + few) for start in range(0, len(self.y), few)]
        with Workers(lambda: self._scratch(pairs), self.y.device) as workers:
            for part in references.split(many):
                work = partial(self._add, part, self._of_rows(self._energy(part)), label, scores or self.everything)
                best = workers.map(work, rows)
                found += [torch.cat(best)] if scores else []
                self.count += len(part)
        if not scores:
            return None
        best = torch.cat(found, 1)
        return best if len(self.shifts) == 1 else best.unflatten(0, (-1, len(self.shifts))).amax(1)

    def _scratch(self, pairs: int) -> tuple[Tensor, Tensor]:
        """Room for the products of some pairs, and for the same with 0 beyond the last k."""
        room = self.y.new_zeros(pairs * len(self.basis.blocks))
        return room, self.y.new_zeros(pairs, self.angles // 2 + 1)

    def _energy(self, part: Tensor) -> Tensor:
        """|C R x|^2 of each image and reference, `(n, m)`; the same for all angles and shifts."""
        if self.rings is None:
            return part.abs().square().sum(1).expand(self.n, -1)
        return self.rings @ self.basis.power(part).T

    def _add(
        self, part: Tensor, energy: Tensor, label: int, every: bool, rows: slice, scratch: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Take up references for some rows; the likelihood of each pair `(rows, m)`, -inf where it cannot matter."""
        blocks, precision = self.basis.blocks, self.precision[rows, None]
        y, conjugate = self.y[rows] * (precision * self._halves), part.conj().T
        shape = len(y), len(part)
        products = scratch[0][: math.prod(shape) * len(blocks)].view(len(blocks), *shape)
        for k, block in enumerate(blocks):
            torch.mm(y[:, block], conjugate[block], out=products[k])
        products[0] -= 0.5 * precision * energy[rows]
        pairs = slice(None) if every else self._possible(rows, products)
        best = torch.full(shape, -math.inf, device=y.device)
        if isinstance(pairs, Tensor) and not len(pairs):
            return best
        likelihoods = self._of_angles(products.flatten(1).T[pairs], scratch[1])
        best.view(-1)[pairs] = likelihoods.amax(1)
        largest = torch.maximum(self.largest[rows], best.amax(1))
        self._remember(rows, best, likelihoods, pairs)
        shrunk = torch.exp(self.largest[rows] - largest)[:, None]
        self.largest[rows] = largest
        self.mean[rows] *= shrunk
        self.total[rows] *= shrunk
        if not self.everything and not (best > largest[:, None] - NEGLIGIBLE).any():
            return best
        turned, used = self._weights(best, likelihoods, largest, pairs)
        self.total[rows, label] += turned[0].real.sum(1)
        for k, block in enumerate(blocks):
            self.mean[rows, block] += turned[k] @ part[used, block]
        return best

    def _possible(self, rows: slice, products: Tensor) -> Tensor | slice:
        """Which pairs, numbered, may be likely: the sum of |products| bounds the likelihood at every angle."""
        least = torch.minimum(self.largest[rows] - NEGLIGIBLE, self.likelihoods[rows, -1])[:, None]
        for some in (slice(1), slice(None)):  # one row tells whether the bound is worth its cost
            possible = 2 * products[1:, some].abs().sum(0) + products[0, some].real > least[some]
            if 2 * int(possible.sum()) > possible.numel():
                return slice(None)
        return torch.nonzero(possible.view(-1), as_tuple=True)[0]

    def _of_angles(self, products: Tensor, scratch: Tensor) -> Tensor:
        """Likelihoods `(pairs, angles)` of products `(pairs, k)`."""
        padded = scratch[: len(products)]
        padded[:, : products.shape[1]] = products
        return torch.fft.irfft(padded, n=self.angles, norm="forward")

    def _weights(
        self, best: Tensor, likelihoods: Tensor, largest: Tensor, pairs: Tensor | slice
    ) -> tuple[Tensor, Tensor | slice]:
        """Sums over angles of w exp(-1j k phi), by which references are turned, `(k, rows, used)`; and those used."""
        n, m, count = *best.shape, len(self.basis.blocks)
        if self.everything:
            weights = torch.exp(likelihoods.view(n, m, -1) - largest[:, None, None])
            return torch.fft.rfft(weights)[..., :count].permute(2, 0, 1), slice(None)
        row, column = torch.nonzero(best > largest[:, None] - NEGLIGIBLE, as_tuple=True)
        chosen = self._places(best, likelihoods, pairs)[row, column]
        weights = torch.exp(likelihoods[chosen] - largest[row, None])
        used, place = torch.unique(column, return_inverse=True)
        turned = self.y.new_zeros(count, n, len(used))
        turned[:, row, place] = torch.fft.rfft(weights)[:, :count].T
        return turned, used

    def _places(self, best: Tensor, likelihoods: Tensor, pairs: Tensor | slice) -> Tensor:
        """Which of the likelihoods are those of each pair, `(rows, m)`; any where there are none."""
        places = torch.zeros(best.shape, dtype=torch.long, device=best.device)
        places.view(-1)[pairs] = torch.arange(len(likelihoods), device=best.device)
        return places

    def _remember(self, rows: slice, best: Tensor, likelihoods: Tensor, pairs: Tensor | slice) -> None:
        """Keep the most likely of the references known so far and of those that have come."""
        places = self._places(best, likelihoods, pairs)
        best, new = best.topk(min(NEIGHBOURS, best.shape[1]))
        turns = likelihoods[places.gather(1, new)].argmax(2) * (2 * math.pi / self.angles)
        self.likelihoods[rows], index = torch.cat([self.likelihoods[rows], best], 1).topk(NEIGHBOURS)
        self.numbers[rows] = torch.cat([self.numbers[rows], new + self.count], 1).gather(1, index)
        self.turns[rows] = torch.cat([self.turns[rows], turns], 1).gather(1, index)

    def coefficients(self) -> Tensor:
        """The posterior mean of each image at each shift, `(n t, d)`; ValueError where no reference has come."""
        if not self.count:
            raise ValueError("references: expected one or more, got none; add some")
        return self.mean / self.total.sum(1, keepdim=True)

    def result(self, coefficients: Tensor | None = None, size: int | None = None) -> Posterior:
        """The posterior, with the images of `coefficients` for the estimate; None: those of its mean.

        size : how many references there are, where those that came are the likely ones among them.
        """
        coefficients, t = self.coefficients() if coefficients is None else coefficients, len(self.shifts)
        total = self.total.sum(1, keepdim=True)
        logs = (self.largest + total[:, 0].log()).cpu().double().numpy().reshape(-1, t)
        evidence = np.logaddexp.reduce(logs, axis=1)
        shares = np.exp(logs - evidence[:, None])
        evidence = evidence - math.log((size or self.count) * self.angles * t)
        x_hat = np.zeros((len(logs), *2 * (self.basis.rings.n,)), np.float32)
        for k, shift in enumerate(self.shifts):
            held = np.flatnonzero(shares[:, k] > math.exp(-NEGLIGIBLE))
            if len(held):
                images = self.basis.images(coefficients[torch.from_numpy(held * t + k).to(coefficients.device)])
                x_hat[held] += shares[held, k, None, None].astype(np.float32) * moved(images, shift)
        best = self.likelihoods[:, 0].reshape(-1, t).argmax(1).cpu().numpy()
        rows = np.arange(len(best)) * t + best
        degrees = np.rad2deg(self.turns[:, 0].cpu().numpy())[rows]
        labels = (self.total / total).cpu().numpy().reshape(len(best), t, -1)
        labels = (shares[..., None] * labels).sum(1, dtype=np.float32)
        reference = self.numbers[:, 0].cpu().numpy()[rows]
        return Posterior(x_hat, evidence, reference, degrees, labels, self.shifts[best])


def moved(images: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Images `(m, h, h)` moved periodically by `shift`, px along x and y, `(2,)` or one for each image `(m, 2)`."""
    if not shift.any():
        return images
    h, (x, y) = images.shape[-1], np.moveaxis(shift, -1, 0)[..., None, None]
    turns = scipy.fft.rfftfreq(h) * x + scipy.fft.fftfreq(h)[:, None] * y
    factor = np.exp(-2j * np.pi * turns).astype(np.complex64)
    return scipy.fft.irfft2(scipy.fft.rfft2(images) * factor, s=images.shape[1:])


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
    # Of a transfer: its mean over each ring of pixels, and that interpolated to the rings of the basis.
    inside = ring.ravel() == np.arange(ring.max() + 1)[:, None]
    means = inside / inside.sum(axis=1, keepdims=True)
    at = basis.rings.radius * h / (2 * np.pi)
    taken = np.stack([np.interp(at, np.arange(len(means)), each) for each in np.eye(len(means))])
    weights = ((transfer**2 / noise).reshape(len(transfer), -1) @ means.T @ taken).astype(np.float32)
    return filtered, np.broadcast_to(weights, (len(y), weights.shape[1])).copy()
