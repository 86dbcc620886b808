"""Progressive growing: which levels are in use when, that they fade in without a jump, and that all of it learns."""

import numpy as np
import pytest
import torch
from torch import nn

from cryo_lib.networks import losses, models, pggan
from cryo_lib.networks.runs import Settings, Trainer


@pytest.mark.parametrize(
    "side, levels",
    [(8, [4, 8]), (32, [4, 8, 16, 32]), (48, [6, 12, 24, 48]), (128, [4, 8, 16, 32, 64, 128]), (40, [5, 10, 20, 40])],
)
def test_levels_double_from_4_px_to_the_images_side(side, levels):
    assert pggan.sizes(side) == levels


@pytest.mark.parametrize("side", [9, 44, 72])
def test_sides_that_cannot_be_halved_to_4_are_refused(side):
    with pytest.raises(ValueError, match=f"image_size: expected 4, 5, 6 or 7 times a power of two, got {side}"):
        pggan.sizes(side)


def test_growth_starts_at_the_lowest_level_fades_each_in_and_ends_with_all_of_them():
    assert pggan.at(0.0, 4) == (0, 1.0) and pggan.at(1.0, 4) == (3, 1.0) and pggan.at(0.3, 1) == (0, 1.0)
    states = [pggan.at(p, 4) for p in np.linspace(0, 1, 1201)]
    overall = np.array([level - 1 + fade for level, fade in states])
    steps = np.diff(overall)
    assert (steps >= 0).all() and steps.max() < 0.02, "levels come one after another, a little at a time"
    assert np.mean([state == (3, 1.0) for state in states]) == pytest.approx(1 - pggan.GROWTH, abs=0.01)
    alone = [np.mean([state == (level, 1.0) for state in states]) for level in range(3)]
    np.testing.assert_allclose(alone, pggan.GROWTH / 3 / 2, atol=0.01)


@pytest.mark.parametrize("progress", [0.0, 0.2, 0.4, 0.6, 1.0])
def test_networks_keep_the_images_size_at_every_stage_and_use_no_level_above_the_one_in_use(progress):
    images = torch.rand(3, 1, 32, 32)
    generator, critic = pggan.Generator(32, 1), pggan.Discriminator(32, 1)
    generator.progress = critic.progress = progress
    x_hat = generator(images)
    assert x_hat.shape == images.shape and critic(images).shape == (3, 1, 1, 1)
    level, _ = pggan.at(progress, 4)
    block = 32 // pggan.sizes(32)[level]
    flat = nn.functional.avg_pool2d(x_hat, block).repeat_interleave(block, 2).repeat_interleave(block, 3)
    torch.testing.assert_close(x_hat, flat)
    (x_hat.mean() + critic(images).mean()).backward()
    for i, used in enumerate(generator.up, start=1):
        assert all((p.grad is not None) == (i <= level) for p in used.parameters())


@pytest.mark.parametrize("build", [pggan.Generator, pggan.Discriminator])
def test_a_new_level_fades_in_without_a_jump(build):
    """Just after a level is added the network is what it was before; at the end of the fade nothing jumps either."""
    torch.manual_seed(0)
    network, images = build(32, 2).double(), torch.rand(2, 1, 32, 32, dtype=torch.float64)
    span = pggan.GROWTH / 3
    for border in (0.5 * span, span, 1.5 * span, 3 * span):
        before, after = [], []
        for outputs, side in ((before, -1e-9), (after, 1e-9)):
            network.progress = border + side
            outputs.append(network(pggan.seen(images, network.progress)))
        torch.testing.assert_close(before[0], after[0], rtol=1e-5, atol=1e-6)


def test_a_network_saved_while_it_grows_comes_back_as_it_was(tmp_path):
    torch.manual_seed(0)
    model, y = pggan.Generator(16, 1), torch.rand(2, 16, 16)
    model.progress = 0.3
    path = models.save(tmp_path / "g.safetensors", model, {"architecture": "pggan", "image_size": 16, "width": 1})
    loaded, _ = models.load(path)
    assert loaded.progress == pytest.approx(0.3)
    np.testing.assert_array_equal(models.denoise_images(loaded, y), models.denoise_images(model, y))


