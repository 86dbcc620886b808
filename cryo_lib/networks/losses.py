"""The objectives of the paper: (alpha, beta)-scores, the Wasserstein score, reconstruction losses, and the methods made of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from cryo_lib import checks


@cache
def _power_coefficients(c: float, degree: int = 16) -> tuple[float, ...]:
    """Coefficients p_k of the polynomial that is (1 + w)^(-c) on [0, 1] to about 1e-12 for c in [-1, 3]."""
    fit = np.polynomial.Chebyshev.interpolate(lambda w: (1 + w) ** -c, degree, domain=[0, 1])
    return tuple(fit.convert(kind=np.polynomial.Polynomial, domain=[-1, 1], window=[-1, 1]).coef)


@cache
def _terms(a: float, c: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Coefficients and decay rates of the integral's terms, on the device once: a step must not copy from the host."""
    coefficients = _power_coefficients(c)
    rates = [a + k for k in range(len(coefficients))]
    return torch.tensor(coefficients, dtype=dtype, device=device), torch.tensor(rates, dtype=dtype, device=device)


def _integral_from_zero(r: Tensor, a: float, c: float) -> Tensor:
    """Integral of exp(-a s) (1 + exp(-s))^(-c) over s from 0 to r >= 0, term by term of the polynomial in exp(-s)."""
    p, rate = _terms(a, c, r.dtype, r.device)
    r = r.unsqueeze(-1)
    terms = torch.where(rate == 0, r, -torch.expm1(-rate * r) / torch.where(rate == 0, 1.0, rate))
    return (p * terms).sum(-1)


class _ScoreReal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, alpha: float, beta: float) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.alpha, ctx.beta = alpha, beta
        c = alpha + beta + 1
        value = torch.where(
            logits >= 0,
            _integral_from_zero(logits.clamp(min=0), beta + 1, c),
            -_integral_from_zero((-logits).clamp(min=0), alpha, c),
        )
        if beta > -1:
            value = value - sum(p / (beta + 1 + k) for k, p in enumerate(_power_coefficients(c)))
        return value

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None, None]:
        (logits,) = ctx.saved_tensors
        log_t, log_1_t = torch.nn.functional.logsigmoid(logits), torch.nn.functional.logsigmoid(-logits)
        return upstream * torch.exp(ctx.alpha * log_t + (ctx.beta + 1) * log_1_t), None, None


def score_real(logits: Tensor, alpha: float, beta: float) -> Tensor:
    """S(t, 1) = -int_t^1 c^(alpha-1) (1-c)^beta dc at t = sigmoid(logits), Eq. (5).

    Computed in logit space, where dS/dz = t^alpha (1-t)^(beta+1): exact to rounding for every logit, no clamp.

    Parameters
    ----------
    logits : real tensor of any shape; the discriminator's output before the sigmoid.
    alpha, beta : in [-1, 1]. (0, 0) is JS-GAN, (1, 1) least squares, (-.5, -.5) the boost score.

    Returns
    -------
    Tensor of the shape of `logits`, <= 0. At beta = -1 the integral diverges; the value is then the antiderivative
    that is 0 at t = 1/2, whose gradient is the same.

    Raises
    ------
    ValueError : alpha or beta outside [-1, 1].
    """
    alpha, beta = checks.number("alpha", alpha, low=-1, high=1), checks.number("beta", beta, low=-1, high=1)
    return _ScoreReal.apply(logits, alpha, beta)


def score_fake(logits: Tensor, alpha: float, beta: float) -> Tensor:
    """S(t, 0) = -int_0^t c^alpha (1-c)^(beta-1) dc at t = sigmoid(logits), Eq. (5).

    dS/dz = -t^(alpha+1) (1-t)^beta. Shapes, ranges and errors as `score_real`, of which it is the mirror image
    (t -> 1-t, alpha <-> beta); the integral diverges at alpha = -1.
    """
    alpha, beta = checks.number("alpha", alpha, low=-1, high=1), checks.number("beta", beta, low=-1, high=1)
    return _ScoreReal.apply(-logits, beta, alpha)


