"""Denoising by a stack of noisy images and nothing else: expectation-maximisation over class averages.

An image shows one of K templates, turned in the plane, and a deviation from it, or noise alone; each of the two as
likely as the other. In units of the noise's sd,

    y = R_phi t_m + z + noise,    z ~ N(0, tau),    t_m ~ N(mean, lambda),

where tau and lambda are variances of steerable components, so that they do not depend on the turn; lambda is the
stack's own, as the prior that a covariance Wiener filter (CWF, Bhamre, Zhang and Singer 2016) has. With one template
that does not deviate from the mean this is such a filter; with more of them tau is less, and less noise passes. The
2D classification of RELION (Scheres 2012) is the same without z.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cryo_lib import checks
from cryo_lib.denoisers.posterior import mirrored
from cryo_lib.denoisers.steerable import Basis
from cryo_lib.denoisers.summing import angle_count, noise_sd
from cryo_lib.networks.models import pick_device
from cryo_lib.simulate.projection import square

LEFT_OUT = 0.05  # share of the noisy images' energy outside the basis: noise where no circle in the box reaches
TOGETHER = 64  # images that are compared at a time


@dataclass(frozen=True)
class _Weighed:
    """What an E-step says: sums over images for each class, `(K, d)` and `(K,)`, and for each image what follows."""

    sums: Tensor
    counts: Tensor
    mean: Tensor  # (n, d), of the turned templates, times the probability of a particle
    particle: Tensor  # (n,), that probability
    likelihoods: Tensor  # (n,), log, of the image, less that of noise alone


class Classes:
    """Class averages of a stack, found by `iterations` of expectation-maximisation from images taken at random.

    Parameters
    ----------
    y : noisy images `(n, h, h)`, the particles centred. sigma : sd of the noise, a number or `(n,)`; noise is white.
    n_classes : templates, at most n. iterations : at least 1.
    seed : of the images that the templates start from.
    mirrors : take the images' mirror images as well: of projections, those from the opposite side.

    Attributes
    ----------
    history : log posterior of the templates by iteration, less the likelihood of noise, nats an image; never less than
        before.
    counts : `(n_classes,)`, images of each class, in the last iteration; mirror images count as well.

    Raises
    ------
    ValueError : fewer than two images, fewer images than classes, images that are not square or that show nothing
        beyond the noise.
    """

    def __init__(
        self,
        y: Any,
        sigma: Any,
        n_classes: int,
        iterations: int,
        seed: int,
        mirrors: bool = False,
        device: str = "auto",
    ) -> None:
        y = square(y, "y")
        if len(y) < 2:
            raise ValueError(f"y: expected two images or more, got {len(y)}; classes are averages, give the stack")
        if checks.integer("n_classes", n_classes, low=1) > len(y):
            raise ValueError(f"n_classes: expected at most {len(y)}, one an image, got {n_classes}; ask for fewer")
        checks.integer("iterations", iterations, low=1)
        y = _in_sd(y, sigma)
        y = np.concatenate([y, mirrored(y)]) if mirrors else y
        self.basis = basis = Basis(y, LEFT_OUT, pick_device(device))
        self.angles = angle_count(basis)
        self._real = 2.0 - (basis.frequencies == 0).float()  # real numbers in a coefficient
        y = basis.expand(y)
        self.mean = torch.where(basis.frequencies == 0, y.mean(0), 0)
        self.prior = self._variance((y - self.mean).abs().square().mean(0))
        if not self.prior.any():
            raise ValueError("y: expected images that show more than noise, got none; lower sigma, or give others")
        chosen = torch.from_numpy(np.random.default_rng(seed).permutation(len(y))[:n_classes]).to(y.device)
        self.templates = self.mean + self.prior / (self.prior + 1) * (y[chosen] - self.mean)
        self.deviation, self.history = self.prior, []
        for _ in range(iterations):
            self._update(y, found := self._weigh(y))
        self.counts = found.counts.cpu().numpy()

    def images(self) -> np.ndarray:
        """The templates, `(n_classes, h, h)`, in units of the noise's sd."""
        return self.basis.images(self.templates)

    def denoise(self, y: Any, sigma: Any, temperature: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
        """E[x | y] under the model, `(n, h, h)` float32 on the scale of y, and the evidence `(n,)`.

        The evidence is the log of the likelihood ratio of "a particle of this stack" to "noise alone", nats; where it
        is negative x_hat tends to 0. y and sigma as of `Classes`; the images may be others than those of the stack.
        Weights are likelihoods to the power of 1 / temperature: above 1 the estimate reaches between templates, which
        are further apart than the noise can tell, and holds less of the noise that is in them.
        """
        y = square(y, "y")
        coefficients = self.basis.expand(_in_sd(y, sigma))
        found = self._weigh(coefficients, checks.number("temperature", temperature, low=1))
        passed = self.deviation / (1 + self.deviation)
        estimate = found.mean + passed * (found.particle[:, None] * coefficients - found.mean)
        scale = noise_sd(sigma, len(y)).astype(np.float32)[:, None, None]
        return self.basis.images(estimate) * scale, found.likelihoods.cpu().double().numpy()

    def _variance(self, power: Tensor) -> Tensor:
        """The variance of a real number beyond the noise's 1, of the mean of a coefficient's squared modulus."""
        return (power / self._real - 1).clamp(min=0)

    def _update(self, y: Tensor, found: _Weighed) -> None:
        """The M-step: tau where the templates are, then the templates; the history takes what the E-step saw."""
        shrunk = (self.templates - self.mean).abs().square() / self.prior.clamp(min=1e-12)
        both = torch.logaddexp(found.likelihoods, torch.zeros(())) - math.log(2)
        self.history.append(float((both.double().sum() - 0.5 * shrunk.double().sum()) / len(y)))
        power = found.particle @ y.abs().square() - 2 * (y.conj() * found.mean).real.sum(0)
        power += found.counts @ self.templates.abs().square()
        self.deviation = self._variance(power / found.particle.sum())
        gain = self.prior / (1 + self.deviation)
        self.templates = (gain * found.sums + self.mean) / (gain * found.counts[:, None] + 1)

    def _weigh(self, y: Tensor, temperature: float = 1.0) -> _Weighed:
        """The E-step of coefficients `(n, d)`."""
        sums, counts = torch.zeros_like(self.templates), torch.zeros(len(self.templates), device=y.device)
        parts = []
        for part in y.split(TOGETHER):
            weights, particle, likelihoods = self._likely(part, temperature)
            turned = torch.fft.rfft(weights)[..., : len(self.basis.blocks)]
            mean = torch.empty_like(part)
            for k, block in enumerate(self.basis.blocks):
                mean[:, block] = turned[..., k] @ self.templates[:, block]
                sums[:, block] += turned[..., k].mH @ part[:, block]
            counts += weights.sum((0, 2))
            parts.append((mean, particle, likelihoods))
        return _Weighed(sums, counts, *(torch.cat(each) for each in zip(*parts)))

    def _likely(self, y: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """Of each image the weights of templates and turns `(n, K, angles)`, of any, and the likelihood of any."""
        precision = 1 / (1 + self.deviation)
        weighted = y * precision * (self._real.reciprocal())
        products = torch.stack([weighted[:, b] @ self.templates[:, b].mH for b in self.basis.blocks], 2)
        products[:, :, 0] -= 0.5 * self.templates.abs().square() @ precision
        padded = torch.nn.functional.pad(products, (0, self.angles // 2 + 1 - products.shape[2]))
        each = torch.fft.irfft(padded, n=self.angles, norm="forward")
        # Of an image that deviates at random from 0, less that of noise alone.
        near = 0.5 * y.abs().square() @ (1 - precision) + 0.5 * self._real @ precision.log()
        near = near - math.log(len(self.templates) * self.angles)
        each += near[:, None, None]
        likelihoods = each.flatten(1).logsumexp(1)
        noise = torch.zeros_like(each[:, :1, 0])
        weights = torch.softmax(torch.cat([each.flatten(1), noise], 1) / temperature, 1)[:, :-1].view_as(each)
        return weights, weights.sum((1, 2)), likelihoods


def _in_sd(y: np.ndarray, sigma: Any) -> np.ndarray:
    return y / noise_sd(sigma, len(y)).astype(np.float32)[:, None, None]
