"""The objectives of the paper: (alpha, beta)-scores, the Wasserstein score, reconstruction losses; methods of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from cryo_lib import checks
from cryo_lib.networks import parallel

LOSSES = ("l1", "l2", "trimmed", "welsch")
TARGETS = {"noise2noise": "copy", "noise2void": "itself"}  # ids of methods that see no reference
WELSCH_WIDTH = 4.0  # of Welsch's loss, in medians of a minibatch's errors


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
    discriminator: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, mix: Tensor, reduction: str = "mean"
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
    """`(n, ...)` values to a scalar: the `mean` or `sum` over each image's elements, then the mean over images."""
    return _each_image(values, reduction).mean()


def _each_image(values: Tensor, reduction: str) -> Tensor:
    flat = values.flatten(1)
    return flat.mean(1) if reduction == "mean" else flat.sum(1)


def trimmed(errors: Tensor) -> Tensor:
    """Mean of those errors of a minibatch, `(n,)`, that are not above their median: least trimmed squares, of images.

    Of several processes the median is that of the whole minibatch, as in `welsch`. Source: Rousseeuw 1984.
    """
    everyones = parallel.gathered(errors.detach())
    median = _median(everyones)
    return torch.where(errors <= median, errors, 0.0).mean() / (everyones <= median).to(errors.dtype).mean()


def welsch(errors: Tensor) -> Tensor:
    """Mean of c (1 - exp(-e / c)) over a minibatch's errors e, `(n,)`, c four times their median (Welsch's loss).

    An image's gradient is weighted by exp(-e / c): errors far above the others' have next to none. Source: Holland and
    Welsch 1977, with images for residuals.
    """
    scale = WELSCH_WIDTH * _median(parallel.gathered(errors.detach())).clamp(min=torch.finfo(errors.dtype).tiny)
    return -(scale * torch.expm1(-errors / scale)).mean()


def _median(values: Tensor) -> Tensor:
    """The lower median; by a sort, which does not wait for the device."""
    return values.sort().values[(len(values) - 1) // 2]


@dataclass(frozen=True)
class Method:
    """What is minimised and maximised in Algorithm 1: an adversary (or none) and a reconstruction loss.

    Attributes
    ----------
    adversary : "none", "beta" (Eq. 5) or "wgan_gp" (Eq. 8).
    loss : "l1" or "l2", the paper's |x_hat - x|^p; "trimmed" or "welsch", robust ones of |x_hat - x|^2 an image.
    alpha, beta : of the "beta" adversary, each in [-1, 1].
    target : what the denoised image is compared with: "reference"; "copy", the same image with other noise (Lehtinen et
        al. 2018); "itself", the noisy image at pixels that the network does not see (Krull et al. 2019).
    """

    adversary: str
    loss: str
    alpha: float = 0.0
    beta: float = 0.0
    target: str = "reference"

    def __post_init__(self) -> None:
        checks.choice("adversary", self.adversary, ("none", "beta", "wgan_gp"))
        checks.choice("loss", self.loss, LOSSES)
        checks.choice("target", self.target, ("reference", *TARGETS.values()))
        if self.target != "reference" and self.adversary != "none":
            raise ValueError(
                f"target: expected reference, which the adversary {self.adversary} tells from denoised "
                f"images, got {self.target}"
            )
        for name in ("alpha", "beta"):
            checks.number(name, getattr(self, name), low=-1, high=1)

    @classmethod
    def parse(cls, name: str) -> Method:
        """The method of an id: `l2_ae`, `trimmed_ae`; an adversary and a loss, `js_l1`, `beta_05_m1_l1`; `noise2void`.

        In numbers `05` is .5, `1` is 1 and `m1` is -1; `js` is `beta_0_0`. ValueError for what is no such id.
        """
        if name in TARGETS:
            return cls("none", "l2", target=TARGETS[name])
        number, loss = "(?!m0_)m?[0-9](?:[0-9]*[1-9])?", "|".join(LOSSES)  # one way to write each: names are keys
        match = re.fullmatch(rf"({loss})_ae|(js|wgan_gp|beta_({number})_({number}))_({loss})", str(name))
        if not match:
            forms = "l1_ae, l2_ae, js_l1, wgan_gp_l1 or beta_<alpha>_<beta>_l1 such as beta_05_m1_l1 (.5, -1)"
            forms += f", {', '.join(TARGETS)}"
            losses = f"losses are {', '.join(LOSSES)}"
            raise ValueError(f"method: expected an id such as {forms}; {losses}; got {name!r}")
        alone, adversary, *powers, beside = match.groups()
        if alone:
            return cls("none", alone)
        if adversary == "wgan_gp":
            return cls("wgan_gp", beside)
        try:
            return cls("beta", beside, *(_number(power or "0") for power in powers))
        except ValueError as error:
            raise ValueError(f"method {name!r}: {error}") from error

    def real(self, logits: Tensor) -> Tensor:
        """Elementwise score of references, which D maximises."""
        return logits if self.adversary == "wgan_gp" else score_real(logits, self.alpha, self.beta)

    def fake(self, logits: Tensor) -> Tensor:
        """Elementwise score of denoised images, which D maximises and G minimises."""
        return -logits if self.adversary == "wgan_gp" else score_fake(logits, self.alpha, self.beta)

    def discriminator_loss(
        self,
        discriminator: Callable[[Tensor], Tensor],
        x: Tensor,
        x_hat: Tensor,
        mix: Tensor,
        mu: float,
        reduction: str,
    ) -> Tensor:
        """What D minimises: -S(D(x), 1) - S(D(x_hat), 0), for WGANgp with mu times the gradient penalty.

        x, x_hat : references and denoised images, (n, 1, h, w), detached. mix : (n,), of the gradient penalty.
        reduction : "mean" or "sum" over an image's patch scores.
        """
        real = reduce_images(self.real(discriminator(x)), reduction)
        loss = -real - self.adversarial_loss(discriminator, x_hat, reduction)
        if self.adversary != "wgan_gp":
            return loss
        return loss + mu * gradient_penalty(discriminator, x, x_hat, mix[:, None, None, None], reduction)

    def adversarial_loss(self, discriminator: Callable[[Tensor], Tensor], x_hat: Tensor, reduction: str) -> Tensor:
        """S(D(x_hat), 0), which D maximises and G minimises; `reduction` as of `discriminator_loss`."""
        return reduce_images(self.fake(discriminator(x_hat)), reduction)

    def reconstruction_loss(self, x_hat: Tensor, x: Tensor, reduction: str) -> Tensor:
        """The loss of each image, `reduction` "mean" or "sum" over pixels; then the mean over images, robust or not.

        Pixels where x is NaN are compared with nothing, and count as no error.
        """
        difference = torch.where(x.isnan(), 0.0, x_hat - x)
        errors = _each_image(difference.abs() if self.loss == "l1" else difference.square(), reduction)
        return {"trimmed": trimmed, "welsch": welsch}.get(self.loss, torch.mean)(errors)


def _number(digits: str) -> float:
    """What the digits of an id stand for: 05 is .5, 1 is 1, m1 is -1."""
    sign, digits = (-1.0, digits[1:]) if digits.startswith("m") else (1.0, digits)
    return sign * float(f"{digits[0]}.{digits[1:] or 0}")