def test_references_are_the_averages_over_the_pixels_of_the_level_in_use():
    images = torch.rand(2, 1, 16, 16)
    torch.testing.assert_close(pggan.seen(images, 0.0)[:, :, ::4, ::4], nn.functional.avg_pool2d(images, 4))
    assert torch.equal(pggan.seen(images, 1.0), images)
    for progress in np.linspace(0, 1, 7):
        torch.testing.assert_close(pggan.seen(images, progress).mean((1, 2, 3)), images.mean((1, 2, 3)))


def test_equalised_weights_keep_the_mean_square_from_layer_to_layer():
    """He's constant: after a ReLU whose input has mean square 1, the next input's mean square is 1 again."""
    torch.manual_seed(0)
    x, conv = torch.randn(8, 64, 16, 16), pggan.Scaled(64, 64, 3)
    out = torch.relu(conv(torch.relu(conv(x))))[:, :, 2:-2, 2:-2]
    assert out.square().mean().item() == pytest.approx(1, rel=0.2)
    assert conv.weight.std().item() == pytest.approx(1, rel=0.02)


def test_pixel_norm_makes_every_pixels_channels_unit_mean_square():
    out = pggan.PixelNorm()(5 * torch.randn(2, 16, 4, 4))
    torch.testing.assert_close(out.square().mean(1), torch.ones(2, 4, 4), rtol=1e-5, atol=1e-5)


def test_the_critic_tells_a_batch_of_copies_from_a_varied_one():
    """The minibatch's standard deviation is an input: a generator that collapses to one picture can be seen to."""
    torch.manual_seed(0)
    critic, images = pggan.Discriminator(16, 2), torch.rand(4, 1, 16, 16)
    alone, varied = critic(images[:1].expand(4, -1, -1, -1))[0], critic(images)[0]
    assert (alone - varied).abs().item() > 1e-4


def test_the_critics_slope_is_that_of_images_at_full_size_at_every_level():
    """A picture of the lowest level's pixels has one slope, seen by the critic at that level or at full size."""
    critic = pggan.Discriminator(8, 2).double()
    images = (
        torch.rand(3, 1, 4, 4, dtype=torch.float64).repeat_interleave(2, 2).repeat_interleave(2, 3).requires_grad_()
    )
    critic.progress = 0.0
    (slope,) = torch.autograd.grad(critic(images).sum(), images)
    small = images.detach()[:, :, ::2, ::2].requires_grad_()
    (small_slope,) = torch.autograd.grad(critic(small.repeat_interleave(2, 2).repeat_interleave(2, 3)).sum(), small)
    torch.testing.assert_close(slope.flatten(1).norm(dim=1), small_slope.flatten(1).norm(dim=1) / 2)


@pytest.mark.parametrize("method", ["l1_ae", "wgan_gp_l1"])
def test_it_grows_and_learns_in_the_one_training_loop(method):
    """All of its convolutions move by the end, and it denoises blobs."""
    rng, grid = np.random.default_rng(0), np.arange(16) - 8
    dx, dy = rng.uniform(-3, 3, (2, 40, 1, 1))
    x = np.exp(-((grid[None, None] - dx) ** 2 + (grid[None, :, None] - dy) ** 2) / 8).astype(np.float32)
    y = x + 0.2 * rng.standard_normal(x.shape).astype(np.float32)
    settings = Settings(
        architecture="pggan", width=2, epochs=25, batch_size=8, lam=100.0, beta1=0.0, beta2=0.99, eta_g=3e-3
    )
    trainer = Trainer(losses.Method.parse(method), settings, lambda epoch: (x, y), 0, torch.device("cpu"))
    before = [p.detach().clone() for p in trainer.generator.parameters()]
    trainer.advance(trainer.iterations)
    assert all(not torch.equal(a, b) for a, b in zip(before, trainer.generator.parameters()))
    with torch.no_grad():
        error = (trainer.generator(torch.as_tensor(y)[:, None])[:, 0] - torch.as_tensor(x)).square().mean().item()
    assert pggan.at(trainer.generator.progress, 3) == (2, 1.0) and error < 0.02 < np.square(y - x).mean()