def gradient_penalty(
    discriminator: torch.nn.Module, real: Tensor, fake: Tensor, mix: Tensor, reduction: str = "mean"
) -> Tensor:
    """Mean over images of (||grad D(x~)||_2 - 1)^2 at x~ = mix * real + (1 - mix) * fake, Eq. (8).

    Parameters
    ----------
    discriminator : its score of an image, the `reduction` ("mean" or "sum") of its patch scores, is differentiated with
        respect to the image. With batch norm in it an image's score depends a little on the others of its batch too.
    real, fake : (n, 1, h, w), detached from any graph.
    mix : (n, 1, 1, 1) uniform on [0, 1].

    Returns
    -------
    Scalar tensor with a graph to the discriminator's weights. Source: Gulrajani et al. 2017.
    """
    between = (mix * real + (1 - mix) * fake).requires_grad_()
    scores = len(real) * reduce_images(discriminator(between), reduction)
    (slope,) = torch.autograd.grad(scores, between, create_graph=True)
    return (slope.flatten(1).norm(dim=1) - 1).square().mean()


def reduce_images(values: Tensor, reduction: str) -> Tensor:
    """`(n, ...)` elementwise values to a scalar: the `mean` or `sum` over each image's elements, then the mean over images."""
    flat = values.flatten(1)
    return (flat.mean(1) if reduction == "mean" else flat.sum(1)).mean()


@dataclass(frozen=True)
class Method:
    """One row of the paper's tables: an adversary (or none) and an l_p reconstruction loss, Algorithm 1.

    Attributes
    ----------
    label : name in tables and figures, as printed in Table 1.
    adversary : "none", "beta" (Eq. 5) or "wgan_gp" (Eq. 8).
    p : 1 or 2, the power of the reconstruction loss |x_hat - x|^p.
    alpha, beta : of the "beta" adversary, each in [-1, 1].
    """

    label: str
    adversary: str
    p: int
    alpha: float = 0.0
    beta: float = 0.0

    def __post_init__(self) -> None:
        checks.choice("adversary", self.adversary, ("none", "beta", "wgan_gp"))
        checks.choice("p", self.p, (1, 2))

    @classmethod
    def parse(cls, name: str) -> Method:
        """The method of an id such as `beta_05_05_l1`."""
        return METHODS[checks.choice("method", name, METHODS)]

    def real(self, logits: Tensor) -> Tensor:
        """Elementwise score of references, which the discriminator maximises."""
        return logits if self.adversary == "wgan_gp" else score_real(logits, self.alpha, self.beta)

    def fake(self, logits: Tensor) -> Tensor:
        """Elementwise score of denoised images, which the discriminator maximises and the generator minimises."""
        return -logits if self.adversary == "wgan_gp" else score_fake(logits, self.alpha, self.beta)

    def reconstruction(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """Elementwise |x_hat - x|^p."""
        difference = x_hat - x
        return difference.abs() if self.p == 1 else difference.square()


METHODS = {
    "l2_ae": Method("ℓ2-Autoencoder", "none", 2),
    "l1_ae": Method("ℓ1-Autoencoder", "none", 1),
    "js_l1": Method("(0,0)-GAN + ℓ1", "beta", 1, 0.0, 0.0),
    "wgan_gp_l1": Method("WGANgp + ℓ1", "wgan_gp", 1),
    "beta_1_1_l1": Method("(1,1)-GAN + ℓ1", "beta", 1, 1.0, 1.0),
    "beta_05_05_l1": Method("(.5,.5)-GAN + ℓ1", "beta", 1, 0.5, 0.5),
    "beta_m05_m05_l1": Method("(−.5,−.5)-GAN + ℓ1", "beta", 1, -0.5, -0.5),
    "beta_m1_m1_l1": Method("(−1,−1)-GAN + ℓ1", "beta", 1, -1.0, -1.0),
    "beta_1_m1_l1": Method("(1,−1)-GAN + ℓ1", "beta", 1, 1.0, -1.0),
    "beta_05_m05_l1": Method("(.5,−.5)-GAN + ℓ1", "beta", 1, 0.5, -0.5),
    "beta_01_m01_l1": Method("(.1,−.1)-GAN + ℓ1", "beta", 1, 0.1, -0.1),
}
