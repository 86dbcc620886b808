"""The scores are the paper's integrals, with exact gradients at every finite logit."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate

from cryo_lib.networks import losses

PAIRS = [(0, 0), (1, 1), (0.5, 0.5), (-0.5, -0.5), (1, -1), (-1, 1), (0.5, -0.5), (0.1, -0.1), (-1, -1), (-0.3, 0.8)]
CLOSED_FORMS = {
    (0, 0): (lambda t: np.log(t), lambda t: np.log1p(-t)),
    (1, 1): (lambda t: -((1 - t) ** 2) / 2, lambda t: -(t**2) / 2),
    (0.5, 0.5): (
        lambda t: -(math.pi / 2 - np.arcsin(np.sqrt(t)) - np.sqrt(t * (1 - t))),
        lambda t: -(np.arcsin(np.sqrt(t)) - np.sqrt(t * (1 - t))),
    ),
    (-0.5, -0.5): (lambda t: -2 * np.sqrt((1 - t) / t), lambda t: -2 * np.sqrt(t / (1 - t))),
}


@pytest.mark.parametrize("pair", CLOSED_FORMS)
def test_scores_equal_their_closed_forms(pair):
    z = torch.linspace(-12, 12, 241, dtype=torch.float64)
    t = torch.sigmoid(z).numpy()
    real, fake = CLOSED_FORMS[pair]
    np.testing.assert_allclose(losses.score_real(z, *pair).numpy(), real(t), rtol=1e-7, atol=1e-10)
    np.testing.assert_allclose(losses.score_fake(z, *pair).numpy(), fake(t), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("alpha, beta", PAIRS)
def test_scores_equal_their_integrals_where_these_converge(alpha, beta):
    for z in (-3.0, -0.4, 0.0, 0.7, 4.0):
        t = 1 / (1 + math.exp(-z))
        point = torch.tensor([z], dtype=torch.float64)
        if beta > -1:
            expected = -integrate.quad(lambda c: c ** (alpha - 1), t, 1, weight="alg", wvar=(0, beta))[0]
            assert losses.score_real(point, alpha, beta).item() == pytest.approx(expected, rel=1e-7)
        if alpha > -1:
            expected = -integrate.quad(lambda c: (1 - c) ** (beta - 1), 0, t, weight="alg", wvar=(alpha, 0))[0]
            assert losses.score_fake(point, alpha, beta).item() == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("alpha, beta", PAIRS)
def test_value_and_gradient_agree(alpha, beta):
    z = torch.linspace(-8, 8, 33, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: losses.score_real(v, alpha, beta), (z,), rtol=1e-4)
    assert torch.autograd.gradcheck(lambda v: losses.score_fake(v, alpha, beta), (z,), rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alpha, beta", PAIRS)
def test_gradient_is_the_formula_at_extreme_logits(alpha, beta, dtype):
    z = torch.tensor([-60.0, -30.0, -5.0, 0.0, 5.0, 30.0, 60.0], dtype=dtype, requires_grad=True)
    log_t, log_u = -np.logaddexp(0, -z.detach().double().numpy()), -np.logaddexp(0, z.detach().double().numpy())
    (real,) = torch.autograd.grad(losses.score_real(z, alpha, beta).sum(), z)
    (fake,) = torch.autograd.grad(losses.score_fake(z, alpha, beta).sum(), z)
    np.testing.assert_allclose(real, np.exp(alpha * log_t + (beta + 1) * log_u), rtol=1e-4, atol=1e-37)
    np.testing.assert_allclose(fake, -np.exp((alpha + 1) * log_t + beta * log_u), rtol=1e-4, atol=1e-37)
    assert torch.isfinite(real).all() and torch.isfinite(fake).all()


def test_the_scores_are_proper():
    """For every q the expected score q S(t,1) + (1-q) S(t,0) is greatest at t = q."""
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    z = torch.logit(t)
    for alpha, beta in PAIRS:
        for q in (0.2, 0.5, 0.77):
            expected = q * losses.score_real(z, alpha, beta) + (1 - q) * losses.score_fake(z, alpha, beta)
            assert t[expected.argmax()].item() == pytest.approx(q, abs=0.011)


@pytest.mark.parametrize("alpha, beta", [(1.1, 0), (0, -1.01), (float("nan"), 0)])
def test_parameters_outside_the_family_are_refused(alpha, beta):
    with pytest.raises(ValueError, match=r"(alpha|beta): expected a finite number >= -1 and <= 1, got"):
        losses.score_real(torch.zeros(1), alpha, beta)


def test_gradient_penalty_of_a_linear_critic_is_its_slope():
    slope = 3.0

    class Critic(torch.nn.Module):
        def forward(self, images):
            return slope * images[:, :, :1, :1]

    real, fake = torch.rand(5, 1, 4, 4), torch.rand(5, 1, 4, 4)
    for reduction in ("mean", "sum"):
        penalty = losses.gradient_penalty(Critic(), real, fake, torch.rand(5, 1, 1, 1), reduction)
        assert penalty.item() == pytest.approx((slope - 1) ** 2, rel=1e-5)


def test_gradient_penalty_is_of_the_reduction_that_the_critic_maximises():
    class Critic(torch.nn.Module):
        def forward(self, images):
            return images  # 16 patch scores, each of slope 1 to its own pixel

    images = torch.rand(3, 1, 4, 4)
    for reduction, slope in (("mean", 4 / 16), ("sum", 4.0)):
        penalty = losses.gradient_penalty(Critic(), images, images, torch.rand(3, 1, 1, 1), reduction)
        assert penalty.item() == pytest.approx((slope - 1) ** 2, rel=1e-5)


def test_reductions_differ_by_the_number_of_elements():
    values = torch.rand(3, 1, 5, 7)
    ratio = losses.reduce_images(values, "sum") / losses.reduce_images(values, "mean")
    assert ratio.item() == pytest.approx(35, rel=1e-5)


def test_the_trimmed_loss_is_the_mean_of_the_lesser_half():
    errors = torch.tensor([9.0, 1.0, 4.0, 2.0, 1e6], requires_grad=True)
    losses.trimmed(errors).backward()
    assert losses.trimmed(errors).item() == pytest.approx((1 + 4 + 2) / 3)
    assert errors.grad.tolist() == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3, 0])


def test_welschs_loss_weighs_each_image_by_how_far_its_error_is_above_the_others():
    """Its gradient is exp(-e / c) / n with c four medians; an error of a hundred medians has none."""
    errors = torch.tensor([1.0, 2.0, 3.0, 200.0], dtype=torch.float64, requires_grad=True)
    losses.welsch(errors).backward()
    assert errors.grad.tolist() == pytest.approx(np.exp(-errors.detach().numpy() / 8) / 4, abs=1e-12)


@pytest.mark.parametrize("name", ["trimmed_ae", "welsch_ae"])
@pytest.mark.parametrize("reduction, times", [("mean", 1), ("sum", 12)])
def test_robust_losses_of_clean_pairs_scale_as_the_squared_error_and_ignore_a_minority(name, reduction, times):
    method, x = losses.Method.parse(name), torch.zeros(9, 1, 3, 4)
    x_hat = torch.full_like(x, 0.1)
    plain = method.reconstruction_loss(x_hat, x, reduction)
    assert plain.item() == pytest.approx(0.01 * times * {"trimmed": 1, "welsch": 4 * -np.expm1(-0.25)}[method.loss])
    x_hat[:4] = 100.0
    x_hat.requires_grad_()
    (gradient,) = torch.autograd.grad(method.reconstruction_loss(x_hat, x, reduction), x_hat)
    assert not gradient[:4].any() and (gradient[4:] > 0).all()


def test_an_unknown_adversary_is_refused():
    with pytest.raises(ValueError, match="adversary: expected one of none, beta, wgan_gp, got 'hinge'"):
        losses.Method("hinge", "l1")


@pytest.mark.parametrize(
    "name, method",
    [
        ("l2_ae", losses.Method("none", "l2")),
        ("welsch_ae", losses.Method("none", "welsch")),
        ("wgan_gp_trimmed", losses.Method("wgan_gp", "trimmed")),
        ("js_l1", losses.Method("beta", "l1", 0.0, 0.0)),
        ("wgan_gp_l1", losses.Method("wgan_gp", "l1")),
        ("beta_05_05_l1", losses.Method("beta", "l1", 0.5, 0.5)),
        ("beta_m1_01_l2", losses.Method("beta", "l2", -1.0, 0.1)),
        ("noise2noise", losses.Method("none", "l2", target="copy")),
        ("noise2void", losses.Method("none", "l2", target="itself")),
    ],
)
def test_an_id_is_its_method(name, method):
    assert losses.Method.parse(name) == method


@pytest.mark.parametrize("name", ["unet", "beta_05_l1", "l3_ae", "js_l1_", "beta_050_1_l1", "beta_0_m0_l1"])
def test_what_is_no_id_is_named(name):
    """One number written in two ways as well: ids are names of folders."""
    with pytest.raises(ValueError, match=f"expected an id such as l1_ae.* got '{name}'"):
        losses.Method.parse(name)


def test_an_id_outside_the_family_is_named():
    with pytest.raises(ValueError, match="method 'beta_2_0_l1': alpha: expected a finite number >= -1 and <= 1, got 2"):
        losses.Method.parse("beta_2_0_l1")


def test_an_adversary_needs_references_to_tell_from_denoised_images():
    with pytest.raises(ValueError, match="target: expected reference, which the adversary beta .* got itself"):
        losses.Method("beta", "l1", target="itself")


@pytest.mark.parametrize("name", ["l1_ae", "l2_ae"])
def test_pixels_without_a_target_count_for_nothing(name):
    """The loss is that of the pixels that have one, over all pixels; the gradient elsewhere is 0."""
    method, x_hat = losses.Method.parse(name), torch.rand(3, 1, 4, 4, requires_grad=True)
    x, known = torch.rand(3, 1, 4, 4), torch.rand(3, 1, 4, 4) < 0.4
    loss = method.reconstruction_loss(x_hat, x.where(known, torch.nan), "mean")
    power = 1 if name == "l1_ae" else 2
    assert loss.item() == pytest.approx(((x_hat - x)[known].abs() ** power).sum().item() / x.numel())
    loss.backward()
    assert not x_hat.grad[~known].any() and x_hat.grad[known].all()


@pytest.mark.parametrize("name", ["js_l1", "beta_1_1_l2", "wgan_gp_l1"])
def test_the_losses_of_d_and_g_oppose_each_other_on_denoised_images(name):
    """The gradient of D's loss in D(x_hat) is minus that of G's, and D climbs on references."""
    method, x, x_hat = losses.Method.parse(name), torch.randn(2, 3, 1, 4, 4), torch.randn(3, 1, 4, 4)
    weight = torch.tensor(0.7, requires_grad=True)
    loss_d = method.discriminator_loss(lambda images: weight * images, x[0], x_hat, torch.zeros(3), 0.0, "mean")
    loss_g = method.adversarial_loss(lambda images: weight * images, x_hat, "mean")
    real = losses.reduce_images(method.real(weight * x[0]), "mean")
    torch.testing.assert_close(loss_d, -real - loss_g)
    assert method.reconstruction_loss(x[0], x[0], "sum") == 0
